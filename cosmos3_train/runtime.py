"""Where a process stands: rank, seeds, logging. The only reader of the environment.

Every random draw of a run comes from `draw(seed, *place)`, a generator that is a pure function of its arguments,
so that a sample's noise does not depend on the rank, the worker or the micro-batch that happens to hold it.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import logging
import os
import random
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

logger = logging.getLogger("cosmos3_train")

_asked: ContextVar[Callable[[], bool]] = ContextVar("_asked", default=lambda: False)


def rank() -> int:
    """This process's global rank, from torchrun's environment (0 where it did not start it)."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes take part in the run (1 where no launcher started it)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's place on its machine, which is the GPU it uses."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many processes of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def node_count() -> int:
    """How many machines take part in the run."""
    return max(1, world_size() // max(1, local_world_size()))


def is_first_rank() -> bool:
    return rank() == 0


def listen_to_other_machines() -> None:
    """Let gloo listen where the other machines of the run reach this one, unless GLOO_SOCKET_IFNAME says where: at the
    interface by which it reaches the first of them. By itself gloo takes what the machine's own name stands for, and in
    Debian's /etc/hosts that is 127.0.1.1."""
    if node_count() == 1 or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    name = interface_towards(os.environ.get("MASTER_ADDR", ""))
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def interface_towards(host: str) -> str | None:
    """The network interface by which an IPv4 host is reached, or which has its address. None where that is this machine
    alone, or not known."""
    get_address = 0x8915  # SIOCGIFADDR, netdevice(7)
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # which sends nothing
        own = probe.getsockname()[0]
        if own.startswith("127."):
            return None
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(probe, get_address, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    return None


def launched() -> bool:
    """Whether torchrun (or a launcher that sets the same variables) started this process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def choose_accelerator(kind: str) -> None:
    """Tell DeepSpeed, before it is imported, whether to run on "cuda" or "cpu"; else it guesses, with a warning."""
    os.environ["DS_ACCELERATOR"] = kind


def fold(seed: int, *place: int | str) -> int:
    """A 63-bit seed that depends on every argument: the same on every machine and Python version."""
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw(seed: int, *place: int | str) -> torch.Generator:
    """A CPU generator for the draws made at `place`, for example `draw(seed, "noise", sample_number)`."""
    return torch.Generator().manual_seed(fold(seed, *place))


def seed_everything(seed: int) -> None:
    """Seed the global generators. They are a safety net: the project's own draws use `draw`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_up_logging(level: int = logging.INFO) -> None:
    """Rank 0 speaks on standard error, every other rank only from warnings up. Safe to call twice."""
    root = logging.getLogger("cosmos3_train")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        prefix = "" if world_size() == 1 else f"[rank {rank()}] "
        handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
        root.addHandler(handler)
    root.propagate = False
    root.setLevel(level if is_first_rank() else logging.WARNING)
    # Progress bars and load reports of the libraries below would break ours; their warnings still come through.
    for noisy in ("httpx", "filelock", "matplotlib", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def log_to_file(folder: Path) -> None:
    """Send what this process prints to `folder/rank_NNN.log`, with all that it logs, unless it is the first rank.

    The descriptors themselves are replaced, for NCCL and gloo write there without asking Python.
    """
    if is_first_rank() or not launched():
        return
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(folder / f"rank_{rank():03d}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    logging.getLogger("cosmos3_train").setLevel(logging.INFO)
    logger.info("started %s, process %d", time.strftime("%Y-%m-%d %H:%M:%S"), os.getpid())


def record_failure(error: Exception, text: str = "") -> None:
    """Tell the launcher why this process ends: torchrun shows it in its report, where it would show an exit code alone.

    Args:
        text: what is shown, instead of the traceback of the exception that is being handled.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    told = {"py_callstack": text or traceback.format_exc(), "timestamp": str(int(time.time()))}
    content = {"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": told}}
    # Best effort: a full disk must not put another error in the place of this one.
    with suppress(OSError):
        Path(path).write_text(json.dumps(content), encoding="utf-8")


def leave_at_once(code: int) -> NoReturn:
    """End this process, one of several, as it is. At an interpreter's own end torch takes leave of the other ranks, and
    with NCCL waits for them, who do not come: the launcher would never learn that this one has failed."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


class Interrupted(BaseException):
    """SIGTERM, while `interruptible` or where work looks for it. Like Ctrl-C's exception it passes through what handles
    errors."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block SIGTERM raises `Interrupted`, so that whatever is half done is left as after an error.

    Only the main thread can be interrupted; elsewhere the block is as if it were not there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        # Launchers repeat it; what tidies up is not interrupted again.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Interrupted

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def leaving_if(asked: Callable[[], bool]) -> Iterator[None]:
    """Within the block work is left at the next `leave_if_asked` once `asked` says so: between its parts, for processes
    that wait for each other must not be torn apart within one."""
    token = _asked.set(asked)
    try:
        yield
    finally:
        _asked.reset(token)


def leave_if_asked() -> None:
    """To be called between the parts of long work, each some seconds at most.

    Raises:
        Interrupted: within `leaving_if`, where it was asked for.
    """
    if _asked.get()():
        raise Interrupted


def wait_for_sigterm(seconds: float) -> bool:
    """Whether SIGTERM comes within the time; it is not obeyed but told."""
    try:
        with interruptible():
            time.sleep(seconds)
    except Interrupted:
        return True
    return False


def ignore_sigterm(worker: int) -> None:
    """For a loader's worker. Batch systems signal every process of a job, and the main process decides what follows: it
    finishes its step, or stops in order; a worker that dies under it would be an error of its own."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def offline_hub() -> None:
    """Keep the Hub client from looking for a network for folders that are already on disk."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@contextmanager
def garbage_later() -> Iterator[None]:
    """Let Python look for cycles of objects afterwards and not within: a pass makes so many objects that it looks
    dozens of times, and finds none, while the GPU waits for the next launch."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def free_memory(root: Path = Path("/")) -> float | None:
    """Bytes that this process and its children may still take: what the machine has, or less where a control group
    (a container, a batch job) allows less. None where the system does not tell.

    Args:
        root: of the file system to ask, for /proc and /sys.
    """
    known = [_machine_memory(root), *_group_memory(root)]
    return min((free for free in known if free is not None), default=None)


def _machine_memory(root: Path) -> float | None:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        names = ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE")  # not Linux
        pages, size = (os.sysconf(name) if name in os.sysconf_names else -1 for name in names)
        return float(pages * size) if pages > 0 and size > 0 else None
    found = {line.split(":")[0]: float(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return found.get("MemAvailable")


def _group_memory(root: Path) -> Iterator[float]:
    """What each control group that this process is in, version 2 or 1, leaves free: every ancestor limits as well."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            tops, names = ("sys/fs/cgroup", "sys/fs/cgroup/unified"), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            tops, names = (
                ("sys/fs/cgroup/memory",),
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        for top in tops:
            # A container sees its own group as the top and may still be told the host's path: what is not there is
            # passed over.
            here = root / top / path.lstrip("/")
            for group in (here, *here.parents):
                yield from _group_free(group, *names)
                if group == root / top:
                    break


def _group_free(group: Path, limit: str, used: str, cached: str) -> Iterator[float]:
    try:
        allowed, taken = (int((group / name).read_text(encoding="ascii")) for name in (limit, used))
        stat = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):  # no such group, or "max": no limit
        return
    # Pages of files that were read count as taken until somebody wants the memory.
    freed = next((int(line.split()[1]) for line in stat if line.split()[0] == cached), 0)
    yield max(0.0, float(allowed - taken + freed))
