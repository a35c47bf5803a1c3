"""The one walk through the vocabulary projection: cross-entropy straight from hidden states, in chunks, at supervised
positions only. The full logits tensor never exists.

:func:`linear_cross_entropy` is what training, preferences and evaluation call. On a GPU whose kernels are enabled it
runs the operators of :mod:`aifactory_train.kernels`; elsewhere the chunks below, whose matrix products are tuned for
CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from aifactory_train.kernels import hardware, runtime
from aifactory_train.kernels.linear_cross_entropy.op import accumulate
from aifactory_train.model.cpu_matmul import by_columns, by_rows

if TYPE_CHECKING:
    from aifactory_train.model.objective import Walk

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


class Shaping(NamedTuple):
    """What lies between ``hidden @ weight.T`` and the logits beside a bias: a factor, and a soft cap (0: none)."""

    scale: float = 1.0
    softcap: float = 0.0

    def slope_(self, logits: torch.Tensor) -> torch.Tensor | None:
        """d logit / d (the output layer's result) but for the factor, from the logits (a new tensor); None: it is 1."""
        return (logits / self.softcap).square_().neg_().add_(1.0) if self.softcap else None


def shaped(logits: torch.Tensor, scale: float, softcap: float, bias: torch.Tensor | None) -> torch.Tensor:
    """The logits of a model from its ``hidden @ weight.T`` (fp32, overwritten): ``softcap * tanh(scale * (x + bias) /
    softcap)``, without the tanh where ``softcap`` is 0."""
    if bias is not None:
        logits.add_(bias)
    if scale != 1.0:
        logits.mul_(scale)
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


def _logits(chunk: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, how: Shaping) -> torch.Tensor:
    """fp32 ``[rows, V]``, to be overwritten."""
    return shaped(by_rows(chunk, weight).float(), how.scale, how.softcap, bias)


class _Gradients:
    """Gradients of hidden states, weight and bias (each None where nothing needs it), filled chunk by chunk; the last
    two in fp32.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, needs: Sequence[bool]):
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight, self.bias = (
            torch.zeros(t.shape, dtype=torch.float32, device=t.device) if t is not None and needed else None
            for t, needed in ((weight, needs[1]), (bias, needs[2]))
        )

    def add(self, here: slice, chunk: torch.Tensor, weight: torch.Tensor, dlogits: torch.Tensor) -> None:
        """From the gradient of the output layer's result (fp32) of the rows ``here``."""
        if self.bias is not None:
            self.bias += dlogits.sum(0)
        dlogits = dlogits.to(chunk.dtype)
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
    def forward(ctx, hidden, weight, bias, labels, how: Shaping, rows: int):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needs = ctx.needs_input_grad[:3]
        gradients = _Gradients(hidden, weight, bias, needs)
        for start in range(0, hidden.shape[0], rows):
            here = slice(start, start + rows)
            chunk, target = hidden[here], labels[here].unsqueeze(1)
            logits = _logits(chunk, weight, bias, how)
            slope = how.slope_(logits) if any(needs) else None
            picked = logits.gather(1, target)
            highest = logits.amax(1, keepdim=True)
            grad = logits.sub_(highest).exp_()
            norm = grad.sum(1, keepdim=True)
            total += (norm.log() + (highest - picked)).sum()
            if any(needs):
                grad.mul_(how.scale / norm)
                grad.scatter_add_(1, target, torch.full_like(target, -how.scale, dtype=grad.dtype))
                gradients.add(here, chunk, weight, grad if slope is None else grad.mul_(slope))
            del logits, grad, slope  # before the next chunk's are made: they take the same memory
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx, grad_output):
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        if grad_hidden is not None:
            # expanded, or the factor would be rounded to the type of the hidden states before the product
            factor = grad_output.expand_as(grad_hidden)
            grad_hidden = torch.mul(grad_hidden, factor, out=torch.empty_like(grad_hidden))
        if grad_weight is not None:
            # In place, as it is as large as the embedding; a second backward pass is refused by autograd's version
            # count.
            grad_weight = grad_weight.mul_(grad_output).to(ctx.dtypes[0])
        if grad_bias is not None:
            grad_bias = (grad_bias * grad_output).to(ctx.dtypes[1])
        return grad_hidden, grad_weight, grad_bias, None, None, None


