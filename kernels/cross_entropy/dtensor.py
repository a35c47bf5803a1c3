"""Sharding rules of cross-entropy."""

from aifactory_train.kernels.sharding import Shard, rule, whole


@rule("cross_entropy_fwd")
def cross_entropy_fwd(logits, labels, scale, softcap):
    return [([p, p], [p, p, None, None]) for p in (whole, Shard(0))]


@rule("cross_entropy_bwd")
def cross_entropy_bwd(grad, logits, labels, lse, scale, softcap):
    return [([p], [p, p, p, p, None, None]) for p in (whole, Shard(0))]
