"""What happens when the loss is not finite or jumps: stop, leave the batch out, or go back to the last good checkpoint.

Every rank sees the same summed loss and norm, so every rank comes to the same verdict without asking.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aifactory_train.config.schema import GuardConfig
from aifactory_train.core.errors import RunFailed
from aifactory_train.core.output import note

if TYPE_CHECKING:
    from aifactory_train.data import Cursor
    from aifactory_train.training.trainer import Trainer

#: Losses that the median of a spike is taken over, and how many there must be before anything counts as one.
WINDOW, ENOUGH = 32, 8


@dataclass
class Verdict:
    """``action`` is go, skip, rollback or stop; ``why`` names the figure."""

    action: str
    why: str = ""


class Guard:
    """Judges each step before its gradients are used."""

    def __init__(self, settings: GuardConfig):
        self.settings = settings
        self.losses: list[float] = []
        self.incidents = 0

    def judge(self, loss: float, norm: float) -> Verdict:
        """``loss`` in nats per supervised token, ``norm`` of the gradient before clipping."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return self._incident(self.settings.on_nonfinite, f"loss {loss}, gradient norm {norm}")
        factor = self.settings.spike_factor
        if factor is not None and len(self.losses) >= ENOUGH:
            middle = statistics.median(self.losses)
            if loss > factor * middle:
                why = f"loss {loss:.4g} is {loss / middle:.3g} times the median of the last {len(self.losses)} steps"
                return self._incident(self.settings.on_spike, why)
        self.losses = [*self.losses[-(WINDOW - 1) :], loss]
        return Verdict("go")

    def _incident(self, action: str, why: str) -> Verdict:
        self.incidents += 1
        if action != "stop" and self.incidents > self.settings.max_incidents:
            return Verdict("stop", f"{why}; more than guard.max_incidents = {self.settings.max_incidents} incidents")
        return Verdict(action, why)

    def state(self) -> dict[str, Any]:
        return {"losses": self.losses, "incidents": self.incidents}

    def load(self, state: dict[str, Any]) -> None:
        self.losses, self.incidents = list(state["losses"]), int(state["incidents"])


def leave_out(trainer: Trainer, verdict: Verdict, next_cursor: Cursor, documents: Any) -> dict[str, Any]:
    """The guard objected: leave this step's batch out, after going back to the last good checkpoint if it says so.

    Returns the step's record for the metrics. Raises :class:`RunFailed` where the policy is to stop.
    """
    trainer.engine.discard()
    number, why = trainer.step + 1, verdict.why
    action, at = verdict.action, f"step {number}: {why}"
    if action == "rollback":
        trainer.checkpoints.wait()
        good = trainer.checkpoints.choose()
        if good is None:
            action, why = "stop", f"{why}; there is no checkpoint to roll back to"
        else:
            at += f"; weights of step {good}"
            trainer.checkpoints.load(good)
    if action == "stop":
        raise RunFailed(
            f"step {number}: {why}",
            where=str(trainer.run.path),
            fix="lower train.learning_rate, look at the rows with logging.row_ids, or set guard.on_nonfinite / on_spike",
        )
    if trainer.world.is_main:
        note(f"{action}: {at}")
        trainer.recorder.incident(action, number, why, documents)
    trainer.cursor, trainer.step = next_cursor, number
    record = {"kind": action, "step": number, "why": at, "rows": len(documents)}
    if trainer.recipe.logging.row_ids:
        record["row_ids"] = [trainer.data.train.row_id(int(i)) for i in documents]
    return record
