"""Sharding rules of LayerNorm."""

from aifactory_train.kernels.sharding import Shard, optional, rows, rule, total, whole


@rule("layer_norm_fwd")
def layer_norm_fwd(x, weight, bias, eps):
    return [([whole] * 3, [whole, optional(weight, whole), optional(bias, whole), None])] + [
        ([Shard(d)] * 3, [Shard(d), optional(weight, whole), optional(bias, whole), None]) for d in rows(x)
    ]


@rule("layer_norm_bwd")
def layer_norm_bwd(dy, x, weight, has_bias, mean, rstd, eps):
    return [([whole] * 3, [whole, whole, optional(weight, whole), None, whole, whole, None])] + [
        ([Shard(d), total, total], [Shard(d), Shard(d), optional(weight, whole), None, Shard(d), Shard(d), None])
        for d in rows(x)
    ]
