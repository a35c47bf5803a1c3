"""The methods of a recipe, put together for the loop."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from aifactory_train.methods.goldfish import GoldfishTokens
from aifactory_train.methods.neftune import noise_keys
from aifactory_train.methods.preference import Preference

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.data import PreparedData
    from aifactory_train.parallel.engine import DeviceBatch
    from aifactory_train.training.trainer import Trainer


class Methods:
    """What the recipe's methods add to data, batches and steps."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.preference = Preference(recipe) if recipe.methods.preference else None

    def view(self, data: PreparedData) -> PreparedData:
        """The prepared data as the loop sees it: pairs or judged answers as units, goldfish masks."""
        settings = self.recipe.methods
        if self.preference is not None:
            data = self.preference.view(data)
        if settings.goldfish:
            data = dataclasses.replace(
                data, train=GoldfishTokens(data.train, settings.goldfish.k, settings.goldfish.context)
            )
        return data

    def begin(self, trainer: Trainer, *, resumed: bool) -> None:
        """Before the first step: the log-probabilities of the reference, which is the model as it is now."""
        if self.preference is not None:
            self.preference.begin(trainer, resumed=resumed)

    def before_step(self, trainer: Trainer, documents: Any) -> None:
        """Once per optimizer step, on all ranks: what its loss is divided by, KTO's KL estimate."""
        if self.preference is not None:
            self.preference.before_step(trainer, documents)

    def micro_batch(self, trainer: Trainer, share: Any) -> DeviceBatch:
        """The documents of one micro-batch as tensors on this rank's device."""
        from aifactory_train.parallel.batches import micro_batch

        recipe, device, train_set = self.recipe, trainer.world.device, trainer.data.train
        if self.preference is not None:
            batch, documents, lengths = self.preference.micro_batch(trainer, share)
        else:
            batch = micro_batch(train_set, share, recipe.data.batching, trainer.pad_id, device)
            documents, lengths = share, train_set.lengths[share]
        if recipe.methods.neftune is not None and len(share):
            batch.extra["noise"] = noise_keys(
                documents, lengths, batch, recipe.methods.neftune.alpha, (recipe.train.seed, trainer.step), device
            )
        return batch

    def units(self, supervised: int) -> int:
        """What the summed loss of the step is divided by: supervised tokens, or for preferences its pairs (or judged answers)."""
        return self.preference.units if self.preference is not None else supervised

    def figures(self) -> dict[str, float]:
        """What a finished step adds to metrics.jsonl; summed over all ranks."""
        return self.preference.figures() if self.preference is not None else {}
