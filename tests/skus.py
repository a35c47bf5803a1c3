"""``torch.cuda`` as it answers on the GPUs of European systems, pretended on a machine that has none."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

GIB = 2**30


@dataclass(frozen=True)
class Sku:
    """What a driver says of one device. ``free``: the share of its memory that an idle node shows as free (on GH200 and
    MI300A the page cache lies in it); ``known_as``: the kernels' name of it."""

    name: str
    known_as: str
    gib: float
    units: int
    capability: tuple[int, int]
    gcn: str | None = None
    free: float = 0.985
    integrated: bool = False

    @property
    def hip(self) -> bool:
        return self.gcn is not None

    @property
    def bf16(self) -> bool:
        return self.hip or self.capability >= (8, 0)


SKUS = {
    "A100": Sku("NVIDIA A100-SXM4-40GB", "A100-40", 39.4, 108, (8, 0)),
    "H100": Sku("NVIDIA H100 80GB HBM3", "H100-80", 79.1, 132, (9, 0)),
    "GH200": Sku("NVIDIA GH200 120GB", "GH200", 94.5, 132, (9, 0), free=0.52),
    "MI250X": Sku("AMD Instinct MI250X", "MI250X-GCD", 63.98, 110, (9, 0), gcn="gfx90a:sramecc+:xnack-"),
    "MI300A": Sku("AMD Instinct MI300A", "MI300A", 128.0, 228, (9, 4), gcn="gfx942:sramecc+:xnack+", free=0.6),
    "V100": Sku("Tesla V100-SXM2-32GB", "", 31.7, 80, (7, 0)),
}


def pretend(monkeypatch: pytest.MonkeyPatch, sku: Sku, count: int = 4) -> list[str]:
    """torch sees ``count`` devices of ``sku``; returns the list of devices that are set, in order."""
    chosen: list[str] = []
    total = int(sku.gib * GIB)
    properties = SimpleNamespace(
        name=sku.name,
        total_memory=total,
        multi_processor_count=sku.units,
        major=sku.capability[0],
        minor=sku.capability[1],
        gcnArchName=sku.gcn or "",
        is_integrated=sku.integrated,
        pci_domain_id=0,
        pci_bus_id=0x44,
        pci_device_id=0,
        uuid="3f6b",
        warp_size=64 if sku.hip else 32,
    )
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "set_device": lambda device: chosen.append(str(device)),
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: sku.name,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: sku.capability,
        "mem_get_info": lambda device=None: (int(sku.free * total), total),
        "max_memory_allocated": lambda device=None: int(0.7 * total),
        "max_memory_reserved": lambda device=None: int(0.8 * total),
        "empty_cache": lambda: None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.version, "hip", "6.4.43484" if sku.hip else None)
    monkeypatch.setattr(torch.version, "cuda", None if sku.hip else "12.8")
    return chosen