class _PerToken(torch.autograd.Function):
    """NLL of each row. What a row weighs in the loss is known after all of them, so backward makes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, how: Shaping, rows: int):
        nll, lse = (torch.empty(len(labels), dtype=torch.float32, device=hidden.device) for _ in range(2))
        for start in range(0, hidden.shape[0], rows):
            here = slice(start, start + rows)
            logits = _logits(hidden[here], weight, bias, how)
            lse[here] = torch.logsumexp(logits, dim=1)
            nll[here] = lse[here] - logits.gather(1, labels[here].unsqueeze(1)).squeeze(1)
            del logits
        ctx.save_for_backward(hidden, weight, bias, labels, lse)
        ctx.how, ctx.rows = how, rows
        return nll

    @staticmethod
    def backward(ctx, grad_output):
        hidden, weight, bias, labels, lse = ctx.saved_tensors
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        for start in range(0, hidden.shape[0], ctx.rows):
            here = slice(start, start + ctx.rows)
            chunk, factor = hidden[here], grad_output[here].unsqueeze(1) * ctx.how.scale
            logits = _logits(chunk, weight, bias, ctx.how)
            slope = ctx.how.slope_(logits)
            grad = logits.sub_(lse[here].unsqueeze(1)).exp_().mul_(factor)
            grad.scatter_add_(1, labels[here].unsqueeze(1), -factor)
            gradients.add(here, chunk, weight, grad if slope is None else grad.mul_(slope))
            del grad, logits, slope
        grad_weight = gradients.weight.to(weight.dtype) if gradients.weight is not None else None
        grad_bias = gradients.bias.to(bias.dtype) if gradients.bias is not None else None
        return gradients.hidden, grad_weight, grad_bias, None, None, None


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    reduction: Reduction = "sum",
    counts: Sequence[int] | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
    rows: int | None = None,
    kernels: bool = False,
    walk: Walk | None = None,
) -> torch.Tensor:
    """Cross-entropy in nats of the softmax of :func:`shaped` ``hidden @ weight.T`` at ``targets``, with gradients for
    hidden, weight and bias ``[V]``.

    hidden ``[N, D]``, weight ``[V, D]`` (same dtype), targets int64 ``[N]`` without ignored entries (select the
    supervised rows first). ``reduction``: :data:`Reduction`; ``counts`` are the targets of each document, in order,
    host integers that add up to ``N``. ``N = 0`` gives zeros (or nothing) with a connected graph. ``rows`` of logits
    exist at once (:func:`chunk_rows`). ``kernels``: by the registered operators, which run Triton where the registry
    selects it; models with a bias, which are few, go without. ``temperature`` divides the logits, cap and all.
    ``walk`` goes through the same chunks for something other than cross-entropy, and its result is returned.

    ``sum`` makes the gradients in its forward pass and costs 6 N V D FLOP; the others make the logits twice and cost 8.
    """
    scale, softcap = scale / temperature, softcap / temperature  # c tanh(s x / c) / T = c' tanh(s' x / c')
    if walk is not None:
        chunk = chunk_rows(weight.shape[0], rows, device=hidden.device)
        return walk(hidden, weight, bias, targets, Shaping(scale, softcap), chunk)
    if reduction == "documents":
        assert counts is not None
        how: dict[str, Any] = {"scale": scale, "softcap": softcap, "bias": bias, "rows": rows, "kernels": kernels}
        each = linear_cross_entropy(hidden, weight, targets, reduction="none", **how)
        return document_sums(each, counts) if counts else each
    if hidden.shape[0] == 0:
        nothing = hidden.sum().float() if reduction == "sum" else hidden.sum(1).float()
        unused = weight[:1].sum().float() + (0.0 if bias is None else bias.sum().float())
        return nothing + 0.0 * unused
    rows = chunk_rows(weight.shape[0], rows, device=hidden.device)
    if kernels and bias is None:
        return _by_kernels(hidden, weight, targets, reduction, Shaping(scale, softcap), rows)
    function = _Summed if reduction == "sum" else _PerToken
    return function.apply(hidden, weight, bias, targets, Shaping(scale, softcap), rows)


def document_sums(each: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """fp32 ``[documents]``: the sums of ``each`` ``[N]`` over the ``counts`` (host integers) of its documents.

    In a fixed order: an index_add on a GPU has none, and a resumed run would differ in the last bits. On a GPU one
    kernel sums all segments (each launch of its own would take longer than its sum); on a CPU sums one after the other
    are pairwise, and so nearer to the exact ones.
    """
    if each.device.type == "cpu":
        return torch.stack([part.sum() for part in each.split(list(counts))])
    lengths = torch.tensor(counts, dtype=torch.int64)
    if each.device.type == "cuda":
        lengths = lengths.pin_memory()  # or the host would wait for the copy
    # unsafe: without a look at the lengths, for which the host would wait
    return torch.segment_reduce(each, "sum", lengths=lengths.to(each.device, non_blocking=True), unsafe=True)


def _by_kernels(hidden, weight, targets, reduction: Reduction, how: Shaping, rows: int) -> torch.Tensor:
    from aifactory_train.kernels import ops

    options: dict[str, Any] = {"scale": how.scale, "softcap": how.softcap or None, "chunk_size": rows}
    if reduction == "sum":
        return ops.linear_cross_entropy(hidden, weight, targets, **options)
    return -ops.linear_logps(hidden, weight, targets, **options)
