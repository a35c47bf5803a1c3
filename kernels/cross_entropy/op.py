"""Cross-entropy as registered operators with autograd."""

import torch

from aifactory_train.kernels import runtime
from aifactory_train.kernels.cross_entropy import reference, space
from aifactory_train.kernels.spec import cdiv

__all__ = ["cross_entropy"]


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, scale: float = 1.0, softcap: float | None = None, reduction: str = "sum"
) -> torch.Tensor:
    """Cross-entropy of rows of logits.

    ``logits`` [N, V] in bf16, fp16 or fp32, ``labels`` [N] int64 with -100 for rows that do not count. ``scale``
    multiplies the logits, ``softcap`` then bounds them by tanh. Returns the fp32 sum over rows, or with
    ``reduction="none"`` one loss a row. The logits are kept; the gradient is a new tensor. On a GPU a label outside [0,
    V) makes the loss NaN, on a CPU it raises.
    """
    if reduction not in ("sum", "none"):
        raise ValueError(f"cross_entropy: reduction must be 'sum' or 'none', not {reduction!r}")
    if not runtime.use_triton("cross_entropy", logits):
        loss = reference.cross_entropy(logits, labels, scale, softcap)
    else:
        loss = torch.ops.aifactory.cross_entropy_fwd(logits, labels, scale, softcap or 0.0)[0]
    return loss.sum() if reduction == "sum" else loss


def launch_forward(logits, labels, scale, softcap, op="cross_entropy"):
    """(loss, lse) [N] of the forward kernel; ``softcap`` 0 means none."""
    from aifactory_train.kernels.cross_entropy.triton_kernels import ce_fwd as kernel

    n, v = logits.shape
    loss, lse = (logits.new_empty(n, dtype=torch.float32) for _ in range(2))
    if n:
        config = runtime.launch("cross_entropy", logits, rows=n, vocab=v)["cross_entropy_fwd"]
        kernel[(n,)](
            logits, labels, loss, lse, logits.stride(0), v, scale, softcap,
            CAP=softcap != 0.0, BLOCK=space.block(config, v), **runtime.compiler_options(config),
        )  # fmt: skip
    return loss, lse


def launch_backward(grad, logits, labels, lse, out, scale, softcap):
    """Write grad[row] * d loss / d logits into ``out`` (which may be ``logits``)."""
    from aifactory_train.kernels.cross_entropy.triton_kernels import ce_bwd as kernel

    n, v = logits.shape
    if n:
        config = runtime.launch("cross_entropy", logits, rows=n, vocab=v)["cross_entropy_bwd"]
        block = space.block(config, v)
        kernel[(n, cdiv(v, block))](
            grad, logits, labels, lse, out, grad.stride(0), logits.stride(0), out.stride(0), v, scale, softcap,
            CAP=softcap != 0.0, BLOCK=block, **runtime.compiler_options(config),
        )  # fmt: skip
    return out


@runtime.custom_op(
    "cross_entropy_fwd", "(Tensor logits, Tensor labels, float scale, float softcap) -> (Tensor, Tensor)"
)
def cross_entropy_fwd(logits, labels, scale, softcap):
    if not runtime.use_triton("cross_entropy", logits):
        shaped = reference.shape_logits(logits, scale, softcap or None)
        loss = torch.nn.functional.cross_entropy(shaped, labels, ignore_index=runtime.IGNORE, reduction="none")
        return loss.float(), torch.logsumexp(shaped, -1).float()
    return launch_forward(runtime.rows2d(logits), labels, scale, softcap)


@cross_entropy_fwd.register_fake
def _(logits, labels, scale, softcap):
    loss = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return loss, torch.empty_like(loss)


@runtime.custom_op(
    "cross_entropy_bwd", "(Tensor grad, Tensor logits, Tensor labels, Tensor lse, float scale, float softcap) -> Tensor"
)
def cross_entropy_bwd(grad, logits, labels, lse, scale, softcap):
    if not runtime.use_triton("cross_entropy", logits):
        return reference.cross_entropy_backward(grad, logits, labels, scale, softcap or None).to(logits.dtype)
    return launch_backward(grad, runtime.rows2d(logits), labels, lse, logits.new_empty(logits.shape), scale, softcap)


@cross_entropy_bwd.register_fake
def _(grad, logits, labels, lse, scale, softcap):
    return logits.new_empty(logits.shape)


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # the first result alone has a gradient: no zeros are made
    logits, labels, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(logits, labels, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    logits, labels, lse = ctx.saved_tensors
    return torch.ops.aifactory.cross_entropy_bwd(grad, logits, labels, lse, ctx.scale, ctx.softcap), None, None, None


cross_entropy_fwd.register_autograd(_backward, setup_context=_setup)
