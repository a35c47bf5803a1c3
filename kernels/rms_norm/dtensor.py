"""Sharding rules of RMSNorm."""

from aifactory_train.kernels.sharding import Shard, optional, rows, rule, total, whole


@rule("rms_norm_fwd")
def rms_norm_fwd(x, weight, eps, offset):
    return [([whole] * 2, [whole, optional(weight, whole), None, None])] + [
        ([Shard(d)] * 2, [Shard(d), optional(weight, whole), None, None]) for d in rows(x)
    ]


@rule("rms_norm_bwd")
def rms_norm_bwd(dy, x, weight, rstd, eps, offset, need_weight=True):
    return [([whole] * 2, [whole, whole, optional(weight, whole), whole, None, None])] + [
        ([Shard(d), total], [Shard(d), Shard(d), optional(weight, whole), Shard(d), None, None]) for d in rows(x)
    ]
