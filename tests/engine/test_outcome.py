"""A request that is refused changes nothing about what a run has reached; what happened is written down all the
same.
"""

from __future__ import annotations

import errno
import json
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.run import outcome
from aifactory_train.run.folder import RunFolder
from aifactory_train.run.outcome import Attempt, in_one_line
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


def test_no_secret_gets_into_state_outcome_or_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception of a library may quote the address or the variable that it used."""
    monkeypatch.setenv("PROJECT_TOKEN", "s3cretvalue")
    error = RuntimeError(
        "no answer of https://me:s3cretpw@hub/x?sig=s3cretsig&a=1 with s3cretvalue and hf_s3cretABCDEFGHIJKLMN"
    )
    run = RunFolder(tmp_path)
    with pytest.raises(RuntimeError), Attempt(run, 0, 0, 1, timeout_s=60) as record:
        record.training = True
        raise error
    texts = [p.read_text() for p in tmp_path.rglob("*.json")]
    assert len(texts) >= 2 and not any("s3cret" in text for text in texts)
    assert "no answer of https://[withheld]@hub/x?sig=[withheld]&a=1" in run.state()["message"]
    assert "s3cret" not in in_one_line(error, type_only=False)


def test_the_address_of_data_keeps_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    from aifactory_train.config.data_blocks import DataFacts

    facts = DataFacts(url="https://data.example/rows?token=abcdefgh&part=1")
    assert facts.url == "https://data.example/rows?token=[withheld]&part=1"
    assert "facts.url" in capsys.readouterr().err and DataFacts(url=facts.url).url == facts.url
    assert DataFacts(url="https://data.example/rows?page=2").url == "https://data.example/rows?page=2"


def test_a_full_disk_is_a_failure_and_each_file_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``state.json`` cannot be written: exit code 1, and the outcome says what ended the run."""
    from aifactory_train.core import files

    replace = files.os.replace

    def full(source: object, target: object) -> None:
        if str(target).endswith("state.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)  # type: ignore[arg-type]

    run = RunFolder(tmp_path)
    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(RunFailed, match="No space left"), Attempt(run, 0, 0, 1, timeout_s=60) as record:
        record.training = True
        run.set_state("running")
    said = json.loads((tmp_path / "attempts" / "001" / "outcome-0.json").read_text())
    assert said["status"] == "failed" and said["exit_code"] == 1 and "No space left" in said["message"]
    assert not list(tmp_path.glob(".state.json*"))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"state": 1}', '{"state": "running", "pid": "x"}', '{"state": "running", "pid": [1]}', "[" * 50_000,  # noqa: E501
     '{"state": "running", "time": "now"}'],
)  # fmt: skip
def test_a_state_of_another_shape_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path).is_live()
    assert caught.value.where == str(tmp_path / "state.json")


@pytest.mark.parametrize("more", [{}, {"pid": 2**80}, {"pid": -1}, {"pid": None}])
def test_a_state_without_a_process_is_nobodys(tmp_path: Path, more: dict) -> None:
    import socket

    (tmp_path / "state.json").write_text(
        json.dumps({"state": "running", "step": 1, "time": 1e300, "host": socket.gethostname(), **more})
    )
    assert not RunFolder(tmp_path).is_live()


def test_a_run_folder_whose_path_is_no_text_is_refused(tmp_path: Path) -> None:
    import os

    from aifactory_train.run.opening import open_for_training

    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xff"))
    with pytest.raises(UserError, match="not UTF-8"):
        open_for_training(RunFolder(folder), None)
    assert not folder.exists()


# ---- what is written while a run trains


def beats(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder / f"attempts/001/alive-{rank}.json").read_text())


