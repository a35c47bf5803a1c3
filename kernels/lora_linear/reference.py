"""LoRA linear in plain torch: the oracle of the tests (fp64-capable) and the CPU path."""

import torch


def lora_linear(x, weight, lora_a, lora_b, scaling, bias=None, x_adapter=None):
    """The operator of that name: ``x W^T + bias + scaling (x_adapter A^T) B^T``; ``x_adapter`` defaults to x."""
    linear = torch.nn.functional.linear
    return linear(x, weight, bias) + linear(linear(x if x_adapter is None else x_adapter, lora_a), lora_b) * scaling
