"""What the loop itself keeps in a checkpoint (beside engine and random numbers), and whether a run may go on from
it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aifactory_train.config.schema import TrainConfig
from aifactory_train.core.errors import UserError
from aifactory_train.data import Cursor
from aifactory_train.training.guard import Guard
from aifactory_train.training.schedule import learning_rate
from aifactory_train.training.stopping import Best


@dataclass
class LoopState:
    """Where the loop stands: ``step`` optimizer steps are done, ``cursor`` is where the next one begins reading."""

    best: Best
    guard: Guard
    step: int = 0
    cursor: Cursor = field(default_factory=lambda: Cursor(0, 0))
    results: dict[str, Any] = field(default_factory=dict)  # evaluations of the run, by when

    def values(self, data: str, total_steps: int, method: dict[str, Any]) -> dict[str, Any]:
        """As JSON values for a checkpoint; ``data`` is the digest of what the cursor counts."""
        values = {
            "cursor": dataclasses.asdict(self.cursor),
            "data": data,
            "total_steps": total_steps,
            "best": self.best.state(),
            "guard": self.guard.state(),
            "results": self.results,
        }
        return {**values, "method": method} if method else values

    def load(self, step: int, saved: dict[str, Any]) -> None:
        """Stand where :meth:`values` were taken, after ``step`` steps."""
        self.step, self.cursor = step, Cursor(**saved["cursor"])
        self.best.load(saved["best"])
        self.results = saved["results"]
        self.guard.load(saved["guard"])


def refuse_length(step: int, total_steps: int, finished: bool) -> None:
    """Raise :class:`UserError` if a run that made ``step`` steps has nothing to do with ``total_steps``."""
    if step > total_steps or (finished and step == total_steps):
        done = "is finished after" if finished else "has made"
        raise UserError(
            f"the run {done} {step} steps, and {total_steps} are asked for",
            where="train.max_steps, train.epochs",
            fix=f"more than {step} steps (train.max_steps, train.epochs) prolong it, or --resume STEP goes back to an "
            f"earlier checkpoint",
        )


def refuse_other_rows(saved: dict[str, Any], data: str, fixes: list[str]) -> None:
    """Raise :class:`UserError` if ``data`` is not the digest of the rows that the checkpoint counted; ``fixes``: what
    may be set so that it is."""
    if saved["data"] != data:
        raise UserError(
            "the training rows are not those that the checkpoint counted",
            where="data.train",
            fix="; ".join([*fixes, "restore the data, or start a new run (--run-dir NEW)"]),
        )


def same_rates(
    step: int, saved: dict[str, Any], now: TrainConfig, total_steps: int
) -> Callable[[dict[str, Any]], bool]:
    """A question about the recipe that made the checkpoint: did its first ``step`` steps have the learning rates of
    ``now``?
    """

    def ask(before: dict[str, Any]) -> bool:
        old, length = TrainConfig.model_validate(before["train"]), saved["total_steps"]
        return all(learning_rate(s, length, old) == learning_rate(s, total_steps, now) for s in range(step))

    return ask
