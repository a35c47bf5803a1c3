"""Attention inside documents in plain torch: the oracle of the tests (fp64-capable)."""

import itertools

import torch


def allowed(queries: torch.Tensor, keys: torch.Tensor, window: int, chunk: int) -> torch.Tensor:
    """Which of the ``keys`` each of the ``queries`` sees, by their places in one document: bool [queries, keys]."""
    m, n = queries[:, None], keys[None, :]
    seen = n <= m
    if window:
        seen &= n > m - window
    if chunk:
        seen &= n // chunk == m // chunk
    return seen


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
) -> torch.Tensor:
    """As :func:`aifactory_train.kernels.attention.op.attention`; every document's whole matrix of scores is made."""
    groups = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bounds = cu_seqlens.tolist()
    parts = []
    for start, end in itertools.pairwise(bounds):
        one, keys, values = (t[start:end].transpose(0, 1) for t in (q, k, v))
        scores = one @ keys.repeat_interleave(groups, 0).transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(end - start, device=q.device)
        if slopes is not None:
            scores = scores + slopes.to(scores.dtype)[:, None, None] * (at[None, :] - at[:, None])
        scores = scores.masked_fill(~allowed(at, at, window, chunk), float("-inf"))
        if sinks is not None:
            sink = sinks.to(scores.dtype)[:, None, None].expand(-1, end - start, 1)
            scores = torch.cat([scores, sink], -1)
        weights = scores.softmax(-1)[..., : end - start]
        parts.append((weights @ values.repeat_interleave(groups, 0)).transpose(0, 1))
    if not parts:  # differentiable all the same
        return q.new_zeros(0, q.shape[1], v.shape[-1]) + 0 * (q.sum() + k.sum() + v.sum())
    return torch.cat(parts)
