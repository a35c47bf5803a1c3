"""Learning from preferences: DPO, ORPO, SimPO, CPO and KTO, on the loop and the batches of supervised fine-tuning.

The parts: :mod:`pairs` (what a row is), :mod:`preference_loss` (formulas), :mod:`reference` (log-probabilities of the
model before the first step), :mod:`preference_eval` (held-out figures). This file puts them into the run.

A step's loss is the sum over its pairs (KTO: rated answers) divided by their number, over all ranks. With replayed rows
the step adds ``replay_weight`` times *their* mean NLL per target: preference loss + weight x NLL, as the pretraining
term of Ouyang et al. 2022, arXiv 2203.02155, equation 2, is added to a preference objective against forgetting.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from aifactory_train.config.preference_block import NAMES, OF_PAIRS, WITH_REFERENCE
from aifactory_train.methods.pairs import HeldOutLabels, LabelledTokens, Mismatched, PairedTokens, PairsSubset
from aifactory_train.methods.preference_loss import SUMS, PairObjective
from aifactory_train.methods.reference import Reference, score
from aifactory_train.methods.supervised import Supervised
from aifactory_train.parallel.batches import micro_batch, to_device

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.data import PreparedData
    from aifactory_train.methods.base import RunContext, StepContext
    from aifactory_train.parallel.engine import DeviceBatch

#: Desirable answers times their weight over undesirable ones times theirs should lie here (Ethayarajh et al. 2024,
#: section 4).
BALANCE = (1.0, 4 / 3)


class Preference(Supervised):
    """The preference method of a run: its views on the data, its reference, batches and figures."""

    def __init__(self, recipe: Recipe):
        assert recipe.methods.preference is not None
        super().__init__(recipe)
        self.settings = recipe.methods.preference
        self.paired = self.settings.kind in OF_PAIRS
        self.reference = Reference()
        self.mixed: Mismatched | None = None  # KTO: exchanged answers of the run's documents
        self.baseline = 0.0
        self.units_of_step = self.replay_tokens = 1
        self.replays = any(source.share is not None for source in recipe.data.train)
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64)

    # ---- data

    def view(self, data: PreparedData) -> PreparedData:
        """The prepared data as units of this method. Raises :class:`UserError` for rows that are none."""
        if self.paired:
            train: Any = PairedTokens(data.train, whole=True)
            evals: dict[str, Any] = {name: PairedTokens(held) for name, held in data.evals.items()}
        else:
            longest = self.recipe.data.sequence_length
            train = LabelledTokens(data.train)
            evals = {name: HeldOutLabels(held, longest) for name, held in data.evals.items()}
            unbalanced = self._unbalanced(*train.counts())
            if unbalanced:
                report = {**data.report, "warnings": [*data.report.get("warnings", []), unbalanced]}
                data = dataclasses.replace(data, report=report)
        return dataclasses.replace(data, train=train, evals=evals)

    def _unbalanced(self, good: int, bad: int) -> str | None:
        how, (low, high) = self.settings, BALANCE
        ratio = how.desirable_weight * good / (how.undesirable_weight * bad)
        if low <= ratio <= high:
            return None
        if good < bad:
            key, wanted = "desirable_weight", how.undesirable_weight * bad / good
        else:
            key, wanted = "undesirable_weight", how.desirable_weight * good / bad
        return (
            f"{good:,} desirable answers (weight {how.desirable_weight:g}) and {bad:,} undesirable ones (weight "
            f"{how.undesirable_weight:g}): their ratio is {ratio:.2g}, the paper recommends {low:g} to {high:.2f}; "
            f"methods.preference.{key}={wanted:.3g} would make it 1"
        )

    # ---- the reference

    def prepare(self, run: RunContext, *, resumed: bool) -> list[tuple[str, str, str]]:
        """Compute the reference's log-probabilities of the run's documents, or read them when the run goes on."""
        self.sums = self.sums.to(run.world.device)
        if self.settings.kind not in WITH_REFERENCE:
            return [("reference", "none", f"{NAMES[self.settings.kind]} needs none")]
        wanted = self._documents_of_run(run)
        if not self.paired:
            base = run.data.train.base  # type: ignore[attr-defined]
            self.mixed = Mismatched(base, wanted, self.recipe.data.sequence_length)
        if resumed:
            line = self.reference.read(run, wanted)
        else:
            line = self.reference.compute(run, wanted, self.mixed)
            if run.world.is_main:
                self.reference.write(run)
        for name, sides in (self.reference.held or {}).items():
            run.data.evals[name].reference = sides  # type: ignore[attr-defined]
        return [("reference", *line)]

    def _documents_of_run(self, run: RunContext) -> np.ndarray:
        """Judged documents that the run's steps will use, int64, sorted."""
        train_set: Any = run.data.train
        seen = np.zeros(len(train_set), dtype=bool)
        seen[train_set.replayed] = True  # imitated, not rated
        run.sampler.mark_seen(seen, run.total_steps)
        return train_set.documents(np.flatnonzero(seen & ~train_set.replayed))

    # ---- a step

    def before_step(self, step: StepContext) -> None:
        """Count the step's units; KTO: z0, the mean log-ratio of exchanged answers over all of the step's questions, at
        least 0.
        """
        run, units = step.run, step.documents
        train_set: Any = run.data.train
        self.sums.zero_()
        replayed = train_set.replayed[units]
        self.units_of_step = max(1, int((~replayed).sum()))
        self.replay_tokens = max(1, int(train_set.supervised[units[replayed]].sum()))
        if self.settings.kind != "kto":
            return
        assert self.mixed is not None and self.reference.exchanged is not None
        rated = np.sort(units[~replayed])
        self.baseline = 0.0
        if len(rated):
            places = np.searchsorted(self.mixed.documents, rated)
            now = score(run, PairsSubset(self.mixed, places), most=len(places))
            self.baseline = max(0.0, float((now - self.reference.exchanged[rated]).mean()))

    def micro_batch(self, run: RunContext, share: np.ndarray) -> tuple[DeviceBatch, np.ndarray, np.ndarray]:
        """(batch, its documents, their lengths) of the units ``share``; documents are those of the view's ``base``."""
        train_set: Any = run.data.train
        device, base = run.world.device, train_set.base
        units = np.asarray(share, dtype=np.int64)
        documents = train_set.documents(units)
        batch = micro_batch(base, documents, self.recipe.data.batching, run.pad_id, device)
        per_unit = np.where(train_set.replayed[units], 1, 2 if self.paired else 1)
        replayed = np.repeat(train_set.replayed[units], per_unit)
        counts = base.supervised[documents]
        answers = np.flatnonzero(~replayed)
        rated = documents[answers]
        reference = np.zeros(len(rated)) if self.reference.train is None else self.reference.train[rated]
        batch.objective = PairObjective(
            settings=self.settings,
            counts=[int(n) for n in counts],
            answers=to_device(torch.from_numpy(answers), device),
            lengths=to_device(torch.from_numpy(counts[answers].astype(np.float32)), device),
            reference=to_device(torch.from_numpy(reference.astype(np.float32)), device),
            desirable=to_device(torch.from_numpy(train_set.desirable[rated]), device),
            replayed=to_device(torch.from_numpy(np.flatnonzero(replayed)), device),
            replay_tokens=int(counts[replayed].sum()),
            # the loop divides by the units of the step
            replay_scale=self.settings.replay_weight * self.units_of_step / self.replay_tokens,
            baseline=self.baseline,
            sums=self.sums,
        )
        return batch, documents, base.lengths[documents]

    def units(self, supervised: int) -> int:
        """The loss is a mean over the step's pairs (KTO: rated answers)."""
        return self.units_of_step

    def figures(self) -> dict[str, float]:
        """Of the step, over all ranks: ``reward_margin`` (mean over good minus mean over bad answers), for pairs
        ``reward_accuracy`` (equal rewards count half), KTO also ``kl``; where rows are replayed ``preference_loss`` and
        ``replay_loss`` (mean NLL of a target) apart.

        The reward is the one that the loss is made of (:func:`aifactory_train.model.answer_loss.rewards_of`).
        """
        sums = self.sums.clone()
        dist.all_reduce(sums)
        found = dict(zip(SUMS, sums.tolist(), strict=True))
        out: dict[str, float] = {}
        if found["good_answers"] and found["bad_answers"]:
            out["reward_margin"] = found["good"] / found["good_answers"] - found["bad"] / found["bad_answers"]
            if self.paired:
                out["reward_accuracy"] = found["in_order"] / found["good_answers"]
        if not self.paired:
            out["kl"] = self.baseline
        rated = found["good_answers"] + found["bad_answers"]
        if self.replays and rated:
            out["preference_loss"] = found["preference_loss"] / self.units_of_step
        if found["replay_tokens"]:
            out["replay_loss"] = found["replay_nll"] / found["replay_tokens"]
        return out
