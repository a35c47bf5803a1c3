"""A reward model: a head of one output on each answer of a pair, higher for the better one.

The loss of a pair is the negative log-likelihood of its order (Bradley and Terry 1952, as in Ouyang et al. 2022, arXiv
2203.02155, equation 1); a step's loss is the sum over its pairs divided by their number, over all ranks.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from aifactory_train.data.classified import ends_of
from aifactory_train.methods.pairs import PairedTokens
from aifactory_train.methods.supervised import Supervised
from aifactory_train.model.head import PairLoss
from aifactory_train.parallel.batches import micro_batch, read_at

if TYPE_CHECKING:
    from aifactory_train.data import PreparedData, TokenDataset
    from aifactory_train.methods.base import RunContext
    from aifactory_train.parallel.engine import DeviceBatch


class RewardTokens(PairedTokens):
    """Pairs for a reward model. Each counts as one supervised target; ``ends`` int64 ``[documents of base]`` are the
    places that the head reads.
    """

    def __init__(self, base: TokenDataset, pad_id: int, *, whole: bool = False):
        super().__init__(base, whole=whole)
        self.supervised = np.ones(len(self), dtype=np.int32)
        self.ends = ends_of(base, pad_id)

    def sides(self, pairs: np.ndarray) -> np.ndarray:
        """int64 ``[pairs, 2]``: the documents (of ``base``) of some pairs, chosen first."""
        return np.stack([self.first[pairs], self.first[pairs] + 1], axis=1)


class RewardModel(Supervised):
    """Bradley-Terry on pairs of answers."""

    def view(self, data: PreparedData) -> PreparedData:
        """The prepared data as pairs. Raises :class:`UserError` for a row that is none."""
        pad_id = int(data.tokenizer_info["pad_id"])
        evals: dict[str, Any] = {name: RewardTokens(held, pad_id) for name, held in data.evals.items()}
        return dataclasses.replace(data, train=RewardTokens(data.train, pad_id, whole=True), evals=evals)

    def micro_batch(self, run: RunContext, share: np.ndarray) -> tuple[DeviceBatch, np.ndarray, np.ndarray]:
        """(batch, its documents, their lengths) of the pairs ``share``; documents are those of the view's ``base``."""
        train: RewardTokens = run.data.train  # type: ignore[assignment]
        documents = train.sides(np.asarray(share, dtype=np.int64)).reshape(-1)
        batching, lengths = self.recipe.data.batching, train.base.lengths[documents]
        batch = micro_batch(train.base, documents, batching, run.pad_id, run.world.device)
        read_at(batch, lengths, train.ends[documents], batching)
        batch.objective = PairLoss()
        return batch, documents, lengths
