#!/usr/bin/env bash
# Cosmos3-Pico from nothing but this repository: experiments/pico/make.sh STAGE [STAGE ...], from the project's root.
#
#   states   play by the expert, as poses      CPU only, about 4 minutes on 2 cores for each 1,000 episodes
#   logs     LeRobot logs drawn from them      CPU only, about a millisecond a frame and core
#   rows     prepared rows of the logs         CPU only, seconds
#   codec    the video tokenizer               all GPUs, MINUTES
#   folder   a complete folder, its transformer random
#   recode   or the new codec beside the transformer that is there
#   latents  every window through the codec    one GPU a robot, from the poses: no video is read
#   train    the transformer                   all GPUs
#   assemble the trained folder in data/cosmos3_pico
#
# Then once more, from what the expert does where that policy's own play leads:
#
#   corrections   states, log and rows of the expert correcting data/cosmos3_pico's play: about 3 s a seed and core
#   train_corrected, assemble_corrected
#
# CORRECTED is how many seeds of play are corrected: once, of the policy that data/cosmos3_pico holds then; take the
# states file away to correct another. SEEDS names the states files (ten), EPISODES what each holds (1,000); two thirds
# of all are drawn for the turned robot and one for the swapped. MINUTES is the codec's time, CODEC more options for it
# ("--trained data/cosmos3_pico/vae" goes on with the one that ships), TRAIN more key=value for the training, which goes
# on with what data/cosmos3_pico holds: with `recode` in place of `folder`, with the transformer that ships.
set -euo pipefail
SEEDS=${SEEDS:-0 1 2 3 4 5 6 7 8 9}
EPISODES=${EPISODES:-1000}
MINUTES=${MINUTES:-11}
CODEC=${CODEC:-}
TRAIN=${TRAIN:-}
CORRECTED=${CORRECTED:-1680}
GPUS=${GPUS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
WORKERS=${WORKERS:-$(nproc)}
robots=(prepared/pico prepared/pico_turned prepared/pico_swapped)
states=(); for k in $SEEDS; do states+=("prepared/pico_states/$k.npz"); done
ALL=$(( EPISODES * ${#states[@]} )); THIRD=$(( (ALL + 2) / 3 ))
draw() {
    python data/pusht/make_episodes.py --contract "$1" --episodes "$2" --from-states "${states[@]}" --gop 30 --crf 30 \
        --workers "$WORKERS" --output "$3"
}
rows() {
    cosmos3 prepare data/pusht/log.yaml --embodiment "$1" --source "$2" --output "$3" --workers "$WORKERS" --stride "$4" \
        --heldout 0.02
}
assemble() {
    python experiments/pico/build_folder.py --transformer "$1" --vae "$2" --statistics "${robots[@]}" --output data/cosmos3_pico
}

for stage in "$@"; do
    case $stage in
    states)
        mkdir -p prepared/pico_states
        for k in $SEEDS; do
            [ -f "prepared/pico_states/$k.npz" ] || python data/pusht/make_episodes.py --contract pusht --episodes "$EPISODES" \
                --first-seed "${k}000" --disturbed 0.6 --workers "$WORKERS" --states "prepared/pico_states/$k.npz"
        done ;;
    logs)
        draw pusht "$ALL" prepared/pico_log
        draw pusht_turned "$(( ALL - THIRD ))" prepared/pico_turned_log
        draw pusht_swapped "$THIRD" prepared/pico_swapped_log ;;
    rows)
        rows pusht prepared/pico_log prepared/pico 9
        rows pusht_turned prepared/pico_turned_log prepared/pico_turned 9
        rows pusht_swapped prepared/pico_swapped_log prepared/pico_swapped 9 ;;
    codec)
        run=(python); [ "$GPUS" -gt 1 ] && run=(python -m torch.distributed.run --standalone --nproc-per-node "$GPUS")
        # shellcheck disable=SC2086 # CODEC is words
        "${run[@]}" experiments/pico/train_vae.py --output prepared/pico_codec --minutes "$MINUTES" --seed 0 --workers 8 \
            --held-out-clips 64 --states "${states[0]}" $CODEC ;;
    folder)
        python experiments/pico/build_folder.py --transformer none --vae prepared/pico_codec/vae --output data/cosmos3_pico ;;
    recode) assemble data/cosmos3_pico/transformer prepared/pico_codec/vae ;;
    latents)
        python experiments/pico/cache_latents.py --poses "${states[@]}" ;;
    train)
        # shellcheck disable=SC2086 # TRAIN is words
        PROCESSES=$GPUS launch/local.sh experiments/pico.yaml $TRAIN ;;
    assemble) assemble runs/pico/export/merged/transformer data/cosmos3_pico/vae ;;
    corrections)
        [ -f prepared/pico_states/corrections.npz ] || python experiments/pico/correct_policy.py --seeds "$CORRECTED" \
            --workers "$WORKERS" --states prepared/pico_states/corrections.npz
        [ -d prepared/pico_corrected_log ] || python data/pusht/make_episodes.py --contract pusht --episodes "$(( 4 * CORRECTED ))" \
            --from-states prepared/pico_states/corrections.npz --gop 30 --crf 30 --workers "$WORKERS" \
            --output prepared/pico_corrected_log
        rows pusht prepared/pico_corrected_log prepared/pico_corrected 4
        python experiments/pico/cache_latents.py --experiment experiments/pico_corrected.yaml --only corrected \
            --poses prepared/pico_states/corrections.npz ;;
    train_corrected)
        # shellcheck disable=SC2086 # TRAIN is words
        PROCESSES=$GPUS launch/local.sh experiments/pico_corrected.yaml $TRAIN ;;
    assemble_corrected) assemble runs/pico_corrected/export/merged/transformer data/cosmos3_pico/vae ;;
    *) echo "no stage '$stage': states logs rows codec folder recode latents train assemble corrections train_corrected assemble_corrected" >&2; exit 2 ;;
    esac
done
