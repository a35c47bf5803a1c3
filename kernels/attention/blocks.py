"""The CPU path: attention in blocks of queries, forward and backward, in torch.

Work grows with what the queries may see (document length times window), never with the square of the pack. Scores are
made again in the backward pass, so what is kept is the operands, the result and one number a query.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from aifactory_train.kernels.attention.reference import allowed
from aifactory_train.kernels.runtime import wide

#: Queries of one block: enough for a matrix product to run at its speed, few enough that a narrow window saves work.
BLOCK = 128


def blocks(lengths: list[int], window: int, chunk: int) -> Iterator[tuple[slice, slice, int, int]]:
    """(queries, keys: places in the batch; the first query and the first key: places in their document) of each
    block."""
    start = 0
    for length in lengths:
        for first in range(0, length, BLOCK):
            end = min(length, first + BLOCK)
            low = 0
            if window:
                low = max(low, first - window + 1)
            if chunk:
                low = max(low, first // chunk * chunk)
            yield slice(start + first, start + end), slice(start + low, start + end), first, low
        start += length


def _scores(
    q: torch.Tensor, k: torch.Tensor, first: int, low: int, slopes: torch.Tensor | None, options: tuple
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(scores [Hk, G, m, n] with -inf where nothing is seen; the soft-capped scores / cap, None without a cap)."""
    scale, window, chunk, softcap = options
    scores = torch.einsum("hgmd,hnd->hgmn", q, k).mul_(scale)
    capped = None
    if softcap:
        capped = scores.div_(softcap).tanh_()
        scores = capped * softcap
    m = torch.arange(first, first + q.shape[2], device=q.device)
    n = torch.arange(low, low + k.shape[1], device=q.device)
    if slopes is not None:
        scores = scores + slopes.view(k.shape[0], -1, 1, 1).to(scores.dtype) * (n[None, :] - m[:, None])
    return scores.masked_fill_(~allowed(m, n, window, chunk), float("-inf")), capped


def _heads(states: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[n, H, D] -> [Hk, G, n, D], at least fp32."""
    return wide(states).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


class Blocks(torch.autograd.Function):
    """Attention block by block."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, slopes, lengths, options):
        kv_heads, (rows, heads, _) = k.shape[1], q.shape
        out = q.new_zeros(rows, heads, v.shape[-1])
        kind = wide(q).dtype
        lse = torch.zeros(heads, rows, dtype=kind, device=q.device)
        sink = None if sinks is None else sinks.to(kind).view(kv_heads, -1, 1, 1)
        for here, there, first, low in blocks(lengths, *options[1:3]):
            keys, values = (wide(t[there]).transpose(0, 1) for t in (k, v))
            scores, _ = _scores(_heads(q[here], kv_heads), keys, first, low, slopes, options)
            total = scores.logsumexp(-1, keepdim=True)
            if sink is not None:
                total = torch.logaddexp(total, sink)
            weights = scores.sub_(total).exp_()
            result = torch.einsum("hgmn,hnd->hgmd", weights, values)
            out[here] = result.permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)
            lse[:, here] = total.flatten(0, 1).squeeze(-1)
        ctx.save_for_backward(q, k, v, sinks, slopes, out, lse)
        ctx.lengths, ctx.options = lengths, options
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        q, k, v, sinks, slopes, out, lse = ctx.saved_tensors
        scale, window, chunk, _ = ctx.options
        kv_heads = k.shape[1]
        dq = torch.zeros_like(q)
        dk, dv = (torch.zeros_like(t, dtype=lse.dtype) for t in (k, v))
        delta = (wide(out) * wide(dout)).sum(-1).t()  # [H, rows]
        for here, there, first, low in blocks(ctx.lengths, window, chunk):
            keys, values = (wide(t[there]).transpose(0, 1) for t in (k, v))
            queries, given = _heads(q[here], kv_heads), _heads(dout[here], kv_heads)
            scores, capped = _scores(queries, keys, first, low, slopes, ctx.options)
            weights = scores.sub_(lse[:, here].unflatten(0, (kv_heads, -1)).unsqueeze(-1)).exp_()
            dv[there] += torch.einsum("hgmn,hgmd->nhd", weights, given)
            change = torch.einsum("hgmd,hnd->hgmn", given, values)
            change.sub_(delta[:, here].unflatten(0, (kv_heads, -1)).unsqueeze(-1)).mul_(weights)
            if capped is not None:
                change.mul_(1 - capped * capped)
            change.mul_(scale)
            dq[here] = torch.einsum("hgmn,hnd->mhgd", change, keys).flatten(1, 2).to(dq.dtype)
            dk[there] += torch.einsum("hgmn,hgmd->nhd", change, queries)
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            dsinks = -((sinks.to(lse.dtype)[:, None] - lse).exp() * delta).sum(1).to(sinks.dtype)
        return dq, dk.to(k.dtype), dv.to(v.dtype), dsinks, None, None, None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: list[int],
    sinks: torch.Tensor | None,
    slopes: torch.Tensor | None,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
) -> torch.Tensor:
    """As :func:`aifactory_train.kernels.attention.op.attention`, with the documents' lengths on the host."""
    with torch.autocast(q.device.type, enabled=False):  # or its products would be made in half precision
        return Blocks.apply(q, k, v, sinks, slopes, lengths, (scale, window, chunk, softcap))
