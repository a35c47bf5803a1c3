"""Chunked linear cross-entropy: loss and gradients in one sweep over chunks of supervised rows.

A chunk's logits exist only until they have been overwritten with their gradient and used for the two gradient GEMMs.
The weight gradient is accumulated in fp32 over all chunks and rounded once, in backward.
"""

import logging
from functools import lru_cache

import torch

from aifactory_train.kernels import runtime
from aifactory_train.kernels.cross_entropy.reference import cross_entropy_backward, shape_logits
from aifactory_train.kernels.linear_cross_entropy import space

__all__ = ["linear_cross_entropy"]

log = logging.getLogger(__name__)
NAME = "linear_cross_entropy"


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    supervised: int | None = None,
) -> torch.Tensor:
    """Sum of the cross-entropy of ``scale * (hidden @ weight.T + bias)`` over supervised rows, as an fp32 scalar.

    ``hidden`` [N, D] (leading dimensions are flattened), ``weight`` [V, D], ``labels`` [N] int64 already aligned with
    ``hidden``; rows with label -100 count nothing. ``softcap`` bounds the scaled logits by tanh (Gemma 2). All logits
    never exist at once: ``chunk_size`` rows at a time, by default from the device's balance of FLOP and bandwidth.

    ``supervised``: how many labels are not -100, if the caller knows it on the host; only those rows are then computed,
    without asking the device. Too small a number makes the loss NaN. Without it a CPU counts for itself, a GPU computes
    every row.

    Differentiable in hidden, weight and bias. A weight of another dtype is cast to hidden's (autocast is followed). A
    weight sharded as a DTensor is gathered here, and its gradient is reduce-scattered (summed) back; call it inside the
    forward of the module that FSDP2 wraps to use the weight that FSDP has gathered anyway, which also covers a tied
    embedding. On a GPU a label outside [0, V) gives NaN, on a CPU it raises ``IndexError``.
    """
    hidden, weight, labels, bias = prepare(hidden, weight, labels, bias)
    rows = labels.numel() if supervised is None else supervised
    if rows == labels.numel():
        supervised = None
    chunk = chunk_size or _chunk(hidden, rows, weight.shape[0])
    grad = torch.is_grad_enabled()
    return torch.ops.aifactory.linear_cross_entropy_fwd(
        hidden, weight, labels, bias, scale, softcap or 0.0, chunk, -1 if supervised is None else supervised,
        grad and hidden.requires_grad, grad and (weight.requires_grad or (bias is not None and bias.requires_grad)),
    )[0]  # fmt: skip


def prepare(hidden, weight, labels, bias):
    """Flatten leading dimensions, gather a sharded weight, follow autocast, bring all to one dtype; checks shapes."""
    from aifactory_train.kernels.dtensor import gathered

    weight, bias = gathered(weight), gathered(bias) if bias is not None else None
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.shape[0] != labels.shape[0]:
        raise ValueError(
            f"{NAME}: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}: "
            f"expected [N, D], [V, D], [N]"
        )
    dtype = runtime.arithmetic(hidden)
    return hidden.to(dtype), weight.to(dtype), labels, bias.to(dtype) if bias is not None else None


def _chunk(hidden, rows, vocab):
    arch, sku, _ = runtime.where(hidden)
    return space.chunk_rows(arch, sku, rows, vocab)


@runtime.custom_op(
    "linear_cross_entropy_fwd",
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float scale, float softcap, int chunk, int "
    "supervised, bool need_hidden, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor)",
)
def linear_cross_entropy_fwd(hidden, weight, labels, bias, scale, softcap, chunk, supervised, need_hidden, need_weight):
    rows, picked, overflow = pick(labels, supervised)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    extra = 0 if picked is None else 1  # one row more takes the gradient of padding indices
    room = (hidden.shape[0] + extra, hidden.shape[1]) if need_hidden else (0,)
    dh = hidden.new_zeros(room) if extra else hidden.new_empty(room)
    dw = weight.new_zeros(weight.shape, dtype=dtype) if need_weight else None
    db = weight.new_zeros(weight.shape[0], dtype=dtype) if need_weight and bias is not None else None
    each: list[torch.Tensor] = []
    buffer = weight.new_empty(min(chunk, rows), weight.shape[0])
    for first in range(0, rows, chunk):
        here = slice(first, min(first + chunk, rows))
        if picked is None:
            h, label = hidden[here], labels[here]
        else:
            at = picked[here].clamp(max=labels.shape[0] - 1)
            h = hidden[at]
            label = torch.where(picked[here] < labels.shape[0], labels[at], runtime.IGNORE)
        logits = project(h, weight, bias, buffer[: h.shape[0]])
        losses, dlogits = _loss_and_gradient(logits, label, scale, softcap, need_hidden or need_weight)
        each.append(losses)
        if need_hidden:
            if picked is None:
                torch.mm(dlogits, weight, out=dh[here])
            else:
                dh.index_copy_(0, picked[here], dlogits @ weight)
        if need_weight:
            accumulate(dw, dlogits, h)
            if db is not None:
                db += dlogits.sum(0, dtype=dtype)
    loss = torch.cat(each).sum(dtype=dtype) if each else hidden.new_zeros((), dtype=dtype)
    if overflow is not None:
        loss = torch.where(overflow, float("nan"), loss)
    if need_hidden and extra:
        dh = dh.resize_(hidden.shape)
    return (
        loss.float() if dtype == torch.float32 else loss,
        dh,
        dw if dw is not None else hidden.new_empty(0),
        db if db is not None else hidden.new_empty(0),
    )


