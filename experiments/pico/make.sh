#!/usr/bin/env bash
# Cosmos3-Pico from nothing but this repository: experiments/pico/make.sh STAGE [STAGE ...], from the project's root.
#
#   states   play by the expert, as poses      CPU only, about 4 minutes on 2 cores for each 1,000 episodes
#   logs     LeRobot logs drawn from them      CPU only, about a millisecond a frame and core
#   rows     prepared rows of the logs         CPU only, seconds
#   codec    the video tokenizer               all GPUs, MINUTES
#   folder   a complete folder, its transformer random
#   latents  every window through the codec    one GPU a robot, from the poses: no video is read
#   train    the transformer                   all GPUs
#   assemble the trained folder in data/cosmos3_pico
#
# SEEDS gives the states files (five of 1,000 episodes); MINUTES the codec's time. Each stage leaves what it made alone.
set -euo pipefail
SEEDS=${SEEDS:-0 1 2 3 4}
MINUTES=${MINUTES:-7}
GPUS=${GPUS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
WORKERS=${WORKERS:-$(nproc)}
states=(); for k in $SEEDS; do states+=("prepared/pico_states/$k.npz"); done
draw() { python data/pusht/make_episodes.py --contract "$1" --episodes "$2" --from-states "${states[@]}" --gop 30 --crf 30 --output "$3"; }
rows() { cosmos3 prepare data/pusht/log.yaml --embodiment "$1" --source "$2" --output "$3" --workers "$WORKERS" --stride 5 --heldout 0.02; }

for stage in "$@"; do
    case $stage in
    states)
        mkdir -p prepared/pico_states
        for k in $SEEDS; do
            [ -f "prepared/pico_states/$k.npz" ] || python data/pusht/make_episodes.py --contract pusht --episodes 1000 \
                --first-seed "${k}000" --disturbed 0.6 --workers "$WORKERS" --states "prepared/pico_states/$k.npz"
        done ;;
    logs)
        draw pusht 5000 prepared/pusht_5000 & draw pusht_turned 1700 prepared/pusht_turned_1700 & wait -n && wait -n
        draw pusht_swapped 1700 prepared/pusht_swapped_1700 ;;
    rows)
        rows pusht prepared/pusht_5000 prepared/pico
        rows pusht_turned prepared/pusht_turned_1700 prepared/pico_turned
        rows pusht_swapped prepared/pusht_swapped_1700 prepared/pico_swapped ;;
    codec)
        python -m torch.distributed.run --standalone --nproc-per-node "$GPUS" experiments/pico/train_vae.py \
            --output prepared/pico_codec --minutes "$MINUTES" --seed 0 --workers 8 --held-out-clips 64 --states "${states[0]}" ;;
    folder)
        python experiments/pico/build_folder.py --transformer none --vae prepared/pico_codec/vae --output data/cosmos3_pico ;;
    latents)
        python experiments/pico/cache_latents.py --poses "${states[@]}" ;;
    train)
        PROCESSES=$GPUS launch/local.sh experiments/pico.yaml ;;
    assemble)
        python experiments/pico/build_folder.py --transformer runs/pico/export/merged/transformer \
            --vae prepared/pico_codec/vae --output data/cosmos3_pico ;;
    *) echo "no stage '$stage': states logs rows codec folder latents train assemble" >&2; exit 2 ;;
    esac
done
