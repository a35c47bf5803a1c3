"""Residual + RMSNorm as registered operators with autograd."""

import torch

from aifactory_train.kernels import runtime
from aifactory_train.kernels.rms_norm.op import launch_backward, launch_forward, rms_norm
from aifactory_train.kernels.rms_norm.reference import rms_norm_backward
from aifactory_train.kernels.rms_norm_residual import reference

__all__ = ["rms_norm_passing", "rms_norm_residual"]

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


def rms_norm_passing(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(norm(x), x)``: as :func:`rms_norm` with x handed on for the residual stream, so that its two gradients are
    added inside the norm's backward pass.
    """
    if not runtime.use_triton("rms_norm", x):
        return rms_norm(x, weight, eps, offset), x
    return _Passing.apply(x, weight, eps, offset)


class _Passing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        ctx.set_materialize_grads(False)
        y, rstd = torch.ops.aifactory.rms_norm_fwd(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps, ctx.offset = eps, offset
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx, dy, dx):
        x, weight, rstd = ctx.saved_tensors
        need = ctx.needs_input_grad[1]
        if dy is None:
            return dx, torch.zeros_like(weight) if need else None, None, None
        if dx is None:
            grad, dw = torch.ops.aifactory.rms_norm_bwd(dy, x, weight, rstd, ctx.eps, ctx.offset, need)
        else:
            grad, dw = torch.ops.aifactory.rms_norm_residual_bwd(dy, dx, x, weight, rstd, ctx.eps, ctx.offset, need)
        return grad, dw if need else None, None, None


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
    "(Tensor dy, Tensor ds, Tensor s, Tensor? weight, Tensor rstd, float eps, float offset, bool need_weight=True)"
    " -> (Tensor, Tensor)",
)
def rms_norm_residual_bwd(dy, ds, s, weight, rstd, eps, offset, need_weight=True):
    if not runtime.use_triton(NAME, s):
        dx, dw = rms_norm_backward(dy, s, weight, eps, offset)
        return dx + ds, dw if dw is not None and need_weight else s.new_empty(0)
    return launch_backward(NAME, dy, ds, s, weight, rstd, offset, need_weight)


@rms_norm_residual_bwd.register_fake
def _(dy, ds, s, weight, rstd, eps, offset, need_weight=True):
    return s.new_empty(s.shape), torch.empty_like(weight) if weight is not None and need_weight else s.new_empty(0)


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # the statistic has no gradient: no zeros are made for it
    _, _, weight, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(output[1], weight, output[2])
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, dy, ds, _):
    s, weight, rstd = ctx.saved_tensors
    dy, ds = (torch.zeros_like(s) if grad is None else grad for grad in (dy, ds))
    need = ctx.needs_input_grad[2]
    grad, dw = torch.ops.aifactory.rms_norm_residual_bwd(dy, ds, s, weight, rstd, ctx.eps, ctx.offset, need)
    return grad, grad, dw if need else None, None, None


rms_norm_residual_fwd.register_autograd(_backward, setup_context=_setup)
