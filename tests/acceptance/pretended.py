"""GPUs that are not here: ``torch.cuda`` answers as for one of a table; what is put on ``cuda:N`` lies on the CPU."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class PretendedGpu:
    """As a driver describes it. ``device``: the known device that it is; ``site``: a profile that has it."""

    name: str
    arch: str
    units: int
    memory_gib: float
    device: str | None
    site: str
    count: int = 4
    bf16: bool = True
    integrated: bool = False

    @property
    def amd(self) -> bool:
        return self.arch.startswith("gfx")


GPUS = {
    "A100": PretendedGpu("NVIDIA A100-SXM4-40GB", "sm_80", 108, 39.4, "A100-40", "vega"),
    "H100": PretendedGpu("NVIDIA H100 64GB HBM2", "sm_90", 132, 63.4, "H100-64", "marenostrum5-acc"),
    "GH200": PretendedGpu("NVIDIA GH200 120GB", "sm_90", 132, 94.5, "GH200", "jupiter-booster"),
    "MI250X GCD": PretendedGpu("AMD Instinct MI250X", "gfx90a", 110, 64.0, "MI250X-GCD", "lumi-g", count=8),
    "MI300A": PretendedGpu("AMD Instinct MI300A", "gfx942", 228, 128.0, "MI300A", "hunter", integrated=True),
    "V100": PretendedGpu("Tesla V100-SXM2-32GB", "sm_70", 80, 31.7, None, "jean-zay-v100", bf16=False),
}


def on_cpu(value: Any) -> Any:
    """A device of torch as where its tensors really lie."""
    return "cpu" if str(value).startswith("cuda") else value


def use(monkeypatch: Any, gpu: PretendedGpu, *, free: float = 0.98, can_have: float = 0.97, arch_list=None) -> None:
    """From now on, until the test ends."""
    from aifactory_train.core import compat
    from aifactory_train.kernels import runtime

    total = int(gpu.memory_gib * GIB)
    major, minor = (9, 0) if gpu.amd else (int(gpu.arch[3]), int(gpu.arch[4]))
    facts = SimpleNamespace(
        name=gpu.name,
        major=major,
        minor=minor,
        total_memory=total,
        multi_processor_count=gpu.units,
        is_integrated=gpu.integrated,
        gcnArchName=f"{gpu.arch}:sramecc+:xnack-" if gpu.amd else "",
        uuid="0a1b",
        pci_domain_id=0,
        pci_bus_id=0xC1,
        pci_device_id=0,
    )
    runtime.device_of.cache_clear()
    for name, answer in {
        "is_available": lambda: True,
        "device_count": lambda: gpu.count,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda device=None: gpu.name,
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_properties": lambda device: facts,
        "get_arch_list": lambda: [gpu.arch] if arch_list is None else arch_list,
        "mem_get_info": lambda device=None: (int(free * total), total),
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.version, "hip", "6.4" if gpu.amd else None)
    monkeypatch.setattr(torch.version, "cuda", None if gpu.amd else "12.8")
    monkeypatch.setattr(compat, "supports_bf16", lambda device: gpu.bf16)
    whole = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: whole(self, *map(on_cpu, a), **k))
    for name in ("empty", "full", "randn", "ones", "zeros"):
        real = getattr(torch, name)

        def made(*sizes: Any, _real=real, _name=name, device: Any = None, **more: Any) -> Any:
            if _name == "empty" and str(device).startswith("cuda") and sizes[0] > GIB // 4:
                if sizes[0] > can_have * total:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                sizes = (1, *sizes[1:])
            return _real(*sizes, device=on_cpu(device), **more)

        monkeypatch.setattr(torch, name, made)
