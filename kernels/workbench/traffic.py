"""Counts the bytes of every operator in the interpreter and holds them against the floor that its mathematics sets.

A launch's bytes are its distinct addresses, loads and stores apart; an operator's bytes are the sum over its launches, so a partial sum
that one kernel writes and the next one reads counts twice. Requested bytes count every access, also those that a cache serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from aifactory_train.kernels import ops, registry, runtime
from aifactory_train.kernels.spec import ITEMSIZE
from aifactory_train.kernels.workbench import interpreter

#: the ratio that a pointwise operator must keep, and the others for information
BOUND = 1.10

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def shape_of(op: str, rows: int, hidden: int) -> dict[str, int]:
    """The shape that is counted for: hidden is the row width of every operator (32 query and 8 key heads for RoPE)."""
    sizes = {"rows": rows, "hidden": hidden, "width": hidden, "vocab": hidden, "heads": hidden // 128 or 1,
             "kv_heads": max(1, hidden // 512), "head_dim": 128, "in": hidden, "out": hidden, "rank": 16,
             "numel": rows * hidden}  # fmt: skip
    return {d: sizes[d] for d in registry.operator(op).dims}


def _leaf(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(dtype).requires_grad_()


def programs(
    op: str, shape: dict[str, int], dtype: torch.dtype
) -> tuple[Callable[[], Any], Callable[[Any], None] | None]:
    """(forward, backward of its result) of an operator on random inputs; no backward where there is none or it is part of forward."""

    def backward(out):
        out = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(out, [torch.randn_like(o) for o in out])

    n = shape.get("rows", 0)
    h = shape.get("hidden", shape.get("width", 0))
    if op in ("rms_norm", "rms_norm_residual", "layer_norm"):
        x, w = _leaf(n, h, dtype=dtype), _leaf(h, dtype=dtype)
        if op == "rms_norm":
            return lambda: ops.rms_norm(x, w), backward
        if op == "layer_norm":
            b = _leaf(h, dtype=dtype)
            return lambda: ops.layer_norm(x, w, b), backward
        r = _leaf(n, h, dtype=dtype)
        return lambda: ops.rms_norm_residual(x, r, w), backward
    if op in ("swiglu", "geglu"):
        gate, up = _leaf(n, h, dtype=dtype), _leaf(n, h, dtype=dtype)
        return lambda: getattr(ops, op)(gate, up), backward
    if op == "rope":
        dim = shape["head_dim"]
        q, k = (
            (torch.randn(1, n, shape[s], dim).to(dtype).transpose(1, 2)).requires_grad_() for s in ("heads", "kv_heads")
        )
        table = torch.randn(1, n, dim).to(dtype)
        return lambda: ops.rope(q, k, table, table), backward
    if op == "cross_entropy":
        x, y = _leaf(n, shape["vocab"], dtype=dtype), torch.randint(0, shape["vocab"], (n,))
        return lambda: ops.cross_entropy(x, y, reduction="none"), backward
    if op == "linear_cross_entropy":
        hidden, weight = _leaf(n, 8, dtype=dtype), _leaf(shape["vocab"], 8, dtype=dtype)
        y = torch.randint(0, shape["vocab"], (n,))
        return lambda: ops.linear_cross_entropy(hidden, weight, y), None
    if op == "linear_dpo":
        hidden, weight = _leaf(2, n // 2, 8, dtype=dtype), _leaf(shape["vocab"], 8, dtype=dtype)
        y = torch.randint(0, shape["vocab"], (2, n // 2))
        return lambda: ops.linear_dpo(hidden, weight, y, torch.zeros(2))[0], backward
    if op == "lora_linear":
        x, w = _leaf(n, 32, dtype=dtype), _leaf(shape["out"], 32, dtype=dtype)
        a, b = _leaf(shape["rank"], 32, dtype=dtype), _leaf(shape["out"], shape["rank"], dtype=dtype)
        return lambda: ops.lora_linear(x, w, a, b, 2.0), None
    p, g = torch.randn(shape["numel"]).to(dtype), torch.randn(shape["numel"]).to(dtype)
    state = ops.new_state(p)
    return lambda: ops.adamw8bit(p, g, state, step=1, lr=1e-3), None


def count(
    op: str, rows: int, hidden: int, dtype: str = "bf16", arch: str = "sm_90", sku: str | None = "H100-80"
) -> Iterator[dict[str, Any]]:
    """One row a direction. The values are not looked at, so loads are not performed (a dry run of the same programs)."""
    interpreter.quick()
    shape = shape_of(op, rows, hidden)
    operator = registry.operator(op)
    with runtime.interpret(arch, sku):
        forward, backward = programs(op, shape, DTYPES[dtype])
        for direction in ("forward", "backward") if backward else ("forward",):
            with interpreter.counting(dry=True) as launches:
                if direction == "forward":
                    made = forward()
                elif backward:
                    backward(made)
            floor = operator.floor(direction, dtype, shape)
            moved, requested = sum(x.bytes for x in launches), sum(x.requested for x in launches)
            yield {
                "op": op, "direction": direction, "shape": shape, "dtype": dtype, "bytes": moved, "requested_bytes": requested,
                "floor_bytes": floor, "ratio": round(moved / floor, 4), "bound": BOUND if operator.pointwise else None,
                "launches": [{"kernel": x.kernel, "loaded": x.loaded, "stored": x.stored} for x in launches],
                "arch": arch, "sku": sku, "item_bytes": ITEMSIZE[dtype],
            }  # fmt: skip


def rows(
    operators: Iterable[str], n: int, hidden: int, dtype: str, arch: str, sku: str | None
) -> Iterator[dict[str, Any]]:
    for op in operators:
        yield from count(op, n, hidden, dtype, arch, sku)
