"""What takes several ranks: bandwidths, one curve, and what becomes of a job whose rank fails or stands still."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from aifactory_train.acceptance import curves as one_process
from aifactory_train.acceptance import processes, ranks, small
from aifactory_train.acceptance.report import Report

#: Ranks at most: more would only take longer.
MOST_RANKS = 4
#: Seconds from a rank's failure to the end of its job; and the time-out of the ranks for each other where one sleeps.
ENDS_S, TIMEOUT_S = 30.0, 20
BYTES = 2**28


def size_of(report: Report) -> int:
    """One rank a GPU; two on a CPU."""
    return min(report.gpus, MOST_RANKS) if report.gpu else 2


# ---- bandwidth


def bandwidth(report: Report) -> None:
    """GB/s on the bus as nccl-tests counts them, of 256 MiB a rank; every GPU takes part."""
    found = ranks.run("several:measure", report.gpus, report.work, 60, {}, fork=False)
    report.figures |= {"ranks": report.gpus, "mib": BYTES / 2**20, "bus_gb_s": found[0]}
    for name, rate in found[0].items():
        report.expect(rate > 1.0, f"{name}: {rate:.2g} GB/s between the GPUs of one machine")


def measure(world: Any, settings: dict[str, Any]) -> dict[str, float]:
    """On each rank: the bus bandwidth of three collectives."""
    import torch
    import torch.distributed as dist

    n, count = world.size, BYTES // 2 // world.size * world.size
    whole = torch.ones(count, dtype=torch.bfloat16, device=world.device)
    part = torch.ones(count // n, dtype=torch.bfloat16, device=world.device)
    share = (n - 1) / n
    kinds: dict[str, tuple[Any, float]] = {
        "all_reduce": (lambda: dist.all_reduce(whole), 2 * share),
        "all_gather": (lambda: dist.all_gather_into_tensor(whole, part), share),
        "reduce_scatter": (lambda: dist.reduce_scatter_tensor(part, whole), share),
    }
    found = {}
    for name, (run, factor) in kinds.items():
        for _ in range(3):
            run()
        torch.cuda.synchronize(world.device)
        began = time.perf_counter()
        for _ in range(10):
            run()
        torch.cuda.synchronize(world.device)
        found[name] = factor * count * 2 / ((time.perf_counter() - began) / 10) / 1e9
    return found


# ---- one curve


def curves(report: Report) -> None:
    """Over several ranks the curve of one process in fp32; in bf16 within twice what ddp is off."""
    size, settings = size_of(report), {"steps": small.STEPS if report.gpu else 5}
    exact = ranks.run("several:exact_of", 1, report.work / "one", 100, settings, fork=not report.gpu)[0]
    given = {**settings, "exact": exact}
    found = ranks.run("several:curves_of", size, report.work / "several", 200, given, fork=not report.gpu)[0]
    report.figures |= {"ranks": size, "deviation": {}}
    for name, (losses, allowed) in found.items():
        one_process.against(report, name, losses, exact, allowed)


def exact_of(world: Any, settings: dict[str, Any]) -> list[float]:
    """One process on the CPU in fp32."""
    return small.curve(small.on_cpu(world), settings["steps"])


def curves_of(world: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """``name: (losses, allowed)``."""
    from aifactory_train.core import compat
    from aifactory_train.parallel.traits import traits_of

    steps, half = settings["steps"], world.device != "cpu" and compat.supports_bf16(world.device)
    precision = {"precision": small.HALF} if half else {}
    allowed = one_process.SAME
    found: dict[str, Any] = {}
    for name in ("ddp", "fsdp2", "hsdp"):
        case: dict[str, Any] = {"engine": name}
        if traits_of(name).shard_group == "chosen":
            case["shard_size"] = 2 if world.size % 2 == 0 else world.size
        losses = small.curve(world, steps, **precision, **case)
        if half and not found:
            found["ddp"] = losses, one_process.BF16_MOST
            allowed = max(2 * small.deviation(losses, settings["exact"]), one_process.BF16_FLOOR)
        else:
            found[name] = losses, allowed
    return found


# ---- one rank fails, or stands still


def oom(report: Report) -> None:
    """One rank runs out of memory in step 2: the job ends, the rank is named, nothing is tried again."""
    code, took, cause, rank = faulty(report, "oom", first_failure_ends=2.0)
    late = f"the job ended {took} s after the failure, not within {ENDS_S:.0f}"
    report.expect(took is not None and took < ENDS_S, late)
    report.expect(code == 1, f"the rank that ran out of memory ended with exit code {code}, not 1")
    blame(report, cause, rank, "out-of-memory")


def sleeps(report: Report) -> None:
    """One rank stands still in its own work: it is the cause, not those that wait for it."""
    _, took, cause, rank = faulty(report, "sleep", first_failure_ends=TIMEOUT_S * 1.0)
    report.expect(took is not None, "no rank noticed that one stands still")
    blame(report, cause, rank, "hang")


def blame(report: Report, cause: dict[str, Any], rank: int, kind: str) -> None:
    report.figures["cause"] = cause
    found = f"rank {cause.get('rank')} ({cause.get('kind')}: {str(cause.get('message'))[:160]})"
    right = cause.get("rank") == rank and cause.get("kind") == kind
    report.expect(right, f"blamed is {found}, it was rank {rank} ({kind})")


def faulty(
    report: Report, fault: str, *, first_failure_ends: float
) -> tuple[int | None, float | None, dict[str, Any], int]:
    """(exit code of the rank, seconds from the fault to the end of the job, the judged cause, the rank) of a training
    in which the last rank fails. As a launcher does, the others are ended a little after the first failure."""
    from aifactory_train.launchers.programs import attempt

    size = size_of(report)
    settings: dict[str, Any] = {"train__max_steps": 6, "eval__before": False, "eval__after": False,
                                "export__automatic": False, "checkpoint__at_end": False,
                                "parallel__timeout_s": 120 if fault == "oom" else TIMEOUT_S}  # fmt: skip
    recipe = small.run_files(report.work / "files", **settings)
    run, marker = report.work / "run", report.work / "fault"
    report.begin("training with a fault")
    with processes.port() as number:
        given = [
            "--fault",
            fault,
            "--rank",
            size - 1,
            "--marker",
            marker,
            "--",
            "train",
            recipe,
            "--run-dir",
            run,
            "--quiet",
        ]
        started = processes.Started("aifactory_train.acceptance.faulty", given, size, report.work, number,
                                    fork=not report.gpu)  # fmt: skip
        codes = started.wait(180, first_failure_ends=first_failure_ends)
    ended = time.time()
    report.figures |= {"ranks": size, "exit_codes": codes}
    before = f"the ranks did not get as far as the fault: {processes.end_of(started.logs[-1])}"
    if not report.expect(marker.exists(), before):
        return codes[-1], None, {}, size - 1
    took = round(ended - marker.stat().st_mtime, 1)
    report.figures["seconds_from_fault_to_end"] = took
    folders = sorted(Path(run, "attempts").glob("[0-9]*"))
    state, cause = attempt.diagnose(str(folders[-1]), size) if folders else ("none", None)
    report.expect(state == "failed", f"the attempt is judged as {state}")
    return codes[-1], took, cause or {}, size - 1
