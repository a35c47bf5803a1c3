"""Per-token log-probabilities from hidden states as registered operators, and the DPO loss on top of them.

The weight of a pair's gradient depends on both whole sequences, so the gradient cannot be made in the forward sweep as
the linear cross-entropy does: backward recomputes each chunk's logits (8 N V D FLOP instead of 6). Other preference
losses (ORPO, KTO, GRPO) are plain torch on the same log-probabilities.
"""

import torch

from aifactory_train.kernels import runtime
from aifactory_train.kernels.cross_entropy.op import launch_backward, launch_forward
from aifactory_train.kernels.cross_entropy.reference import cross_entropy_backward, shape_logits
from aifactory_train.kernels.linear_cross_entropy.op import accumulate, pick, prepare, project
from aifactory_train.kernels.linear_cross_entropy.space import chunk_rows
from aifactory_train.kernels.linear_dpo import reference

__all__ = ["linear_dpo", "linear_logps"]

NAME = "linear_dpo"


def linear_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Log-probability of every label under ``softmax(scale * (hidden @ weight.T + bias))``, fp32, in the shape of
    ``labels``.

    ``hidden`` [..., D], ``weight`` [V, D], ``labels`` [...] int64 aligned with hidden; 0 at -100. Differentiable in
    hidden, weight, bias.
    """
    shape = labels.shape
    hidden, weight, labels, bias = prepare(hidden, weight, labels, bias)
    arch, sku, _ = runtime.where(hidden)
    chunk = chunk_size or chunk_rows(arch, sku, labels.numel(), weight.shape[0])
    return torch.ops.aifactory.linear_logps_fwd(hidden, weight, labels, bias, scale, softcap or 0.0, chunk)[0].view(
        shape
    )


def linear_dpo(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    reference_logps: torch.Tensor,
    bias: torch.Tensor | None = None,
    beta: float = 0.1,
    smoothing: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """DPO loss, summed over P pairs.

    ``hidden`` [2 P, S, D] with the chosen sequences first, ``labels`` [2 P, S] aligned with it (-100 for prompt and
    padding), ``reference_logps`` [2 P] of the frozen reference (:func:`linear_logps` under ``no_grad``, summed over S).
    Returns (loss, chosen rewards [P], rejected rewards [P]), fp32; the rewards are detached.
    """
    if labels.dim() != 2 or labels.shape[0] % 2:
        raise ValueError(f"{NAME}: labels must be [2 P, S] with the chosen sequences first, got {tuple(labels.shape)}")
    logps = linear_logps(hidden, weight, labels, bias, scale, softcap, chunk_size).sum(-1)
    return reference.dpo(logps, reference_logps, beta, smoothing)


def _chunks(hidden, weight, labels, bias, chunk, rows, picked):
    """(which rows, hidden, labels, logits) of each chunk; the logits of all lie in one buffer."""
    buffer = weight.new_empty(min(chunk, rows), weight.shape[0])
    for first in range(0, rows, chunk):
        last = min(first + chunk, rows)
        here = slice(first, last) if picked is None else picked[first:last]
        h = hidden[here]
        yield here, h, labels[here], project(h, weight, bias, buffer[: h.shape[0]])


@runtime.custom_op(
    "linear_logps_fwd",
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float scale, float softcap, int chunk) -> (Tensor, "
    "Tensor)",
)
def linear_logps_fwd(hidden, weight, labels, bias, scale, softcap, chunk):
    rows, picked, _ = pick(labels, -1)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logps, lse = (hidden.new_zeros(labels.shape[0], dtype=dtype) for _ in range(2))
    for here, _, label, logits in _chunks(hidden, weight, labels, bias, chunk, rows, picked):
        if runtime.use_triton(NAME, logits):
            loss, part = launch_forward(logits, label, scale, softcap)
        else:
            shaped = shape_logits(logits, scale, softcap or None)
            loss = torch.nn.functional.cross_entropy(shaped, label, ignore_index=runtime.IGNORE, reduction="none")
            part = torch.logsumexp(shaped, -1)
        logps[here], lse[here] = -loss, part
    return logps, lse


@linear_logps_fwd.register_fake
def _(hidden, weight, labels, bias, scale, softcap, chunk):
    logps = hidden.new_empty(labels.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
    return logps, torch.empty_like(logps)


@runtime.custom_op(
    "linear_logps_bwd",
    "(Tensor grad, Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor lse, float scale, float softcap, "
    "int chunk) -> (Tensor, Tensor, Tensor)",
)
def linear_logps_bwd(grad, hidden, weight, labels, bias, lse, scale, softcap, chunk):
    rows, picked, _ = pick(labels, -1)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    dh = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    dw = weight.new_zeros(weight.shape, dtype=dtype)
    db = weight.new_zeros(weight.shape[0], dtype=dtype)
    for here, h, label, logits in _chunks(hidden, weight, labels, bias, chunk, rows, picked):
        minus = -grad[here]  # the kernels differentiate the loss, which is minus the log-probability
        if runtime.use_triton(NAME, logits):
            dlogits = launch_backward(minus, logits, label, lse[here], logits, scale, softcap)
        else:
            dlogits = logits.copy_(cross_entropy_backward(minus, logits, label, scale, softcap or None))
        dh[here] = dlogits @ weight
        accumulate(dw, dlogits, h)
        db += dlogits.sum(0, dtype=dtype)
    return dh, dw.to(weight.dtype), db.to(weight.dtype)


@linear_logps_bwd.register_fake
def _(grad, hidden, weight, labels, bias, lse, scale, softcap, chunk):
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # the first result alone has a gradient: no zeros are made
    hidden, weight, labels, bias, ctx.scale, ctx.softcap, ctx.chunk = inputs
    ctx.save_for_backward(hidden, weight, labels, bias, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 7
    hidden, weight, labels, bias, lse = ctx.saved_tensors
    dh, dw, db = torch.ops.aifactory.linear_logps_bwd(
        grad, hidden, weight, labels, bias, lse, ctx.scale, ctx.softcap, ctx.chunk
    )
    return dh, dw, None, db if bias is not None else None, None, None, None


linear_logps_fwd.register_autograd(_backward, setup_context=_setup)
