"""Training methods beside plain supervised fine-tuning (docs/methods.md). Each is a block of the recipe:

``methods.preference`` DPO, ORPO, KTO · ``methods.goldfish`` tokens that never carry loss · ``methods.neftune`` noise on embeddings ·
``data.train[].share`` replay of general data · ``model.vocabulary`` tokens for a new language.

The loop calls :class:`Methods` at a few places; without any of these blocks it does what the loop would do by itself. A step is
still defined by its documents alone: what a method adds (noise, masks, references, the KL estimate) is a function of documents
and step, or a sum over all ranks, so that ranks, accumulation, packing and engine do not change the curve.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from aifactory_train.methods.goldfish import GoldfishTokens
from aifactory_train.methods.neftune import noise_keys
from aifactory_train.methods.preference import Preference

if TYPE_CHECKING:
    from aifactory_train.config import Recipe
    from aifactory_train.data import PreparedData
    from aifactory_train.parallel import DeviceBatch
    from aifactory_train.train import Trainer


def objective(recipe: Recipe) -> str:
    """What the training minimises, in words for the record: method, its settings, replay, noise."""
    how, methods = recipe.methods.preference, recipe.methods
    over = "assistant turns" if recipe.data.supervise == "assistant" else "all tokens"
    likelihood = f"next-token cross-entropy over {over}"
    replayed = [source.share for source in recipe.data.train if source.share is not None]
    if how is None:
        parts = [likelihood]
        if methods.goldfish is not None:
            parts.append(f"one token in {methods.goldfish.k} withheld (goldfish loss, arXiv 2406.10209)")
        if replayed:
            parts.append(f"{sum(replayed):.3g} of the tokens replayed")
    else:
        reference = "relative to the model before its first step"
        ipo = how.kind == "dpo" and how.loss == "ipo"
        names = {
            "dpo": f"{'identity' if ipo else 'direct'} preference optimisation of pairs ({'IPO' if ipo else 'DPO'}, beta {how.beta:g}"
            + (f", label smoothing {how.label_smoothing:g})" if how.label_smoothing else ")")
            + f" {reference}",
            "orpo": f"likelihood of chosen answers and {how.beta:g} x their log odds ratio to rejected ones (ORPO)",
            "kto": f"prospect-theoretic value of judged answers (KTO, beta {how.beta:g}, weights {how.desirable_weight:g} and "
            f"{how.undesirable_weight:g}) {reference}",
        }
        parts = [names[how.kind]]
        if replayed:
            parts.append(f"{how.replay_weight:g} x {likelihood} of replayed rows ({sum(replayed):.3g} of the tokens)")
    if methods.neftune is not None:
        parts.append(f"noise on the embeddings (NEFTune, alpha {methods.neftune.alpha:g})")
    return "; ".join(parts)


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
