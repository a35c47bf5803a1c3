"""Small listeners of a run: the watchdog's sign of life, and the state that others read."""

from __future__ import annotations

from aifactory_train import __version__
from aifactory_train.record.events import Event, Incident, PhaseBegan, RunStarted, StepDone
from aifactory_train.run.folder import RunFolder
from aifactory_train.run.outcome import Attempt


class Heartbeat:
    """Hands the phases of this rank to its attempt, whose watchdog waits for them."""

    def __init__(self, attempt: Attempt):
        self.attempt = attempt

    def hear(self, event: Event) -> None:
        if isinstance(event, PhaseBegan):
            self.attempt.beat(event.step, event.phase)


class StateFile:
    """Keeps ``state.json`` at "running" with the step (rank 0). How the run ends is written by the trainer, which must not fail at it."""

    def __init__(self, run: RunFolder):
        self.run = run

    def hear(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self.run.set_state("running", step=int(event.metrics["step"]), version=__version__)
        elif isinstance(event, (Incident, RunStarted)):
            self.run.set_state("running", step=event.step, version=__version__)
