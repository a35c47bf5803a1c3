"""The process group of training: formed, used, left; and a rank that fails ends."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from aifactory_train.acceptance import processes, ranks
from aifactory_train.acceptance.report import Report

#: Seconds in which a group is taken down, and in which a rank that raised is gone.
LEAVE_S, GONE_S = 5.0, 15.0
#: On a CPU, where only the threads of gloo are waited for, a busy machine may take longer.
LEAVE_CPU_S = 20.0


def check(report: Report) -> None:
    """Ranks of which one raises; the group of one rank, all of its sides."""
    with report.part("a rank that raises"):
        raising(report)
    with report.part("form and leave"):
        alone(report)


def alone(report: Report) -> None:
    """:func:`join_world` at world size 1, with everything that training asks of it."""
    import torch
    import torch.distributed as dist

    from aifactory_train.parallel.world import join_world, leave_world

    began = time.monotonic()
    world = join_world(60, threads=1)
    report.figures |= {"backend": str(dist.get_backend_config()), "join_s": round(time.monotonic() - began, 2)}
    for device in dict.fromkeys(("cpu", world.device)):
        report.begin(f"all-reduce on {device}")
        tensor = torch.full((1024,), 3.0, device=device)
        dist.all_reduce(tensor)
        report.expect(bool((tensor == 3).all()), f"the all-reduce of one rank on {device} changed its values")
    report.begin("object gather")
    boxes: list[Any] = [None]
    dist.all_gather_object(boxes, {"device": world.device})
    report.expect(boxes == [{"device": world.device}], f"the object gather gave {boxes}")
    report.begin("new_group(gloo)")
    group = dist.new_group(backend="gloo")
    small = torch.ones(4)
    dist.all_reduce(small, group=group)
    report.expect(bool((small == 1).all()), "the all-reduce of a gloo group changed its values")
    report.begin("destroy")
    began = time.monotonic()
    leave_world()
    took = time.monotonic() - began
    report.figures["leave_s"] = round(took, 2)
    most = LEAVE_S if report.gpu else LEAVE_CPU_S
    report.expect(took < most, f"taking the group down took {took:.1f} s, more than {most:.0f}")


def raising(report: Report) -> None:
    """Two ranks where there are two GPUs or none; NCCL takes one rank a GPU."""
    size = min(report.gpus, 2) if report.gpu else 2
    given = ranks.settings_file(report.work, {"timeout_s": 60})
    marker = report.work / "raised"
    with processes.port() as number:
        started = processes.Started(
            processes.RANK, ["group:raises", given], size, report.work, number, fork=not report.gpu
        )
        end = time.monotonic() + 60
        while not marker.exists() and time.monotonic() < end and None in [p.poll() for p in started.processes]:
            time.sleep(0.02)
        began = time.monotonic()
        failed = started.processes[-1]
        while failed.poll() is None and time.monotonic() < began + GONE_S:
            time.sleep(0.02)
        code, took = failed.poll(), time.monotonic() - began
        started.kill()
    report.figures |= {"ranks": size, "raising_gone_s": round(took, 2), "raising_exit_code": code}
    last = processes.end_of(started.logs[-1])
    if report.expect(marker.exists(), f"the ranks did not get as far as the failure: {last}"):
        report.expect(code is not None, f"a rank that raised was still there after {GONE_S:.0f} s")
        report.expect(code != 0, "a rank that raised ended with exit code 0")


def raises(world: Any, settings: dict[str, Any]) -> None:
    """The last rank fails while the others wait for it."""
    import torch
    import torch.distributed as dist

    tensor = torch.ones(1 << 16, device=world.device)
    dist.all_reduce(tensor)
    if world.rank == world.size - 1:
        (Path(settings["out"]) / "raised").write_text("")
        raise RuntimeError("raised on purpose")
    dist.all_reduce(tensor)
    tensor.sum().item()
    time.sleep(30)
