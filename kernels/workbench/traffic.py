"""Counts the bytes of every operator in the interpreter and holds them against the floor that its mathematics sets.

A launch's bytes are its distinct addresses, loads and stores apart; an operator's bytes are the sum over its launches,
so a partial sum that one kernel writes and the next one reads counts twice. Requested bytes count every access, also
those that a cache serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from aifactory_train.kernels import registry, runtime
from aifactory_train.kernels.spec import ITEMSIZE
from aifactory_train.kernels.workbench import inputs, interpreter

#: the ratio that a pointwise operator must keep, and the others for information
BOUND = 1.10

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def shape_of(op: str, rows: int, hidden: int) -> dict[str, int]:
    """The shape that is counted for: hidden is the row width of every operator (32 query and 8 key heads for RoPE); a
    dimension that has no usual size takes that of the operator's first shape to check."""
    sizes = {"rows": rows, "hidden": hidden, "width": hidden, "vocab": hidden, "heads": hidden // 128 or 1,
             "kv_heads": max(1, hidden // 512), "head_dim": 128, "in": hidden, "out": hidden, "rank": 16,
             "numel": rows * hidden}  # fmt: skip
    operator = registry.operator(op)
    return {d: sizes.get(d, operator.checks[0][d]) for d in operator.dims}


def programs(
    op: str, shape: dict[str, int], dtype: torch.dtype
) -> tuple[Callable[[], Any], Callable[[Any], None] | None]:
    """(forward, backward of its result) of an operator on random inputs; no backward where there is none or it is part
    of forward.
    """
    operator = registry.operator(op)
    arguments = inputs.draw(op, shape | {d: v for d, v in operator.shrink.items() if d in shape}, dtype)
    run = inputs.function(op)

    def backward(out: Any) -> None:
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        torch.autograd.backward(outs, [torch.randn_like(o) for o in outs])

    return lambda: run(*arguments), backward if "backward" in operator.counted else None


def count(
    op: str, rows: int, hidden: int, dtype: str = "bf16", arch: str = "sm_90", sku: str | None = "H100-80"
) -> Iterator[dict[str, Any]]:
    """One row a direction. The values are not looked at, so loads are not performed (a dry run of the same
    programs).
    """
    interpreter.quick()
    shape = shape_of(op, rows, hidden)
    operator = registry.operator(op)
    with runtime.interpret(arch, sku):
        forward, backward = programs(op, shape, DTYPES[dtype])
        for direction in ("forward", "backward") if backward else ("forward",):
            with interpreter.counting(dry=operator.dry) as launches:
                if direction == "forward":
                    made = forward()
                elif backward:
                    backward(made)
            floor = operator.floor(direction, dtype, shape)
            moved, requested = sum(x.bytes for x in launches), sum(x.requested for x in launches)
            yield {
                "op": op,
                "direction": direction,
                "shape": shape,
                "dtype": dtype,
                "bytes": moved,
                "requested_bytes": requested,
                "floor_bytes": floor,
                "ratio": round(moved / floor, 4),
                "bound": BOUND if operator.pointwise else None,
                "launches": [{"kernel": x.kernel, "loaded": x.loaded, "stored": x.stored} for x in launches],
                "arch": arch,
                "sku": sku,
                "item_bytes": ITEMSIZE[dtype],
            }


def rows(
    operators: Iterable[str], n: int, hidden: int, dtype: str, arch: str, sku: str | None
) -> Iterator[dict[str, Any]]:
    for op in operators:
        yield from count(op, n, hidden, dtype, arch, sku)
