"""Who hears of a run: record, trackers, the watchdog's sign of life, the state that others read, and what the trainer
adds.
"""

from __future__ import annotations

from collections.abc import Sequence

from aifactory_train import __version__
from aifactory_train.config.schema import Recipe
from aifactory_train.parallel.world import World
from aifactory_train.record.events import (
    Event,
    EventBus,
    Incident,
    Listener,
    PhaseBegan,
    RunEnded,
    RunStarted,
    StepDone,
)
from aifactory_train.record.recorder import Recorder
from aifactory_train.record.trackers import Trackers
from aifactory_train.report.pack import write_pack
from aifactory_train.run.folder import RunFolder
from aifactory_train.run.outcome import Attempt
from aifactory_train.run.ownership import Owner


class Heartbeat:
    """Hands the phases of this rank to its attempt, whose watchdog waits for them."""

    def __init__(self, attempt: Attempt):
        self.attempt = attempt

    def hear(self, event: Event) -> None:
        if isinstance(event, PhaseBegan):
            self.attempt.beat(event.step, event.phase)
        elif isinstance(event, RunEnded):  # what comes now (digests, a last record) is no step that hangs
            self.attempt.beat(self.attempt.step, "end")


class StateFile:
    """Keeps ``state.json`` at "running" with the step (rank 0), a few seconds behind. How the run ends is written by
    the trainer, which must not fail at it."""

    def __init__(self, attempt: Attempt):
        self.attempt = attempt

    def hear(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self.attempt.running(int(event.metrics["step"]), version=__version__)
        elif isinstance(event, (Incident, RunStarted)):
            self.attempt.running(event.step, version=__version__)


def listen(
    recipe: Recipe, run: RunFolder, world: World, attempt: Attempt, more: Sequence[Listener], owner: Owner
) -> EventBus:
    """The event bus of one rank. The record hears first but for the heartbeat: it is what others are judged by."""
    number = int(attempt.folder.name) if attempt.folder else None
    recorder = Recorder(run, world, recipe, attempt=number, write_pack=write_pack)
    bus = EventBus(Heartbeat(attempt), over=owner.lost)
    if world.is_main:
        bus.add(Trackers(run, recipe, recorder.failed))
    for listener in (recorder, *more):
        bus.add(listener)
    if world.is_main:
        bus.add(StateFile(attempt))
    return bus
