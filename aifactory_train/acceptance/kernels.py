"""Every operator of the registry, forward and backward, against its reference in fp64; and how fast on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from aifactory_train.acceptance.report import NotHere, Report

#: Elements beyond which an offset of 32 bits wraps.
WRAPS = 2**31
ROWS, HIDDEN = 8192, 4096


def check(report: Report) -> None:
    """On a GPU the compiled kernels, on a CPU the same programs in Triton's interpreter (fp32, small)."""
    if not report.gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
    from aifactory_train.kernels import hardware, registry, runtime

    if not runtime.HAS_TRITON:
        raise NotHere("Triton is not installed: every operator takes the torch path")
    if report.gpu:
        import torch

        torch.cuda.set_device(report.device)
        arch, device, _ = runtime.device_of(torch.cuda.current_device())
        report.figures |= {"arch": arch, "device": device}
        if arch not in hardware.TARGETS:
            raise NotHere(f"the kernels are proven for {', '.join(hardware.TARGETS)}, not for {arch}")
        kinds = ("bf16",) if report.quick else ("bf16", "fp32")
        for name in registry.OPERATORS:
            for kind in kinds:
                with report.part(f"{name} {kind}"):
                    values(report, name, kind)
        with report.part("beyond 2^31 elements"):
            wide(report)
        with report.part("bandwidth"):
            speed(report)
        return
    report.said.append("in Triton's interpreter: fp32, small shapes, no times")
    from aifactory_train.kernels.workbench import interpreter

    interpreter.exact()
    interpreter.quick()
    with runtime.interpret():
        for name in registry.OPERATORS:
            with report.part(f"{name} fp32"):
                values(report, name, "fp32")


def values(report: Report, name: str, kind: str) -> None:
    """One operator in one type: odd sizes, and strided rows where it takes rows."""
    import torch

    from aifactory_train.kernels import registry
    from aifactory_train.kernels.workbench import inputs, traffic

    shapes = inputs.small(registry.operator(name))
    if not report.gpu:
        shapes = shapes[:1]
    for shape in shapes:
        torch.manual_seed(0)
        with torch.device(report.device):
            drawn = inputs.draw(name, shape, traffic.DTYPES[kind])
        forms = {"": drawn, " strided": strided(drawn)} if report.gpu else {"": drawn}
        for form, given in forms.items():
            if given is not None:
                compare(report, f"{name} {kind}{form} {shape}", in_place(inputs.function(name)),
                        in_place(inputs.oracle(name)), given)  # fmt: skip


