"""Sharding rules of the chunked linear cross-entropy."""

from aifactory_train.kernels.sharding import Shard, optional, rule, total, whole


@rule("linear_cross_entropy_fwd")
def linear_cross_entropy_fwd(hidden, weight, labels, bias, scale, softcap, chunk, supervised, need_hidden, need_weight):
    b, rest = optional(bias, whole), [None] * 6
    return [
        ([whole] * 4, [whole, whole, whole, b, *rest]),
        ([total, Shard(0), total, total], [Shard(0), whole, Shard(0), b, *rest]),
    ]
