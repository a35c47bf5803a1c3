"""The model as it was before the first step, for answers that did not exist then: its trained parameters are kept
beside those in training and change places with them while it scores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from aifactory_train.parallel.engine import Engine


class FrozenWeights:
    """This rank's part of the trained parameters of now. What is not trained is the same in both."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.kept = [tensor.detach().clone() for tensor in self._live()]

    def _live(self) -> list[torch.Tensor]:
        model = self.engine.state()["model"]
        return [piece.tensor for name in sorted(model) for piece in model[name].pieces]

    def nbytes(self) -> int:
        """Bytes on this rank."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.kept)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the engine computes with these weights; afterwards with its own, to the bit. Collective."""
        own = [tensor.detach().clone() for tensor in self._live()]
        self._fill(self.kept)
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: list[torch.Tensor]) -> None:
        for live, value in zip(self._live(), values, strict=True):
            live.copy_(value)
        self.engine.finish_load(self.engine.updates)
