"""Sharding rules of RoPE."""

from aifactory_train.kernels.sharding import Shard, optional, rule, total, whole


def rope_placements(cos):
    """q and k [B, heads, S, D]: batch, heads or sequence; cos and sin [B or 1, S, D] follow batch and sequence."""
    batch = Shard(0) if cos.shape[0] > 1 else whole
    return [(whole, whole), (Shard(0), batch), (Shard(1), whole), (Shard(2), Shard(1))]


@rule("rope_fwd")
def rope_fwd(q, k, cos, sin, q_weight, k_weight, eps, offset):
    w = [optional(q_weight, whole), optional(k_weight, whole), None, None]
    return [([x, x], [x, x, t, t, *w]) for x, t in rope_placements(cos)]


@rule("rope_bwd")
def rope_bwd(dq, dk, cos, sin):
    return [([x, x], [x, x, t, t]) for x, t in rope_placements(cos)]


@rule("rope_norm_bwd")
def rope_norm_bwd(dq, dk, q, k, cos, sin, q_weight, k_weight, eps, offset):
    out = []
    for x, t in rope_placements(cos):
        sums = whole if x == whole else total
        out.append(([x, x, sums, sums], [x, x, x, x, t, t, whole, whole, None, None]))
    return out
