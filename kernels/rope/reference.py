"""RoPE in plain torch: the oracle of the tests (fp64-capable) and the CPU path."""

import torch

from aifactory_train.kernels.rms_norm.reference import rms_norm, rms_norm_backward


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``x cos + rotate_half(x) sin`` with x [B, heads, S, D] and cos, sin [B or 1, S, D]."""
    cos, sin = cos.unsqueeze(1).to(x.dtype), sin.unsqueeze(1).to(x.dtype)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def rope(q, k, cos, sin, q_weight=None, k_weight=None, eps=1e-6, offset=0.0):
    """The operator of that name: rotated (q, k), each normalised over D first where a weight is given."""
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm(q, q_weight, eps, offset), rms_norm(k, k_weight, eps, offset)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def rope_norm_backward(dq, dk, q, k, cos, sin, q_weight, k_weight, eps, offset):
    """(dq, dk, dq_weight, dk_weight) in closed form: turn back, then through each head's normalisation."""
    gq, wq = rms_norm_backward(rotate(dq, cos, -sin), q, q_weight, eps, offset)
    gk, wk = rms_norm_backward(rotate(dk, cos, -sin), k, k_weight, eps, offset)
    return gq, gk, wq, wk
