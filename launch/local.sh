#!/usr/bin/env bash
# One machine, one process a device: launch/local.sh EXPERIMENT [key=value ...] [--fresh]
# All visible GPUs, or PROCESSES of them; without a GPU, PROCESSES processes on the CPU. Topology only: everything else
# is in the experiment.
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: [PROCESSES=N] launch/local.sh EXPERIMENT [key=value ...] [--fresh]" >&2
    exit 2
fi
experiment=$1
shift

python=(python)
if ! python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("lightning") is None)' 2>/dev/null; then
    python=(uv run python)
fi
processes=${PROCESSES:-$("${python[@]}" -c 'import torch; print(max(1, torch.cuda.device_count()))')}

# After TERM, torchrun gives its processes 120 s, where it would give 30: for the step that they are in, its checkpoint,
# and the one before it, which may be on its way. (When one of them is dead it gives the others 30 s, whatever is said
# here.) That of torch 2.11 cannot be told so; to look into its file is quicker than to import it.
patience=(--shutdown-timeout 120)
if ! "${python[@]}" -c 'import importlib.util as u, pathlib, sys
torchrun = pathlib.Path(u.find_spec("torch").origin).parent / "distributed" / "run.py"
sys.exit(sys.argv[1] not in torchrun.read_text(encoding="utf-8"))' "${patience[0]}"; then
    patience=()
fi
exec "${python[@]}" -m torch.distributed.run --standalone --nproc-per-node "$processes" ${patience[@]+"${patience[@]}"} \
    -m cosmos3_train.cli train "$experiment" "strategy.devices=$processes" "$@"
