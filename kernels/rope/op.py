"""RoPE as registered operators with autograd."""

import torch

from aifactory_train.kernels import runtime
from aifactory_train.kernels.rms_norm.op import sum_columns
from aifactory_train.kernels.rope import reference, space
from aifactory_train.kernels.spec import grid_stride

__all__ = ["rope"]


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding of queries and keys.

    ``q`` [B, Hq, S, D], ``k`` [B, Hk, S, D], any strides with D innermost; ``cos`` and ``sin`` [B or 1, S, D] with
    equal halves, not differentiated. With ``q_weight`` and ``k_weight`` [D] (both or neither) each head is
    RMS-normalised first, with ``eps`` and ``weight + offset``. Returns rotated (q, k) in their dtypes and strides.
    """
    if (q_weight is None) != (k_weight is None):
        raise ValueError("rope: give both q_weight and k_weight, or neither")
    if not runtime.use_triton("rope", q):
        return reference.rope(q, k, cos, sin, q_weight, k_weight, eps, offset)
    return torch.ops.aifactory.rope_fwd(q, k, cos, sin, q_weight, k_weight, eps, offset)


def _inner(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(q, k):
    b, heads, seq, dim = q.shape
    return {"rows": b * seq, "heads": heads, "kv_heads": k.shape[1], "head_dim": dim}


def _table(cos, sin):
    """cos and sin with one set of strides; a batch of one is broadcast by a zero stride."""
    cos, sin = _inner(cos), _inner(sin)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, 0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1)


def _bhs(x: torch.Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _rotate(name, sign, q, k, cos, sin, q_weight, k_weight, eps, offset):
    from aifactory_train.kernels.rope.triton_kernels import rope_fwd as kernel

    q, k = _inner(q), _inner(k)
    qo, ko = torch.empty_like(q), torch.empty_like(k)
    sizes = _sizes(q, k)
    if not sizes["rows"]:
        return qo, ko
    config = runtime.launch("rope", q, **sizes)[name]
    cos, sin, sc_b, sc_s = _table(cos, sin)
    kernel[(sizes["rows"],)](
        q, k, cos, sin, q if q_weight is None else q_weight, k if k_weight is None else k_weight, qo, ko,
        *_bhs(q), *_bhs(k), *_bhs(qo), *_bhs(ko), sc_b, sc_s,
        q.shape[2], q.shape[1], k.shape[1], q.shape[3] // 2, eps, offset,
        SIGN=sign, HAS_NORM=q_weight is not None, **space.tiles(config, sizes), **runtime.compiler_options(config),
    )  # fmt: skip
    return qo, ko


@runtime.custom_op(
    "rope_fwd",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, float eps, float offset) -> "
    "(Tensor, Tensor)",
)
def rope_fwd(q, k, cos, sin, q_weight, k_weight, eps, offset):
    if not runtime.use_triton("rope", q):
        outs = reference.rope(q, k, cos, sin, q_weight, k_weight, eps, offset)
        return tuple(torch.empty_like(_inner(x)).copy_(o) for x, o in zip((q, k), outs, strict=True))
    return _rotate(
        "rope_fwd" if q_weight is None else "rope_norm_fwd", 1, q, k, cos, sin, q_weight, k_weight, eps, offset
    )


@rope_fwd.register_fake
def _(q, k, cos, sin, q_weight, k_weight, eps, offset):
    return torch.empty_like(_inner(q)), torch.empty_like(_inner(k))


@runtime.custom_op("rope_bwd", "(Tensor dq, Tensor dk, Tensor cos, Tensor sin) -> (Tensor, Tensor)")
def rope_bwd(dq, dk, cos, sin):
    if not runtime.use_triton("rope", dq):
        outs = reference.rope(dq, dk, cos, -sin)
        return tuple(torch.empty_like(_inner(x)).copy_(o) for x, o in zip((dq, dk), outs, strict=True))
    return _rotate("rope_bwd", -1, dq, dk, cos, sin, None, None, 0.0, 0.0)


@rope_bwd.register_fake
def _(dq, dk, cos, sin):
    return torch.empty_like(_inner(dq)), torch.empty_like(_inner(dk))


@runtime.custom_op(
    "rope_norm_bwd",
    "(Tensor dq, Tensor dk, Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor q_weight, Tensor k_weight, float eps, "
    "float offset) -> (Tensor, Tensor, Tensor, Tensor)",
)
def rope_norm_bwd(dq, dk, q, k, cos, sin, q_weight, k_weight, eps, offset):
    q, k = _inner(q), _inner(k)
    gq, gk = torch.empty_like(q), torch.empty_like(k)
    if not runtime.use_triton("rope", q):
        a, b, wq, wk = reference.rope_norm_backward(dq, dk, q, k, cos, sin, q_weight, k_weight, eps, offset)
        return gq.copy_(a), gk.copy_(b), wq, wk
    from aifactory_train.kernels.reduce import column_sum
    from aifactory_train.kernels.rope.triton_kernels import rope_norm_bwd as kernel

    dq, dk = _inner(dq), _inner(dk)
    sizes = _sizes(q, k)
    dim = sizes["head_dim"]
    if not sizes["rows"]:
        return gq, gk, torch.zeros_like(q_weight), torch.zeros_like(k_weight)
    configs = runtime.launch("rope", q, **sizes)
    config = configs["rope_norm_bwd"]
    programs = grid_stride(config, sizes["rows"], runtime.units(q))
    partial = q.new_empty(programs, 2 * dim, dtype=torch.float32)
    cos, sin, sc_b, sc_s = _table(cos, sin)
    kernel[(programs,)](
        dq, dk, q, k, cos, sin, q_weight, k_weight, gq, gk, partial,
        *_bhs(dq), *_bhs(dk), *_bhs(q), *_bhs(k), *_bhs(gq), *_bhs(gk), sc_b, sc_s,
        sizes["rows"], q.shape[2], q.shape[1], k.shape[1], dim // 2, eps, offset,
        **space.tiles(config, sizes), **runtime.compiler_options(config),
    )  # fmt: skip
    both = sum_columns(column_sum, configs["rope_sum"], partial, q_weight.new_empty(2 * dim))
    return gq, gk, both[:dim].clone(), both[dim:].clone()


@rope_norm_bwd.register_fake
def _(dq, dk, q, k, cos, sin, q_weight, k_weight, eps, offset):
    return (
        torch.empty_like(_inner(q)),
        torch.empty_like(_inner(k)),
        torch.empty_like(q_weight),
        torch.empty_like(k_weight),
    )


def _setup(ctx, inputs, output):
    q, k, cos, sin, q_weight, k_weight, ctx.eps, ctx.offset = inputs
    ctx.norm = q_weight is not None
    ctx.save_for_backward(*((q, k, cos, sin, q_weight, k_weight) if ctx.norm else (cos, sin)))


def _backward(ctx, dq, dk):
    if not ctx.norm:
        return *torch.ops.aifactory.rope_bwd(dq, dk, *ctx.saved_tensors), None, None, None, None, None, None
    gq, gk, wq, wk = torch.ops.aifactory.rope_norm_bwd(dq, dk, *ctx.saved_tensors, ctx.eps, ctx.offset)
    return gq, gk, None, None, wq, wk, None, None


rope_fwd.register_autograd(_backward, setup_context=_setup)
