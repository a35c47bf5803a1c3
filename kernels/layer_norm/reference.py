"""LayerNorm in plain torch: the oracle of the tests (fp64-capable) and the CPU path."""

import torch

from aifactory_train.kernels.runtime import wide


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension, in at least fp32, in x's dtype."""
    f = wide(x)
    y = torch.nn.functional.layer_norm(
        f,
        x.shape[-1:],
        weight.to(f.dtype) if weight is not None else None,
        bias.to(f.dtype) if bias is not None else None,
        eps,
    )
    return y.to(x.dtype)


def layer_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dweight, dbias) in closed form; the last two in at least fp32."""
    f, g = wide(x), wide(dy)
    var, mean = torch.var_mean(f, -1, correction=0, keepdim=True)
    r = torch.rsqrt(var + eps)
    xhat = (f - mean) * r
    wdy = g if weight is None else g * weight.to(f.dtype)
    dx = (wdy - wdy.mean(-1, keepdim=True) - xhat * (wdy * xhat).mean(-1, keepdim=True)) * r
    flat = g.reshape(-1, x.shape[-1])
    return dx.to(x.dtype), (flat * xhat.reshape(flat.shape)).sum(0), flat.sum(0)
