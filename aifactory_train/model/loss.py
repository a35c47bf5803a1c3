"""The one walk through the vocabulary projection: cross-entropy straight from hidden states, in chunks, at supervised
positions only. The full logits tensor never exists.

:func:`linear_cross_entropy` is what training, preferences and evaluation call. On a GPU whose kernels are enabled it
runs the operators of :mod:`aifactory_train.kernels`; elsewhere the chunks below, whose matrix products are tuned for
CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from aifactory_train.kernels import hardware, runtime
from aifactory_train.kernels.linear_cross_entropy.op import accumulate
from aifactory_train.model.cpu_matmul import by_columns, by_rows

#: Bytes of one chunk of fp32 logits on a CPU. 64 MiB keeps the projection's matrix products large (455 rows of a 36k
#: vocabulary).
CHUNK_BYTES = 64 * 2**20
#: The same on a GPU, as the planner counts it (:func:`aifactory_train.planning.search.loss_chunk`), but never below
#: ``GPU_ROWS``: each chunk reads and writes the fp32 gradient of the whole output weight, which only large products
#: hide.
GPU_CHUNK_BYTES = 2**30
GPU_ROWS = 1024

#: ``sum``: fp32 scalar over all rows; ``none``: fp32 ``[N]``; ``documents``: fp32, one sum for each of ``counts``
Reduction = Literal["sum", "none", "documents"]


def chunk_rows(vocabulary: int, wanted: int | None = None, *, device: torch.device | str = "cpu") -> int:
    """Rows of logits that exist at once: ``wanted`` (``train.loss_chunk_tokens``), else from the vocabulary and the
    device.
    """
    if wanted:
        return wanted
    device = torch.device(device)
    if device.type == "cpu":
        return max(32, CHUNK_BYTES // (4 * vocabulary))
    most = max(GPU_ROWS, 2 ** (max(1, GPU_CHUNK_BYTES // (4 * vocabulary)).bit_length() - 1))
    return max(GPU_ROWS, min(most, hardware.chunk_rows(_sku(device))))


def _sku(device: torch.device) -> hardware.Sku | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    arch, name, _ = runtime.device_of(torch.cuda.current_device() if device.index is None else device.index)
    return hardware.sku(name, arch)


def _logits(chunk: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
    """fp32 ``[rows, V]``, to be overwritten."""
    logits = by_rows(chunk, weight).float()
    return logits.mul_(scale) if scale != 1.0 else logits


class _Gradients:
    """Gradients of hidden states and weight (each None where nothing needs it), filled chunk by chunk; the weight's in
    fp32.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, need_hidden: bool, need_weight: bool):
        self.hidden = torch.empty_like(hidden) if need_hidden else None
        self.weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None

    def add(self, here: slice, chunk: torch.Tensor, weight: torch.Tensor, dlogits: torch.Tensor) -> None:
        """From the gradient of the logits of the rows ``here``."""
        if self.hidden is not None:
            self.hidden[here] = by_columns(dlogits, weight)
        if self.weight is not None:
            accumulate(self.weight, dlogits, chunk)


