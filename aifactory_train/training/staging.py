"""Copies of a rank's state in host memory, from which a checkpoint is written while training goes on."""

from __future__ import annotations

import torch

from aifactory_train.parallel.state import Piece, Sharded


def pinned_memory(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Host memory that a GPU copies into by itself."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


class Staging:
    """From a GPU through pinned memory that is kept from save to save, all copies in a row and one wait: into fresh
    memory each copy would wait for the device and for the pages."""

    def __init__(self, device: str):
        self.device = device
        self._kept: dict[tuple[str, int], torch.Tensor] = {}

    def copies(self, state: dict[str, Sharded]) -> dict[str, Sharded]:
        """The pieces that this rank writes: the next step may change the originals at once. Those of the call before
        are overwritten.
        """
        staged = {}
        for name, entry in state.items():
            pieces = []
            for number, piece in enumerate(entry.pieces if entry.owned else ()):
                copy = self._host_memory((name, number), piece.tensor, entry.dtype)
                pieces.append(Piece(piece.offsets, copy.copy_(piece.tensor, non_blocking=True)))
            staged[name] = Sharded(entry.shape, entry.dtype, pieces)
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)
        return staged

    def _host_memory(self, key: tuple[str, int], tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if tensor.device.type == "cpu":
            return torch.empty(tensor.shape, dtype=dtype)
        kept = self._kept.get(key)
        if kept is None or kept.shape != tensor.shape or kept.dtype != dtype:
            kept = self._kept[key] = pinned_memory(tensor.shape, dtype)
        return kept
