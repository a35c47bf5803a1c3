"""NEFTune: uniform noise on the embeddings while training, none while evaluating.

Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning", arXiv 2310.05914: to every embedding of a
sequence of L tokens with D numbers each, add ``alpha / sqrt(L D)`` times uniform(-1, 1).

The noise is a hash of seed, step, document, place and dimension. It therefore does not depend on ranks, packing or
accumulation, and a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aifactory_train.data.sampler import splitmix64
from aifactory_train.model.embedding_noise import Noise
from aifactory_train.parallel.batches import to_device

if TYPE_CHECKING:
    from aifactory_train.parallel.engine import DeviceBatch


def noise_keys(
    documents: Any, lengths: Any, batch: DeviceBatch, alpha: float, moment: tuple[int, int], device: str
) -> Noise:
    """Keys and scales for a batch of ``documents`` with ``lengths`` tokens; ``moment`` is (seed, step)."""
    shape = tuple(batch.input_ids.shape)
    keys, scale = np.zeros(shape[0] * shape[1], dtype=np.int64), np.zeros(shape[0] * shape[1], dtype=np.float32)
    state = np.zeros(1, dtype=np.uint64)
    for part in moment:
        state = splitmix64(state ^ np.asarray([part & (2**64 - 1)], dtype=np.uint64))
    at = 0
    for document, length, segment in zip(documents, lengths, batch.documents.lengths, strict=True):
        own = splitmix64(state ^ splitmix64(np.asarray([int(document)], dtype=np.uint64)))
        with np.errstate(over="ignore"):
            each = splitmix64(own + np.arange(int(length), dtype=np.uint64))
        keys[at : at + int(length)] = (each >> np.uint64(32)).astype(np.int64)
        scale[at : at + int(length)] = alpha / math.sqrt(int(length))
        at += int(segment)
    parts = (torch.from_numpy(part.reshape(shape)) for part in (keys, scale))
    return Noise(*(to_device(part, device) for part in parts))
