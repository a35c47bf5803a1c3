"""RMSNorm as registered operators with autograd."""

import torch

from aifactory_train.kernels import runtime
from aifactory_train.kernels.rms_norm import reference, space
from aifactory_train.kernels.spec import cdiv, grid_stride

__all__ = ["rms_norm"]


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, offset: float = 0.0
) -> torch.Tensor:
    """RMS normalisation of the last dimension.

    ``x`` [..., H] in bf16, fp16 or fp32, any row stride; ``weight`` [H] or None; the result has x's shape and dtype,
    fp32 inside. ``offset`` is added to the weight (1.0 for Gemma). Differentiable in x and weight.
    """
    if not runtime.use_triton("rms_norm", x):
        return reference.rms_norm(x, weight, eps, offset)
    return torch.ops.aifactory.rms_norm_fwd(x, weight, eps, offset)[0]


@runtime.custom_op("rms_norm_fwd", "(Tensor x, Tensor? weight, float eps, float offset) -> (Tensor, Tensor)")
def rms_norm_fwd(x, weight, eps, offset):
    if not runtime.use_triton("rms_norm", x):
        f = runtime.wide(x)
        return reference.rms_norm(x, weight, eps, offset), torch.rsqrt(f.square().mean(-1) + eps).to(torch.float32)
    return launch_forward("rms_norm", x, None, weight, eps, offset)[:2]


@rms_norm_fwd.register_fake
def _(x, weight, eps, offset):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@runtime.custom_op(
    "rms_norm_bwd",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, float eps, float offset, bool need_weight=True) -> "
    "(Tensor, Tensor)",
)
def rms_norm_bwd(dy, x, weight, rstd, eps, offset, need_weight=True):
    if not runtime.use_triton("rms_norm", x):
        dx, dw = reference.rms_norm_backward(dy, x, weight, eps, offset)
        return dx, dw if dw is not None and need_weight else x.new_empty(0)
    return launch_backward("rms_norm", dy, None, x, weight, rstd, offset, need_weight)


@rms_norm_bwd.register_fake
def _(dy, x, weight, rstd, eps, offset, need_weight=True):
    return x.new_empty(x.shape), torch.empty_like(weight) if weight is not None and need_weight else x.new_empty(0)


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # the statistic has no gradient: no zeros are made for it
    x, weight, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy, _):
    x, weight, rstd = ctx.saved_tensors
    need = ctx.needs_input_grad[1]
    dx, dw = torch.ops.aifactory.rms_norm_bwd(dy, x, weight, rstd, ctx.eps, ctx.offset, need)
    return dx, dw if need else None, None, None


rms_norm_fwd.register_autograd(_backward, setup_context=_setup)


def launch_forward(op, x, residual, weight, eps, offset):
    """(y, rstd, s) of the forward kernel, shared with the residual form; s is y's alias-free sum x + residual, or
    empty.
    """
    from aifactory_train.kernels.rms_norm.triton_kernels import rms_norm_fwd as kernel

    x2 = runtime.rows2d(x)
    n, h = x2.shape
    r2 = runtime.rows2d(residual) if residual is not None else x2
    y = x.new_empty(x.shape)
    s = x.new_empty(x.shape) if residual is not None else x.new_empty(0)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if n == 0:
        return y, rstd, s
    config = runtime.launch(op, x, rows=n, hidden=h)[f"{op}_fwd"]
    constexprs = space.forward_constexprs(residual is not None)(config, "", {"hidden": h})
    constexprs["HAS_W"] = weight is not None
    kernel[(cdiv(n, config["rows"]),)](
        x2, r2, weight if weight is not None else x2, y, s, rstd, x2.stride(0), r2.stride(0), h, h, n, h, eps, offset,
        **constexprs, **runtime.compiler_options(config),
    )  # fmt: skip
    return y, rstd, s


def launch_backward(op, dy, ds, x, weight, rstd, offset, need_weight=True):
    """(dx, dweight) of the backward kernel; with ``ds`` the gradient of the residual stream is added to dx. The partial
    rows of a weight that needs no gradient are not summed.
    """
    from aifactory_train.kernels.reduce import column_sum
    from aifactory_train.kernels.rms_norm.triton_kernels import rms_norm_bwd as kernel

    x2, dy2 = runtime.rows2d(x), runtime.rows2d(dy)
    ds2 = runtime.rows2d(ds) if ds is not None else dy2
    n, h = x2.shape
    dx = x.new_empty(x.shape)
    if n == 0:
        return dx, torch.zeros_like(weight) if weight is not None and need_weight else x.new_empty(0)
    configs = runtime.launch(op, x, rows=n, hidden=h)
    config = configs[f"{op}_bwd"]
    programs = grid_stride(config, n, runtime.units(x))
    constexprs = space.backward_constexprs(ds is not None)(config, "", {"hidden": h})
    constexprs["HAS_W"] = weight is not None
    partial = x.new_empty((programs, h) if weight is not None else (1, 1), dtype=torch.float32)
    kernel[(constexprs["CHUNKS"], programs)](
        dy2, ds2, x2, weight if weight is not None else x2, rstd, dx, partial,
        dy2.stride(0), ds2.stride(0), x2.stride(0), h, n, h, offset,
        **constexprs, **runtime.compiler_options(config),
    )  # fmt: skip
    if weight is None or not need_weight:
        return dx, x.new_empty(0)
    return dx, sum_columns(column_sum, configs[f"{op}_sum"], partial, weight)


def sum_columns(kernel, config, partial, like):
    """Sum the fp32 partial rows [G, H] into a tensor like ``like``."""
    out = torch.empty_like(like)
    g, h = partial.shape
    kernel[(cdiv(h, config["block"]),)](
        partial, out, g, h, ROWS=config["rows"], BLOCK=config["block"], **runtime.compiler_options(config)
    )
    return out