class _Summed(torch.autograd.Function):
    """Forward computes the loss and, chunk by chunk, the gradients; backward only scales them.

    The gradient of the logits is ``softmax - one_hot``; with it each chunk gives its rows of the hidden states'
    gradient and its addend of the weight's gradient, after which its logits are dropped. The weight's gradient is
    accumulated in fp32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, scale: float, rows: int):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradients = _Gradients(hidden, weight, hidden.requires_grad, weight.requires_grad)
        for start in range(0, hidden.shape[0], rows):
            here = slice(start, start + rows)
            chunk, target = hidden[here], labels[here].unsqueeze(1)
            logits = _logits(chunk, weight, scale)
            picked = logits.gather(1, target)
            highest = logits.amax(1, keepdim=True)
            grad = logits.sub_(highest).exp_()
            norm = grad.sum(1, keepdim=True)
            total += (norm.log() + (highest - picked)).sum()
            if hidden.requires_grad or weight.requires_grad:
                grad.mul_(scale / norm)
                grad.scatter_add_(1, target, torch.full_like(target, -scale, dtype=grad.dtype))
                grad = grad.to(hidden.dtype)
                gradients.add(here, chunk, weight, grad)
            del logits, grad  # before the next chunk's are made: they take the same memory
        ctx.save_for_backward(gradients.hidden, gradients.weight)
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
            # In place, as it is as large as the embedding; a second backward pass is refused by autograd's version
            # count.
            grad_weight = grad_weight.mul_(grad_output).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


class _PerToken(torch.autograd.Function):
    """NLL of each row. What a row weighs in the loss is known after all of them, so backward makes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, scale: float, rows: int):
        nll, lse = (torch.empty(len(labels), dtype=torch.float32, device=hidden.device) for _ in range(2))
        for start in range(0, hidden.shape[0], rows):
            here = slice(start, start + rows)
            logits = _logits(hidden[here], weight, scale)
            lse[here] = torch.logsumexp(logits, dim=1)
            nll[here] = lse[here] - logits.gather(1, labels[here].unsqueeze(1)).squeeze(1)
            del logits
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.scale, ctx.rows = scale, rows
        return nll

    @staticmethod
    def backward(ctx, grad_output):
        hidden, weight, labels, lse = ctx.saved_tensors
        gradients = _Gradients(hidden, weight, *ctx.needs_input_grad[:2])
        for start in range(0, hidden.shape[0], ctx.rows):
            here = slice(start, start + ctx.rows)
            chunk, factor = hidden[here], grad_output[here].unsqueeze(1) * ctx.scale
            grad = _logits(chunk, weight, ctx.scale).sub_(lse[here].unsqueeze(1)).exp_().mul_(factor)
            grad = grad.scatter_add_(1, labels[here].unsqueeze(1), -factor).to(hidden.dtype)
            gradients.add(here, chunk, weight, grad)
            del grad
        grad_weight = gradients.weight.to(weight.dtype) if gradients.weight is not None else None
        return gradients.hidden, grad_weight, None, None, None


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    reduction: Reduction = "sum",
    counts: Sequence[int] | None = None,
    scale: float = 1.0,
    rows: int | None = None,
    kernels: bool = False,
) -> torch.Tensor:
    """Cross-entropy in nats of ``softmax(scale * hidden @ weight.T)`` at ``targets``, with gradients for hidden and
    weight.

    hidden ``[N, D]``, weight ``[V, D]`` (same dtype), targets int64 ``[N]`` without ignored entries (select the
    supervised rows first). ``reduction``: :data:`Reduction`; ``counts`` are the targets of each document, in order,
    host integers that add up to ``N``. ``N = 0`` gives zeros (or nothing) with a connected graph. ``rows`` of logits
    exist at once (:func:`chunk_rows`). ``kernels``: by the registered operators, which run Triton where the registry
    selects it.

    ``sum`` makes the gradients in its forward pass and costs 6 N V D FLOP; the others make the logits twice and cost 8.
    """
    if reduction == "documents":
        assert counts is not None
        each = linear_cross_entropy(hidden, weight, targets, reduction="none", scale=scale, rows=rows, kernels=kernels)
        if not counts:
            return each
        # One sum after the other: an index_add on a GPU adds in no fixed order, and a resumed run would differ in the
        # last bits.
        return torch.stack([part.sum() for part in each.split(list(counts))])
    if hidden.shape[0] == 0:
        nothing = hidden.sum().float() if reduction == "sum" else hidden.sum(1).float()
        return nothing + 0.0 * weight[:1].sum().float()
    rows = chunk_rows(weight.shape[0], rows, device=hidden.device)
    if kernels:
        return _by_kernels(hidden, weight, targets, reduction, scale, rows)
    function = _Summed if reduction == "sum" else _PerToken
    return function.apply(hidden, weight, targets, scale, rows)


def _by_kernels(hidden, weight, targets, reduction: Reduction, scale: float, rows: int) -> torch.Tensor:
    from aifactory_train.kernels import ops

    if reduction == "sum":
        return ops.linear_cross_entropy(hidden, weight, targets, scale=scale, chunk_size=rows)
    return -ops.linear_logps(hidden, weight, targets, scale=scale, chunk_size=rows)