@linear_cross_entropy_fwd.register_fake
def _(hidden, weight, labels, bias, scale, softcap, chunk, supervised, need_hidden, need_weight):
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    dw = weight.new_empty(weight.shape, dtype=dtype) if need_weight else hidden.new_empty(0)
    db = weight.new_empty(weight.shape[0], dtype=dtype) if need_weight and bias is not None else hidden.new_empty(0)
    return hidden.new_empty((), dtype=dtype), hidden.new_empty(hidden.shape if need_hidden else 0), dw, db


def pick(labels, supervised):
    """(number of rows to compute, their indices or None for all, a device flag that more were supervised than
    announced).

    Indices beyond the supervised rows are N. A GPU is never asked how many there are.
    """
    if supervised < 0:
        if labels.device.type != "cpu":
            return labels.shape[0], None, None
        index = torch.nonzero(labels != runtime.IGNORE).squeeze(1)
        return index.shape[0], index if index.shape[0] < labels.shape[0] else None, None
    valid = labels != runtime.IGNORE
    index = torch.nonzero_static(valid, size=supervised, fill_value=labels.shape[0]).squeeze(1)
    return supervised, index, valid.sum() > supervised


def project(h, weight, bias, out):
    """``h @ weight.T + bias`` into ``out`` by the vendor's GEMM."""
    if bias is None:
        return torch.mm(h, weight.t(), out=out)
    return torch.addmm(bias, h, weight.t(), out=out)


def _loss_and_gradient(logits, labels, scale, softcap, gradient):
    """(losses [C], logits overwritten with their gradient or None)."""
    if runtime.use_triton(NAME, logits):
        if not gradient:
            from aifactory_train.kernels.cross_entropy.op import launch_forward

            return launch_forward(logits, labels, scale, softcap)[0], None
        return _launch(logits, labels, scale, softcap), logits
    shaped = shape_logits(logits, scale, softcap or None)
    losses = torch.nn.functional.cross_entropy(shaped, labels, ignore_index=runtime.IGNORE, reduction="none")
    if not gradient:
        return losses, None
    one = torch.ones_like(losses)
    return losses, logits.copy_(cross_entropy_backward(one, logits, labels, scale, softcap or None))


def _launch(logits, labels, scale, softcap):
    from aifactory_train.kernels.cross_entropy.space import block
    from aifactory_train.kernels.linear_cross_entropy.triton_kernels import ce_fwd_bwd as kernel

    n, v = logits.shape
    loss = logits.new_empty(n, dtype=torch.float32)
    config = runtime.launch(NAME, logits, rows=n, hidden=0, vocab=v)["linear_cross_entropy_fwd"]
    kernel[(n,)](
        logits, labels, loss, logits.stride(0), v, scale, softcap,
        CAP=softcap != 0.0, BLOCK=block(config, v), **runtime.compiler_options(config),
    )  # fmt: skip
    return loss


def accumulate(total, dlogits, h):
    """``total += dlogits.T @ h`` with an fp32 ``total``: inside the GEMM where the vendor's library can, else one add a
    chunk.
    """
    a = dlogits.t()
    if total.dtype == h.dtype:
        total.addmm_(a, h)
    elif _mixed_gemm(h.device.type, h.device.index, h.dtype, runtime.where(h)[0] if h.is_meta else ""):
        torch.addmm(total, a, h, out_dtype=torch.float32, out=total)
    else:
        total += a @ h


@lru_cache(None)
def _mixed_gemm(kind: str, index: int | None, dtype: torch.dtype, pretended: str = "") -> bool:
    """Whether this device's ``addmm`` takes half inputs with an fp32 accumulator; tried once on a small matrix, and
    logged. Of a pretended device what is documented: NVIDIA's library does.
    """
    if kind != "cuda":
        return pretended.startswith("sm_")
    device = torch.device(kind, index or 0)
    total, a = torch.zeros(16, 16, device=device), torch.eye(16, device=device, dtype=dtype)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError) as error:
        log.warning(
            "%s: no GEMM with fp32 accumulator here (%s): weight gradient added chunk by chunk",
            NAME,
            str(error).splitlines()[0],
        )
        return False
    return True


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # the first result alone has a gradient: no zeros are made
    _, weight, _, bias, *_ = inputs
    ctx.dtypes = (weight.dtype, bias.dtype if bias is not None else None)
    ctx.needs = inputs[-2:]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _times(tensor, factor, dtype):
    """The product in ``dtype``, rounded once: the factor (one over a step's tokens, say) keeps its fp32 value."""
    return torch.mul(tensor, factor.expand_as(tensor), out=torch.empty_like(tensor, dtype=dtype))


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    dh, dw, db = ctx.saved_tensors
    need_hidden, need_weight = ctx.needs
    weight_dtype, bias_dtype = ctx.dtypes
    return (
        _times(dh, grad, dh.dtype) if need_hidden else None,
        _times(dw, grad, weight_dtype) if need_weight else None,
        None,
        _times(db, grad, bias_dtype) if need_weight and bias_dtype is not None else None,
        None, None, None, None, None, None,
    )  # fmt: skip


linear_cross_entropy_fwd.register_autograd(_backward, setup_context=_setup)
