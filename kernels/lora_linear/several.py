"""Adapted linear layers that belong together, as one operator each: those of one input (query, key, value), and a gated
MLP from its input to the residual stream.

One operator knows more than its parts: the adapters' first products are one product, the gradients of the common input
are added inside the products that make them, and what can be made again from what is kept anyway is not kept. The
arithmetic of each part is that of ``lora_linear``, ``swiglu`` and ``rms_norm``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aifactory_train.kernels import runtime
from aifactory_train.kernels.lora_linear import reference
from aifactory_train.kernels.rms_norm.reference import rms_norm as plain_norm
from aifactory_train.kernels.swiglu.op import glu_fwd, launch_glu_backward, plain_gated

Tensors = Sequence[torch.Tensor]


def lora_linears(
    x: torch.Tensor, weights: Tensors, lora_a: Tensors, lora_b: Tensors, scaling: float
) -> list[torch.Tensor]:
    """:func:`lora_linear` of one input for several layers: ``x W_i^T + scaling (x A_i^T) B_i^T``, a list of [..., M_i].

    ``x`` [..., K], ``weights`` [M_i, K], ``lora_a`` [R, K] with one rank, ``lora_b`` [M_i, R]; autocast is followed.
    Weights are frozen: they get no gradient.
    """
    dtype = runtime.arithmetic(x)
    x, weights, lora_a, lora_b = x.to(dtype), *([t.to(dtype) for t in ts] for ts in (weights, lora_a, lora_b))
    if not runtime.use_triton("lora_linear", x):
        parts = zip(weights, lora_a, lora_b, strict=True)
        return [reference.lora_linear(x, w, a, b, scaling) for w, a, b in parts]
    return torch.ops.aifactory.lora_linears_fwd(x, weights, lora_a, lora_b, scaling)[0]


def lora_mlp(
    x: torch.Tensor,
    residual: torch.Tensor,
    weights: Tensors,
    lora_a: Tensors,
    lora_b: Tensors,
    scaling: float,
    kind: int = 0,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> torch.Tensor:
    """``residual + down(act(gate(x)) * up(x))`` with adapted ``gate``, ``up`` and ``down`` (in this order in the lists).

    ``x`` and ``residual`` [..., K]; ``kind`` is that of the activation (0 silu, 1 gelu by tanh, 2 gelu by erf). With
    ``norm_weight`` [K] ``x`` must be the RMS normalisation of ``residual`` under it, ``eps`` and ``offset``: it is then
    made again in backward rather than kept, as the activation always is. Differentiable in x, residual and the
    adapters; base weights are frozen.
    """
    dtype = runtime.arithmetic(x)
    x, weights, lora_a, lora_b = x.to(dtype), *([t.to(dtype) for t in ts] for ts in (weights, lora_a, lora_b))
    if not runtime.use_triton("lora_linear", x):
        gate, up = (reference.lora_linear(x, weights[i], lora_a[i], lora_b[i], scaling) for i in (0, 1))
        hidden = plain_gated(gate, up, kind)
        return residual + reference.lora_linear(hidden, weights[2], lora_a[2], lora_b[2], scaling)
    return torch.ops.aifactory.lora_mlp_fwd(
        x, residual, weights, lora_a, lora_b, scaling, kind, norm_weight, eps, offset
    )[0]


# ---- products of several layers with one input


def stacked(tensors: Tensors) -> torch.Tensor:
    """``torch.cat`` of matrices; no copy where they lie one after the other in one storage already."""
    first = tensors[0]
    at = first.storage_offset()
    for tensor in tensors:
        behind = tensor.untyped_storage() is first.untyped_storage() and tensor.storage_offset() == at
        if not (behind and tensor.is_contiguous()):
            return torch.cat(list(tensors))
        at += tensor.numel()
    rows = sum(t.shape[0] for t in tensors)
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


def _sizes(weight: torch.Tensor, rank: int) -> dict[str, int]:
    return {"in": weight.shape[1], "out": weight.shape[0], "rank": rank}


def _forward(x2, weights, lora_a, lora_b, scaling, onto=None):
    """(results [N, M_i], T [N, n R]): one thin product for all; ``onto`` [N, M] is added to a single result."""
    from aifactory_train.kernels.lora_linear.op import epilogue

    rank = lora_a[0].shape[0]
    t = x2 @ stacked(lora_a).t()
    results = []
    for i, (weight, b) in enumerate(zip(weights, lora_b, strict=True)):
        y = x2 @ weight.t() if onto is None else torch.addmm(onto, x2, weight.t())
        results.append(
            epilogue("lora_linear_fwd", y, t[:, i * rank : (i + 1) * rank], b.t(), scaling, _sizes(weight, rank))
        )
    return results, t


def _adapter_gradients(dys, x2, lora_b, t, scaling):
    """(dA of all, stacked [n R, K]; dB of each; U [N, n R]) from the gradients of the results."""
    rank = lora_b[0].shape[1]
    u = x2.new_empty(x2.shape[0], rank * len(dys))
    dbs = []
    for i, (dy, b) in enumerate(zip(dys, lora_b, strict=True)):
        here = slice(i * rank, (i + 1) * rank)
        torch.mm(dy, b, out=u[:, here])
        dbs.append(scaled_product(dy.t(), t[:, here], scaling))
    return scaled_product(u.t(), x2, scaling), dbs, u


def scaled_product(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """``scaling * a @ b``, the factor inside the product."""
    out = a.new_empty(a.shape[0], b.shape[1])
    return torch.addmm(out, a, b, beta=0, alpha=scaling, out=out)


def _input_gradient(dys, u, weights, lora_a, scaling):
    """The gradient of the common input: products add onto the first one, the adapters' parts come in one pass."""
    from aifactory_train.kernels.lora_linear.op import epilogue

    dx = dys[0] @ weights[0]
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, weight)
    a = stacked(lora_a)
    return epilogue("lora_linear_bwd", dx, u, a, scaling, _sizes(weights[0], a.shape[0]))


