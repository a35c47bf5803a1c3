"""Cross-entropy in plain torch: the oracle of the tests (fp64-capable) and the CPU path."""

import torch

from aifactory_train.kernels.runtime import IGNORE, wide


def shape_logits(logits: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """``softcap * tanh(scale * logits / softcap)`` in at least fp32 (Gemma 2); without a cap only the scale."""
    f = wide(logits)
    f = f * scale if scale != 1.0 else f
    return softcap * torch.tanh(f / softcap) if softcap else f


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, scale: float = 1.0, softcap: float | None = None
) -> torch.Tensor:
    """Loss of every row, [N] in at least fp32; 0 where the label is -100."""
    f = shape_logits(logits, scale, softcap)
    return torch.nn.functional.cross_entropy(f, labels, ignore_index=IGNORE, reduction="none")


def cross_entropy_backward(
    grad: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, scale: float = 1.0, softcap: float | None = None
) -> torch.Tensor:
    """``grad[row] * d loss[row] / d logits`` in closed form, in at least fp32; 0 where the label is -100."""
    shaped = shape_logits(logits, scale, softcap)
    slope = torch.softmax(shaped, -1)
    slope.scatter_add_(1, labels.clamp(min=0).unsqueeze(1), slope.new_full((labels.shape[0], 1), -1.0))
    if softcap:
        slope *= 1 - (shaped / softcap).square()
    return slope * (grad * scale * (labels != IGNORE)).unsqueeze(1)
