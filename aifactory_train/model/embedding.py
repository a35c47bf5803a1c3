"""The vector of a text, and the loss of telling a query's positive from other texts.

The loss is the multiple negatives ranking loss (Henderson et al. 2017, arXiv 1705.00652; InfoNCE) over the candidates
of a whole step. Its gradient by the vectors is computed once for the step, and micro-batches carry it to the weights
(Gao et al. 2021, arXiv 2101.06983), so that memory does not grow with the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from aifactory_train.core.errors import UserError
from aifactory_train.model.head import HeadObjective

if TYPE_CHECKING:
    from aifactory_train.config.head_block import HeadConfig


class Pooled(HeadObjective):
    """The vectors of a micro-batch's documents, fp32 ``[documents, D]``, from the hidden states that are read.

    ``lengths`` int ``[documents]``: how many neighbouring states are read of each (their mean is the vector); one
    each: they are the vectors.
    """

    def __init__(self, lengths: np.ndarray):
        self.lengths = torch.from_numpy(np.asarray(lengths, dtype=np.int64))

    def loss(self, outputs: torch.Tensor) -> torch.Tensor:
        return self.vectors(outputs)

    def vectors(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of hidden states ``[N, D]``. Always summed in the same order, unlike atomic additions on a GPU."""
        hidden = hidden.float()
        if len(self.lengths) == len(hidden):
            return hidden
        share = torch.block_diag(*(torch.full((1, int(n)), 1.0 / int(n)) for n in self.lengths)).to(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            return share @ hidden


class CarriedGradient(Pooled):
    """The summed losses of a micro-batch's queries, whose gradient by its vectors is known already.

    ``gradient`` fp32 ``[documents, D]`` of the step's summed loss; ``value`` fp32 scalar: this micro-batch's part.
    """

    def __init__(self, lengths: np.ndarray, gradient: torch.Tensor, value: torch.Tensor):
        super().__init__(lengths)
        self.gradient, self.value = gradient, value

    def loss(self, outputs: torch.Tensor) -> torch.Tensor:
        carried = (self.vectors(outputs) * self.gradient).sum()
        return carried + (self.value - carried).detach()


@dataclass(frozen=True)
class Similarity:
    """How vectors are compared. ``sizes``: of how many first dimensions each, the whole vector last."""

    temperature: float
    normalise: bool
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, head: HeadConfig, width: int) -> Similarity:
        """For vectors of ``width`` dimensions. Raises :class:`UserError` where a size is larger."""
        sizes: Sequence[int] = head.matryoshka or ()
        if any(size > width for size in sizes):
            raise UserError(
                f"the model's vectors have {width} dimensions, {max(sizes)} are more",
                where="methods.head.matryoshka",
                fix=f"sizes up to {width}",
            )
        return cls(head.temperature, head.normalise, (*sorted(set(sizes) - {width}), width))

    def scores(self, queries: torch.Tensor, candidates: torch.Tensor, size: int) -> torch.Tensor:
        """``[Q, C]`` of vectors ``[Q, D]`` and ``[C, D]``, by their first ``size`` dimensions; without temperature."""
        queries, candidates = queries[:, :size], candidates[:, :size]
        if self.normalise:
            queries, candidates = F.normalize(queries, dim=1), F.normalize(candidates, dim=1)
        return queries @ candidates.t()

    def losses(
        self, queries: torch.Tensor, candidates: torch.Tensor, left_out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss of each query ``[Q]``, added up over the sizes: minus the log-likelihood of candidate ``i`` for
        query ``i``. ``left_out`` bool ``[Q, C]``: candidates that are no negatives of a query.
        """
        total: Any = 0.0
        own = torch.arange(len(queries), device=queries.device)
        for size in self.sizes:
            logits = self.scores(queries, candidates, size) / self.temperature
            if left_out is not None:
                logits = logits.masked_fill(left_out, -torch.inf)
            total = total + F.cross_entropy(logits, own, reduction="none")
        return total
