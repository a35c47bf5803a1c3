"""Sharding rules of attention: whole, or heads (those that share keys and values stay together)."""

from aifactory_train.kernels.sharding import Shard, optional, rule, whole


@rule("attention_fwd")
def attention_fwd(q, k, v, cu_seqlens, max_length, sinks, slopes, scale, window, chunk, softcap):
    out = []
    for x, h in ((whole, whole), (Shard(1), Shard(0))):
        out.append(([x, h], [x, x, x, whole, None, optional(sinks, h), optional(slopes, h), *[None] * 4]))
    return out


@rule("attention_bwd")
def attention_bwd(dout, q, k, v, cu_seqlens, out, lse, max_length, sinks, slopes, scale, window, chunk, softcap):
    found = []
    for x, h in ((whole, whole), (Shard(1), Shard(0))):
        sums = h if sinks is not None else whole
        arguments = [x, x, x, x, whole, x, h, None, optional(sinks, h), optional(slopes, h), *[None] * 4]
        found.append(([x, x, x, sums], arguments))
    return found
