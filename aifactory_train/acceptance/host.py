"""How often the host waits for the device: never within forward and backward, once a step."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from aifactory_train.acceptance import small
from aifactory_train.acceptance.report import Report


def check(report: Report) -> None:
    """On a GPU torch itself refuses what waits; on a CPU the operators that would wait are counted."""
    from aifactory_train.parallel.world import join_world

    world = join_world(60, threads=1)
    for checkpointing in ("none",) if report.quick or not report.gpu else ("none", "full"):
        for engine in ("ddp", "fsdp2"):
            with report.part(f"{engine}, checkpointing {checkpointing}"):
                one(report, world, f"{engine}, checkpointing {checkpointing}", engine, checkpointing)
    if report.gpu:
        with report.part("profile"):
            profile(report, world)


def one(report: Report, world: Any, name: str, engine: str, checkpointing: str) -> None:
    """Warmed up, then counted."""
    running = small.engine(world, engine=engine, checkpointing=checkpointing)
    for number in range(2):
        small.step(running, world, number)
    if report.gpu:
        within, a_step = on_gpu(running, world)
    else:
        within, a_step = on_cpu(running, world, engine)
    report.figures.setdefault("waits", {})[name] = {"forward_backward": within, "step": a_step}
    report.expect(not within, f"{name}: forward and backward have the host wait: {within}")
    report.expect(a_step == 1, f"{name}: the host waits {a_step} times a step, not once")


def on_gpu(running: Any, world: Any) -> tuple[str, int]:
    """(what waits within forward and backward, empty for nothing; how often a step waits)."""
    import torch

    batch = small.batch(small.documents(0), world.device)
    torch.cuda.synchronize(world.device)
    within = ""
    torch.cuda.set_sync_debug_mode("error")
    try:
        running.forward_backward(batch, 0.5, last=True)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        within = " ".join(str(error).split())[:200]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    running.discard()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step_on(running, world, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return within, sum("synchroniz" in str(warning.message) for warning in heard)


def step_on(running: Any, world: Any, batch: Any) -> list[float]:
    """A step as the trainer makes it, on a batch that is there already; the one reading is what it returns."""
    import torch
    import torch.distributed as dist

    loss = running.forward_backward(batch, 0.5, last=True).double()
    norm = running.clip(1.0, 0.7)
    dist.all_reduce(loss)
    found = torch.stack([loss, norm.to(loss)]).tolist()
    running.step(1e-3)
    return found


def on_cpu(running: Any, world: Any, engine: str) -> tuple[str, int]:
    """The same, from the operators whose result the host must have."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    from aifactory_train.parallel.traits import traits_of

    asking = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2"}
    # DDP looks up on the host which parameters were used: an int32 each.
    own = torch.int32 if not traits_of(engine).shards_parameters else None
    seen: list[str] = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = function._schema.name.split("::")[1]
            if name in asking and args[0].dtype != own:
                seen.append(name)
            return function(*args, **(kwargs or {}))

    class Copies(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(function, "__name__", "") in ("tolist", "cpu", "numpy"):
                seen.append(function.__name__)
            return function(*args, **(kwargs or {}))

    batch = small.batch(small.documents(0), world.device)
    with Copies(), Operators():
        running.forward_backward(batch, 0.5, last=True)
    within = ", ".join(seen)
    running.discard()
    seen.clear()
    with Copies(), Operators():
        step_on(running, world, batch)
    return within, len(seen)


def profile(report: Report, world: Any) -> None:
    """Share of three steps in which the device computes, and the longest time in which it does not. Of a model whose
    kernels take longer than their launches; figures alone."""
    import torch
    from torch.autograd import DeviceType

    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4,
             "num_hidden_layers": 8}  # fmt: skip
    running = small.engine(world, shape=shape, tokens=8192)
    batch = small.full_batch(8192, 512, world.device)
    for _ in range(2):
        step_on(running, world, batch)
    torch.cuda.synchronize(world.device)
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as seen:
        for _ in range(3):
            step_on(running, world, batch)
        torch.cuda.synchronize(world.device)
    spans = [(e.time_range.start, e.time_range.end) for e in seen.events() if e.device_type == DeviceType.CUDA]
    busy, whole, gap = busy_share(spans)
    report.figures["profile"] = {"busy_share": busy / whole if whole else None, "largest_gap_us": gap,
                                 "three_steps_ms": whole / 1e3}  # fmt: skip


def busy_share(spans: Iterable[tuple[float, float]]) -> tuple[float, float, float]:
    """(time covered by at least one span, time from the first to the last, the longest time between them)."""
    ordered = sorted(spans)
    if not ordered:
        return 0.0, 0.0, 0.0
    start, end = ordered[0]
    first, busy, gap = start, 0.0, 0.0
    for begin, stop in ordered[1:]:
        if begin > end:
            busy, gap, start = busy + end - start, max(gap, begin - end), begin
        end = max(end, stop)
    return busy + end - start, end - first, gap
