"""Sharding rules: how each registered operator acts on DTensors, so that FSDP2, tensor and sequence parallelism see through it.

Rows are independent in every operator: an input sharded over a row dimension gives outputs sharded the same way, and gradients that
are summed over rows come out as partial sums. The normalised, gated or vocabulary dimension is never sharded.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch


def gathered(weight: Any) -> torch.Tensor:
    """A plain tensor: a DTensor weight is gathered, and its gradient goes back as a partial sum (reduce-scattered to its shards)."""
    if _DTENSOR is None or not isinstance(weight, _DTENSOR):
        return weight
    from torch.distributed.tensor import Partial, Replicate

    sharded: Any = weight
    mesh = sharded.device_mesh
    return sharded.redistribute(mesh, [Replicate()] * mesh.ndim).to_local(grad_placements=[Partial()] * mesh.ndim)


# The DTensor class once the rules are registered; a plain variable, because torch.compile traces the test in `gathered`.
_DTENSOR: type | None = None


@lru_cache(None)
def register() -> None:
    """Register the rules once; nothing to do where torch was built without distributed support."""
    global _DTENSOR
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    _DTENSOR = DTensor
    ops = torch.ops.aifactory
    whole, total = Replicate(), Partial()

    def rows(tensor) -> range:
        """Dimensions that may be sharded: all but the last."""
        return range(len(tensor.shape) - 1)

    def optional(tensor, placement):
        return placement if tensor is not None else None

    @register_sharding(ops.rms_norm_fwd.default)
    def _(x, weight, eps, offset):
        return [([whole] * 2, [whole, optional(weight, whole), None, None])] + [
            ([Shard(d)] * 2, [Shard(d), optional(weight, whole), None, None]) for d in rows(x)
        ]

    @register_sharding(ops.rms_norm_bwd.default)
    def _(dy, x, weight, rstd, eps, offset):
        return [([whole] * 2, [whole, whole, optional(weight, whole), whole, None, None])] + [
            ([Shard(d), total], [Shard(d), Shard(d), optional(weight, whole), Shard(d), None, None]) for d in rows(x)
        ]

    @register_sharding(ops.rms_norm_residual_fwd.default)
    def _(x, residual, weight, eps, offset):
        return [([whole] * 3, [whole, whole, optional(weight, whole), None, None])] + [
            ([Shard(d)] * 3, [Shard(d), Shard(d), optional(weight, whole), None, None]) for d in rows(x)
        ]

    @register_sharding(ops.rms_norm_residual_bwd.default)
    def _(dy, ds, s, weight, rstd, eps, offset):
        return [([whole] * 2, [whole, whole, whole, optional(weight, whole), whole, None, None])] + [
            ([Shard(d), total], [Shard(d)] * 3 + [optional(weight, whole), Shard(d), None, None]) for d in rows(s)
        ]

    @register_sharding(ops.layer_norm_fwd.default)
    def _(x, weight, bias, eps):
        return [([whole] * 3, [whole, optional(weight, whole), optional(bias, whole), None])] + [
            ([Shard(d)] * 3, [Shard(d), optional(weight, whole), optional(bias, whole), None]) for d in rows(x)
        ]

    @register_sharding(ops.layer_norm_bwd.default)
    def _(dy, x, weight, has_bias, mean, rstd, eps):
        return [([whole] * 3, [whole, whole, optional(weight, whole), None, whole, whole, None])] + [
            ([Shard(d), total, total], [Shard(d), Shard(d), optional(weight, whole), None, Shard(d), Shard(d), None])
            for d in rows(x)
        ]

    @register_sharding(ops.glu_fwd.default)
    def _(gate, up, kind):
        # Elementwise: the last dimension may be sharded too (tensor-parallel MLP).
        return [([p], [p, p, None]) for p in [whole, *(Shard(d) for d in range(len(gate.shape)))]]

    @register_sharding(ops.glu_bwd.default)
    def _(grad, gate, up, kind):
        return [([p, p], [p, p, p, None]) for p in [whole, *(Shard(d) for d in range(len(gate.shape)))]]

    def rope_placements(cos):
        """q and k [B, heads, S, D]: batch, heads or sequence; cos and sin [B or 1, S, D] follow batch and sequence."""
        batch = Shard(0) if cos.shape[0] > 1 else whole
        return [(whole, whole), (Shard(0), batch), (Shard(1), whole), (Shard(2), Shard(1))]

    @register_sharding(ops.rope_fwd.default)
    def _(q, k, cos, sin, q_weight, k_weight, eps, offset):
        w = [optional(q_weight, whole), optional(k_weight, whole), None, None]
        return [([x, x], [x, x, t, t, *w]) for x, t in rope_placements(cos)]

    @register_sharding(ops.rope_bwd.default)
    def _(dq, dk, cos, sin):
        return [([x, x], [x, x, t, t]) for x, t in rope_placements(cos)]

    @register_sharding(ops.rope_norm_bwd.default)
    def _(dq, dk, q, k, cos, sin, q_weight, k_weight, eps, offset):
        out = []
        for x, t in rope_placements(cos):
            sums = whole if x == whole else total
            out.append(([x, x, sums, sums], [x, x, x, x, t, t, whole, whole, None, None]))
        return out

    @register_sharding(ops.cross_entropy_fwd.default)
    def _(logits, labels, scale, softcap):
        return [([p, p], [p, p, None, None]) for p in (whole, Shard(0))]

    @register_sharding(ops.cross_entropy_bwd.default)
    def _(grad, logits, labels, lse, scale, softcap):
        return [([p], [p, p, p, p, None, None]) for p in (whole, Shard(0))]

    @register_sharding(ops.linear_cross_entropy_fwd.default)
    def _(hidden, weight, labels, bias, scale, softcap, chunk, supervised, need_hidden, need_weight):
        b, rest = optional(bias, whole), [None] * 6
        return [
            ([whole] * 4, [whole, whole, whole, b, *rest]),
            ([total, Shard(0), total, total], [Shard(0), whole, Shard(0), b, *rest]),
        ]

    @register_sharding(ops.linear_logps_fwd.default)
    def _(hidden, weight, labels, bias, scale, softcap, chunk):
        return [([p, p], [p, whole, p, optional(bias, whole), None, None, None]) for p in (whole, Shard(0))]

    @register_sharding(ops.linear_logps_bwd.default)
    def _(grad, hidden, weight, labels, bias, lse, scale, softcap, chunk):
        rest = [None] * 3
        return [
            ([whole] * 3, [whole, whole, whole, whole, optional(bias, whole), whole, *rest]),
            ([Shard(0), total, total], [Shard(0), Shard(0), whole, Shard(0), optional(bias, whole), Shard(0), *rest]),
        ]

    @register_sharding(ops.lora_linear_fwd.default)
    def _(x, weight, lora_a, lora_b, scaling, bias, x_adapter):
        out = []
        for p in [whole, Shard(0)]:
            out.append(([p, p], [p, whole, whole, whole, None, optional(bias, whole), optional(x_adapter, p)]))
        return out

    @register_sharding(ops.lora_linear_bwd.default)
    def _(dy, x, weight, lora_a, lora_b, t, scaling, x_adapter, need_x, need_weight, need_bias):
        flags = [None] * 3
        out = []
        for p in [whole, Shard(0)]:
            s = whole if p == whole else total
            out.append(([p, s, s, s, s, p], [p, p, whole, whole, whole, p, None, optional(x_adapter, p), *flags]))
        return out
