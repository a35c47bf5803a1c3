"""Layers that carry a state from token to token (gated delta nets, Mamba, lightning attention, short convolutions) stay
inside documents.

transformers' own code of these layers takes no boundaries: what could name them (``seq_idx``, ``cu_seq_lens_q``) is
dropped outside some kernels for GPUs that may or may not be installed. So the layer is run on documents: the tokens of
a pack are laid out as rows, one document a row, documents of similar length together, and what it gives is put back in
its place. Every such layer is causal, so the padding behind a document changes nothing in it. Whether that holds for a
model is not believed but compared at start (:mod:`aifactory_train.model.position_check`).

The boundaries go into a block with its arguments, not by a global: a block that is computed again in the backward
(checkpointing) has those of its own micro-batch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from aifactory_train.model.attention import Documents

#: Names of classes that mix positions by a state or a convolution. One that is missing here trains one document a row.
STATEFUL = re.compile(
    r"\w*(DeltaNet|DeltaAttention|LightningAttention|LinearAttention|Mamba2?(Mixer|Layer)?|(Bamba|FalconH1)Mixer"
    r"|ShortConv(olution)?|RecurrentBlock|Rwkv\w*(Attention|FeedForward)|xLSTMLayer|ZayaAttention|NGramEmbedding"
    r"|Retention|GatedLinearUnitRecurrence)"
)
#: Padding of rows that are computed together, as a part of their tokens.
MOST_PADDING = 0.25
#: The argument of blocks that holds the boundaries.
_ARGUMENT = "documents_of_states"


class Rows:
    """The documents of a batch as rows of similar length.

    ``groups``: for each call of a layer, int64 ``[rows, width]`` into the flattened batch, and the places of real
    tokens in the flattened result, int64 ``[tokens]``. ``order``: where the tokens of all groups, one behind the other,
    go.
    """

    def __init__(self, documents: Documents, device: torch.device):
        self.documents, self.total = documents, sum(documents.lengths)
        starts = [0]
        for length in documents.lengths:
            starts.append(starts[-1] + length)
        self.groups: list[tuple[torch.Tensor, torch.Tensor]] = []
        taken: list[torch.Tensor] = []
        for members in _alike(documents.lengths):
            lengths = torch.tensor([documents.lengths[m] for m in members])
            steps = torch.arange(int(lengths.max()))
            first = torch.tensor([starts[m] for m in members])[:, None]
            real = steps < lengths[:, None]
            index = first + torch.minimum(steps, lengths[:, None] - 1)  # padding repeats the last token
            taken.append(index[real])
            kept = real.flatten().nonzero().flatten()
            self.groups.append((index.to(device), kept.to(device)))
        order = torch.cat(taken) if taken else torch.zeros(0, dtype=torch.int64)
        self.order = order.argsort().to(device)


def _alike(lengths: list[int]) -> list[list[int]]:
    """Indices of documents that are computed together, the longest first."""
    groups: list[list[int]] = []
    real = 0
    for index in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i]):
        if groups:
            padded = lengths[groups[-1][0]] * (len(groups[-1]) + 1)
            if padded <= (1 + MOST_PADDING) * (real + lengths[index]):
                groups[-1].append(index)
                real += lengths[index]
                continue
        groups.append([index])
        real = lengths[index]
    return groups


class States:
    """What the layers of one model know of the documents: ``now`` while the model is called, ``inside`` a block."""

    def __init__(self) -> None:
        self.now: Rows | None = None
        self.inside: Rows | None = None


def keep_apart(model: nn.Module) -> tuple[States, list[str]]:
    """Have every layer of ``model`` that carries a state run on documents: (what to tell them by, their names)."""
    states = States()
    found = {name: m for name, m in model.named_modules() if STATEFUL.fullmatch(type(m).__name__)}
    outermost = {n: m for n, m in found.items() if not any(n != other and n.startswith(f"{other}.") for other in found)}
    if not outermost:
        return states, []
    mixers = dict.fromkeys(outermost.values())
    for mixer in mixers:
        mixer.forward = _on_documents(mixer.forward, states)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    for block in dict.fromkeys(child for one in lists for child in one):
        if any(m in mixers for m in block.modules()):
            _pass_on(block, states)
    return states, list(outermost)


def _pass_on(block: nn.Module, states: States) -> None:
    """``block`` takes the boundaries as an argument; called without (decoding), its layers see none."""
    inner = block.forward

    def give(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, _ARGUMENT: states.now} if states.now is not None else kwargs

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        before, states.inside = states.inside, kwargs.pop(_ARGUMENT, states.inside)
        try:
            return inner(*args, **kwargs)
        finally:
            states.inside = before

    block.register_forward_pre_hook(give, with_kwargs=True)
    block.forward = forward


def _on_documents(forward: Callable[..., Any], states: States) -> Callable[..., Any]:
    """A layer's ``forward``, run on rows of documents where the boundaries are known and rows are not documents yet."""

    @functools.wraps(forward)
    def on_documents(*args: Any, **kwargs: Any) -> Any:
        rows = states.inside or states.now
        shape = _shape_of([*args, *kwargs.values()], rows.total) if rows is not None else None
        if rows is None or shape is None or set(rows.documents.lengths) == {shape[1]}:
            return forward(*args, **kwargs)
        return _by_rows(forward, rows, shape, args, kwargs)

    return torch.compiler.disable(on_documents)


def _shape_of(values: list[Any], total: int) -> torch.Size | None:
    """``[B, T]`` of a layer's input. Raises if it has one that does not hold the batch's tokens."""
    first = next((v for v in values if isinstance(v, torch.Tensor) and v.dim() >= 2), None)
    if first is None:
        return None
    if first.shape[0] * first.shape[1] != total:
        raise ValueError(f"a layer that carries a state got {tuple(first.shape)} for {total} tokens")
    return first.shape[:2]


def _by_rows(
    forward: Callable[..., Any], rows: Rows, shape: torch.Size, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    results = []
    for index, kept in rows.groups:
        count, width = index.shape
        bounds = torch.arange(count + 1, dtype=torch.int32) * width

        def cut(value: Any, index: torch.Tensor = index, bounds: torch.Tensor = bounds) -> Any:
            if isinstance(value, Documents):
                return Documents.of(bounds, index.device)
            if isinstance(value, (tuple, list)):
                return type(value)(cut(v) for v in value) if type(value) in (tuple, list) else value
            if not isinstance(value, torch.Tensor):
                return value
            if value.dim() >= 2 and value.shape[:2] == shape:
                return value.reshape(rows.total, *value.shape[2:])[index]
            if value.dim() >= 2 and value.shape[0] == 1 and value.shape[1] == shape[1]:
                return value[0][index % shape[1]]  # the same for every row of the batch
            return value[: index.shape[1]] if value.dim() == 1 and value.shape[0] == shape[1] else value

        out = forward(*(cut(a) for a in args), **{k: cut(v) for k, v in kwargs.items()})
        results.append(_real(out, count, width, kept))
    return _together(results, rows.order, shape)


def _real(out: Any, count: int, width: int, kept: torch.Tensor) -> Any:
    """``[tokens, ...]`` of a group's result ``[rows, width, ...]``; parts of another shape (states) stay."""
    if isinstance(out, tuple):
        return tuple(_real(part, count, width, kept) for part in out)
    if isinstance(out, torch.Tensor) and out.dim() >= 2 and out.shape[:2] == (count, width):
        return out.reshape(count * width, *out.shape[2:])[kept]
    return None  # a state, which nothing in training asks for


def _together(parts: list[Any], order: torch.Tensor, shape: torch.Size) -> Any:
    first = parts[0]
    if isinstance(first, tuple):
        return tuple(_together([p[i] for p in parts], order, shape) for i in range(len(first)))
    return None if first is None else torch.cat(parts)[order].reshape(*shape, *first.shape[1:])
