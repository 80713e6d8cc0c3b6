"""What NVIDIA says its GPUs can do: the denominators of MFU, and what `cosmos3 plan` takes a share of.

Dense tensor-core rates with float32 accumulation, without sparsity (data sheets print twice that where they count it).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cosmos3_train.config import UserError, nearest

TAKEN_MIB = 1024
"""Of what the driver tells, what no run can allocate: some 0.4 GiB that torch is not told of, and a process's own
context with the kernels that it has loaded, about as much again."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    key:      a short name
    names:    pattern of what torch calls it (`torch.cuda.get_device_name`)
    mib:      all of its memory, as the driver tells (`nvidia-smi`); a process has `bytes` of it
    major:    of its compute capability, which kernels ask for
    bfloat16, fp8: peak TFLOP/s; None where it has no such tensor cores
    bandwidth: of its memory, TB/s
    link:     to another GPU of the same machine, GB/s one way: NVLink where it is built in, else PCIe
    source:   where the rates stand, all NVIDIA's
    """

    key: str
    names: str
    mib: int
    major: int
    bfloat16: float
    fp8: float | None
    bandwidth: float
    link: float
    source: str

    @property
    def bytes(self) -> int:
        """What a process may allocate on it."""
        return (self.mib - TAKEN_MIB) << 20


GPUS: tuple[Gpu, ...] = (
    Gpu("b200-180g", r"\bB200\b", 183359, 10, 2250.0, 4500.0, 8.0, 900.0, "NVIDIA HGX B200 data sheet, one of eight"),
    Gpu("h200-nvl-141g", r"\bH200 NVL\b", 143771, 9, 835.5, 1670.5, 4.8, 450.0, "NVIDIA H200 data sheet, NVL"),
    Gpu("h200-141g", r"\bH200\b", 143771, 9, 989.0, 1979.0, 4.8, 450.0, "NVIDIA H200 data sheet, SXM"),
    Gpu("gh200-96g", r"\bGH200\b", 97871, 9, 989.0, 1979.0, 4.0, 450.0, "NVIDIA GH200 data sheet"),
    Gpu("h100-pcie-80g", r"\bH100 PCIe\b", 81559, 9, 756.0, 1513.0, 2.0, 64.0, "NVIDIA H100 data sheet, PCIe"),
    Gpu("h100-nvl-94g", r"\bH100 NVL\b", 95830, 9, 835.5, 1670.5, 3.9, 300.0, "NVIDIA H100 data sheet, NVL"),
    Gpu("h100-80g", r"\bH100\b", 81559, 9, 989.0, 1979.0, 3.35, 450.0, "NVIDIA H100 data sheet, SXM"),
    Gpu("a100-80g", r"\bA100\b.*80GB", 81920, 8, 312.0, None, 2.039, 300.0, "NVIDIA A100 data sheet"),
    Gpu("a100-40g", r"\bA100\b", 40960, 8, 312.0, None, 1.555, 300.0, "NVIDIA A100 data sheet"),
    Gpu("l40s-48g", r"\bL40S\b", 46068, 8, 362.0, 733.0, 0.864, 32.0, "NVIDIA L40S data sheet"),
    Gpu("rtx6000ada-48g", r"\bRTX 6000 Ada\b", 49140, 8, 364.2, 728.5, 0.96, 32.0, "Ada architecture, RTX 6000"),
    Gpu("a6000-48g", r"\bRTX A6000\b", 49140, 8, 154.8, None, 0.768, 32.0, "NVIDIA RTX A6000 data sheet"),
    Gpu("rtx5090-32g", r"\bRTX 5090\b(?! (Laptop|D))", 32607, 12, 209.5, 419.0, 1.792, 64.0, "Blackwell architecture"),
    Gpu("rtx4090-24g", r"\bRTX 4090\b(?! (Laptop|D))", 24564, 8, 165.2, 330.3, 1.008, 32.0, "Ada architecture"),
    Gpu("l4-24g", r"\bL4\b", 23034, 8, 121.0, 242.5, 0.3, 32.0, "NVIDIA L4 data sheet"),
)
"""The first whose pattern is found in a name is the one, so narrower patterns stand above wider ones."""


def find_gpu(name: str) -> Gpu | None:
    """The GPU that torch calls so, None where it is not in the table, or a part of one (MIG)."""
    part_of_one = re.search(r"\bMIG\b", name)  # whose peaks are not the whole's
    return None if part_of_one else next((gpu for gpu in GPUS if re.search(gpu.names, name)), None)


def gpu_called(key: str) -> Gpu:
    """The GPU of that short name.

    Raises:
        UserError: there is none; names the nearest ones.
    """
    found = next((gpu for gpu in GPUS if gpu.key == key), None)
    if found is None:
        raise UserError(f"--gpu {key}: not in the table of GPUs.{nearest(key, [gpu.key for gpu in GPUS])}")
    return found
