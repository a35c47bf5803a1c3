"""Attention that stays inside each document, on every backend.

The functions are registered in transformers' attention registry, so no model code is changed. Documents are described
by their boundaries in the flattened batch, not by a mask: work grows with the square of the document's length, never
with the length of the pack. transformers is asked for no mask at all; decoding, which needs them, goes by a name of its
own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from aifactory_train.core import compat
from aifactory_train.core.errors import UserError
from aifactory_train.kernels import runtime

#: names in transformers' registry
PER_DOCUMENT = "aifactory_per_document"
VARLEN = "aifactory_varlen"
FLASH = "aifactory_flash"
TRITON = "aifactory_triton"
#: with a mask and without documents: what :func:`decoding` puts in their place
DECODING = "aifactory_decoding"


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch lie, over its flattened ``B * T`` positions.

    ``lengths`` are host integers that add up to ``B * T`` (padded tails count as documents of their own);
    ``cu_seqlens`` is the int32 tensor ``[num_documents + 1]`` on the device that the variable-length kernels read.
    """

    lengths: list[int]
    cu_seqlens: torch.Tensor
    max_length: int

    @staticmethod
    def of(cu_seqlens: torch.Tensor, device: torch.device | str) -> Documents:
        """From cumulative lengths on the host (no device synchronisation)."""
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
        return Documents(lengths, cu_seqlens.to(device, dtype=torch.int32, non_blocking=True), max(lengths, default=0))


def _flat(states: torch.Tensor) -> torch.Tensor:
    """``[B, H, T, D]`` -> ``[1, H, B * T, D]``."""
    if states.shape[0] == 1:
        return states
    batch, heads, length, dim = states.shape
    return states.transpose(0, 1).reshape(1, heads, batch * length, dim)


@dataclass(frozen=True)
class Variant:
    """What a layer's attention does beyond the causal softmax, as far as documents of this length feel it.

    ``window``: tokens that a token sees, itself included; ``chunk``: it sees its own chunk of so many alone; 0 is no
    limit. ``softcap`` c: scores become c tanh(score / c). ``sinks``: a score a head without a value.
    """

    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: torch.Tensor | None = None

    @staticmethod
    def of(module: torch.nn.Module, longest: int, kwargs: dict[str, Any]) -> Variant:
        """From what transformers passes to an attention function, and what it says by the layer alone."""
        window, chunk = kwargs.get("sliding_window") or 0, _chunk(module)
        sinks = kwargs.get("s_aux")
        return Variant(
            window if window < longest else 0,
            chunk if chunk < longest else 0,
            float(kwargs.get("softcap") or 0.0),
            getattr(module, "sinks", None) if sinks is None else sinks,
        )

    @property
    def plain(self) -> bool:
        return not (self.window or self.chunk or self.softcap) and self.sinks is None

    @property
    def windowed(self) -> bool:
        """A window and nothing else."""
        return bool(self.window) and not (self.chunk or self.softcap) and self.sinks is None


def _chunk(module: torch.nn.Module) -> int:
    """Tokens of a chunk of a layer that attends inside chunks (Llama 4 says so by the mask alone); 0 elsewhere."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None or index is None or index >= len(kinds) or kinds[index] != "chunked_attention":
        return 0
    return int(getattr(config, "attention_chunk_size", None) or 0)


def own_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents,
    dropout: float,
    scaling: float | None,
    variant: Variant = Variant(),
) -> torch.Tensor:
    """This project's operator, which computes every variant; tensors as in :data:`Kernel`. It has no dropout."""
    if dropout:
        raise UserError(
            f"this model drops {dropout:g} of its attention in training, which attention with windows, sinks or soft "
            "caps, and model.attention=triton, cannot",
            where="model.base",
            fix="set attention_dropout to 0 in the model's config.json",
        )
    from aifactory_train.kernels.attention.op import attention

    return attention(
        q, k, v, documents.cu_seqlens, documents.max_length, variant.sinks, None, scaling, variant.window,
        variant.chunk, variant.softcap, documents.lengths,
    )  # fmt: skip


