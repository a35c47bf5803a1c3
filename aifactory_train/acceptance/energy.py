"""The energy counter of a GPU: it is found, it rises, and it says a power that a GPU can have."""

from __future__ import annotations

import time

from aifactory_train.acceptance.report import Report

#: W. No GPU that trains draws less while it computes, and none more.
LEAST_W, MOST_W = 30.0, 2000.0


def check(report: Report) -> None:
    """Joules before and after some seconds of matrix products."""
    import torch

    from aifactory_train.energy.readers import MeteredDevice, find_readers
    from aifactory_train.record.devices import device_of

    torch.cuda.set_device(report.device)
    mine = device_of(report.device)
    device = MeteredDevice(mine["uuid"], mine["pci"], mine["model"])
    readers, reasons = find_readers([device])
    own = [reader for reader in readers if reader.boundary == "device"]
    report.figures |= {"readers": [reader.name for reader in readers], "not_here": reasons}
    told = "; ".join(f"{name}: {why}" for name, why in reasons.items())
    if not report.expect(own, f"no energy counter of this GPU can be read: {told}"):
        return
    reader = own[0]
    a = torch.randn(4096, 4096, device=report.device)
    report.begin(f"reading {reader.name}")
    before, began = reader.read(), time.monotonic()
    until = began + (2 if report.quick else 4)
    while time.monotonic() < until:
        for _ in range(20):
            a = (a @ a).clamp_(-1, 1)
        torch.cuda.synchronize(report.device)
    after, seconds = reader.read(), time.monotonic() - began
    joules = sum(after[name] - before[name] for name in before.keys() & after.keys())
    watts = joules / seconds
    report.figures |= {"joules": joules, "mean_w": watts, "counters": sorted(after)}
    report.expect(joules > 0, f"the counter {reader.name} did not rise in {seconds:.1f} s of work")
    shared = 8 if reader.expected > 1 else 1
    possible = LEAST_W <= watts <= MOST_W * shared
    report.expect(not joules or possible, f"{reader.name} says {watts:.0f} W: no GPU draws that")