# ---- several layers of one input


@torch.library.custom_op(
    "aifactory::lora_linears_fwd",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, float scaling) -> (Tensor[], Tensor)",
)
def lora_linears_fwd(x, weights, lora_a, lora_b, scaling):
    results, t = _forward(x.reshape(-1, x.shape[-1]), weights, lora_a, lora_b, scaling)
    return [y.view(*x.shape[:-1], y.shape[1]) for y in results], t


@lora_linears_fwd.register_fake
def _(x, weights, lora_a, lora_b, scaling):
    rows = x.numel() // x.shape[-1]
    results = [x.new_empty(*x.shape[:-1], w.shape[0]) for w in weights]
    return results, x.new_empty(rows, lora_a[0].shape[0] * len(lora_a))


@torch.library.custom_op(
    "aifactory::lora_linears_bwd",
    mutates_args=(),
    schema="(Tensor[] dys, Tensor x, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, Tensor t, float scaling, "
    "bool need_x) -> (Tensor, Tensor, Tensor[])",
)
def lora_linears_bwd(dys, x, weights, lora_a, lora_b, t, scaling, need_x):
    flat = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
    da, dbs, u = _adapter_gradients(flat, x.reshape(-1, x.shape[-1]), lora_b, t, scaling)
    dx = _input_gradient(flat, u, weights, lora_a, scaling).view(x.shape) if need_x else x.new_empty(0)
    return dx, da, dbs


@lora_linears_bwd.register_fake
def _(dys, x, weights, lora_a, lora_b, t, scaling, need_x):
    rows = lora_a[0].shape[0] * len(lora_a)
    return (
        x.new_empty(x.shape if need_x else 0),
        x.new_empty(rows, x.shape[-1]),
        [b.new_empty(b.shape) for b in lora_b],
    )


