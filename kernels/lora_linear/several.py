"""Adapted linear layers that belong together: those of one input (query, key and value; gate and up), and the end of a
gated MLP from the activation to the residual stream, as one operator each.

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


#: What a layer's input was normalised from, so that it can be made again: (source, weight or None, eps, offset).
Origin = tuple[torch.Tensor, torch.Tensor | None, float, float]


def lora_linears(
    x: torch.Tensor, weights: Tensors, lora_a: Tensors, lora_b: Tensors, scaling: float, origin: Origin | None = None
) -> list[torch.Tensor]:
    """:func:`lora_linear` of one input for several layers: ``x W_i^T + scaling (x A_i^T) B_i^T``, a list of [..., M_i].

    ``x`` [..., K], ``weights`` [M_i, K], ``lora_a`` [R, K] with one rank, ``lora_b`` [M_i, R]; autocast is followed.
    Differentiable in x and the adapters; weights are frozen. With ``origin`` ``x`` must be its RMS normalisation: it is
    made again in backward rather than kept (no gradient flows to the origin from here).
    """
    dtype = runtime.arithmetic(x)
    x, weights, lora_a, lora_b = x.to(dtype), *([t.to(dtype) for t in ts] for ts in (weights, lora_a, lora_b))
    if not runtime.use_triton("lora_linear", x):
        parts = zip(weights, lora_a, lora_b, strict=True)
        return [reference.lora_linear(x, w, a, b, scaling) for w, a, b in parts]
    source, norm_weight, eps, offset = origin or (None, None, 0.0, 0.0)
    source, norm_weight = (None if t is None else t.detach() for t in (source, norm_weight))
    return torch.ops.aifactory.lora_linears_fwd(x, weights, lora_a, lora_b, scaling, source, norm_weight, eps, offset)[
        0
    ]


def lora_gated_down(
    gate: torch.Tensor,
    up: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    kind: int = 0,
) -> torch.Tensor:
    """``residual + lora_linear(act(gate) * up)``: the end of a gated MLP, [..., M].

    ``gate`` and ``up`` [..., I], ``residual`` [..., M]; ``kind`` is that of the activation (0 silu, 1 gelu by tanh, 2
    gelu by erf). The product is made again in backward rather than kept, and the gradients of gate and up take their
    memory: nothing else may keep them, and a second backward pass is refused by autograd's version count.
    Differentiable in all but ``weight``, which is frozen.
    """
    dtype = runtime.arithmetic(gate)
    gate, up, weight, lora_a, lora_b = (t.to(dtype) for t in (gate, up, weight, lora_a, lora_b))
    if not runtime.use_triton("lora_linear", gate):
        return residual + reference.lora_linear(plain_gated(gate, up, kind), weight, lora_a, lora_b, scaling)
    return torch.ops.aifactory.lora_gated_down_fwd(gate, up, residual, weight, lora_a, lora_b, scaling, kind)[0]


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


@runtime.custom_op(
    "lora_linears_fwd",
    "(Tensor x, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, float scaling, Tensor? source, Tensor? "
    "norm_weight, float eps, float offset) -> (Tensor[], Tensor)",
)
def lora_linears_fwd(x, weights, lora_a, lora_b, scaling, source, norm_weight, eps, offset):
    results, t = _forward(x.reshape(-1, x.shape[-1]), weights, lora_a, lora_b, scaling)
    return [y.view(*x.shape[:-1], y.shape[1]) for y in results], t


@lora_linears_fwd.register_fake
def _(x, weights, lora_a, lora_b, scaling, source, norm_weight, eps, offset):
    rows = x.numel() // x.shape[-1]
    results = [x.new_empty(*x.shape[:-1], w.shape[0]) for w in weights]
    return results, x.new_empty(rows, lora_a[0].shape[0] * len(lora_a))


@runtime.custom_op(
    "lora_linears_bwd",
    "(Tensor[] dys, Tensor kept, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, Tensor t, float scaling, "
    "bool normalise, Tensor? norm_weight, float eps, float offset, bool need_x) -> (Tensor, Tensor, Tensor[])",
)
def lora_linears_bwd(dys, kept, weights, lora_a, lora_b, t, scaling, normalise, norm_weight, eps, offset, need_x):
    flat = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
    x = _normalised(kept, norm_weight, eps, offset) if normalise else kept
    da, dbs, u = _adapter_gradients(flat, x.reshape(-1, x.shape[-1]), lora_b, t, scaling)
    del x  # before the gradient is made that takes the same memory
    dx = _input_gradient(flat, u, weights, lora_a, scaling).view(kept.shape) if need_x else kept.new_empty(0)
    return dx, da, dbs


def _normalised(source, weight, eps, offset):
    from aifactory_train.kernels.rms_norm.op import launch_forward

    if not runtime.use_triton("rms_norm", source):
        return plain_norm(source, weight, eps, offset)
    return launch_forward("rms_norm", source, None, weight, eps, offset)[0]


@lora_linears_bwd.register_fake
def _(dys, kept, weights, lora_a, lora_b, t, scaling, normalise, norm_weight, eps, offset, need_x):
    rows = lora_a[0].shape[0] * len(lora_a)
    return (
        kept.new_empty(kept.shape if need_x else 0),
        kept.new_empty(rows, kept.shape[-1]),
        [b.new_empty(b.shape) for b in lora_b],
    )


def _setup_linears(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # the thin product has no gradient: no zeros are made for it
    x, weights, lora_a, lora_b, ctx.scaling, source, norm_weight, ctx.eps, ctx.offset = inputs
    ctx.count, ctx.normalise = len(weights), source is not None
    kept = x if source is None else source
    ctx.save_for_backward(kept, norm_weight, output[1], *weights, *lora_a, *lora_b)


def _backward_linears(ctx, dys, _):
    kept, norm_weight, t, *rest = ctx.saved_tensors
    n = ctx.count
    weights, lora_a, lora_b = rest[:n], rest[n : 2 * n], rest[2 * n :]
    need_x = ctx.needs_input_grad[0]
    dys = [kept.new_zeros(*kept.shape[:-1], w.shape[0]) if d is None else d for d, w in zip(dys, weights, strict=True)]
    dx, da, dbs = torch.ops.aifactory.lora_linears_bwd(
        dys, kept, weights, lora_a, lora_b, t, ctx.scaling, ctx.normalise, norm_weight, ctx.eps, ctx.offset, need_x
    )
    das = list(da.split(lora_a[0].shape[0]))
    return dx if need_x else None, [None] * n, das, dbs, None, None, None, None, None


lora_linears_fwd.register_autograd(_backward_linears, setup_context=_setup_linears)


# ---- the end of a gated MLP


@runtime.custom_op(
    "lora_gated_down_fwd",
    "(Tensor gate, Tensor up, Tensor residual, Tensor weight, Tensor lora_a, Tensor lora_b, float scaling, "
    "int kind) -> (Tensor, Tensor)",
)
def lora_gated_down_fwd(gate, up, residual, weight, lora_a, lora_b, scaling, kind):
    hidden = glu_fwd(gate, up, kind).reshape(-1, gate.shape[-1])
    onto = residual.reshape(-1, residual.shape[-1])
    (out,), t = _forward(hidden, [weight], [lora_a], [lora_b], scaling, onto)
    return out.view(residual.shape), t


@lora_gated_down_fwd.register_fake
def _(gate, up, residual, weight, lora_a, lora_b, scaling, kind):
    return residual.new_empty(residual.shape), gate.new_empty(gate.numel() // gate.shape[-1], lora_a.shape[0])


@runtime.custom_op(
    "lora_gated_down_bwd",
    "(Tensor dy, Tensor(a!) gate, Tensor(b!) up, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor t, "
    "float scaling, int kind) -> (Tensor, Tensor)",
    changes=("gate", "up"),
)
def lora_gated_down_bwd(dy, gate, up, weight, lora_a, lora_b, t, scaling, kind):
    dy2 = dy.reshape(-1, dy.shape[-1])
    hidden = glu_fwd(gate, up, kind).reshape(-1, gate.shape[-1])
    da, (db,), u = _adapter_gradients([dy2], hidden, [lora_b], t, scaling)
    del hidden  # before its gradient is made, which takes the same memory
    dhidden = _input_gradient([dy2], u, [weight], [lora_a], scaling)
    launch_glu_backward(dhidden.view(gate.shape), gate, up, kind, into=(gate, up))
    return da, db


@lora_gated_down_bwd.register_fake
def _(dy, gate, up, weight, lora_a, lora_b, t, scaling, kind):
    return lora_a.new_empty(lora_a.shape), lora_b.new_empty(lora_b.shape)


def _setup_down(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # the thin product has no gradient: no zeros are made for it
    gate, up, _, weight, lora_a, lora_b, ctx.scaling, ctx.kind = inputs
    ctx.save_for_backward(gate, up, weight, lora_a, lora_b, output[1])


def _backward_down(ctx, dy, _):
    gate, up, weight, lora_a, lora_b, t = ctx.saved_tensors
    da, db = torch.ops.aifactory.lora_gated_down_bwd(dy, gate, up, weight, lora_a, lora_b, t, ctx.scaling, ctx.kind)
    return gate, up, dy, None, da, db, None, None


lora_gated_down_fwd.register_autograd(_backward_down, setup_context=_setup_down)