def per_document_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    documents: Documents | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal SDPA on each document. query ``[B, H, T, D]``, key/value ``[B, H_kv, T, D]`` -> ``[B, T, H, D]``.

    What SDPA does not compute (windows, chunks, sinks, soft caps) our own operator does, by blocks of queries.
    """
    if documents is None:
        # transformers makes no mask for this name: padding would be attended to in silence.
        raise ValueError(
            "the attention of training needs documents; generate within aifactory_train.model.attention.decoding"
        )
    variant = Variant.of(module, documents.max_length, kwargs)
    if not variant.plain:
        return _rows(own_attention, query, key, value, documents, dropout, scaling, variant)
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    if groups > 1 and not shares_heads(query):
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    # split, not slices: the backward of split is one concatenation, that of a slice a full-size tensor per document
    parts = zip(*(_flat(states).split(documents.lengths, dim=2) for states in (query, key, value)), strict=True)
    # by a branch, not by the comparison: in compiled blocks that is a symbol, which SDPA does not take
    shared: dict[str, Any] = {"enable_gqa": True} if groups > 1 else {}
    outputs = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, **shared)
        for q, k, v in parts
    ]
    out = torch.cat(outputs, dim=2)  # [1, H, B*T, D]
    # contiguous as transformers' own functions return it: some models (AFMoE) take a view of it
    return out.squeeze(0).transpose(0, 1).reshape(batch, length, heads, -1).contiguous(), None


def shares_heads(query: torch.Tensor) -> bool:
    """Whether SDPA has a fast kernel for fewer key than query heads. On NVIDIA GPUs in fp32, and before Ampere, only
    its plain form takes them, whose memory grows with the square of the length."""
    if query.device.type != "cuda" or torch.version.hip:
        return True
    return query.dtype != torch.float32 and torch.cuda.get_device_capability(query.device) >= (8, 0)


#: Attention of ``[B * T, H, D]`` queries to ``[B * T, H_kv, D]`` keys and values, given the documents, dropout, scaling
#: and the layer's variant.
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Documents, float, float | None, Variant], torch.Tensor]


def _rows(
    kernel: Kernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    dropout: float,
    scaling: float | None,
    variant: Variant,
) -> tuple[torch.Tensor, None]:
    """A kernel over flattened tokens on transformers' ``[B, H, T, D]``; the result is ``[B, T, H, D]``."""
    batch, heads, length, _ = query.shape
    # SDPA follows autocast by itself; kernels refuse fp32 and mixed types
    query, key, value = (states.to(runtime.arithmetic(states)) for states in (query, key, value))
    q, k, v = (_flat(states).squeeze(0).transpose(0, 1).contiguous() for states in (query, key, value))
    return kernel(q, k, v, documents, dropout, scaling, variant).reshape(batch, length, heads, -1), None


def _over_documents(computes: Callable[[Variant], bool]) -> Callable[[Kernel], Callable[..., Any]]:
    """A variable-length kernel in transformers' form; what it does not compute (``computes``) our own operator does.

    Without documents it is :func:`per_document_attention`, which refuses.
    """

    def wrap(kernel: Kernel) -> Callable[..., tuple[torch.Tensor, None]]:
        @functools.wraps(kernel)
        def attention(
            module, query, key, value, attention_mask, *, dropout=0.0, scaling=None, documents=None, **kwargs
        ) -> tuple[torch.Tensor, None]:
            if documents is None:
                return per_document_attention(module, query, key, value, attention_mask)
            variant = Variant.of(module, documents.max_length, kwargs)
            taken = kernel if computes(variant) else own_attention
            return _rows(taken, query, key, value, documents, dropout, scaling, variant)

        return attention

    return wrap


def _varlen_computes(variant: Variant) -> bool:
    """Windows where torch's kernel takes them; on AMD GPUs that was not seen, so our own operator computes them."""
    return variant.plain or (variant.windowed and not torch.version.hip and "window_size" in _asked())


def _asked() -> frozenset[str]:
    """Names of the arguments of torch's variable-length kernel; empty where torch has none."""
    attend = compat.varlen_attention()
    return frozenset(inspect.signature(attend).parameters) if attend else frozenset()


