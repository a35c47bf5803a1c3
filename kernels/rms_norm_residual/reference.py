"""Residual + RMSNorm in plain torch: the oracle of the tests (fp64-capable) and the CPU path."""

import torch

from aifactory_train.kernels.rms_norm.reference import rms_norm


def rms_norm_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """``s = x + residual``; returns ``(rms_norm(s), s)``, both in x's dtype."""
    s = x + residual
    return rms_norm(s, weight, eps, offset), s
