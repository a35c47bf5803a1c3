"""A checkpoint is loaded bit for bit; a run that is killed between two steps goes on with the curve of one that was
not."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

from aifactory_train.acceptance import processes, small
from aifactory_train.acceptance.report import Report

STEPS, EVERY = 8, 2
#: Largest relative difference of the two curves: on a CPU they are equal; on a GPU flash attention's backward adds dQ
#: in no fixed order.
SAME_CPU, SAME_GPU = 1e-6, 2e-2


def check(report: Report) -> None:
    """A run that is killed with SIGKILL against one that is not; the state through a checkpoint, in this process."""
    with report.part("kill and resume"):
        killed(report)
    with report.part("save and load"):
        state(report)


def state(report: Report) -> None:
    """Masters and moments are equal, bit for bit, after they were loaded; a step was made while they were written."""
    import torch

    from aifactory_train.parallel.world import join_world
    from aifactory_train.training.checkpoint import Checkpointer, flat_state

    world = join_world(60, threads=1)
    settings = small.recipe(adapter="none")
    running = small.engine_of(settings, world)
    for number in range(2):
        small.step(running, world, number)
    kept = {name: [piece.tensor.detach().cpu().clone() for piece in entry.pieces]
            for name, entry in flat_state(running).items()}  # fmt: skip
    keeper = Checkpointer(report.work / "checkpoints", settings, running, world)
    keeper.prepare()
    began = time.monotonic()
    keeper.save(2, {}, wait=False)
    staged = time.monotonic() - began
    small.step(running, world, 2)  # while the copies are written
    keeper.wait()
    size = sum(entry.nbytes() for entry in flat_state(running).values())
    report.figures |= {"saved_mib": size / 2**20, "step_waits_s": staged, "save_s": keeper.durations[-1]}
    fresh = small.engine_of(settings, world)
    Checkpointer(report.work / "checkpoints", settings, fresh, world).load(2)
    found = flat_state(fresh)
    report.expect(found.keys() == kept.keys(), "other tensors came back than were saved")
    unlike = []
    for name, tensors in kept.items():
        pieces = [piece.tensor.detach().cpu() for piece in found[name].pieces]
        if not all(torch.equal(a, b) for a, b in zip(tensors, pieces, strict=True)):
            unlike.append(name)
    report.figures["tensors"] = len(kept)
    report.expect(any(name.startswith("optimizer/") for name in kept), "no moments were saved")
    report.expect(not unlike, f"{len(unlike)} of {len(kept)} tensors are others after loading: {unlike[:3]}")
    if report.gpu:
        report.begin("staging")
        report.figures["staging_gb_s"] = staging(world.device)


def staging(device: str) -> float:
    """GB/s of copies of 1 GiB into pinned memory that is kept, the second time."""
    import torch

    from aifactory_train.parallel.state import Piece, Sharded
    from aifactory_train.training.staging import Staging

    tensor = torch.zeros(2**28, device=device)
    entry = {"one": Sharded((2**28,), tensor.dtype, [Piece((0,), tensor)])}
    copies = Staging(device)
    copies.copies(entry)
    began = time.perf_counter()
    copies.copies(entry)
    return 2**30 / (time.perf_counter() - began) / 1e9


def killed(report: Report) -> None:
    """The same recipe twice; one of the two is killed as soon as a checkpoint in its middle is complete."""
    report.work.mkdir(parents=True, exist_ok=True)
    threads = {} if report.gpu else {"parallel__threads": 1}
    settings: dict[str, Any] = {"train__max_steps": STEPS, "checkpoint__every_steps": EVERY, "eval__before": False,
                                "eval__after": False, "export__automatic": False, **threads}  # fmt: skip
    recipe = small.run_files(report.work / "run", **settings)
    whole, cut = report.work / "whole", report.work / "cut"
    log, fork = report.work / "train.log", not report.gpu
    report.begin("a run that is not killed")
    code, _ = processes.call("train", recipe, "--run-dir", whole, "--quiet", log=log, fork=fork)
    if not report.expect(code == 0, f"the run ended with {code}: {processes.end_of(log)}"):
        return
    report.begin("kill -9")
    process = processes.start(processes.PROGRAM, ["train", recipe, "--run-dir", cut, "--quiet"], log, fork=fork)
    at = kill_after_checkpoint(process, cut)
    early = f"no checkpoint came, or the run ended before it could be killed: {processes.end_of(log)}"
    if not report.expect(at is not None, early):
        return
    report.begin("resume")
    code, _ = processes.call("train", recipe, "--run-dir", cut, "--quiet", "--resume", "auto", log=log, fork=fork)
    report.expect(code == 0, f"the run that was killed did not go on: {processes.end_of(log)}")
    one, other = losses(whole), losses(cut)
    report.figures |= {"killed_after_step": at, "steps": len(other)}
    if report.expect(one.keys() == other.keys(), f"steps {sorted(other)} instead of {sorted(one)}"):
        off = max(abs(other[k] - one[k]) / abs(one[k]) for k in one)
        allowed = SAME_GPU if report.gpu else SAME_CPU
        report.figures["deviation"] = off
        report.expect(off <= allowed, f"after the kill the curve is off by {off:.2g}, at most {allowed:g}")


def kill_after_checkpoint(process: Any, run: Path, seconds: float = 120) -> int | None:
    """SIGKILL a run once its first checkpoint is complete; that step, or None where none came or the run was done
    before."""
    end = time.monotonic() + seconds
    try:
        while process.poll() is None and time.monotonic() < end:
            done = sorted((run / "checkpoints").glob("step-*/COMPLETE"))
            if done:
                process.kill()
                killed = process.wait(timeout=20) == -signal.SIGKILL
                return int(done[0].parent.name.removeprefix("step-")) if killed else None
            time.sleep(0.005)
    finally:
        process.kill()
    return None


def losses(run: Path) -> dict[int, float]:
    """Step -> loss, the last word on each."""
    rows = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    return {row["step"]: row["loss"] for row in rows if row.get("kind") == "train"}
