"""Times the operators on the GPU of this machine. Where there is none, nothing is timed and the reason is given.

Times are medians of Triton's ``do_bench`` (it flushes the L2 cache between runs); a backward pass is timed as the
registered backward operator, without autograd's own overhead, on both sides.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from aifactory_train.kernels import hardware, registry, runtime
from aifactory_train.kernels.spec import Config, Kernel, Shape
from aifactory_train.kernels.workbench import inputs, traffic


def measurement(
    arch: str | None, sku: str | None
) -> tuple[Callable[[str, Kernel, Config, str, Shape], float] | None, str]:
    """(a function that times one configuration in seconds, "") or (None, why nothing can be timed here)."""
    if not torch.cuda.is_available():
        return None, "this machine has no GPU that torch can use"
    here, name, _ = runtime.device_of(torch.cuda.current_device())
    if arch and here != arch:
        return None, f"this machine's GPU is {here}, not {arch}"
    if sku and name != sku:
        return None, f"this machine's GPU is {name or 'of no known SKU'}, not {sku}"
    return time_configuration, ""


def conditions() -> dict[str, Any]:
    """What a measured entry must say about itself."""
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": p.name,
        "date": datetime.date.today().isoformat(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "clock_mhz": torch.cuda.clock_rate()
        if hasattr(torch.cuda, "clock_rate") and torch.version.hip is None
        else None,
    }


def _time(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=25, rep=100, return_mode="median")) / 1e3


def time_configuration(op: str, kernel: Kernel, config: Config, dtype: str, shape: Shape) -> float:
    """Seconds of the operator's direction that the kernel belongs to, with the kernel in the given configuration."""
    sizes = {d: int(shape[d]) for d in registry.operator(op).dims}
    with torch.device("cuda"):
        forward, backward = traffic.programs(op, sizes, traffic.DTYPES[dtype])
    with runtime.force(kernel.name, config):
        if kernel.direction == "forward" or backward is None:
            return _time(forward)
        out = forward()
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        grads = [torch.randn_like(o) for o in outs]
        return _time(lambda: torch.autograd.backward(outs, grads, retain_graph=True))


def rivals(op: str) -> dict[str, Callable[..., Any]]:
    """Functions to compare with, on the same inputs as ours: eager and torch.compile, and what the operator's
    ``rivals.py`` names.
    """
    found: dict[str, Callable[..., Any]] = {}
    if registry.operator(op).eager:
        found["eager"] = inputs.oracle(op)
        found["compile"] = torch.compile(inputs.oracle(op))
    others = registry.part(op, "rivals")
    return found | (others.rivals() if others else {})


def rows(
    operators: Iterable[str], n: int, hidden: int, dtype: str = "bf16", *, others: bool = True
) -> Iterator[dict[str, Any]]:
    """One row an operator and direction: microseconds of every implementation (without ``others`` of ours alone), and
    ours as a share of the bandwidth floor.
    """
    arch, name, _ = runtime.device_of(torch.cuda.current_device())
    device = hardware.sku(name, arch)
    for op in operators:
        operator = registry.operator(op)
        sizes = traffic.shape_of(op, n, hidden)
        if "vocab" in sizes:
            sizes["vocab"] = 128256
        with torch.device("cuda"):
            cases = _cases(op, sizes, traffic.DTYPES[dtype], others)
        for direction in ("forward", "backward"):
            us: dict[str, float | None] = {}
            for who, (run, arguments) in cases.items():
                us[who] = _direction(run, arguments, direction)
            if us["ours"] is None:
                continue
            floor = operator.floor(direction, dtype, sizes)
            best = floor / device.bandwidth * 1e6 if device else None
            yield {
                "op": op, "direction": direction, "shape": sizes, "dtype": dtype, "arch": arch, "sku": name,
                "us": us, "floor_bytes": floor, "percent_of_floor": round(100 * best / us["ours"], 1) if best else None,
                "percent_meaningful": operator.pointwise, **conditions(),
            }  # fmt: skip


def _direction(run: Callable[..., Any], arguments: tuple[Any, ...], direction: str) -> float | None:
    """Microseconds of a forward or backward pass; None where there is no backward."""
    if direction == "forward":
        with torch.no_grad():
            return _time(lambda: run(*arguments)) * 1e6
    out = run(*arguments)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, torch.Tensor) and o.requires_grad]
    if not outs:
        return None
    grads = [torch.randn_like(o) for o in outs]
    return _time(lambda: torch.autograd.backward(outs, grads, retain_graph=True)) * 1e6


def _cases(
    op: str, shape: dict[str, int], dtype: torch.dtype, others: bool
) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """implementation -> (function, inputs) on the GPU."""
    arguments = inputs.draw(op, shape, dtype)
    return {
        who: (run, arguments) for who, run in ({"ours": inputs.function(op)} | (rivals(op) if others else {})).items()
    }
