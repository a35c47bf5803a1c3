"""One training curve: on the GPU as on the CPU, under every engine, and with everything that only changes how it is
computed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

from aifactory_train.acceptance import small
from aifactory_train.acceptance.report import NotHere, Report

#: Largest relative difference of two fp32 curves, whoever computes them.
SAME = 1e-4
#: A curve in bf16 may be off from fp32 by twice what the plain one is, or by this where that is less.
BF16_FLOOR = 2e-3
#: What a plain curve in bf16 may be off by at most.
BF16_MOST = 0.1


def cases(quick: bool, half: bool) -> dict[str, dict[str, Any]]:
    """What is compared with the plain curve, by name. ``half``: in bf16 where a case says nothing else."""
    precision = {"precision": small.HALF} if half else {}
    found: dict[str, dict[str, Any]] = {"fsdp2": {"engine": "fsdp2"}}
    if not quick:
        # Without bf16 the stages compute alike, and one is enough.
        found |= {name: {"engine": name} for name in (("zero2", "zero3") if half else ("zero3",))}
        found["checkpointing selective"] = {"checkpointing": "selective"}
        found["fsdp2, checkpointing full"] = {"engine": "fsdp2", "checkpointing": "full"}
    found["kernels off"] = {"kernels": "off"}
    if half:
        found["attention per document"] = {"attention": "per_document"}
    return {name: {**precision, **case} for name, case in found.items()}


def check(report: Report) -> None:
    """The plain curve on the CPU in fp32 is what all others are held against."""
    from aifactory_train.core import compat
    from aifactory_train.parallel.world import join_world

    world = join_world(120, threads=1)
    cpu = small.on_cpu(world)
    steps = (10 if report.quick else small.STEPS) if report.gpu else 6
    report.begin("CPU, fp32")
    exact = small.curve(cpu, steps)
    report.figures |= {"first_loss": exact[0], "last_loss": exact[-1], "deviation": {}}
    report.expect(exact[-1] < exact[0], "the tiny model did not learn on the CPU")
    allowed = SAME
    if report.gpu:
        with report.part("GPU, fp32"):
            against(report, "GPU, fp32", small.curve(world, steps, precision={"compute": "fp32"}), exact, SAME)
    half = report.gpu and compat.supports_bf16(world.device)
    with report.part("bf16"):
        if report.gpu and not half:
            raise NotHere("this GPU has no bf16")
        plain = small.curve(world, steps, precision=small.HALF)
        against(report, "bf16", plain, exact, BF16_MOST)
        if half:
            allowed = max(2 * small.deviation(plain, exact), BF16_FLOOR)
    for name, case in cases(report.quick, half).items():
        with report.part(name):
            needs(case)
            against(report, name, small.curve(world, steps, **case), exact, allowed)
    precision = {"precision": small.HALF} if half else {}
    with report.part("DPO"):
        preference(report, world, cpu, steps, precision, allowed)
    if not report.quick:
        for checkpointing in ("none", "full") if report.gpu else ("full",):
            with report.part(f"compiled, checkpointing {checkpointing}"):
                compiled(report, world, steps, {**precision, "checkpointing": checkpointing}, exact, allowed)


def against(report: Report, name: str, found: list[float], exact: list[float], allowed: float) -> None:
    off = small.deviation(found, exact)
    report.figures["deviation"][name] = off
    report.expect(off <= allowed, f"{name}: the curve is off by {off:.2g}, at most {allowed:.2g}")


def needs(case: dict[str, Any]) -> None:
    """Leave out an engine whose package is missing."""
    import importlib.util

    from aifactory_train.parallel.traits import traits_of

    package = traits_of(case.get("engine", "ddp")).package
    if package and importlib.util.find_spec(package) is None:
        raise NotHere(f"{package} is not installed")


def preference(report: Report, world: Any, cpu: Any, steps: int, precision: dict[str, Any], allowed: float) -> None:
    """DPO on this device against DPO on the CPU in fp32; on the CPU with checkpointing against without."""
    exact = small.curve(cpu, steps, preference=True)
    case = precision if report.gpu else {"checkpointing": "full"}
    found = small.curve(world, steps, preference=True, **case)
    # A preference loss goes toward 0, where relative differences mean nothing.
    off = max(abs(a - b) for a, b in zip(found, exact, strict=True)) / max(map(abs, exact))
    report.figures["deviation"]["DPO"] = off
    report.expect(off <= 2 * allowed, f"DPO: the curve is off by {off:.2g}, at most {2 * allowed:.2g}")


def compiled(report: Report, world: Any, steps: int, case: dict[str, Any], exact: list[float], allowed: float) -> None:
    """Compiled blocks: the same curve. Where attention is one operator: from at most two graphs (lengths as numbers,
    and any length) without a break; a step of documents one by one is another graph for each number of them."""
    from torch._dynamo.utils import counters

    from aifactory_train.core import compat

    name = f"compiled, checkpointing {case['checkpointing']}"
    one_operator = bool(case.get("precision")) and compat.varlen_attention() is not None and not torch_is_amd()
    with compiling(report.gpu):
        found = small.curve(world, steps, compile=True, **case)
    graphs, breaks = int(counters["stats"]["unique_graphs"]), dict(counters["graph_break"])
    report.figures.setdefault("graphs", {})[name] = graphs
    against(report, name, found, exact, allowed)
    if not one_operator:
        report.figures["graph_breaks"] = [text.split("\n")[0] for text in breaks]
        return
    report.expect(1 <= graphs <= 2, f"{name}: {graphs} graphs, not 1 or 2")
    report.expect(not breaks, f"{name}: not in one graph: {list(breaks)[:2]}")


def torch_is_amd() -> bool:
    """Where the variable-length kernel is not used in compiled blocks."""
    import torch

    return torch.version.hip is not None


@contextlib.contextmanager
def compiling(gpu: bool) -> Iterator[None]:
    """Counters from nothing. On a CPU the graphs are traced and run as they are: building them would take minutes."""
    import torch
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    whole = torch.compile
    if not gpu:
        as_it_is = {"backend": lambda graph, example: graph.forward}
        torch.compile = lambda *given, **more: whole(*given, **{**more, **as_it_is})  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.compile = whole
        torch._dynamo.reset()
        gc.collect()
