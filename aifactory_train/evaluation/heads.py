"""Held-out figures of a head, each with a bootstrap interval over rows, and what is chosen on the held-out rows.

================== ===================================================================================================
``loss``            the head's loss of a document, as in training but without label weights
``accuracy``        the label with the highest output is right; with any number of labels: all of them are
``micro_f1``        F1 over all labels together; a label is given where its probability is at least 0.5
``macro_f1``        mean F1 of the labels that some row has
``auroc``           mean over labels of the area under the ROC curve
``calibration_error``  expected calibration error, 15 bins
``calibrated_error``  the same after the temperature, chosen on the other half of the rows
``macro_f1_chosen``  macro-F1 at thresholds chosen on the other half of the rows (any number of labels)
================== ===================================================================================================

A temperature and thresholds are chosen on held-out rows. They are judged on rows that they were not chosen on: of two
halves (rows by turns) each is judged by what the other one chose; what the export gets is chosen on all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from aifactory_train import metrics
from aifactory_train.config.head_block import embeds
from aifactory_train.core.errors import UserError
from aifactory_train.evaluation.embeddings import evaluate_embeddings
from aifactory_train.evaluation.head_outputs import head_outputs
from aifactory_train.evaluation.likelihood import choose_rows
from aifactory_train.evaluation.rewards import evaluate_rewards
from aifactory_train.metrics import labels as of_labels
from aifactory_train.metrics import scores
from aifactory_train.metrics.bootstrap import interval, packed, ratio
from aifactory_train.metrics.registry import Figure
from aifactory_train.model.head import label_losses

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.data import PreparedData
    from aifactory_train.data.classified import ClassifiedTokens


#: Held-out rows below which nothing is chosen on them.
LEAST_ROWS = 8


def evaluate_head(
    module: nn.Module,
    prepared: PreparedData,
    recipe: Recipe,
    *,
    how: dict[str, Any],
    whole: bool,
    tell: Callable[[str], None] | None,
) -> dict[str, Any]:
    """Figures over all held-out rows at the top level, and of each evaluation set under ``sets``; the same on all
    ranks.

    ``how``: device, rank, world_size, autocast, pad_id. ``whole``: also figures of each label, what is chosen
    (``calibration``), samples and replicates.
    """
    sets: dict[str, Any] = {}
    found: list[tuple[ClassifiedTokens, np.ndarray, np.ndarray]] = []
    scoring = {"batching": recipe.data.batching, "micro_batch_tokens": recipe.train.micro_batch_tokens, **how}
    if tell is not None:
        rows = sum(min(len(d), recipe.data.eval_rows) for d in prepared.evals.values())
        tell(f"reading {rows:,} held-out rows")
    if embeds(recipe):
        return evaluate_embeddings(module, prepared, recipe, scoring=scoring, whole=whole)
    if recipe.methods.head is not None and recipe.methods.head.kind == "reward":
        return evaluate_rewards(module, prepared, recipe, scoring=scoring, whole=whole)
    for name, dataset in prepared.evals.items():
        held: ClassifiedTokens = dataset  # type: ignore[assignment]
        documents = choose_rows(len(held), recipe.data.eval_rows)
        if not len(documents):
            raise UserError("no held-out rows to evaluate", where=f"data.eval: {held.name}")
        outputs = head_outputs(module, held, documents, held.ends[documents], width=len(held.names), **scoring)
        found.append((held, documents, outputs))
        sets[name] = Judgement(outputs, held.targets[documents]).figures()
    judged = Judgement(np.concatenate([o for _, _, o in found]), np.concatenate([h.targets[d] for h, d, _ in found]))
    figures = judged.figures(replicates=whole)
    if whole:
        names = found[0][0].names
        # a label is text of the rows, and figures go into the record
        shown = names if recipe.privacy.profile == "open" else [str(number) for number in range(len(names))]
        figures["labels"] = judged.by_label(shown)
        figures["calibration"] = judged.chosen()
        figures["samples"] = _samples(found, names, recipe)
    return {**figures, "sets": sets}


def _samples(
    found: list[tuple[ClassifiedTokens, np.ndarray, np.ndarray]], names: list[str], recipe: Recipe
) -> list[dict[str, str]]:
    out = []
    for held, documents, outputs in found:
        for document, row in list(zip(documents.tolist(), outputs, strict=True))[: recipe.eval.samples]:
            text = held.row(document)
            given = [names[k] for k in np.flatnonzero(row >= 0)] if held.several else [names[int(row.argmax())]]
            out.append({"prompt": text["text"], "expected": ", ".join(text["labels"]), "answer": ", ".join(given)})
    return out[: recipe.eval.samples]


class Judgement:
    """Outputs (logits, float64 ``[rows, labels]``) against targets (int64 ``[rows]``, or bool ``[rows, labels]``)."""

    def __init__(self, outputs: np.ndarray, targets: np.ndarray):
        self.outputs, self.targets = outputs, targets
        self.several = targets.ndim == 2
        self.truth = targets if self.several else np.eye(outputs.shape[1], dtype=bool)[targets]

    def probability(self, temperature: float | np.ndarray = 1.0) -> np.ndarray:
        """float64 ``[rows, labels]``; a temperature for all rows, or ``[rows, 1]``."""
        scaled = self.outputs / temperature
        return scores.sigmoid(scaled) if self.several else scores.softmax(scaled)

    def losses(self, temperature: float = 1.0) -> np.ndarray:
        """The loss of each row, float64 ``[rows]``."""
        targets = torch.from_numpy(self.targets)
        outputs = torch.from_numpy(self.outputs / temperature)
        return label_losses(outputs, targets.double() if self.several else targets, None).numpy()

    def given(self, thresholds: np.ndarray | float = 0.5) -> np.ndarray:
        """The labels that the head gives, bool ``[rows, labels]``; thresholds ``[labels]`` or ``[rows, labels]``."""
        if self.several:
            return self.probability() >= thresholds
        return np.eye(self.outputs.shape[1], dtype=bool)[self.outputs.argmax(axis=1)]

    def figures(self, *, replicates: bool = False) -> dict[str, Any]:
        """Figures with intervals, ready for JSON."""
        given, rows = self.given(), len(self.outputs)
        counted = scores.label_statistics(given, self.truth)
        found: dict[str, Figure] = {
            "loss": metrics.figure(_with_one(self.losses()), ratio),
            "accuracy": metrics.figure(_with_one((given == self.truth).all(axis=1)), ratio),
            "micro_f1": metrics.figure(scores.micro_sums(counted), of_labels.micro_value),
            "macro_f1": metrics.figure(counted, of_labels.macro_value),
        }
        value, drawn = scores.auroc(self.probability(), self.truth)
        found["auroc"] = Figure(value, interval(drawn), drawn)
        found["calibration_error"] = metrics.figure(self._calibration(1.0), scores.calibration_error)
        if rows >= LEAST_ROWS:
            halves, temperature = np.arange(rows) % 2, np.ones((rows, 1))
            thresholds = np.full(self.truth.shape, 0.5)
            for half in (0, 1):
                other = Judgement(self.outputs[halves != half], self.targets[halves != half])
                temperature[halves == half] = other.temperature()
                thresholds[halves == half] = other.thresholds()
            found["calibrated_error"] = metrics.figure(self._calibration(temperature), scores.calibration_error)
            if self.several:
                chosen = scores.label_statistics(self.given(thresholds), self.truth)
                found["macro_f1_chosen"] = metrics.figure(chosen, of_labels.macro_value)
        out: dict[str, Any] = {name: one.value for name, one in found.items()}
        out |= {"rows": rows, "ci": {name: one.ci for name, one in found.items()}}
        if replicates:
            kept = {n: packed(one.replicates) for n, one in found.items() if one.replicates is not None}
            out["replicates"] = kept
        return out

    def _calibration(self, temperature: float | np.ndarray) -> np.ndarray:
        probability = self.probability(temperature)
        if self.several:
            return scores.calibration_statistics(probability, self.truth)
        best = probability.argmax(axis=1)
        return scores.calibration_statistics(probability.max(axis=1), best == self.targets)

    def by_label(self, names: list[str]) -> dict[str, dict[str, float | int | None]]:
        """Precision, recall, F1 and AUROC of each label, and how many rows have it."""
        given, probability = self.given(), self.probability()
        one = np.ones((1, len(given)))
        out: dict[str, dict[str, float | int | None]] = {}
        for k, name in enumerate(names):
            right, have, want = (int(x.sum()) for x in (given[:, k] & self.truth[:, k], given[:, k], self.truth[:, k]))
            area = float(scores.auroc_of(probability[:, k], self.truth[:, k], one)[0])
            out[name] = {
                "rows": want,
                "precision": right / have if have else None,
                "recall": right / want if want else None,
                "f1": 2 * right / (have + want) if have + want else None,
                "auroc": None if np.isnan(area) else area,
            }
        return out

    # ---- what is chosen on these rows

    def temperature(self) -> float:
        """What the outputs are divided by, so that probabilities are as likely as they say."""
        return scores.fit_temperature(lambda t: float(self.losses(t).mean()))

    def thresholds(self) -> np.ndarray:
        """float64 ``[labels]``: of the uncalibrated probability of each label (any number of labels)."""
        if not self.several:
            return np.full(self.truth.shape[1], 0.5)
        probability = self.probability()
        return np.asarray([scores.best_threshold(p, t) for p, t in zip(probability.T, self.truth.T, strict=True)])

    def chosen(self) -> dict[str, Any] | None:
        """For the export: ``temperature``, with any number of labels ``thresholds`` in their order, and on how many
        ``rows``. None where these are too few.
        """
        if len(self.outputs) < LEAST_ROWS:
            return None
        out: dict[str, Any] = {"temperature": self.temperature(), "rows": len(self.outputs)}
        if self.several:
            out["thresholds"] = self.thresholds().tolist()
        return out


def _with_one(values: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values))], axis=1)
