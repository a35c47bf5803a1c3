"""Noise on embeddings that is a hash of its place, not of a random state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    pass


_LOW = 0xFFFFFFFF


@dataclass(frozen=True)
class Noise:
    """keys: int64 ``[B, T]`` of 32 random bits for each token; scale: fp32 ``[B, T]``, ``alpha / sqrt(L)`` of its
    document (0 on padding).
    """

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
