"""LoRA linear as registered operators with autograd."""

import torch

from aifactory_train.kernels import runtime
from aifactory_train.kernels.lora_linear import reference, space
from aifactory_train.kernels.lora_linear.several import lora_gated_down, lora_linears, scaled_product
from aifactory_train.kernels.spec import cdiv

__all__ = ["lora_gated_down", "lora_linear", "lora_linears"]

NAME = "lora_linear"


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    x_adapter: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ weight.T + bias + scaling * (x_adapter @ lora_a.T) @ lora_b.T``.

    ``x`` [..., K], ``weight`` [M, K], ``lora_a`` [R, K], ``lora_b`` [M, R], one dtype for all (autocast is followed);
    ``x_adapter`` is the adapter's input when it differs from x (dropout). Differentiable in every tensor; the weight's
    gradient is computed only if asked for. Result [..., M] in that dtype.
    """
    dtype = runtime.arithmetic(x)
    x, weight, lora_a, lora_b = (t.to(dtype) for t in (x, weight, lora_a, lora_b))
    bias = bias.to(dtype) if bias is not None else None
    x_adapter = x_adapter.to(dtype) if x_adapter is not None else None
    if not runtime.use_triton(NAME, x):
        return reference.lora_linear(x, weight, lora_a, lora_b, scaling, bias, x_adapter)
    return torch.ops.aifactory.lora_linear_fwd(x, weight, lora_a, lora_b, scaling, bias, x_adapter)[0]


def epilogue(name, y, t, b, scaling, sizes):
    """``y += scaling * t @ b`` in place; y [N, M] contiguous, t [N, R], b [R, M] in any strides."""
    if not runtime.use_triton(NAME, y):
        return y.addmm_(t, b, alpha=scaling)
    from aifactory_train.kernels.lora_linear.triton_kernels import lora_epilogue as kernel

    (n, m), r = y.shape, t.shape[1]
    if n:
        config = runtime.launch(NAME, y, rows=n, **sizes)[name]
        kernel[(cdiv(n, config["block_m"]), cdiv(m, config["block_n"]))](
            y, t, b, scaling, n, m, r, y.stride(0), t.stride(0), b.stride(0), b.stride(1),
            **space.constexprs(config, "", sizes), **runtime.compiler_options(config),
        )  # fmt: skip
    return y


def _sizes(weight, lora_a):
    return {"in": weight.shape[1], "out": weight.shape[0], "rank": lora_a.shape[0]}


@runtime.custom_op(
    "lora_linear_fwd",
    "(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, float scaling, Tensor? bias, Tensor? x_adapter) -> "
    "(Tensor, Tensor)",
)
def lora_linear_fwd(x, weight, lora_a, lora_b, scaling, bias, x_adapter):
    x2 = x.reshape(-1, x.shape[-1])
    t = (x2 if x_adapter is None else x_adapter.reshape(x2.shape)) @ lora_a.t()
    y = torch.nn.functional.linear(x2, weight, bias)
    epilogue("lora_linear_fwd", y, t, lora_b.t(), scaling, _sizes(weight, lora_a))
    return y.view(*x.shape[:-1], weight.shape[0]), t


@lora_linear_fwd.register_fake
def _(x, weight, lora_a, lora_b, scaling, bias, x_adapter):
    rows = x.numel() // x.shape[-1]
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(rows, lora_a.shape[0])


@runtime.custom_op(
    "lora_linear_bwd",
    "(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor t, float scaling, Tensor? x_adapter, "
    "bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def lora_linear_bwd(dy, x, weight, lora_a, lora_b, t, scaling, x_adapter, need_x, need_weight, need_bias):
    dy2, x2 = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    u = dy2 @ lora_b
    da = scaled_product(u.t(), x2 if x_adapter is None else x_adapter.reshape(x2.shape), scaling)
    db = scaled_product(dy2.t(), t, scaling)
    dx, dxa = x.new_empty(0), x.new_empty(0)
    if need_x:
        dx = dy2 @ weight
        if x_adapter is None:
            epilogue("lora_linear_bwd", dx, u, lora_a, scaling, _sizes(weight, lora_a))
        dx = dx.view(x.shape)
    if x_adapter is not None:
        dxa = ((u @ lora_a) * scaling).view(x.shape)
    dw = dy2.t() @ x2 if need_weight else x.new_empty(0)
    dbias = dy2.sum(0) if need_bias else x.new_empty(0)
    return dx, dw, da, db, dbias, dxa


@lora_linear_bwd.register_fake
def _(dy, x, weight, lora_a, lora_b, t, scaling, x_adapter, need_x, need_weight, need_bias):
    return (
        x.new_empty(x.shape if need_x else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        lora_a.new_empty(lora_a.shape),
        lora_b.new_empty(lora_b.shape),
        x.new_empty(weight.shape[0] if need_bias else 0),
        x.new_empty(x.shape if x_adapter is not None else 0),
    )


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # the thin product has no gradient: no zeros are made for it
    x, weight, lora_a, lora_b, ctx.scaling, _, x_adapter = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, output[1], x_adapter)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy, _):
    x, weight, lora_a, lora_b, t, x_adapter = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx, dw, da, db, dbias, dxa = torch.ops.aifactory.lora_linear_bwd(
        dy, x, weight, lora_a, lora_b, t, ctx.scaling, x_adapter, needs[0], needs[1], needs[5]
    )
    return (
        dx if needs[0] else None, dw if needs[1] else None, da, db, None, dbias if needs[5] else None,
        dxa if x_adapter is not None else None,
    )  # fmt: skip


lora_linear_fwd.register_autograd(_backward, setup_context=_setup)
