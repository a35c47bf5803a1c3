"""The event bus: every listener hears every event; one that fails ends nothing and is said once; metrics keep no
hole.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os

import pytest

from aifactory_train.record.events import Evaluated, EventBus, Incident, PhaseBegan, RunEnded, Saved, StepDone
from aifactory_train.run.folder import RunFolder
from aifactory_train.run.outcome import Attempt
from aifactory_train.training.listeners import StateFile
from aifactory_train.training.metrics_log import MetricsLog


class Heard:
    def __init__(self) -> None:
        self.events: list[object] = []

    def hear(self, event: object) -> None:
        self.events.append(event)


class Fails:
    def hear(self, event: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def step(number: int) -> StepDone:
    return StepDone({"kind": "train", "step": number, "loss": 1.0 / number}, [0], [[[0]]])


def test_a_listener_that_fails_ends_nothing_and_is_said_once(capsys) -> None:
    first, last = Heard(), Heard()
    bus = EventBus(first, Fails(), last)
    events = [PhaseBegan(0, "forward"), step(1), step(2), Saved(2, whole=True), RunEnded("finished")]
    for event in events:
        bus.emit(event)
    assert first.events == last.events == events
    said = capsys.readouterr().err
    assert said.count("Fails failed at StepDone") == 1 and said.count("failed at") == 4
    assert "No space left" in said


@pytest.mark.parametrize("event", [step(1), PhaseBegan(0, "save"), RunEnded("stopped", "SIGUSR1")])
def test_events_cannot_be_changed_by_who_hears_them(event) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.__setattr__(dataclasses.fields(event)[0].name, None)


def test_rows_that_could_not_be_written_are_written_with_the_next(tmp_path, monkeypatch, capsys) -> None:
    run = RunFolder(tmp_path)
    log = MetricsLog(run, enabled=True, tensorboard=False)
    log.open(0)
    bus = EventBus(log)
    bus.emit(step(1))

    class Full:
        """A disk that takes five bytes of a row and no more."""

        def __init__(self, file) -> None:
            self.file = file

        def write(self, row: bytes) -> int:
            return self.file.write(row[:5])

        def __getattr__(self, name: str):
            return getattr(self.file, name)

    real = log._file
    log._file = Full(real)
    bus.emit(step(2))
    bus.emit(Incident("skip", 3, "loss nan", [0], {"kind": "skip", "step": 3}))
    assert os.path.getsize(run.metrics_file) == len(run.metrics_file.read_text().splitlines()[0]) + 1, (
        "no part of a row"
    )
    log._file = real
    bus.emit(Evaluated("during", {"loss": 2.0}, 4))
    bus.emit(Evaluated("after", {"loss": 1.0}, 4))  # stands in eval.json
    bus.emit(RunEnded("finished"))
    rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert [(r["kind"], r["step"]) for r in rows] == [("train", 1), ("train", 2), ("skip", 3), ("eval", 4)]
    assert "MetricsLog failed at StepDone" in capsys.readouterr().err


def test_the_state_follows_steps_and_incidents(tmp_path) -> None:
    run = RunFolder(tmp_path)
    with Attempt(run, 0, 0, 1, timeout_s=60) as attempt:
        bus = EventBus(StateFile(attempt))
        bus.emit(step(7))
        attempt._write_down()  # what its thread does
        assert run.state()["step"] == 7 and run.state()["state"] == "running"
        bus.emit(Incident("skip", 8, "spike", [0], {}))
        attempt._write_down()
        assert run.state()["step"] == 8
