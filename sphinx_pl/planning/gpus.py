"""GPUs by name: how fast their data sheets say they are, and how much memory they have."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sphinx_pl.utils.errors import UserError, suggest


@dataclass(frozen=True)
class Gpu:
    """`name` is part of what the driver calls the device."""

    name: str
    flops: float
    """Dense bf16 FLOP/s, without sparsity."""
    memory_gib: float

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.memory_gib * 2**30


# Variants stand before the plain model: the first name that is part of the device's name counts.
GPUS = {
    "GB200-186GB": Gpu("GB200", 2500e12, 186),
    "B200-180GB": Gpu("B200", 2250e12, 180),
    "H200-141GB": Gpu("H200", 989e12, 140),
    "GH200-96GB": Gpu("GH200", 989e12, 95),
    "H100-NVL-94GB": Gpu("H100 NVL", 835e12, 94),
    "H100-PCIe-80GB": Gpu("H100 PCIe", 756e12, 79.6),
    "H100-80GB": Gpu("H100", 989e12, 79.6),
    "A100-80GB": Gpu("A100", 312e12, 80),
    "A100-40GB": Gpu("A100", 312e12, 40),
    "A40-48GB": Gpu("A40", 149.7e12, 45),
    "A30-24GB": Gpu("A30", 165e12, 24),
    "A10G-24GB": Gpu("A10G", 70e12, 22.5),
    "A10-24GB": Gpu("A10", 125e12, 22.5),
    "L40S-48GB": Gpu("L40S", 362e12, 45),
    "L40-48GB": Gpu("L40", 181e12, 45),
    "L4-24GB": Gpu("L4", 121e12, 22.5),
    "RTX-4090-24GB": Gpu("RTX 4090", 165.2e12, 24),
    "RTX-3090-24GB": Gpu("RTX 3090", 71e12, 24),
}


def find_gpu(name: str) -> Gpu:
    """Raises: UserError: no GPU of that name is known."""
    if name not in GPUS:
        raise UserError(f"plan_for.gpu={name} is not a GPU that is known here; {suggest(name, GPUS)}")
    return GPUS[name]


def name_of_device(device_name: str) -> str | None:
    """The key in GPUS of the GPU with this driver name; None if it is unknown."""
    for name, gpu in GPUS.items():
        if re.search(rf"\b{gpu.name}\b", device_name):  # an RTX A1000 is no A100
            return name
    return None


def flops_of_device(device_name: str) -> float | None:
    """FLOP/s of the GPU with this driver name; None if it is unknown."""
    name = name_of_device(device_name)
    return GPUS[name].flops if name else None
