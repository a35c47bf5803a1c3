"""Sharding rules of the log-probabilities of the chunked preference loss."""

from aifactory_train.kernels.sharding import Shard, optional, rule, total, whole


@rule("linear_logps_fwd")
def linear_logps_fwd(hidden, weight, labels, bias, scale, softcap, chunk):
    return [([p, p], [p, whole, p, optional(bias, whole), None, None, None]) for p in (whole, Shard(0))]


@rule("linear_logps_bwd")
def linear_logps_bwd(grad, hidden, weight, labels, bias, lse, scale, softcap, chunk):
    rest = [None] * 3
    return [
        ([whole] * 3, [whole, whole, whole, whole, optional(bias, whole), whole, *rest]),
        ([Shard(0), total, total], [Shard(0), Shard(0), whole, Shard(0), optional(bias, whole), Shard(0), *rest]),
    ]