def test_no_step_waits_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that does not answer holds up the thread that writes, not the training."""
    monkeypatch.setattr(outcome, "BEAT_EVERY_S", 0.02)
    stuck, free = threading.Event(), threading.Event()
    whole = outcome.write_json

    def slow(path, value, **more):
        if threading.current_thread() is not threading.main_thread():
            stuck.set()
            assert free.wait(30)
        whole(path, value, **more)

    with Attempt(RunFolder(tmp_path), 0, 0, 1, timeout_s=60) as attempt:
        monkeypatch.setattr(outcome, "write_json", slow)
        attempt.beat(1, "forward")
        assert stuck.wait(30)
        for step in range(2, 100):
            attempt.beat(step, "forward")
            attempt.running(step)
        assert beats(tmp_path)["step"] == 0  # what is on the disk is older, and says so
        free.set()
        end = time.monotonic() + 30
        while beats(tmp_path)["step"] != 99:
            assert time.monotonic() < end
            time.sleep(0.01)
        attempt.set_state("stopped", step=99)
        attempt.code = 75


def test_a_heartbeat_tells_when_training_got_there_not_when_it_was_written(tmp_path: Path, monkeypatch) -> None:
    """The hang's verdict looks for news: a thread that goes on writing must not make a rank that stands still look
    alive.
    """
    with Attempt(RunFolder(tmp_path), 0, 0, 1, timeout_s=60) as attempt:
        attempt.beat(5, "forward")
        reached = time.time()
        monkeypatch.setattr(outcome.time, "time", lambda: reached + 500)
        attempt._write_down()
        first = (tmp_path / "attempts/001/alive-0.json").stat().st_mtime_ns
        assert beats(tmp_path) | {"step": 5, "phase": "forward"} == beats(tmp_path)
        assert beats(tmp_path)["time"] <= reached
        attempt._write_down()
        assert (tmp_path / "attempts/001/alive-0.json").stat().st_mtime_ns == first
        monkeypatch.undo()
        attempt.code = 0


def test_the_end_is_never_overwritten_by_a_thread_that_says_running(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(outcome, "BEAT_EVERY_S", 0.001)
    run = RunFolder(tmp_path)
    for state in ("finished", "stopped"):
        with Attempt(run, 0, 0, 1, timeout_s=60) as attempt:
            for step in range(300):
                attempt.running(step)
            attempt.set_state(state, step=300)
            attempt.running(301)
            time.sleep(0.02)
            assert run.state()["state"] == state and run.state()["step"] == 300
            attempt.code = 0
    with pytest.raises(RuntimeError), Attempt(run, 0, 0, 1, timeout_s=60) as attempt:
        attempt.training = True
        attempt.running(5)
        raise RuntimeError("of ours")
    assert run.state()["state"] == "failed"


@pytest.mark.parametrize(
    ("ranks", "local_size", "every_s"),
    [(1, 1, 10), (63, 8, 10), (64, 1, 60), (64, 4, 60), (4096, 4, 60), (99, 8, 30)],
)
def test_thousands_of_ranks_write_their_heartbeats_less_often(ranks, local_size, every_s, tmp_path: Path) -> None:
    with Attempt(RunFolder(tmp_path), 0, 0, None, timeout_s=60, ranks=ranks, local_size=local_size) as attempt:
        assert attempt._every_s == pytest.approx(every_s)
        assert ranks < 64 or local_size == 1 or 60 / attempt._every_s * 2 / local_size <= 1
        attempt.code = 0


def test_a_full_disk_costs_a_heartbeat_not_the_run(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(outcome, "BEAT_EVERY_S", 0.005)
    with Attempt(RunFolder(tmp_path), 0, 0, 1, timeout_s=60) as attempt:
        whole, failed = outcome.write_json, threading.Event()

        def full(path, value, **more):
            failed.set()
            raise UserError("cannot be written: No space left on device", where=str(path))

        monkeypatch.setattr(outcome, "write_json", full)
        attempt.beat(3, "forward")
        assert failed.wait(30)
        time.sleep(0.05)
        monkeypatch.setattr(outcome, "write_json", whole)
        end = time.monotonic() + 30
        while beats(tmp_path)["step"] != 3:
            assert time.monotonic() < end
            time.sleep(0.01)
        attempt.code = 0
    assert capsys.readouterr().err.count("No space left") == 1
