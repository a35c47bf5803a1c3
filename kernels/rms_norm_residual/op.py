"""Residual + RMSNorm as registered operators with autograd."""

import torch

from aifactory_train.kernels import runtime
from aifactory_train.kernels.rms_norm.op import launch_backward, launch_forward
from aifactory_train.kernels.rms_norm.reference import rms_norm_backward
from aifactory_train.kernels.rms_norm_residual import reference

__all__ = ["rms_norm_residual"]

NAME = "rms_norm_residual"


def rms_norm_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """``s = x + residual`` and its RMS normalisation in one pass.

    ``x`` and ``residual`` [..., H] of one dtype, ``weight`` [H] or None. Returns ``(y, s)`` in x's dtype; y is computed
    from the rounded s, as two separate operators would. Differentiable in x, residual and weight.
    """
    if not runtime.use_triton(NAME, x):
        return reference.rms_norm_residual(x, residual, weight, eps, offset)
    y, s, _ = torch.ops.aifactory.rms_norm_residual_fwd(x, residual, weight, eps, offset)
    return y, s


@runtime.custom_op(
    "rms_norm_residual_fwd",
    "(Tensor x, Tensor residual, Tensor? weight, float eps, float offset) -> (Tensor, Tensor, Tensor)",
)
def rms_norm_residual_fwd(x, residual, weight, eps, offset):
    if not runtime.use_triton(NAME, x):
        y, s = reference.rms_norm_residual(x, residual, weight, eps, offset)
        return y, s, torch.rsqrt(runtime.wide(s).square().mean(-1) + eps).to(torch.float32)
    y, rstd, s = launch_forward(NAME, x, residual, weight, eps, offset)
    return y, s, rstd


@rms_norm_residual_fwd.register_fake
def _(x, residual, weight, eps, offset):
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@runtime.custom_op(
    "rms_norm_residual_bwd",
    "(Tensor dy, Tensor ds, Tensor s, Tensor? weight, Tensor rstd, float eps, float offset) -> (Tensor, Tensor)",
)
def rms_norm_residual_bwd(dy, ds, s, weight, rstd, eps, offset):
    if not runtime.use_triton(NAME, s):
        dx, dw = rms_norm_backward(dy, s, weight, eps, offset)
        return dx + ds, dw if dw is not None else s.new_empty(0)
    return launch_backward(NAME, dy, ds, s, weight, rstd, offset)


@rms_norm_residual_bwd.register_fake
def _(dy, ds, s, weight, rstd, eps, offset):
    return s.new_empty(s.shape), torch.empty_like(weight) if weight is not None else s.new_empty(0)


def _setup(ctx, inputs, output):
    _, _, weight, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(output[1], weight, output[2])
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, dy, ds, _):
    s, weight, rstd = ctx.saved_tensors
    grad, dw = torch.ops.aifactory.rms_norm_residual_bwd(dy, ds, s, weight, rstd, ctx.eps, ctx.offset)
    return grad, grad, dw if weight is not None else None, None, None


rms_norm_residual_fwd.register_autograd(_backward, setup_context=_setup)
