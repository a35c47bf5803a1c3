"""Which attention a run takes on a device, tried there before it is trusted."""

from __future__ import annotations

from typing import Any

import torch

from aifactory_train.core import compat
from aifactory_train.core.errors import UserError
from aifactory_train.kernels import hardware, runtime
from aifactory_train.model.attention import (
    FLASH,
    PER_DOCUMENT,
    TRITON,
    VARLEN,
    Documents,
    Kernel,
    Variant,
    own_attention,
    varlen_attention,
)


def trial(device: str, dtype: torch.dtype, heads: tuple[int, int, int], kernel: Kernel | None = None) -> str:
    """Why a variable-length kernel (torch's by default) does not run here, forward and backward over three documents;
    empty where it does.

    ``heads``: query heads, key heads, numbers in each. Some builds of torch lack the kernel, and it has a largest head.
    """
    queries, keys, dim = heads
    documents = Documents.of(torch.tensor([0, 1, 6, 16], dtype=torch.int32), device)
    states = [
        torch.zeros(16, count, dim, dtype=dtype, device=device, requires_grad=True) for count in (queries, keys, keys)
    ]
    try:
        taken: Kernel = kernel or varlen_attention.__wrapped__  # type: ignore[attr-defined]
        q, k, v = states
        taken(q, k, v, documents, 0.0, None, Variant()).sum().backward()
        ran = all(bool(part.grad.isfinite().all()) for part in states)  # type: ignore[union-attr]
        return "" if ran else "its gradients are not finite"
    except Exception as error:  # whatever a build lacks
        return (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            if str(error).strip()
            else type(error).__name__
        )


def _has_triton(device: str) -> bool:
    """Whether our own operator runs as Triton kernels on ``device``."""
    kind = torch.device(device)
    if kind.type != "cuda" or not runtime.HAS_TRITON or not torch.cuda.is_available():
        return False
    return runtime.device_of(kind.index or 0)[0] in hardware.TARGETS and not runtime.trouble(kind)


def heads_of(config: Any) -> tuple[int, int, int] | None:
    """Query heads, key heads, numbers in each, of a transformers configuration; None where it does not say."""
    text = config.get_text_config()
    queries, hidden = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    if not isinstance(queries, int) or not isinstance(hidden, int) or queries < 1:
        return None
    keys = getattr(text, "num_key_value_heads", None) or queries
    return queries, int(keys), int(getattr(text, "head_dim", None) or hidden // queries)


def choose(
    setting: str,
    device: str,
    compute: torch.dtype = torch.bfloat16,
    *,
    heads: tuple[int, int, int] | None = None,
    compiled: bool = False,
) -> tuple[str, str]:
    """The registry name for ``model.attention`` on ``device`` and the reason, for the start-up report.

    ``compute``: the type of arithmetic. FlashAttention, which is what both variable-length kernels are, has no fp32,
    and so none on GPUs without bf16. ``heads`` (:func:`heads_of`): with them ``auto`` tries the kernel first.
    ``compiled``: blocks are compiled. Raises :class:`UserError` if the wanted backend cannot run here.
    """
    if setting != "auto":
        return _asked_for(setting, device, compute), "asked for"
    has_varlen = compat.varlen_attention() is not None
    if device != "cpu" and has_varlen and compute != torch.float32:
        if compiled and torch.version.hip:
            # pytorch#187872: its stand-in in compiled code says another shape of the log-sum-exp than the kernel
            # returns.
            return (
                PER_DOCUMENT,
                "SDPA on each document: on AMD GPUs torch's variable-length kernel is not right in compiled blocks",
            )
        trouble = trial(device, compute, heads) if heads else ""
        if trouble and heads and _has_triton(device) and not trial(device, compute, heads, own_attention):
            return TRITON, f"our own kernel: torch's variable-length one does not run here ({trouble})"
        if trouble:
            return PER_DOCUMENT, f"SDPA on each document: torch's variable-length kernel does not run here ({trouble})"
        return VARLEN, "GPU and torch >= 2.10"
    return PER_DOCUMENT, "SDPA on each document: no variable-length kernel for this device, torch and precision"


def _asked_for(setting: str, device: str, compute: torch.dtype) -> str:
    """The registry name of what a recipe names, or :class:`UserError` where it cannot run."""
    has_varlen = compat.varlen_attention() is not None
    if setting in ("flash", "varlen") and device != "cpu" and compute == torch.float32:
        raise UserError(
            "variable-length attention kernels compute in bf16 only, this run computes in fp32",
            where="model.attention",
            fix="--set model.attention=per_document, or precision.compute=bf16 where the GPU has it",
        )
    if setting == "flash":
        try:
            import flash_attn  # noqa: F401
        except ImportError:
            raise UserError(
                "flash-attn is not installed", where="model.attention", fix="--set model.attention=auto"
            ) from None
        return FLASH
    if setting == "varlen":
        if device == "cpu" or not has_varlen:
            raise UserError(
                "torch's variable-length attention needs a GPU and torch >= 2.10",
                where="model.attention",
                fix="--set model.attention=per_document",
            )
        return VARLEN
    if setting == "triton":
        if not _has_triton(device):
            raise UserError(
                "this project's attention kernel needs a GPU that Triton compiles for",
                where="model.attention",
                fix="--set model.attention=per_document",
            )
        return TRITON
    return PER_DOCUMENT
