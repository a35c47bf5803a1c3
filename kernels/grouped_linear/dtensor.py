"""Sharding rules of the grouped linear: whole, or the columns of the result. Rows cannot be cut: experts have them."""

from aifactory_train.kernels.sharding import Shard, optional, rule, total, whole


@rule("grouped_linear_fwd")
def grouped_linear_fwd(x, weight, offsets, lora_a, lora_b, scaling, bias, kernels):
    found = []
    for y, w in ((whole, whole), (Shard(1), Shard(1))):
        arguments = [whole, w, whole, optional(lora_a, whole), optional(lora_b, w), None, optional(bias, w), None]
        found.append(([y, whole], arguments))
    return found


@rule("grouped_linear_bwd")
def grouped_linear_bwd(dy, x, weight, offsets, lora_a, lora_b, t, scaling, need_x, need_weight, need_bias, kernels):
    found = []
    for y, w, sums in ((whole, whole, whole), (Shard(1), Shard(1), total)):
        a = sums if lora_a is not None else whole
        b = w if lora_b is not None else whole
        outputs = [sums if need_x else whole, w if need_weight else whole, a, b, w if need_bias else whole]
        adapters = [optional(lora_a, whole), optional(lora_b, w)]
        found.append((outputs, [y, whole, w, whole, *adapters, whole, *[None] * 5]))
    return found
