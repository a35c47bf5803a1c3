"""Which facts of a site's profile this machine confirms, and which it contradicts. Imports no torch."""

from __future__ import annotations

from typing import Any

from aifactory_train.sites import detection
from aifactory_train.sites.paths import dig
from aifactory_train.sites.system import System

#: How far a figure may be off and still be the same: drivers keep a part of the memory, units are rounded.
NEAR = {"gpu.memory_gib": 0.07, "gpu.memory_visible_mib": 0.02, "node.memory_gib": 0.1}


def compare(system: System, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """One row ``{fact, profile, observed, verdict, by}`` for each fact that this machine can speak of.

    ``machine``: the figures of :mod:`aifactory_train.acceptance.machine`. verdict: ``confirmed``, ``contradicted``,
    ``new`` (the profile says nothing) or ``not seen`` (a job that was given a part of a node sees a part).
    """
    rows = []
    for path, (observed, by) in observed_facts(machine).items():
        if observed is None:
            continue
        stated = _stated(system, path)
        rows.append(
            {
                "fact": path,
                "profile": stated,
                "observed": observed,
                "verdict": verdict(path, stated, observed),
                "by": by,
            }
        )
    return rows


def observed_facts(machine: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Paths of a profile with what this machine says, and what told it."""
    host, runtime, gpus = machine.get("host") or {}, machine.get("runtime") or {}, machine.get("gpus") or []
    facts: dict[str, tuple[Any, str]] = {
        "node.isa": (host.get("isa"), "uname"),
        "node.sockets": (host.get("sockets"), "lscpu"),
        "node.cores": (host.get("cores"), "lscpu"),
        "node.threads_per_core": (host.get("threads_per_core"), "lscpu"),
        "node.numa_domains": (host.get("numa_domains"), "lscpu"),
        "node.memory_gib": (host.get("memory_gib"), "sysconf"),
    }
    if not gpus:
        return facts
    first = gpus[0]
    device = detection.Device(first["name"], first["memory_mib"], first["arch"], first["vendor"])
    facts |= {
        "node.gpus": (len(gpus), "torch"),
        "gpu.sku": (detection.match_sku(device), "torch, catalogue"),
        "gpu.vendor": (first["vendor"], "torch"),
        "gpu.arch": (first["arch"], "torch"),
        "gpu.compute_units": (first["compute_units"], "torch"),
        "gpu.memory_gib": (round(first["memory_mib"] / 1024, 1), "torch"),
        "gpu.memory_visible_mib": (first["memory_mib"], "torch"),
        "software.driver": (runtime.get("driver"), "/sys/module"),
    }
    placed = [gpu.get("numa") for gpu in gpus]
    if None not in placed:
        facts["node.gpu_numa"] = (placed, "/sys/bus/pci")
    return facts


def _stated(system: System, path: str) -> Any:
    try:
        return dig(system, path)
    except (KeyError, ValueError):
        return None


def verdict(path: str, stated: Any, observed: Any) -> str:
    """See :func:`compare`."""
    if stated is None or stated == []:
        return "new"
    if path == "node.gpus" and observed < stated:
        return "not seen"  # what the job was given, or a part of it: the truth check compares with what was asked for
    if path in NEAR:
        return "confirmed" if abs(stated - observed) <= NEAR[path] * stated else "contradicted"
    if path == "node.gpu_numa":
        return "confirmed" if list(stated)[: len(observed)] == observed else "contradicted"
    if path == "software.driver":
        return "confirmed" if str(observed).startswith(str(stated)) else "contradicted"
    return "confirmed" if stated == observed else "contradicted"
