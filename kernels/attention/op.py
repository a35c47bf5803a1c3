"""Attention inside documents as registered operators with autograd."""

from __future__ import annotations

import torch

from aifactory_train.kernels import runtime
from aifactory_train.kernels.attention import blocks, space
from aifactory_train.kernels.spec import cdiv

__all__ = ["attention"]

NAME = "attention"


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_length: int,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    lengths: list[int] | None = None,
) -> torch.Tensor:
    """Softmax attention of each token to itself and earlier tokens of its document.

    ``q`` [N, H, D], ``k`` [N, Hk, D], ``v`` [N, Hk, Dv] with H a multiple of Hk, one dtype, D innermost, over the N
    tokens of all documents; ``cu_seqlens`` int32 [documents + 1], their bounds; ``max_length`` the tokens of the
    longest one. ``scale``: of the scores, by default D ** -0.5. ``window``: a token sees the last ``window`` tokens,
    itself included; ``chunk``: only those of its own chunk of that many; 0 is no limit. ``softcap`` c: scores become
    c tanh(score / c). ``sinks`` [H]: a score a head that takes part in the softmax and has no value (gpt-oss);
    differentiated. ``slopes`` [H]: slope times (key's place - query's place) is added to a score (ALiBi); not
    differentiated. ``lengths``: of the documents on the host, which the torch path needs (else it reads them back).
    Returns [N, H, Dv]. Raises :class:`ValueError` for heads that do not divide.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    covered = space.covers(runtime.DTYPES.get(q.dtype, ""), {"head_dim": max(q.shape[-1], v.shape[-1])})
    if not covered and q.device.type != "cpu":
        runtime.say_once(f"{NAME}: no kernels for heads of {q.shape[-1]} numbers in {q.dtype}, torch path taken")
    if not (covered and runtime.use_triton(NAME, q)):
        if lengths is None:
            lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
        return blocks.attention(q, k, v, lengths, sinks, slopes, scale, window, chunk, softcap)
    return torch.ops.aifactory.attention_fwd(
        q, k, v, cu_seqlens, max_length, sinks, slopes, scale, window, chunk, softcap
    )[0]


def _inner(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _nh(*tensors: torch.Tensor) -> list[int]:
    """Strides of tokens and heads of each."""
    return [s for t in tensors for s in t.stride()[:2]]


def _sizes(q: torch.Tensor, k: torch.Tensor, options: tuple) -> dict[str, int]:
    sinks, slopes, window, chunk, softcap = options
    return {"rows": q.shape[0], "heads": q.shape[1], "kv_heads": k.shape[1], "head_dim": q.shape[2],
            "window": window, "chunk": chunk, "softcap": int(bool(softcap)), "sinks": int(sinks is not None),
            "slopes": int(slopes is not None)}  # fmt: skip


def _constants(name: str, config: dict, sizes: dict, v: torch.Tensor) -> dict:
    """Compile-time arguments, with the values' own width, and what the compiler is told."""
    found = space.constants(name, config, sizes) | {"BV": space.width(v.shape[-1])}
    return found | runtime.compiler_options(config)


@runtime.custom_op(
    "attention_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_length, Tensor? sinks, Tensor? slopes, "
    "float scale, int window, int chunk, float softcap) -> (Tensor, Tensor)",
)
def attention_fwd(q, k, v, cu_seqlens, max_length, sinks, slopes, scale, window, chunk, softcap):
    from aifactory_train.kernels.attention.triton_kernels import attention_fwd as kernel

    q, k, v = _inner(q), _inner(k), _inner(v)
    rows, heads, dim = q.shape
    out = q.new_empty(rows, heads, v.shape[-1])
    lse = q.new_empty(heads, rows, dtype=torch.float32)
    if not rows:
        return out, lse
    sizes = _sizes(q, k, (sinks, slopes, window, chunk, softcap))
    config = runtime.launch(NAME, q, **sizes)["attention_fwd"]
    kernel[(cdiv(max_length, config["block_m"]), heads, len(cu_seqlens) - 1)](
        q, k, v, q if sinks is None else sinks, q if slopes is None else slopes, cu_seqlens, out, lse,
        *_nh(q, k, v, out), rows, heads // k.shape[1], dim, v.shape[-1], scale, softcap, window, chunk,
        **_constants("attention_fwd", config, sizes, v),
    )  # fmt: skip
    return out, lse


