"""Sharding rules of residual + RMSNorm."""

from aifactory_train.kernels.sharding import Shard, optional, rows, rule, total, whole


@rule("rms_norm_residual_fwd")
def rms_norm_residual_fwd(x, residual, weight, eps, offset):
    return [([whole] * 3, [whole, whole, optional(weight, whole), None, None])] + [
        ([Shard(d)] * 3, [Shard(d), Shard(d), optional(weight, whole), None, None]) for d in rows(x)
    ]


@rule("rms_norm_residual_bwd")
def rms_norm_residual_bwd(dy, ds, s, weight, rstd, eps, offset, need_weight=True):
    return [([whole] * 2, [whole, whole, whole, optional(weight, whole), whole, None, None])] + [
        ([Shard(d), total], [Shard(d)] * 3 + [optional(weight, whole), Shard(d), None, None]) for d in rows(s)
    ]
