"""Which hidden states of a micro-batch are read for the vectors of its documents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from aifactory_train.model.embedding import Pooled
from aifactory_train.parallel.batches import read_at, to_device

if TYPE_CHECKING:
    from aifactory_train.parallel.engine import DeviceBatch


def read_pooled(batch: DeviceBatch, lengths: np.ndarray, batching: str, pooling: str) -> None:
    """Let a batch of documents of ``lengths`` (int ``[K]``) give their vectors: of the last token, or the mean."""
    tokens = np.asarray(lengths, dtype=np.int64)
    if pooling == "last_token":
        read_at(batch, tokens, tokens - 1, batching)
        batch.objective = Pooled(np.ones(len(tokens), dtype=np.int64))
        return
    width = int(batch.input_ids.shape[1])
    begins = np.cumsum(tokens) - tokens if batching == "packed" else np.arange(len(tokens)) * width
    within = np.arange(int(tokens.sum())) - np.repeat(np.cumsum(tokens) - tokens, tokens)
    places = np.repeat(begins, tokens) + within
    batch.positions = to_device(torch.from_numpy(places), str(batch.input_ids.device))
    batch.targets = torch.zeros_like(batch.positions)
    batch.objective = Pooled(tokens)
