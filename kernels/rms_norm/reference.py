"""RMSNorm in plain torch: the oracle of the tests (fp64-capable) and the CPU path."""

import torch

from aifactory_train.kernels.runtime import wide


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float = 0.0) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * (weight + offset)`` over the last dimension, computed in at least fp32, in x's
    dtype.
    """
    f = wide(x)
    y = f * torch.rsqrt(f.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(f.dtype) + offset)
    return y.to(x.dtype)


def rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dx, dweight) in closed form: autograd is off inside a registered operator."""
    f, g = wide(x), wide(dy)
    r = torch.rsqrt(f.square().mean(-1, keepdim=True) + eps)
    xhat = f * r
    wdy = g if weight is None else g * (weight.to(f.dtype) + offset)
    dx = (wdy - xhat * (wdy * xhat).mean(-1, keepdim=True)) * r
    dw = None if weight is None else (g * xhat).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return dx.to(x.dtype), dw
