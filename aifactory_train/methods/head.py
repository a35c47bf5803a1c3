"""Heads: a model that classifies, on the loop and the batches of supervised fine-tuning.

A step's loss is the sum over its documents divided by their number, over all ranks. The parts:
:mod:`aifactory_train.data.classified` (what the labels are), :mod:`aifactory_train.model.head` (the layer and its
losses), :mod:`reward` (a reward model), :mod:`aifactory_train.evaluation.heads`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch

from aifactory_train.core.errors import UserError
from aifactory_train.data.classified import ClassifiedTokens, names_of
from aifactory_train.methods.embedding import Embedding
from aifactory_train.methods.reward import RewardModel
from aifactory_train.methods.supervised import Supervised
from aifactory_train.model.head import LabelLoss
from aifactory_train.parallel.batches import read_at, to_device

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.data import PreparedData, TokenDataset
    from aifactory_train.methods.base import RunContext, TrainingMethod
    from aifactory_train.parallel.engine import DeviceBatch


def head_method(recipe: Recipe) -> TrainingMethod:
    """The method of the recipe's kind of head."""
    assert recipe.methods.head is not None
    if recipe.methods.head.kind == "embedding":
        return Embedding(recipe)
    return RewardModel(recipe) if recipe.methods.head.kind == "reward" else Classifier(recipe)


class Classifier(Supervised):
    """Sequence classification, of one label a document or of any number."""

    def __init__(self, recipe: Recipe):
        assert recipe.methods.head is not None
        super().__init__(recipe)
        self.settings = recipe.methods.head
        self.several = self.settings.kind == "multi_label"
        self.weights: torch.Tensor | None = None  # fp32 [labels], on the host

    # ---- data

    def view(self, data: PreparedData) -> PreparedData:
        """The prepared data with targets. Settles ``data.labels`` of the recipe where it names none: run.yaml and the
        export say which output is which. Raises :class:`UserError` for rows that cannot be told apart."""
        if self.recipe.data.labels is None:
            self.recipe.data.__dict__["labels"] = names_of([data.train, *data.evals.values()])  # the run's own copy
        names = self.recipe.data.labels
        if len(names or ()) < (1 if self.several else 2):
            only = f"all rows have the label '{names[0]}'" if names else "no row has a label"
            raise UserError(
                f"{only}: there is nothing to tell apart",
                where=f"data: {data.train.name}",
                fix="give rows with other labels; rows without any label need methods.head.kind multi_label",
            )
        assert names is not None
        pad_id = int(data.tokenizer_info["pad_id"])
        train = ClassifiedTokens(data.train, names, several=self.several, pad_id=pad_id)
        evals: dict[str, TokenDataset] = {
            name: ClassifiedTokens(held, names, several=self.several, pad_id=pad_id)
            for name, held in data.evals.items()
        }
        self.weights = self._weights(train)
        report = data.report
        never = [name for name, count in zip(names, train.counts().tolist(), strict=True) if not count]
        if never:
            said = f"{len(never)} of {len(names)} labels are in no training row, so nothing is learnt of them: "
            warnings = [*report.get("warnings", []), said + ", ".join(never[:5]) + (", ..." if len(never) > 5 else "")]
            report = {**report, "warnings": warnings}
        return dataclasses.replace(data, train=train, evals=evals, report=report)

    def _weights(self, train: ClassifiedTokens) -> torch.Tensor | None:
        """fp32 ``[labels]``; None where all count alike."""
        wanted = self.settings.class_weights
        if wanted is None:
            return None
        if isinstance(wanted, dict):
            unknown = sorted(wanted.keys() - set(train.names))
            if unknown:
                raise UserError(
                    f"no row has the label '{unknown[0]}'",
                    where="methods.head.class_weights",
                    fix=f"labels are {', '.join(train.names[:12])}",
                )
            return torch.tensor([float(wanted.get(name, 1.0)) for name in train.names])
        count = train.counts().astype(np.float64)
        above = len(train) - count if self.several else np.full(len(count), len(train) / len(count))
        known = (count > 0) & (above > 0)
        return torch.from_numpy(np.where(known, above / np.maximum(count, 1.0), 1.0).astype(np.float32))

    def prepare(self, run: RunContext, *, resumed: bool) -> list[tuple[str, str, str]]:
        """What the start-up report says of labels and their weights."""
        train: ClassifiedTokens = run.data.train  # type: ignore[assignment]
        shown = ", ".join(f"{n} ({c:,})" for n, c in list(zip(train.names, train.counts().tolist(), strict=True))[:8])
        more = f" and {len(train.names) - 8} more" if len(train.names) > 8 else ""
        lines = [("labels", f"{len(train.names)}, with their training rows", f"{shown}{more}")]
        if self.weights is not None:
            span = f"{float(self.weights.min()):.3g} to {float(self.weights.max()):.3g}"
            lines.append(("label weights", span, "methods.head.class_weights"))
        return lines

    # ---- a step

    def micro_batch(self, run: RunContext, share: np.ndarray) -> tuple[DeviceBatch, np.ndarray, np.ndarray]:
        """(batch, its documents, their lengths in tokens)."""
        train: ClassifiedTokens = run.data.train  # type: ignore[assignment]
        batch, documents, lengths = super().micro_batch(run, share)
        share = np.asarray(share, dtype=np.int64)
        read_at(batch, lengths, train.ends[share], self.recipe.data.batching)
        targets = torch.from_numpy(train.targets[share])
        device = run.world.device
        weights = None if self.weights is None else to_device(self.weights, device)
        batch.objective = LabelLoss(to_device(targets.float() if self.several else targets, device), weights)
        return batch, documents, lengths
