"""``completions.jsonl`` of a run: some of the answers that it learnt from, with their rewards."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from aifactory_train.core.files import write_atomic
from aifactory_train.core.output import note

if TYPE_CHECKING:
    from aifactory_train.methods.base import RunContext, StepContext
    from aifactory_train.methods.rollouts import Rollouts

FILE = "completions.jsonl"


class Completions:
    """Written by rank 0: ``keep`` answers of every step, none under a privacy profile (``sensitive`` with
    ``privacy.log_samples`` keeps them)."""

    def __init__(self, run: RunContext, keep: int):
        privacy = run.recipe.privacy
        shown = privacy.profile == "open" or (privacy.profile == "sensitive" and privacy.log_samples)
        self.keep = keep if shown and run.world.is_main else 0
        self.path = run.folder.path / FILE
        self.opened = False

    def write(self, step: StepContext, now: Rollouts, worth: np.ndarray, names: list[str]) -> None:
        """The first answers to one prompt, each step another one. A disk that refuses them is said once."""
        if not self.keep:
            return
        group = now.totals.shape[1]
        first = step.step % len(now.totals) * group
        rows = []
        for number in range(first, first + min(self.keep, group)):
            answer, total = now.answers[number], float(now.totals.ravel()[number])
            rows.append(
                {
                    "step": step.step + 1,
                    "row_id": step.run.data.train.row_id(answer.unit),
                    "prompt": step.run.data.train.questions[answer.unit].prompt,  # type: ignore[attr-defined]
                    "completion": answer.text,
                    "tokens": len(answer.tokens),
                    "truncated": not answer.ended,
                    "rewards": None if answer.rewards is None else dict(zip(names, answer.rewards, strict=True)),
                    "reward": total if np.isfinite(total) else None,
                    "advantage": float(worth.ravel()[number]),
                }
            )
        try:
            if not self.opened:
                self._drop_after(step.step)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        except OSError as error:
            self.keep = 0
            note(f"{self.path}: answers are not kept any more: {error.strerror}")

    def _drop_after(self, step: int) -> None:
        """Answers of steps that are made again, and a row that was being written when the run was killed."""
        self.opened = True
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").split("\n"):
            try:
                known = json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):
                continue
            kept += [line] if known else []
        write_atomic(self.path, "".join(line + "\n" for line in kept))
