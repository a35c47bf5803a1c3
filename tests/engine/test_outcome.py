"""A request that is refused changes nothing about what a run has reached; what happened is written down all the same."""

from __future__ import annotations

import errno
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.run.folder import RunFolder
from aifactory_train.run.outcome import Attempt
from aifactory_train.training.metrics_log import MetricsLog
from aifactory_train.training.state import refuse_length


def attempt(folder: Path, before: str | None, error: BaseException) -> str:
    """The run's state after an attempt in a run of state ``before`` ended with ``error``."""
    run = RunFolder(folder)
    if before is not None:
        run.set_state(before, step=7)
    with pytest.raises(type(error)), Attempt(run, 0, 0, 1, timeout_s=60) as record:
        record.training = True
        raise error
    outcome = json.loads((run.attempt_dir(1) / "outcome-0.json").read_text())
    assert outcome["status"] == "failed" and str(error) in outcome["message"]
    return run.state()["state"]


@pytest.mark.parametrize(
    ("before", "error", "after"),
    [
        ("finished", UserError("another length"), "finished"),
        ("stopped", UserError("other data"), "stopped"),
        ("finished", RunFailed("the disk is full"), "failed"),
        ("stopped", ValueError("a fault of ours"), "failed"),
        ("running", UserError("refused in the middle"), "failed"),
        (None, UserError("never began"), "failed"),
    ],
)
def test_a_refusal_leaves_the_state_as_it_was(before, error, after, tmp_path: Path) -> None:
    assert attempt(tmp_path, before, error) == after


@pytest.mark.parametrize(("state", "done"), [("stopped", 7), ("failed", 7), ("finished", 7), ("finished", 6)])
def test_a_run_is_not_continued_to_fewer_steps_than_it_made(state: str, done: int) -> None:
    with pytest.raises(UserError, match=rf"{done} steps, and 6 are asked for"):
        refuse_length(done, 6, finished=state == "finished")


def test_lines_end_where_json_lines_end(tmp_path: Path) -> None:
    """Characters that Python, but not JSON Lines, takes for ends of lines may stand in ids of rows."""
    run = RunFolder(tmp_path)
    odd = ["a\u2028b", "c\u0085d", "e\x0cf"]
    log = MetricsLog(run, enabled=True, tensorboard=False)
    log.open(0)
    for step in (1, 2, 3):
        log.write({"kind": "train", "step": step, "row_ids": odd})
    log.close()
    with open(run.metrics_file, "a") as file:
        file.write('{"kind": "train", "st')  # killed
    log.open(2)
    log.close()
    kept = [json.loads(line) for line in run.metrics_file.read_text().rstrip("\n").split("\n")]
    assert kept == [{"kind": "train", "step": step, "row_ids": odd} for step in (1, 2)]


def test_report_reads_the_same_lines(tmp_path: Path) -> None:
    from aifactory_train.commands.report import training_records

    run = RunFolder(tmp_path)
    assert training_records(run) == []
    run.metrics_file.write_text(
        '{"step": 1, "row_ids": ["a\u2028b"]}\n{"kind": "skip", "step": 2}\n{"st', encoding="utf-8"
    )
    assert training_records(run) == [{"step": 1, "row_ids": ["a\u2028b"]}]


def test_a_step_that_was_left_out_is_always_logged(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    log = MetricsLog(run, enabled=True, tensorboard=False, every=3)
    log.open(0)
    for step, kind in [
        (1, "train"),
        (2, "skip"),
        (3, "train"),
        (4, "train"),
        (5, "rollback"),
        (6, "train"),
        (7, "train"),
    ]:
        log.write({"kind": kind, "step": step}, last=step == 7)
    log.close()
    assert [json.loads(line)["step"] for line in run.metrics_file.read_text().splitlines()] == [2, 3, 5, 6, 7]


def test_a_save_that_failed_without_a_name_of_a_file_says_what_is_known() -> None:
    from aifactory_train.training.checkpoint import Checkpointer

    saver = SimpleNamespace(world=SimpleNamespace(rank=3))
    describe = Checkpointer._describe
    assert describe(saver, OSError(errno.EFBIG, "File too large")).startswith("File too large (rank 3 on ")  # type: ignore[arg-type]
    named = describe(saver, OSError(errno.ENOSPC, "No space", "/x/state"))  # type: ignore[arg-type]
    assert named.startswith("No space: /x/state (rank 3 on ")


@pytest.mark.parametrize("terminal", [True, False])
def test_the_first_ctrl_c_is_acknowledged_at_a_terminal(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from aifactory_train.training import stopping

    said: list[bytes] = []
    monkeypatch.setattr(stopping.os, "isatty", lambda fd: terminal)
    monkeypatch.setattr(stopping.os, "write", lambda fd, text: said.append(text))
    channels = stopping.StopChannels.__new__(stopping.StopChannels)  # without installing handlers in this process
    channels.signal = None
    channels._on_signal(signal.SIGTERM, None)
    assert not said
    channels._on_signal(signal.SIGINT, None)
    assert [b"Ctrl-C again" in text for text in said] == [True] * terminal
    with pytest.raises(KeyboardInterrupt):
        channels._on_signal(signal.SIGINT, None)
