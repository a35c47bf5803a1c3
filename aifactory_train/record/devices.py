"""Which devices the ranks compute on, and how much of their memory was used."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aifactory_train.parallel.world import World


def gather_devices(world: World) -> list[tuple[str, dict[str, Any]]]:
    """``(host, device)`` of every rank; collective."""
    try:
        mine = (world.host, device_of(world.device))
    except Exception as error:  # a driver that will not answer: the run is not about its name
        mine = (world.host, {"model": f"unknown ({type(error).__name__})"})
    found: list[Any] = [mine]
    if world.size > 1:
        import torch.distributed as dist

        found = [None] * world.size
        dist.all_gather_object(found, mine)
    return found


def device_of(device: str) -> dict[str, Any]:
    """Model, vendor and identity of a torch device."""
    if device == "cpu":
        return {"model": processor(), "kind": "cpu"}
    import torch

    facts = torch.cuda.get_device_properties(device)
    pci = None
    if hasattr(facts, "pci_bus_id"):
        pci = (
            f"{getattr(facts, 'pci_domain_id', 0):04x}:{facts.pci_bus_id:02x}:{getattr(facts, 'pci_device_id', 0):02x}"
        )
    uuid = getattr(facts, "uuid", None)
    return {
        "model": facts.name,
        "kind": "gpu",
        "vendor": "amd" if torch.version.hip else "nvidia",
        "uuid": str(uuid) if uuid else None,
        "pci": pci,
        "memory_bytes": facts.total_memory,
        "runtime": torch.version.hip or torch.version.cuda,
    }


def processor() -> str:
    """The processor's name as the kernel gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return "processor (unknown)"
    return "processor (unknown)"


def peak_memory(device: str) -> dict[str, Any]:
    """The most memory that this process held so far, in bytes, and what that figure is."""
    if device == "cpu":
        return {
            "kind": "resident set of rank 0",
            "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    import torch

    return {
        "kind": "allocated on the device of rank 0",
        "bytes": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }
