"""Documents to tensors. The only module of the data path that imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from aifactory_train.data.store import TokenDataset

IGNORE = -100


@dataclass
class Batch:
    """One micro-batch.

    Attributes:
        input_ids: int64 [B, T]. Packed: B = 1 and the documents end to end; padded: one document a row, padding on the
            right.
        position_ids: int64 [B, T], beginning at 0 for each document.
        labels: int64 [B, T], already shifted: the target of the hidden state at that place, -100 where there is
            none. The
            last token of a document has none, so nothing is predicted across documents.
        cu_seqlens: int32 [segments + 1] over the flattened B*T tokens; one segment per document. Padding lies at the
            end of the last segment (packed) or of its row's segment (padded): causal attention keeps it out of
            every real token.
        max_seqlen: tokens of the longest segment.
        num_supervised: labels that are not -100.
        num_tokens: real tokens, without padding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    num_supervised: int
    num_tokens: int
    #: bool [B, T]: what is no padding; None: all is
    real: torch.Tensor | None = None

    def to(self, device: Any, non_blocking: bool = True) -> Batch:
        """The same batch with its tensors on ``device``."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            labels=move(self.labels),
            cu_seqlens=move(self.cu_seqlens),
            real=None if self.real is None else move(self.real),
        )


def shifted_labels(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """int64 [n]: at each place the next token if it carries loss, else -100."""
    labels = np.full(len(tokens), IGNORE, dtype=np.int64)
    labels[:-1] = np.where(mask[1:], tokens[1:], IGNORE)
    return labels


def collate(
    dataset: TokenDataset,
    doc_indices: Sequence[int] | np.ndarray,
    batching: str = "packed",
    pad_id: int = 0,
    pad_to_multiple_of: int = 1,
    text_only: bool = False,
) -> Batch:
    """Make a :class:`Batch` of documents ``doc_indices`` of ``dataset``.

    No documents give a batch of one padding token without a label, so that a rank without work can still take part in
    collectives. With ``text_only`` the labels are the text tokens alone (bits per byte), not the end-of-turn.
    """
    docs = [int(i) for i in doc_indices]
    tokens = [dataset.tokens(i) for i in docs]
    labels = [
        shifted_labels(t, dataset.text_mask(i) if text_only else dataset.mask(i))
        for i, t in zip(docs, tokens, strict=True)
    ]
    real = sum(len(t) for t in tokens)
    if not docs:
        ids = np.full((1, pad_to_multiple_of), pad_id, dtype=np.int64)
        positions = np.arange(pad_to_multiple_of, dtype=np.int64)[None]
        targets = np.full_like(ids, IGNORE)
        edges = np.asarray([0, pad_to_multiple_of])
        lengths = np.zeros(1)
    elif batching == "packed":
        width = _round_up(real, pad_to_multiple_of)
        ids = np.full((1, width), pad_id, dtype=np.int64)
        targets = np.full_like(ids, IGNORE)
        positions = np.zeros_like(ids)
        lengths = np.asarray([real])
        edges = np.concatenate([[0], np.cumsum([len(t) for t in tokens])])
        edges[-1] = width
        for a, b, t, label in zip(edges[:-1], edges[1:], tokens, labels, strict=True):
            ids[0, a : a + len(t)] = t
            targets[0, a : a + len(t)] = label
            positions[0, a:b] = np.arange(b - a)
    elif batching == "padded":
        width = _round_up(max(len(t) for t in tokens), pad_to_multiple_of)
        ids = np.full((len(docs), width), pad_id, dtype=np.int64)
        targets = np.full_like(ids, IGNORE)
        positions = np.broadcast_to(np.arange(width, dtype=np.int64), ids.shape).copy()
        edges = np.arange(len(docs) + 1) * width
        lengths = np.asarray([len(t) for t in tokens])
        for r, (t, label) in enumerate(zip(tokens, labels, strict=True)):
            ids[r, : len(t)] = t
            targets[r, : len(t)] = label
    else:
        raise ValueError(f"batching is 'packed' or 'padded', not {batching!r}")
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        labels=torch.from_numpy(targets),
        cu_seqlens=torch.from_numpy(edges.astype(np.int32)),
        max_seqlen=int(np.diff(edges).max()),
        num_supervised=int((targets != IGNORE).sum()),
        num_tokens=real,
        real=torch.from_numpy(np.arange(ids.shape[1]) < lengths[:, None]),
    )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
