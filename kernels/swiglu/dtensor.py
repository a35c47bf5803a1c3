"""Sharding rules of the gated activations (SwiGLU and GeGLU)."""

from aifactory_train.kernels.sharding import Shard, rule, whole


@rule("glu_fwd")
def glu_fwd(gate, up, kind):
    # Elementwise: the last dimension may be sharded too (tensor-parallel MLP).
    return [([p], [p, p, None]) for p in [whole, *(Shard(d) for d in range(len(gate.shape)))]]


@rule("glu_bwd")
def glu_bwd(grad, gate, up, kind):
    return [([p, p], [p, p, p, None]) for p in [whole, *(Shard(d) for d in range(len(gate.shape)))]]