@_over_documents(_varlen_computes)
def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents,
    dropout: float,
    scaling: float | None,
    variant: Variant = Variant(),
) -> torch.Tensor:
    """One variable-length kernel over all documents (``torch.nn.attention.varlen``), which has no dropout."""
    if dropout:
        raise UserError(
            f"this model drops {dropout:g} of its attention in training, torch's variable-length kernel cannot",
            where="model.attention",
            fix="--set model.attention=per_document",
        )
    heads, dim = q.shape[1:]
    if scaling is not None and abs(scaling * dim**0.5 - 1) > 1e-6:
        # varlen_attn scales by 1/sqrt(D) in the versions that lack a scale argument: fold the difference into q
        q = q * (scaling * dim**0.5)
    if heads != k.shape[1] and not compat.varlen_supports_gqa():
        k, v = (states.repeat_interleave(heads // states.shape[1], dim=1) for states in (k, v))
    attend = compat.varlen_attention()
    assert attend is not None  # choose() lets this backend be taken only where torch has it
    extra = {"enable_gqa": True} if heads != k.shape[1] else {}
    bounds, longest = documents.cu_seqlens, documents.max_length
    return attend(q, k, v, bounds, bounds, longest, longest, **_causal(attend, variant.window), **extra)


def _causal(attend: Any, window: int) -> dict:
    """``varlen_attn``'s way to ask for causal attention changed from ``is_causal`` to a window."""
    if "is_causal" in inspect.signature(attend).parameters and not window:
        return {"is_causal": True}
    return {"window_size": (window - 1 if window else -1, 0)}


@_over_documents(lambda variant: not variant.chunk and variant.sinks is None)
def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents,
    dropout: float,
    scaling: float | None,
    variant: Variant = Variant(),
) -> torch.Tensor:
    """The flash-attn package's variable-length function."""
    from flash_attn import flash_attn_varlen_func

    more: dict[str, Any] = {"window_size": (variant.window - 1, 0)} if variant.window else {}
    if variant.softcap:
        more["softcap"] = variant.softcap
    bounds, longest = documents.cu_seqlens, documents.max_length
    return flash_attn_varlen_func(
        q, k, v, bounds, bounds, longest, longest, dropout_p=dropout, softmax_scale=scaling, causal=True, **more
    )


triton_attention = _over_documents(lambda variant: True)(own_attention)


def masked_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Decoding (no documents, a cache): transformers' own SDPA with its own mask rules."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    window = kwargs.get("sliding_window") or None
    if attention_mask is None and ((window and key.shape[2] > window) or 1 < query.shape[2] < key.shape[2]):
        # register() makes no mask where no attention_mask was passed: what needs one must say so.
        raise ValueError("pass attention_mask: a window or a cache in use cannot be computed without a mask")
    variant = Variant.of(module, key.shape[2], kwargs)
    if variant.softcap or variant.sinks is not None:
        return _capped_under_mask(query, key, value, attention_mask, kwargs.get("scaling"), variant), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _capped_under_mask(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    variant: Variant,
) -> torch.Tensor:
    """Soft caps and sinks under a mask (bool ``[B, 1, T, S]``, True is seen), which SDPA leaves out in silence."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if variant.softcap:
        scores = variant.softcap * torch.tanh(scores / variant.softcap)
    if mask is None and query.shape[2] > 1:  # register(): a whole text without padding
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min  # a row of padding sees nothing: no NaN
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if variant.sinks is not None:
        sinks = variant.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


@contextlib.contextmanager
def decoding(model: Any) -> Iterator[None]:
    """Within it a transformers ``model`` attends under masks (padding, a cache), as generation needs; documents are
    none of its.
    """
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = DECODING
    try:
        yield
    finally:
        config._attn_implementation = before


def register() -> None:
    """Make the functions known to transformers under their names.

    A mask function is registered for :data:`DECODING` alone. For the others transformers then returns before it looks
    at anything: with one it would ask, in every forward, whether the positions are those of packed documents, and so
    have the host wait for the device.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def mask(*args, **kwargs):
        return None if kwargs.get("attention_mask") is None else sdpa_mask(*args, **kwargs)

    for name, function in (
        (PER_DOCUMENT, per_document_attention),
        (VARLEN, varlen_attention),
        (FLASH, flash_attention),
        (TRITON, triton_attention),
        (DECODING, masked_attention),
    ):
        AttentionInterface.register(name, function)
    AttentionMaskInterface.register(DECODING, mask)
