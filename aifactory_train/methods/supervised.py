"""Plain supervised fine-tuning as a training method, with the additions that any method may have: goldfish masks, noise
on embeddings.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from aifactory_train.methods.goldfish import GoldfishTokens
from aifactory_train.methods.neftune import noise_keys
from aifactory_train.parallel.batches import micro_batch

if TYPE_CHECKING:
    import numpy as np

    from aifactory_train.config.schema import Recipe
    from aifactory_train.data import PreparedData
    from aifactory_train.methods.base import MadeDocuments, RunContext, StepContext
    from aifactory_train.parallel.engine import DeviceBatch


class Supervised:
    """Next-token cross-entropy over supervised tokens; the base of other methods
    (:class:`~aifactory_train.methods.base.TrainingMethod`).
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def view(self, data: PreparedData) -> PreparedData:
        """The prepared data, with the tokens that the goldfish loss withholds taken out of the masks."""
        settings = self.recipe.methods.goldfish
        if settings is None:
            return data
        return dataclasses.replace(data, train=GoldfishTokens(data.train, settings.k, settings.context))

    def begin(self, run: RunContext) -> None:
        """Nothing is kept of the model before the first step."""

    def prepare(self, run: RunContext, *, resumed: bool) -> list[tuple[str, str, str]]:
        """Nothing is needed before the first step."""
        return []

    def before_step(self, step: StepContext) -> None:
        """Nothing is needed before a step."""

    def made(self, step: StepContext) -> MadeDocuments | None:
        """A step computes the documents that it was dealt."""
        return None

    def batch(self, step: StepContext, share: np.ndarray) -> DeviceBatch:
        """The documents of one micro-batch, with NEFTune's noise if the recipe asks for it."""
        batch, documents, lengths = self.micro_batch(step.run, share)
        noise = self.recipe.methods.neftune
        if noise is not None and len(share):
            moment = (self.recipe.train.seed, step.step)
            batch.noise = noise_keys(documents, lengths, batch, noise.alpha, moment, step.run.world.device)
        return batch

    def micro_batch(self, run: RunContext, share: np.ndarray) -> tuple[DeviceBatch, Any, Any]:
        """(batch, its documents, their lengths in tokens)."""
        train_set = run.data.train
        batch = micro_batch(train_set, share, self.recipe.data.batching, run.pad_id, run.world.device)
        return batch, share, train_set.lengths[share]

    def units(self, supervised: int) -> int:
        """The loss is a mean over supervised tokens."""
        return supervised

    def figures(self) -> dict[str, float]:
        """The loop's own figures are enough."""
        return {}

    def state(self) -> dict[str, Any]:
        """A function of documents and step keeps no state."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """See :meth:`state`."""
