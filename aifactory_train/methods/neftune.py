"""NEFTune: uniform noise on the embeddings while training, none while evaluating.

Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning", arXiv 2310.05914: to every embedding of a sequence of L
tokens with D numbers each, add ``alpha / sqrt(L D)`` times uniform(-1, 1).

The noise is a hash of seed, step, document, place and dimension. It therefore does not depend on ranks, packing or accumulation,
and a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aifactory_train.data.sampler import splitmix64

if TYPE_CHECKING:
    from aifactory_train.parallel import DeviceBatch

_LOW = 0xFFFFFFFF


@dataclass(frozen=True)
class Noise:
    """keys: int64 ``[B, T]`` of 32 random bits for each token; scale: fp32 ``[B, T]``, ``alpha / sqrt(L)`` of its document (0 on padding)."""

    keys: torch.Tensor
    scale: torch.Tensor

    def add_to(self, embeddings: torch.Tensor) -> torch.Tensor:
        """``embeddings`` ``[B, T, D]`` with their noise, in their own type."""
        width = embeddings.shape[-1]
        dims = torch.arange(width, dtype=torch.int64, device=embeddings.device) * 0x9E3779B1
        draws = mix32((self.keys.unsqueeze(-1) + dims) & _LOW)
        uniform = (draws.to(torch.float32) + 0.5) * 2.0**-31 - 1.0
        return embeddings + (uniform * (self.scale / math.sqrt(width)).unsqueeze(-1)).to(embeddings.dtype)


def mix32(x: torch.Tensor) -> torch.Tensor:
    """A bijection on 32-bit numbers held in int64 (Wellons' lowbias32, "Prospecting for hash functions", 2018)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _LOW
    x = (x ^ (x >> 15)) * 0x846CA68B & _LOW
    return x ^ (x >> 16)


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
    return Noise(torch.from_numpy(keys.reshape(shape)).to(device), torch.from_numpy(scale.reshape(shape)).to(device))
