"""Two ranks in a step, by torchrun: `python -m tests.training.standing BACKEND one|both`. The second one stands still
before a sum that the first one has begun; or both do, as where they compile, and then go on."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from cosmos3_train.runtime import local_rank, rank, set_up_logging
from cosmos3_train.training import overdue, strategy

PATIENCE, GRACE = 1.0, 0.5


def main(backend: str, which: str) -> None:
    set_up_logging()
    device = torch.device("cuda", local_rank()) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=600))
    strategy._open_meetings(timedelta(seconds=PATIENCE))
    overdue.GRACE = timedelta(seconds=GRACE)
    watch = overdue.Overdue(PATIENCE, lambda error: print("told", error, flush=True))
    watch.start()
    value = torch.ones((), device=device)
    dist.all_reduce(value)
    watch.begin("step 6")
    if which == "both":
        time.sleep(3 * (PATIENCE + 2 * GRACE))
    elif rank() == 1:
        time.sleep(600)
    dist.all_reduce(value)
    sys.stdout.write(f"summed {float(value):g}\n")  # which waits for the device
    sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
