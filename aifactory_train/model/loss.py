"""Cross-entropy straight from hidden states: the vocabulary projection runs in chunks, at supervised positions only, and the
full logits tensor never exists."""

from __future__ import annotations

import torch

from aifactory_train.model.cpu_matmul import by_columns, by_rows

#: Bytes of one chunk of fp32 logits. 64 MiB keeps the projection's matrix products large (455 rows of a 36k vocabulary).
CHUNK_BYTES = 64 * 2**20


def chunk_rows(vocabulary: int, wanted: int | None = None) -> int:
    """Rows of logits that exist at once."""
    return wanted or max(32, CHUNK_BYTES // (4 * vocabulary))


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Forward computes the loss and, chunk by chunk, the gradients; backward only scales them.

    The gradient of the logits is ``softmax - one_hot``; with it each chunk gives its rows of the hidden states' gradient and
    its addend of the weight's gradient, after which its logits are dropped. The weight's gradient is accumulated in fp32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, scale: float, rows: int):
        need_hidden, need_weight = hidden.requires_grad, weight.requires_grad
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        for start in range(0, hidden.shape[0], rows):
            chunk, target = hidden[start : start + rows], labels[start : start + rows].unsqueeze(1)
            logits = by_rows(chunk, weight).float()
            if scale != 1.0:
                logits.mul_(scale)
            picked = logits.gather(1, target)
            highest = logits.amax(1, keepdim=True)
            grad = logits.sub_(highest).exp_()
            norm = grad.sum(1, keepdim=True)
            total += (norm.log() + (highest - picked)).sum()
            if need_hidden or need_weight:
                grad.mul_(scale / norm)
                grad.scatter_add_(1, target, torch.full_like(target, -scale, dtype=grad.dtype))
                grad = grad.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + rows] = by_columns(grad, weight)
                if grad_weight is not None:
                    if grad.dtype == torch.float32:
                        grad_weight.addmm_(grad.t(), chunk)
                    else:
                        grad_weight += (grad.t() @ chunk).float()
            del logits, grad  # before the next chunk's are made: they take the same memory
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_output):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            # expanded, or the factor would be rounded to the type of the hidden states before the product
            factor = grad_output.expand_as(grad_hidden)
            grad_hidden = torch.mul(grad_hidden, factor, out=torch.empty_like(grad_hidden))
        if grad_weight is not None:
            # In place, as it is as large as the embedding; a second backward pass is refused by autograd's version count.
            grad_weight = grad_weight.mul_(grad_output).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    scale: float = 1.0,
    rows: int | None = None,
) -> torch.Tensor:
    """Sum over all rows of the cross-entropy of ``softmax(scale * hidden @ weight.T)`` at ``labels``.

    hidden ``[N, D]``, weight ``[V, D]`` (same dtype), labels int64 ``[N]`` without ignored entries (select the supervised
    rows first). Returns an fp32 scalar, 0 with a connected graph for ``N = 0``.
    """
    if hidden.shape[0] == 0:
        return hidden.sum().float() + 0.0 * weight[:1].sum().float()
    return _ChunkedLinearCrossEntropy.apply(hidden, weight, labels, scale, chunk_rows(weight.shape[0], rows))


@torch.no_grad()
def token_nll(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, scale: float = 1.0, rows: int | None = None
) -> torch.Tensor:
    """Negative log-likelihood of each label in nats, fp32 ``[N]``; arguments as in :func:`linear_cross_entropy`."""
    parts = []
    rows = chunk_rows(weight.shape[0], rows)
    for start in range(0, hidden.shape[0], rows):
        logits = by_rows(hidden[start : start + rows], weight).float().mul_(scale)
        target = labels[start : start + rows].unsqueeze(1)
        parts.append((torch.logsumexp(logits, dim=1, keepdim=True) - logits.gather(1, target)).squeeze(1))
    return torch.cat(parts) if parts else torch.zeros(0, device=hidden.device)
