"""LayerNorm as registered operators with autograd."""

import torch

from aifactory_train.kernels import runtime
from aifactory_train.kernels.layer_norm import reference, space
from aifactory_train.kernels.rms_norm.op import sum_columns
from aifactory_train.kernels.spec import cdiv, grid_stride

__all__ = ["layer_norm"]


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """Layer normalisation of the last dimension.

    ``x`` [..., H] in bf16, fp16 or fp32, any row stride; ``weight`` and ``bias`` [H] or None (a bias needs a weight);
    fp32 mean, variance and gradients; the result has x's shape and dtype. Differentiable in x, weight and bias.
    """
    if weight is None and bias is not None:
        raise ValueError("layer_norm: a bias without a weight is not supported")
    if not runtime.use_triton("layer_norm", x):
        return reference.layer_norm(x, weight, bias, eps)
    return torch.ops.aifactory.layer_norm_fwd(x, weight, bias, eps)[0]


@runtime.custom_op("layer_norm_fwd", "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)")
def layer_norm_fwd(x, weight, bias, eps):
    if not runtime.use_triton("layer_norm", x):
        var, mean = torch.var_mean(runtime.wide(x), -1, correction=0)
        return reference.layer_norm(x, weight, bias, eps), mean.float(), torch.rsqrt(var + eps).float()
    from aifactory_train.kernels.layer_norm.triton_kernels import layer_norm_fwd as kernel

    x2 = runtime.rows2d(x)
    n, h = x2.shape
    y = x.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    if n == 0:
        return y, mean, rstd
    config = runtime.launch("layer_norm", x, rows=n, hidden=h)["layer_norm_fwd"]
    constexprs = space.forward_constexprs(config, "", {"hidden": h})
    constexprs |= {"HAS_W": weight is not None, "HAS_B": bias is not None}
    kernel[(cdiv(n, config["rows"]),)](
        x2,
        weight if weight is not None else x2,
        bias if bias is not None else x2,
        y,
        mean,
        rstd,
        x2.stride(0),
        h,
        n,
        h,
        eps,
        **constexprs,
        **runtime.compiler_options(config),
    )
    return y, mean, rstd


@layer_norm_fwd.register_fake
def _(x, weight, bias, eps):
    stat = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), stat, torch.empty_like(stat)


@runtime.custom_op(
    "layer_norm_bwd",
    "(Tensor dy, Tensor x, Tensor? weight, bool has_bias, Tensor mean, Tensor rstd, float eps) -> (Tensor, Tensor, "
    "Tensor)",
)
def layer_norm_bwd(dy, x, weight, has_bias, mean, rstd, eps):
    none = x.new_empty(0)
    if not runtime.use_triton("layer_norm", x):
        dx, dw, db = reference.layer_norm_backward(dy, x, weight, eps)
        return (
            dx,
            dw.to(weight.dtype) if weight is not None else none,
            db.to(weight.dtype) if has_bias else x.new_empty(0),
        )
    from aifactory_train.kernels.layer_norm.triton_kernels import layer_norm_bwd as kernel
    from aifactory_train.kernels.reduce import column_sum

    x2, dy2 = runtime.rows2d(x), runtime.rows2d(dy)
    n, h = x2.shape
    dx = x.new_empty(x.shape)
    if n == 0:
        zeros = torch.zeros_like(weight) if weight is not None else none
        return dx, zeros, torch.zeros_like(weight) if has_bias else x.new_empty(0)
    configs = runtime.launch("layer_norm", x, rows=n, hidden=h)
    config = configs["layer_norm_bwd"]
    programs = grid_stride(config, n, runtime.units(x))
    constexprs = space.backward_constexprs(config, "", {"hidden": h})
    constexprs |= {"HAS_W": weight is not None, "SUMS": weight is not None}
    partial = x.new_empty((programs, 2 * h) if weight is not None else (1, 1), dtype=torch.float32)
    kernel[(constexprs["CHUNKS"], programs)](
        dy2, x2, weight if weight is not None else x2, mean, rstd, dx, partial, dy2.stride(0), x2.stride(0), h, n, h,
        **constexprs, **runtime.compiler_options(config),
    )  # fmt: skip
    if weight is None:
        return dx, none, x.new_empty(0)
    both = sum_columns(column_sum, configs["layer_norm_sum"], partial, weight.new_empty(2 * h))
    return dx, both[:h].clone(), both[h:].clone() if has_bias else x.new_empty(0)


@layer_norm_bwd.register_fake
def _(dy, x, weight, has_bias, mean, rstd, eps):
    dw = torch.empty_like(weight) if weight is not None else x.new_empty(0)
    return x.new_empty(x.shape), dw, torch.empty_like(weight) if has_bias else x.new_empty(0)


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # the first result alone has a gradient: no zeros are made
    x, weight, bias, ctx.eps = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx, dy, _mean, _rstd):
    x, weight, mean, rstd = ctx.saved_tensors
    dx, dw, db = torch.ops.aifactory.layer_norm_bwd(dy, x, weight, ctx.has_bias, mean, rstd, ctx.eps)
    return dx, dw if weight is not None else None, db if ctx.has_bias else None, None


layer_norm_fwd.register_autograd(_backward, setup_context=_setup)
