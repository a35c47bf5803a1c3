"""Grouped linear in plain torch: the oracle of the tests (fp64-capable)."""

import torch


def grouped_linear(x, weight, offsets, lora_a=None, lora_b=None, scaling=1.0, bias=None):
    """The operator of that name: each expert's rows through its own linear layer."""
    linear = torch.nn.functional.linear
    parts = []
    for e, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        rows = x[start:end]
        y = linear(rows, weight[e], None if bias is None else bias[e])
        if lora_a is not None and lora_b is not None:
            y = y + linear(linear(rows, lora_a[e]), lora_b[e]) * scaling
        parts.append(y)
    return torch.cat(parts)
