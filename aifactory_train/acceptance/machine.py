"""What this machine is, as torch, the driver and the system tell; in a process of its own: a driver may hang."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from aifactory_train.acceptance.report import Report

PACKAGES = (
    "torch", "triton", "transformers", "peft", "datasets", "tokenizers", "safetensors", "numpy", "deepspeed",
    "bitsandbytes", "flash-attn", "liger-kernel",
)  # fmt: skip


def check(report: Report) -> None:
    """The figures of the whole acceptance: versions, host, devices."""
    report.begin("reading the system")
    report.figures |= {"host": host(), "versions": versions()}
    report.begin("asking torch for its devices")
    report.figures["gpus"] = gpus()
    report.figures["runtime"] = runtime()


def versions() -> dict[str, str]:
    """Of this program and of what it computes with; packages that are missing are left out."""
    from aifactory_train import __version__

    found = {"aifactory-train": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def host() -> dict[str, Any]:
    """Name, processor, cores and memory, as a profile counts them."""
    from aifactory_train.sites import detection

    cpu = detection.parse_lscpu(detection.run_tool(["lscpu"]) or "")
    return {
        "name": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        **cpu,
        "isa": cpu.get("isa") or platform.machine(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
    }


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def runtime() -> dict[str, Any]:
    """What torch is built for, and the driver below it."""
    import torch

    hip = torch.version.hip
    built = [] if not torch.cuda.is_available() else torch.cuda.get_arch_list()
    return {"cuda": torch.version.cuda, "rocm": hip, "driver": driver(), "built_for": built}


def driver() -> str | None:
    """The kernel driver's version, as the module itself tells it."""
    for path in ("/sys/module/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            return Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
    return None


def gpus() -> list[dict[str, Any]]:
    """Every GPU that torch sees, as the framework counts them (an MI250X is two)."""
    import torch

    from aifactory_train.core import compat

    if compat.device_type() != "cuda":
        return []
    return [gpu(index) for index in range(torch.cuda.device_count())]


def gpu(index: int) -> dict[str, Any]:
    import torch

    from aifactory_train.kernels.runtime import device_of
    from aifactory_train.record.devices import device_of as identity

    facts = torch.cuda.get_device_properties(index)
    arch, device, units = device_of(index)
    known = identity(f"cuda:{index}")
    return {
        "index": index,
        "name": facts.name,
        "vendor": known["vendor"],
        "arch": arch,
        "capability": f"{facts.major}.{facts.minor}",
        "device": device,
        "compute_units": units,
        "memory_mib": int(facts.total_memory // 2**20),
        "integrated": bool(getattr(facts, "is_integrated", False)),
        "uuid": known["uuid"],
        "pci": known["pci"],
        "numa": numa(known["pci"]),
    }


def numa(pci: str | None) -> int | None:
    """The NUMA node of a PCI address, or None where the system does not tell."""
    try:
        node = int(Path(f"/sys/bus/pci/devices/{pci}.0/numa_node").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