def strided(drawn: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The same inputs with rows that do not follow one another in memory; None where the first is no matrix."""
    import torch

    first = drawn[0]
    if not isinstance(first, torch.Tensor) or first.dim() != 2 or not first.numel() or not first.requires_grad:
        return None
    room = torch.zeros(first.shape[0], first.shape[1] + 24, dtype=first.dtype, device=first.device)
    view = room[:, : first.shape[1]]
    view.copy_(first.detach())
    return view.detach().requires_grad_(), *drawn[1:]


def copied(value: Any) -> Any:
    import torch

    if isinstance(value, dict):
        return {key: copied(below) for key, below in value.items()}
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def in_place(run: Callable[..., Any]) -> Callable[..., Any]:
    """An operator that returns nothing has updated its first argument."""
    import torch

    def ran(*given: Any) -> Any:
        own = tuple(v if isinstance(v, torch.Tensor) and v.requires_grad else copied(v) for v in given)
        out = run(*own)
        return own[0] if out is None else out

    return ran


def compare(
    report: Report, label: str, ours: Callable[..., Any], reference: Callable[..., Any], given: tuple[Any, ...]
) -> None:
    """Every output and gradient: at most twice the error that the reference has in the same type, against fp64."""
    import torch

    wanted = [isinstance(a, torch.Tensor) and a.requires_grad for a in given]

    def run(function: Callable[..., Any], convert: Callable[[Any], Any]) -> list[Any]:
        args = [
            convert(a).requires_grad_(w) if isinstance(a, torch.Tensor) else a
            for a, w in zip(given, wanted, strict=True)
        ]
        out = function(*args)
        outs = out if isinstance(out, tuple) else (out,)
        leaves = [a for a, w in zip(args, wanted, strict=True) if w]
        asked = [o for o in outs if o.requires_grad]
        if not leaves or not asked:
            return list(outs)
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(o.shape, generator=generator).to(o.device, given[0].dtype).to(o.dtype) for o in asked]
        return [*outs, *torch.autograd.grad(asked, leaves, grads, allow_unused=True)]

    def exact(a: Any) -> Any:
        return a.detach().double() if a.is_floating_point() else a.detach()

    results = run(ours, lambda a: a.detach()), run(reference, lambda a: a.detach()), run(reference, exact)
    for number, (mine, theirs, truth) in enumerate(zip(*results, strict=True)):
        if truth is None or truth.numel() == 0:
            continue
        found = [part.detach().double() for part in (mine, theirs, truth)]
        off, allowed, size = (float(t.norm()) for t in (found[0] - found[2], found[1] - found[2], found[2]))
        good = bool(torch.isfinite(found[0]).all()) and off <= 2 * allowed + 1e-6 * size
        off, allowed = off / max(size, 1e-30), allowed / max(size, 1e-30)
        report.expect(good, f"{label}: result {number} is off by {off:.2g}, torch by {allowed:.2g}")
        worst = report.figures.setdefault("worst_error", {})
        operator = label.split(" ")[0]
        worst[operator] = max(worst.get(operator, 0.0), off)


def wide(report: Report) -> None:
    """Rows behind the 2^31st element of one tensor have the values of the same rows alone, forward and backward."""
    import torch

    from aifactory_train.kernels import ops

    rows = WRAPS // HIDDEN + 17
    needed = 4.5 * rows * HIDDEN * 2
    free, _ = torch.cuda.mem_get_info(report.device)
    if free < 1.2 * needed:
        raise NotHere(f"it takes {1.2 * needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    torch.manual_seed(0)
    x = torch.empty(rows, HIDDEN, dtype=torch.bfloat16, device=report.device).normal_().requires_grad_()
    w = torch.ones(HIDDEN, dtype=torch.bfloat16, device=report.device)
    out = ops.rms_norm(x, w, 1e-6)
    (dx,) = torch.autograd.grad(out, x, out.detach())
    last = x.detach()[-32:].clone().requires_grad_()
    alone = ops.rms_norm(last, w, 1e-6)
    (d_alone,) = torch.autograd.grad(alone, last, alone.detach())
    for what, whole, part in (("output", out, alone), ("gradient", dx, d_alone)):
        off = float((whole[-32:].float() - part.float()).norm() / part.float().norm())
        report.expect(off < 1e-2, f"rms_norm: the {what} of rows behind 2^31 elements is off by {off:.2g}")


def speed(report: Report) -> None:
    """GB/s of each operator, and its share of the time that the bytes alone take."""
    from aifactory_train.kernels import hardware, registry
    from aifactory_train.kernels.workbench import bench

    rows = ROWS // 4 if report.quick else ROWS
    found: dict[str, Any] = {}
    names = ("rms_norm", "swiglu", "linear_cross_entropy") if report.quick else registry.OPERATORS
    for name in names:
        report.begin(f"bandwidth of {name}")
        for row in bench.rows([name], rows, HIDDEN, others=False):
            us = row["us"]["ours"]
            found[f"{name} {row['direction']}"] = {
                "us": us,
                "gb_s_of_floor": row["floor_bytes"] / us / 1e3,
                "percent_of_floor": row["percent_of_floor"] if row["percent_meaningful"] else None,
            }
    device = hardware.sku(report.figures.get("device"))
    report.figures |= {"bandwidth_gb_s": device.bandwidth / 1e9 if device else None, "operators": found}
