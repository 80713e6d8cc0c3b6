#!/usr/bin/env bash
# A real Slurm on this machine, to test launch/slurm.sbatch against: two nodes of one CPU each, which are two daemons.
#
#   cluster.sh up FOLDER [key=value ...]    starts it; everything it writes lies in FOLDER, which must be new
#   cluster.sh down FOLDER                  ends it
#
# Between the two, SLURM_CONF=FOLDER/slurm.conf makes sbatch, squeue and scontrol talk to it. Extra lines of slurm.conf may
# be given as key=value. Needs root, for slurmd does; installs Debian's packages where they are missing. Exits with 77
# where that cannot be: no root, no such package.
set -euo pipefail

SKIPPED=77
PORT=${PORT:-17630} # the controller's, and from it on: the first node's, the second's

main() {
    if [ $# -lt 2 ]; then
        echo "usage: cluster.sh up|down FOLDER [key=value ...]" >&2
        exit 2
    fi
    local what=$1 folder
    folder=$(realpath -m "$2")
    shift 2
    case $what in
        up) up "$folder" "$@" ;;
        down) down "$folder" ;;
        *) main ;;
    esac
}

up() {
    local folder=$1
    shift
    install_slurm
    mkdir -p "$folder"/{controller,munge,node1,node2}
    write_configuration "$folder" "$@"
    start_munge "$folder/munge"
    local apart=()
    # The second node sees nothing in FOLDER/only_node1, which is there where a process may have mounts of its own.
    if unshare --mount mount -t tmpfs none "$folder/munge" 2>/dev/null; then
        mkdir "$folder/only_node1"
        # shellcheck disable=SC2016 # expanded by that shell
        apart=(unshare --mount bash -c 'mount -t tmpfs none "$1"; shift; exec "$@"' apart "$folder/only_node1")
    fi
    export SLURM_CONF=$folder/slurm.conf
    slurmctld -D -i >"$folder/slurmctld.out" 2>&1 &
    echo $! >"$folder/slurmctld.pid"
    # In sessions of their own: they kill the process groups of what they started, never the caller's.
    setsid slurmd -D -N node1 >"$folder/node1.out" 2>&1 &
    echo $! >"$folder/node1.pid"
    setsid "${apart[@]}" slurmd -D -N node2 >"$folder/node2.out" 2>&1 &
    echo $! >"$folder/node2.pid"
    wait_until 30 both_idle || {
        echo "cluster.sh: the nodes did not come up in 30 s" >&2
        tail -n 20 "$folder"/*.out >&2
        down "$folder"
        exit 1
    }
}

down() {
    local folder=$1 daemon pid
    if [ -f "$folder/slurm.conf" ]; then
        SLURM_CONF=$folder/slurm.conf timeout 5 scancel --full --signal=KILL --user="$(id -un)" 2>/dev/null || true
    fi
    local pids=()
    for daemon in node1 node2 slurmctld munge/munged; do
        [ -f "$folder/$daemon.pid" ] && pids+=("$(cat "$folder/$daemon.pid")")
    done
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do wait_until 5 gone "$pid" || kill -KILL "$pid" 2>/dev/null || true; done
    rm -f "$folder"/*.pid "$folder"/munge/munged.pid
}

install_slurm() {
    local missing=()
    command -v slurmctld slurmd sbatch >/dev/null || missing+=(slurm-wlm)
    command -v munged >/dev/null || missing+=(munge)
    [ "$(id -u)" = 0 ] || {
        echo "cluster.sh: slurmd needs root" >&2
        exit $SKIPPED
    }
    [ ${#missing[@]} -eq 0 ] && return
    command -v apt-get >/dev/null || {
        echo "cluster.sh: no ${missing[*]} here, and no apt-get to install it with" >&2
        exit $SKIPPED
    }
    export DEBIAN_FRONTEND=noninteractive
    { timeout 60 apt-get update && timeout 180 apt-get install -y --no-install-recommends "${missing[@]}"; } >&2 || {
        echo "cluster.sh: ${missing[*]} could not be installed" >&2
        exit $SKIPPED
    }
}

start_munge() {
    local folder=$1
    # A key, a socket and a log of its own, so that a munge that the machine may have is left alone.
    chmod 700 "$folder"
    head -c 1024 /dev/urandom >"$folder/key"
    chmod 400 "$folder/key"
    # --force: it would not trust a folder under a temporary one, which anybody may write to.
    munged --force --foreground --num-threads=2 --key-file="$folder/key" --socket="$folder/socket" \
        --pid-file="$folder/own.pid" --log-file="$folder/log" --seed-file="$folder/seed" >"$folder/out" 2>&1 &
    echo $! >"$folder/munged.pid"
    wait_until 10 test -S "$folder/socket"
}

write_configuration() {
    local folder=$1 addition
    shift
    cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmctldPort=$PORT
AuthType=auth/munge
CredType=cred/munge
# A requeued job starts again only when the credentials of its first life have expired.
AuthInfo=socket=$folder/munge/socket,cred_expire=5
SlurmctldPidFile=$folder/controller/pid
StateSaveLocation=$folder/controller
SlurmdPidFile=$folder/%n/pid
SlurmdSpoolDir=$folder/%n
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
# Two nodes of one CPU on a machine that may have another number of them.
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,batch_sched_delay=0,sched_min_interval=0
# By default Slurm looks at its queue once a minute, and tells and forgets jobs in strides of half a minute and more.
KillWait=20
MinJobAge=300
SlurmdTimeout=60
SlurmctldTimeout=60
BatchStartTimeout=30
CompleteWait=0
$(for addition in "$@"; do echo "$addition"; done)
NodeName=node1 NodeAddr=127.0.0.1 NodeHostname=$(hostname -s) Port=$((PORT + 1)) CPUs=1 State=UNKNOWN
NodeName=node2 NodeAddr=127.0.0.1 NodeHostname=$(hostname -s) Port=$((PORT + 2)) CPUs=1 State=UNKNOWN
PartitionName=test Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
CONF
}

both_idle() {
    [ "$(timeout 5 sinfo --noheader --partition=test --Node --format=%t 2>/dev/null | grep -c '^idle$')" = 2 ]
}

wait_until() {
    local seconds=$1 end
    shift
    end=$((SECONDS + seconds))
    until "$@"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.2
    done
}

gone() {
    ! kill -0 "$1" 2>/dev/null
}

main "$@"