def _setup_linears(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # the thin product has no gradient: no zeros are made for it
    x, weights, lora_a, lora_b, ctx.scaling = inputs
    ctx.count = len(weights)
    ctx.save_for_backward(x, *weights, *lora_a, *lora_b, output[1])


def _backward_linears(ctx, dys, _):
    x, *rest, t = ctx.saved_tensors
    n = ctx.count
    weights, lora_a, lora_b = rest[:n], rest[n : 2 * n], rest[2 * n :]
    need_x = ctx.needs_input_grad[0]
    dys = [x.new_zeros(*x.shape[:-1], w.shape[0]) if dy is None else dy for dy, w in zip(dys, weights, strict=True)]
    dx, da, dbs = torch.ops.aifactory.lora_linears_bwd(dys, x, weights, lora_a, lora_b, t, ctx.scaling, need_x)
    return dx if need_x else None, [None] * n, list(da.split(lora_a[0].shape[0])), dbs, None


lora_linears_fwd.register_autograd(_backward_linears, setup_context=_setup_linears)


# ---- a gated MLP


@torch.library.custom_op(
    "aifactory::lora_mlp_fwd",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, float scaling, int kind, "
    "Tensor? norm_weight, float eps, float offset) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def lora_mlp_fwd(x, residual, weights, lora_a, lora_b, scaling, kind, norm_weight, eps, offset):
    (gate, up), t = _forward(x.reshape(-1, x.shape[-1]), weights[:2], lora_a[:2], lora_b[:2], scaling)
    hidden = glu_fwd(gate, up, kind)
    onto = residual.reshape(-1, residual.shape[-1])
    (out,), t_down = _forward(hidden, weights[2:], lora_a[2:], lora_b[2:], scaling, onto)
    return out.view(residual.shape), gate, up, t, t_down


@lora_mlp_fwd.register_fake
def _(x, residual, weights, lora_a, lora_b, scaling, kind, norm_weight, eps, offset):
    rows, rank = x.numel() // x.shape[-1], lora_a[0].shape[0]
    halves = [x.new_empty(rows, w.shape[0]) for w in weights[:2]]
    return residual.new_empty(residual.shape), *halves, x.new_empty(rows, 2 * rank), x.new_empty(rows, rank)


@torch.library.custom_op(
    "aifactory::lora_mlp_bwd",
    mutates_args=("gate", "up"),
    schema="(Tensor dy, Tensor source, Tensor(a!) gate, Tensor(b!) up, Tensor t, Tensor t_down, Tensor[] weights, Tensor[] "
    "lora_a, Tensor[] lora_b, float scaling, int kind, Tensor? norm_weight, float eps, float offset) -> (Tensor, "
    "Tensor, Tensor, Tensor[])",
)
def lora_mlp_bwd(
    dy, source, gate, up, t, t_down, weights, lora_a, lora_b, scaling, kind, norm_weight, eps, offset
):  # fmt: skip
    dy2 = dy.reshape(-1, dy.shape[-1])
    hidden = glu_fwd(gate, up, kind)
    da_down, db_down, u = _adapter_gradients([dy2], hidden, lora_b[2:], t_down, scaling)
    del hidden  # before its gradient is made, which takes the same memory
    dhidden = _input_gradient([dy2], u, weights[2:], lora_a[2:], scaling)
    # In place: a second backward pass would need what is overwritten here, and autograd's version count refuses it.
    halves = launch_glu_backward(dhidden, gate, up, kind, into=(gate, up))
    del dhidden
    x = source if norm_weight is None else _normalised(source, norm_weight, eps, offset)
    da, dbs, u = _adapter_gradients(halves, x.reshape(-1, x.shape[-1]), lora_b[:2], t, scaling)
    del x
    dx = _input_gradient(halves, u, weights[:2], lora_a[:2], scaling)
    return dx.view(source.shape), da, da_down, [*dbs, *db_down]


def _normalised(source, weight, eps, offset):
    from aifactory_train.kernels.rms_norm.op import launch_forward

    if not runtime.use_triton("rms_norm", source):
        return plain_norm(source, weight, eps, offset)
    return launch_forward("rms_norm", source, None, weight, eps, offset)[0]


@lora_mlp_bwd.register_fake
def _(dy, source, gate, up, t, t_down, weights, lora_a, lora_b, scaling, kind, norm_weight, eps, offset):
    rank = lora_a[0].shape[0]
    return (
        source.new_empty(source.shape),
        source.new_empty(2 * rank, source.shape[-1]),
        source.new_empty(rank, gate.shape[1]),
        [b.new_empty(b.shape) for b in lora_b],
    )


def _setup_mlp(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # what is kept for backward has no gradient
    x, residual, weights, lora_a, lora_b, ctx.scaling, ctx.kind, norm_weight, ctx.eps, ctx.offset = inputs
    source = x if norm_weight is None else residual
    ctx.save_for_backward(source, norm_weight, *output[1:], *weights, *lora_a, *lora_b)


def _backward_mlp(ctx, dy, *_):
    if dy is None:
        return (None,) * 10
    source, norm_weight, gate, up, t, t_down, *rest = ctx.saved_tensors
    weights, lora_a, lora_b = rest[:3], rest[3:6], rest[6:]
    dx, da, da_down, dbs = torch.ops.aifactory.lora_mlp_bwd(
        dy, source, gate, up, t, t_down, weights, lora_a, lora_b, ctx.scaling, ctx.kind, norm_weight, ctx.eps,
        ctx.offset,
    )  # fmt: skip
    both = list(da.split(lora_a[0].shape[0]))
    return dx, dy, [None] * 3, [*both, da_down], dbs, None, None, None, None, None


lora_mlp_fwd.register_autograd(_backward_mlp, setup_context=_setup_mlp)
