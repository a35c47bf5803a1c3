"""LayerNorm in plain torch: the oracle of the tests (fp64-capable) and the CPU path."""

import torch

from aifactory_train.kernels.runtime import wide


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension, in at least fp32, in x's dtype."""
    f = wide(x)
    like = {"dtype": f.dtype}
    y = torch.nn.functional.layer_norm(
        f,
        x.shape[-1:],
        weight.to(**like) if weight is not None else None,
        bias.to(**like) if bias is not None else None,
        eps,
    )
    return y.to(x.dtype)
