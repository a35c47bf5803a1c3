"""Gated activations as one registered pair of operators; ``kind`` chooses the activation."""

import torch

from aifactory_train.kernels import runtime
from aifactory_train.kernels.geglu import reference as geglu_reference
from aifactory_train.kernels.spec import cdiv
from aifactory_train.kernels.swiglu import reference

__all__ = ["swiglu"]

NAMES = ("swiglu", "geglu", "geglu")  # by kind


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``. Both [..., I] of one shape and dtype, any row stride; differentiable in both; fp32
    inside.
    """
    if not runtime.use_triton("swiglu", gate):
        return reference.swiglu(gate, up)
    return torch.ops.aifactory.glu_fwd(gate, up, 0)


def plain_gated(gate, up, kind):
    """The activation in plain torch, by kind."""
    return reference.swiglu(gate, up) if kind == 0 else geglu_reference.geglu(gate, up, "tanh" if kind == 1 else "none")


@runtime.custom_op("glu_fwd", "(Tensor gate, Tensor up, int kind) -> Tensor")
def glu_fwd(gate, up, kind):
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} must agree")
    name = NAMES[kind]
    if not runtime.use_triton(name, gate):
        return plain_gated(gate, up, kind).contiguous()
    from aifactory_train.kernels.swiglu.triton_kernels import glu_fwd as kernel

    a, b = runtime.rows2d(gate), runtime.rows2d(up)
    n, width = a.shape
    out = gate.new_empty(gate.shape)
    if n:
        config = runtime.launch(name, gate, rows=n, width=width)[f"{name}_fwd"]
        kernel[(n, cdiv(width, config["block"]))](
            a, b, out, a.stride(0), b.stride(0), width, width, KIND=kind, BLOCK=config["block"],
            **runtime.compiler_options(config),
        )  # fmt: skip
    return out


@glu_fwd.register_fake
def _(gate, up, kind):
    return gate.new_empty(gate.shape)


@runtime.custom_op("glu_bwd", "(Tensor grad, Tensor gate, Tensor up, int kind) -> (Tensor, Tensor)")
def glu_bwd(grad, gate, up, kind):
    return launch_glu_backward(grad, gate, up, kind)


def launch_glu_backward(grad, gate, up, kind, into=None):
    """Gradients of gate and up. ``into`` are two tensors that take them; they may be any of the first three, because a
    program reads its tile of all before it writes.
    """
    name = NAMES[kind]
    if not runtime.use_triton(name, gate):
        da, db = reference.gated_backward(grad, gate, up, kind)
        if into is not None:
            return into[0].copy_(da), into[1].copy_(db)
        return da.contiguous(), db.contiguous()
    from aifactory_train.kernels.swiglu.triton_kernels import glu_bwd as kernel

    g, a, b = runtime.rows2d(grad), runtime.rows2d(gate), runtime.rows2d(up)
    n, width = a.shape
    da, db = (gate.new_empty(gate.shape), up.new_empty(up.shape)) if into is None else into
    if n:
        config = runtime.launch(name, gate, rows=n, width=width)[f"{name}_bwd"]
        kernel[(n, cdiv(width, config["block"]))](
            g,
            a,
            b,
            da,
            db,
            g.stride(0),
            a.stride(0),
            b.stride(0),
            width,
            width,
            width,
            KIND=kind,
            BLOCK=config["block"],
            **runtime.compiler_options(config),
        )
    return da, db


@glu_bwd.register_fake
def _(grad, gate, up, kind):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup(ctx, inputs, output):
    gate, up, ctx.kind = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx, grad):
    da, db = torch.ops.aifactory.glu_bwd(grad, *ctx.saved_tensors, ctx.kind)
    return da, db, None


glu_fwd.register_autograd(_backward, setup_context=_setup)
