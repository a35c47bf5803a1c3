"""What happens when the loss is not finite or jumps: stop, leave the batch out, or go back to the last good checkpoint.

Every rank sees the same summed loss and norm, so every rank comes to the same verdict without asking.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aifactory_train.config.schema import GuardConfig
from aifactory_train.core.errors import RunFailed

#: Losses that the median of a spike is taken over, and how many there must be before anything counts as one.
WINDOW, ENOUGH = 32, 8


@dataclass
class StepVerdict:
    """``action`` is go, skip, rollback or stop; ``why`` names the figure."""

    action: str
    why: str = ""


class Guard:
    """Judges each step before its gradients are used."""

    def __init__(self, settings: GuardConfig):
        self.settings = settings
        self.losses: list[float] = []
        self.incidents = 0

    def judge(self, loss: float, norm: float) -> StepVerdict:
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
        return StepVerdict("go")

    def _incident(self, action: str, why: str) -> StepVerdict:
        self.incidents += 1
        if action != "stop" and self.incidents > self.settings.max_incidents:
            return StepVerdict(
                "stop", f"{why}; more than guard.max_incidents = {self.settings.max_incidents} incidents"
            )
        return StepVerdict(action, why)

    def state(self) -> dict[str, Any]:
        return {"losses": self.losses, "incidents": self.incidents}

    def load(self, state: dict[str, Any]) -> None:
        self.losses, self.incidents = list(state["losses"]), int(state["incidents"])


def stopped_by_guard(step: int, why: str, run: Path) -> RunFailed:
    """The error of a run whose policy is to stop."""
    return RunFailed(
        f"step {step}: {why}",
        where=str(run),
        fix="lower train.learning_rate, look at the rows with logging.row_ids, or set guard.on_nonfinite / on_spike",
    )
