"""LoRA linear in plain torch: the oracle of the tests (fp64-capable) and the CPU path."""

import torch


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    x_adapter: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x W^T + bias + scaling (x_adapter A^T) B^T``; ``x_adapter`` defaults to x."""
    linear = torch.nn.functional.linear
    return linear(x, weight, bias) + linear(linear(x if x_adapter is None else x_adapter, lora_a), lora_b) * scaling