@attention_fwd.register_fake
def _(q, k, v, cu_seqlens, max_length, sinks, slopes, scale, window, chunk, softcap):
    rows, heads, _ = q.shape
    return q.new_empty(rows, heads, v.shape[-1]), q.new_empty(heads, rows, dtype=torch.float32)


@runtime.custom_op(
    "attention_bwd",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor out, Tensor lse, SymInt max_length, "
    "Tensor? sinks, Tensor? slopes, float scale, int window, int chunk, float softcap) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def attention_bwd(dout, q, k, v, cu_seqlens, out, lse, max_length, sinks, slopes, scale, window, chunk, softcap):
    from aifactory_train.kernels.attention import triton_kernels as kernels

    dout, q, k, v = _inner(dout), _inner(q), _inner(k), _inner(v)
    rows, heads, dim = q.shape
    kv_heads, vdim = k.shape[1], v.shape[-1]
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    delta = torch.empty_like(lse)
    if not rows:
        return dq, dk, dv, lse.new_zeros(0 if sinks is None else heads)
    sizes = _sizes(q, k, (sinks, slopes, window, chunk, softcap))
    configs = runtime.launch(NAME, q, **sizes)
    config = configs["attention_delta"]
    kernels.attention_delta[(cdiv(rows, config["block_m"]), heads)](
        out, dout, delta, *_nh(out, dout), rows, vdim, **_constants("attention_delta", config, sizes, v),
    )  # fmt: skip
    with_slopes = q if slopes is None else slopes
    common = (rows, heads // kv_heads, dim, vdim, scale, softcap, window, chunk)
    config = configs["attention_bwd_q"]
    kernels.attention_bwd_q[(cdiv(max_length, config["block_m"]), heads, len(cu_seqlens) - 1)](
        q, k, v, with_slopes, cu_seqlens, dout, lse, delta, dq, *_nh(q, k, v, dout, dq), *common,
        **_constants("attention_bwd_q", config, sizes, v),
    )  # fmt: skip
    config = configs["attention_bwd_kv"]
    kernels.attention_bwd_kv[(cdiv(max_length, config["block_n"]), kv_heads, len(cu_seqlens) - 1)](
        q, k, v, with_slopes, cu_seqlens, dout, lse, delta, dk, dv, *_nh(q, k, v, dout, dk, dv), *common,
        **_constants("attention_bwd_kv", config, sizes, v),
    )  # fmt: skip
    if sinks is None:
        return dq, dk, dv, lse.new_empty(0)
    return dq, dk, dv, -((sinks.float()[:, None] - lse).exp() * delta).sum(1)


@attention_bwd.register_fake
def _(dout, q, k, v, cu_seqlens, out, lse, max_length, sinks, slopes, scale, window, chunk, softcap):
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
        torch.empty_like(v, memory_format=torch.contiguous_format),
        lse.new_empty(0 if sinks is None else q.shape[1]),
    )


def _setup(ctx, inputs, output):
    q, k, v, cu_seqlens, ctx.max_length, sinks, slopes, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, sinks, slopes, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout, _):
    q, k, v, cu_seqlens, sinks, slopes, out, lse = ctx.saved_tensors
    dq, dk, dv, dsinks = torch.ops.aifactory.attention_bwd(
        dout, q, k, v, cu_seqlens, out, lse, ctx.max_length, sinks, slopes, *ctx.options
    )
    return dq, dk, dv, None, None, None if sinks is None else dsinks.to(sinks.dtype), None, None, None, None, None


attention_fwd.register_autograd(_backward, setup_context=_setup)
