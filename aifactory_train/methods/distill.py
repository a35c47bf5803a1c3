"""Distillation from stored teachers: the supervised loss, and the divergence from what a larger model thinks of each
target.

``aifactory teach`` ran the teacher once (:mod:`aifactory_train.evaluation.teaching`); a step reads log-probabilities
of its documents by their content (:mod:`aifactory_train.data.teacher_scores`) and holds no teacher. The loss is
:class:`aifactory_train.model.top_logps.DistillObjective`, a mean over the supervised targets of the step.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from aifactory_train.config.distill_block import stored_folder, teacher_recipe
from aifactory_train.core.errors import UserError
from aifactory_train.data.teacher_scores import (
    TeacherId,
    TeacherScores,
    bytes_per_target,
    document_key,
    vocabulary_digest,
)
from aifactory_train.methods.supervised import Supervised
from aifactory_train.model.top_logps import DistillObjective
from aifactory_train.parallel.batches import to_device
from aifactory_train.parallel.world import from_main

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.data import PreparedData, TokenDataset
    from aifactory_train.methods.base import RunContext, StepContext
    from aifactory_train.parallel.engine import DeviceBatch


class Distill(Supervised):
    """The supervised loss of a run, mixed with the divergence from its teacher."""

    def __init__(self, recipe: Recipe):
        assert recipe.methods.distill is not None
        super().__init__(recipe)
        self.settings = recipe.methods.distill
        self.folder = stored_folder(recipe)
        self.fix = f"aifactory teach RECIPE --teacher {self.settings.teacher}, with the settings of this run"
        self.scores: TeacherScores | None = None
        self.before: dict[str, Any] | None = None  # whose scores the run began with, where it goes on
        self.sums = torch.zeros(2, dtype=torch.float64)
        self.targets = 1
        self.ready = False  # every document of the run is known to be stored

    def view(self, data: PreparedData) -> PreparedData:
        """The prepared data. Raises :class:`UserError` where the teacher's log-probabilities are not there, or are
        another's.
        """
        self.scores = TeacherScores(self.folder)
        if self.scores.identity is None:
            raise UserError("no log-probabilities of a teacher are stored here", where=str(self.folder), fix=self.fix)
        self._compare(self.scores.identity)
        return super().view(data)

    def _compare(self, found: TeacherId) -> None:
        how = self.settings
        for key in ("top_k", "temperature", "teacher", "revision"):
            stored, wanted = getattr(found, key), getattr(how, key)
            if key == "teacher" and (Path(stored).is_absolute() and Path(wanted).is_absolute()):
                continue  # a folder may have moved: its weights are compared
            if stored != wanted:
                raise UserError(
                    f"stored with {key} {stored}, the recipe has {wanted}",
                    where=f"methods.distill.{key}: {self.folder}",
                    fix=f"--set methods.distill.{key}={stored}, or {self.fix}",
                )

    # ---- before the first step

    def prepare(self, run: RunContext, *, resumed: bool) -> list[tuple[str, str, str]]:
        """Every document of the run has the log-probabilities of this teacher, whole; looked at by rank 0."""
        self.sums = self.sums.to(run.world.device)
        run.beat("teacher")
        assert self.scores is not None and self.scores.identity is not None
        identity = asdict(self.scores.identity)
        if resumed and self.before not in (None, identity):
            raise UserError(
                "the run was begun with the log-probabilities of another teacher",
                where=str(self.folder),
                fix="put back those it was begun with, or start a new run (--name NEW or --run-dir NEW)",
            )
        self.before = identity
        documents, mass, nll = from_main(run.world, lambda: self._checked(run))
        self.ready = True
        size = bytes_per_target(self.settings.top_k, self.scores.identity.tokens)
        return [
            (
                "teacher",
                f"{self.scores.identity.teacher}: log-probabilities of {documents:,} documents, read",
                f"the {self.settings.top_k} likeliest tokens hold {mass:.2%} on average, {size} bytes a target; its "
                f"own loss on the rows is {nll:.4g}; no teacher in memory",
            )
        ]

    def _checked(self, run: RunContext) -> tuple[int, float, float]:
        """(documents of the run, mean mass of the kept tokens, the teacher's mean NLL). Raises :class:`UserError`."""
        from aifactory_train.data import load_tokenizer
        from aifactory_train.evaluation.teaching import weights_digest

        assert self.scores is not None and self.scores.identity is not None
        identity, train = self.scores.identity, run.data.train
        if vocabulary_digest(load_tokenizer(self.recipe).get_vocab()) != identity.vocabulary:
            raise UserError("stored for another vocabulary", where=str(self.folder), fix=self.fix)
        if Path(self.settings.teacher).is_dir() and weights_digest(teacher_recipe(self.recipe)) != identity.weights:
            raise UserError(
                f"{self.settings.teacher} is another model than the one whose log-probabilities are stored",
                where=str(self.folder),
                fix=f"move the folder away, then {self.fix}",
            )
        self.scores.verify()
        seen = np.zeros(len(train), dtype=bool)
        run.sampler.mark_seen(seen, run.total_steps)
        wanted = np.flatnonzero(seen)
        keys = np.asarray([document_key(train, int(i)) for i in wanted], dtype=np.int64)
        missing = wanted[~self.scores.has(keys)]
        if len(missing):
            raise UserError(
                f"no log-probabilities of the teacher for {len(missing):,} of {len(wanted):,} documents, the first "
                f"from {train.place(int(missing[0]))}",
                where=str(self.folder),
                fix=f"{self.fix}: it computes those that are missing",
            )
        _, mass, nll = self.scores.figures(keys)
        return len(wanted), mass, nll

    # ---- a step

    def before_step(self, step: StepContext) -> None:
        """Figures begin anew."""
        self.sums.zero_()

    def micro_batch(self, run: RunContext, share: np.ndarray) -> tuple[DeviceBatch, np.ndarray, np.ndarray]:
        """(batch, its documents, their lengths in tokens)."""
        batch, documents, lengths = super().micro_batch(run, share)
        how, train, device = self.settings, run.data.train, run.world.device
        found = [self._rows(train, int(i)) for i in documents]
        ids = np.concatenate([np.zeros((0, how.top_k), dtype=np.int64), *(one for one, _ in found)])
        teacher = np.concatenate([np.zeros((0, how.top_k + 1), dtype=np.float32), *(one for _, one in found)])
        assert len(ids) == len(batch.targets), "a document's key holds its mask, so its targets are those stored"
        batch.objective = DistillObjective(
            kind=how.loss,
            beta=how.beta,
            temperature=how.temperature,
            weight=how.weight,
            ids=to_device(torch.from_numpy(ids), device),
            teacher=to_device(torch.from_numpy(teacher), device),
            sums=self.sums,
        )
        return batch, documents, lengths

    def _rows(self, train: TokenDataset, i: int) -> tuple[np.ndarray, np.ndarray]:
        """What is stored of a document (:meth:`TeacherScores.rows`). Before :meth:`prepare` the size of a step is
        tried, with a document that the run may never come by: any distribution serves.
        """
        assert self.scores is not None
        if self.ready:
            return self.scores.rows(document_key(train, i))
        k, targets = self.settings.top_k, int(train.supervised[i])
        return np.tile(np.arange(k), (targets, 1)), np.full((targets, k + 1), -np.log(k + 1), dtype=np.float32)

    def units(self, supervised: int) -> int:
        """The loss is a mean over supervised tokens."""
        self.targets = supervised
        return supervised

    def figures(self) -> dict[str, float]:
        """Of the step, over all ranks, means over targets: ``divergence`` (times the squared temperature) and
        ``supervised_loss``.
        """
        sums = self.sums.clone()
        dist.all_reduce(sums)
        divergence, nll = sums.tolist()
        return {"divergence": divergence / self.targets, "supervised_loss": nll / self.targets}

    # ---- going on

    def state(self) -> dict[str, Any]:
        """Whose log-probabilities the run began with."""
        return {"teacher": self.before}

    def load(self, state: dict[str, Any]) -> None:
        """See :meth:`state`."""
        self.before = state.get("teacher")
