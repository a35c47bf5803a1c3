"""Sharding rules of the LoRA linear."""

from aifactory_train.kernels.sharding import Shard, optional, rule, total, whole


@rule("lora_linear_fwd")
def lora_linear_fwd(x, weight, lora_a, lora_b, scaling, bias, x_adapter):
    out = [
        ([p, p], [p, whole, whole, whole, None, optional(bias, whole), optional(x_adapter, p)])
        for p in [whole, Shard(0)]
    ]
    return out


@rule("lora_linear_bwd")
def lora_linear_bwd(dy, x, weight, lora_a, lora_b, t, scaling, x_adapter, need_x, need_weight, need_bias):
    flags = [None] * 3
    out = []
    for p in [whole, Shard(0)]:
        s = whole if p == whole else total
        out.append(([p, s, s, s, s, p], [p, p, whole, whole, whole, p, None, optional(x_adapter, p), *flags]))
    return out
