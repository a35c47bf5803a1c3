"""Times the operators on the GPU of this machine. Where there is none, nothing is timed and the reason is given.

Times are medians of Triton's ``do_bench`` (it flushes the L2 cache between runs); a backward pass is timed as the registered backward
operator, without autograd's own overhead, on both sides.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from aifactory_train.kernels import hardware, ops, registry, runtime
from aifactory_train.kernels.spec import Config, Kernel, Shape
from aifactory_train.kernels.workbench import traffic


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
        "device": p.name, "date": datetime.date.today().isoformat(), "job": os.environ.get("SLURM_JOB_ID"),
        "clock_mhz": torch.cuda.clock_rate() if hasattr(torch.cuda, "clock_rate") and torch.version.hip is None else None,
    }  # fmt: skip


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
        outs = out if isinstance(out, tuple) else (out,)
        grads = [torch.randn_like(o) for o in outs]
        return _time(lambda: torch.autograd.backward(outs, grads, retain_graph=True))


def rivals(op: str, sizes: dict[str, int], dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    """Forward functions to compare with, on the same inputs as ours: eager, torch.compile, Liger and torch's own where present."""
    import importlib

    if op in ("adamw8bit", "linear_dpo", "linear_cross_entropy", "lora_linear"):
        reference = None
    else:
        module = importlib.import_module(f"aifactory_train.kernels.{op}.reference")
        reference = getattr(module, op)
    found: dict[str, Callable[..., Any]] = {}
    if reference is not None:
        found["eager"] = reference
        found["compile"] = torch.compile(reference)
    return found


def rows(operators: Iterable[str], n: int, hidden: int, dtype: str = "bf16") -> Iterator[dict[str, Any]]:
    """One row an operator and direction: microseconds of every implementation, and ours as a share of the bandwidth floor."""
    arch, name, _ = runtime.device_of(torch.cuda.current_device())
    device = hardware.sku(name, arch)
    for op in operators:
        operator = registry.operator(op)
        sizes = traffic.shape_of(op, n, hidden)
        if "vocab" in sizes:
            sizes["vocab"] = 128256
        with torch.device("cuda"):
            cases = _cases(op, sizes, traffic.DTYPES[dtype])
        for direction in ("forward", "backward"):
            us: dict[str, float | None] = {}
            for who, (run, inputs) in cases.items():
                us[who] = _direction(run, inputs, direction)
            if us["ours"] is None:
                continue
            floor = operator.floor(direction, dtype, sizes)
            best = floor / device.bandwidth * 1e6 if device else None
            yield {
                "op": op, "direction": direction, "shape": sizes, "dtype": dtype, "arch": arch, "sku": name,
                "us": us, "floor_bytes": floor, "percent_of_floor": round(100 * best / us["ours"], 1) if best else None,
                "percent_meaningful": operator.pointwise, **conditions(),
            }  # fmt: skip


def _direction(run: Callable[..., Any], inputs: list[Any], direction: str) -> float | None:
    """Microseconds of a forward or backward pass; None where there is no backward."""
    if direction == "forward":
        with torch.no_grad():
            return _time(lambda: run(*inputs)) * 1e6
    out = run(*inputs)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, torch.Tensor) and o.requires_grad]
    if not outs:
        return None
    grads = [torch.randn_like(o) for o in outs]
    return _time(lambda: torch.autograd.backward(outs, grads, retain_graph=True)) * 1e6


def _cases(op: str, s: dict[str, int], dtype: torch.dtype) -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """implementation -> (function, inputs) on the GPU."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float32).to(dtype).requires_grad_()

    n, h = s.get("rows", 0), s.get("hidden", s.get("width", 0))
    inputs: list[Any]
    if op in ("rms_norm", "layer_norm", "rms_norm_residual"):
        inputs = {"rms_norm": [leaf(n, h), leaf(h), 1e-6], "layer_norm": [leaf(n, h), leaf(h), leaf(h), 1e-6],
                  "rms_norm_residual": [leaf(n, h), leaf(n, h), leaf(h), 1e-6]}[op]  # fmt: skip
    elif op in ("swiglu", "geglu"):
        inputs = [leaf(n, h), leaf(n, h)]
    elif op == "rope":
        table = torch.randn(1, n, s["head_dim"]).to(dtype)
        inputs = [leaf(1, s["heads"], n, s["head_dim"]), leaf(1, s["kv_heads"], n, s["head_dim"]), table, table]
    elif op in ("cross_entropy", "linear_cross_entropy"):
        labels = torch.randint(0, s["vocab"], (n,))
        inputs = [leaf(n, s["vocab"]), labels] if op == "cross_entropy" else [leaf(n, h), leaf(s["vocab"], h), labels]
    elif op == "lora_linear":
        inputs = [leaf(n, s["in"]), leaf(s["out"], s["in"]), leaf(s["rank"], s["in"]), leaf(s["out"], s["rank"]), 2.0]
    elif op == "linear_dpo":
        inputs = [leaf(2, n // 2, h), leaf(s["vocab"], h), torch.randint(0, s["vocab"], (2, n // 2)), torch.zeros(2)]
    else:
        p, g = torch.randn(s["numel"]).to(dtype), torch.randn(s["numel"]).to(dtype)
        state = ops.new_state(p)
        return {"ours": (lambda: ops.adamw8bit(p, g, state, step=1, lr=1e-4), [])}
    functions: dict[str, Callable[..., Any]] = {"ours": getattr(ops, op), **rivals(op, s, dtype)}
    functional = torch.nn.functional
    if op == "linear_cross_entropy":
        functions["eager"] = lambda a, w, y: functional.cross_entropy((a @ w.t()).float(), y, reduction="sum")
        if hasattr(functional, "linear_cross_entropy"):
            functions["torch_linear_cross_entropy"] = lambda a, w, y: functional.linear_cross_entropy(
                a, w, y, reduction="sum"
            )
    functions |= _liger(op)
    return {who: (function, inputs) for who, function in functions.items()}


def _liger(op: str) -> dict[str, Callable[..., Any]]:
    """Liger's function of the same operator and arguments, where the package is installed and has one."""
    import importlib.util

    if importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.transformers import functional as liger

    table: dict[str, Callable[..., Any]] = {
        "rms_norm": lambda x, w, eps: liger.liger_rms_norm(x, w, eps, in_place=False),
        "layer_norm": lambda x, w, b, eps: liger.liger_layer_norm(x, w, b, eps),
        "swiglu": liger.liger_swiglu,
        "geglu": liger.liger_geglu,
        "linear_cross_entropy": lambda a, w, y: liger.liger_fused_linear_cross_entropy(a, w, y, reduction="sum"),
    }
    return {"liger": table[op]} if op in table else {}
