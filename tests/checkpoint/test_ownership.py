"""One run folder, one run: who may take a folder, and from whom."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from aifactory_train.config.loading import load_recipe
from aifactory_train.core.errors import UserError
from aifactory_train.run import folder as runs
from aifactory_train.run import ownership
from aifactory_train.run.folder import RunFolder
from aifactory_train.run.opening import open_for_training
from aifactory_train.run.ownership import Owner, TakenOver, living, process_age, process_lives, process_start

#: A process that waits for a moment, claims, says how that went, and keeps what it has.
CLAIM = """
import sys, time
from pathlib import Path
from aifactory_train.core.errors import UserError
from aifactory_train.run.ownership import Owner
run, at = Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0.0, at - time.time()))
owner = Owner(run)
try:
    owner.claim()
except UserError as error:
    print("refused", error)
else:
    print("mine", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats twenty a second; a file that did not change for a second is dead."""
    monkeypatch.setattr(ownership, "BEAT_S", 0.05)
    monkeypatch.setattr(ownership, "WATCH_S", 1.0)


def claimer(run: Path, at: float = 0.0) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CLAIM, str(run), str(at)], stdout=subprocess.PIPE, text=True)


def elsewhere(run: Path, number: int = 1, **more: Any) -> dict[str, Any]:
    """Rewrite a start as if another machine had made it."""
    path = run / "starts" / f"{number:05d}.json"
    value = {**json.loads(path.read_text()), "host": "othernode", "machine": "othernode", **more}
    path.write_text(json.dumps(value))
    return value


def abandoned(run: Path, **more: Any) -> None:
    """A start of another machine that ended without a word."""
    owner = Owner(run, more.pop("attempt", None))
    owner.claim()
    owner._end.set()
    owner._thread.join()  # type: ignore[union-attr]
    elsewhere(run, owner.number, **more)


def attempt(run: Path, number: int, **record: Any) -> None:
    folder = run / "attempts" / f"{number:03d}"
    folder.mkdir(parents=True)
    (folder / "attempt.json").write_text(json.dumps({"number": number, **record}))


@pytest.mark.parametrize("before", ["nothing", "a killed start"])
def test_one_of_forty_starts_at_the_same_instant_owns_the_folder(tmp_path: Path, before: str) -> None:
    """Processes are forked from this one: the instant is the same within milliseconds."""
    if before == "a killed start":
        first = claimer(tmp_path)
        assert first.stdout is not None and first.stdout.readline() == "mine\n"
        first.kill()
        first.wait()
    told_reader, told_writer = os.pipe()
    go_reader, go_writer = os.pipe()
    pids = []
    for _ in range(40):
        pid = os.fork()
        if pid == 0:
            try:
                os.close(go_writer)
                os.read(go_reader, 1)  # until the parent closes its end
                try:
                    Owner(tmp_path).claim()
                    os.write(told_writer, b"mine\n")
                    time.sleep(60)  # lives on, as a run does
                except UserError as error:
                    os.write(told_writer, (error.what.split(" (")[0] + "\n").encode())
            finally:
                os._exit(0)
        pids.append(pid)
    os.close(go_reader)
    os.close(go_writer)
    os.close(told_writer)
    said, end = b"", time.time() + 60
    while said.count(b"\n") < 40 and time.time() < end:
        said += os.read(told_reader, 4096)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    os.close(told_reader)
    lines = said.decode().splitlines()
    assert sorted(lines) == ["a run is live here"] * 39 + ["mine"], lines
    numbers = sorted(p.name for p in (tmp_path / "starts").iterdir())
    assert numbers == (["00001.json"] if before == "nothing" else ["00001.json", "00002.json"])


def test_the_same_where_the_file_system_has_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    def no_links(*paths: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "starts").mkdir()
    first, second = Owner(tmp_path), Owner(tmp_path)
    assert first._make(1) and not second._make(1)
    assert json.loads((tmp_path / "starts" / "00001.json").read_text())["token"] == first._token


def test_a_killed_start_does_not_block_and_its_number_may_belong_to_another_process(tmp_path: Path) -> None:
    first = claimer(tmp_path)
    assert first.stdout is not None and first.stdout.readline() == "mine\n"
    with pytest.raises(UserError, match=f"a run is live here \\(process {first.pid} on "):
        Owner(tmp_path).claim()
    first.kill()
    first.wait()
    # The number now belongs to a process that has nothing to do with it: this test's parent.
    path = tmp_path / "starts" / "00001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": os.getppid()}))
    owner = Owner(tmp_path)
    owner.claim()
    assert owner.number == 2
    owner.release()
    assert json.loads((tmp_path / "starts" / "00002.json").read_text())["ended"]


def test_an_owner_on_another_machine_is_known_by_its_heartbeat_not_by_a_clock(tmp_path: Path, quick: None) -> None:
    with Owner(tmp_path) as owner:
        owner.claim()
        real = owner._content
        owner._content = lambda **more: json.dumps(  # type: ignore[method-assign]
            {**json.loads(real(**more)), "host": "othernode", "machine": "othernode", "time": 0.0}
        )
        time.sleep(0.3)
        with pytest.raises(UserError, match="on othernode"):
            Owner(tmp_path).claim()  # its clock says 1970, and it lives
    owner = Owner(tmp_path)
    owner.claim()  # it said that it ended
    owner.release()
    abandoned(tmp_path, time=time.time() + 1e6)  # its clock is days ahead, and it is dead
    began = time.monotonic()
    with Owner(tmp_path) as owner:
        owner.claim()
        assert time.monotonic() - began >= 1.0


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": "x"}'])
def test_a_damaged_file_blocks_nobody_for_ever(tmp_path: Path, quick: None, text: str) -> None:
    (tmp_path / "starts").mkdir()
    (tmp_path / "starts" / "00007.json").write_text(text)
    with Owner(tmp_path) as owner:
        owner.claim()
        assert owner.number == 8


@pytest.mark.parametrize(
    ("before", "now", "at_once"),
    [
        ({"job": "18"}, {"job": "18"}, True),  # the scheduler put the job back
        ({"job": "18", "state": "failed", "rc": 1}, {"job": "19"}, True),  # its own job judged it
        ({"job": "18", "state": "failed", "rc": None}, {"job": "19"}, False),  # the next one only thinks so
        ({"job": "18"}, {"job": "19"}, False),
    ],
)
def test_the_launchers_books_are_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, Any], now: dict[str, Any], at_once: bool
) -> None:
    monkeypatch.setattr(ownership, "WATCH_S", 0.5)
    attempt(tmp_path, 1, **before)
    attempt(tmp_path, 2, **now)
    abandoned(tmp_path, attempt=1)
    watched: list[float] = []
    real = time.sleep
    monkeypatch.setattr(time, "sleep", lambda s: watched.append(s) or real(s))
    assert living(tmp_path, 1, attempt=2) is None
    assert (not watched) is at_once


def test_an_owner_whose_place_was_taken_ends_and_changes_nothing(tmp_path: Path, quick: None) -> None:
    first = Owner(tmp_path)
    first.claim()
    (tmp_path / "starts" / "00002.json").write_text(json.dumps({"pid": 7, "host": "othernode", "beat": 0}))
    with pytest.raises(TakenOver, match="process 7 on othernode"):
        first.check(look=True)
    first._thread.join(5)  # type: ignore[union-attr]
    with pytest.raises(TakenOver):
        first.check()
    first.release()
    assert "ended" not in json.loads((tmp_path / "starts" / "00001.json").read_text())


def test_an_owner_whose_place_was_taken_says_nothing_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks of the heartbeat: the other one's record must not get this one's events."""
    from aifactory_train.record import events as ev
    from aifactory_train.record.chain import Chain, read_events

    class Log:
        def hear(self, event: ev.Event) -> None:
            Chain(tmp_path / "events.jsonl").append(type(event).__name__)

    with Owner(tmp_path) as owner:
        owner.claim()
        bus = ev.EventBus(Log(), over=owner.lost)
        bus.emit(ev.Evaluated("before", {}, 0))
        (tmp_path / "starts" / "00002.json").write_text(json.dumps({"pid": 7, "host": "othernode", "beat": 0}))
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 60)  # it was out of reach for a minute, and goes on
        for event in (ev.Evaluated("during", {}, 4), ev.Saved(4, True), ev.RunEnded("failed")):
            bus.emit(event)
    events, faults = read_events(tmp_path / "events.jsonl")
    assert [e["kind"] for e in events] == ["Evaluated"] and not faults


def test_who_read_the_folder_too_early_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """A listing from before number 1 was made: it makes number 1 again after that was withdrawn, and sees number 2."""
    live = claimer(tmp_path)
    assert live.stdout is not None and live.stdout.readline() == "mine\n"
    os.rename(tmp_path / "starts" / "00001.json", tmp_path / "starts" / "00002.json")
    late, real, first = Owner(tmp_path), Owner._newest, [0]
    monkeypatch.setattr(Owner, "_newest", lambda self: first.pop() if first else real(self))
    try:
        with pytest.raises(UserError, match="a run is live here"):
            late.claim()
    finally:
        live.kill()
        live.wait()
    assert [p.name for p in (tmp_path / "starts").iterdir()] == ["00002.json"]


def test_a_refused_start_leaves_nothing_behind(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    (tmp_path / "run.yaml").write_text("{}")
    run.set_state("finished", step=3)
    with pytest.raises(UserError, match="finished"):
        open_for_training(run, None, None, Owner(tmp_path))
    assert list((tmp_path / "starts").iterdir()) == []


def test_a_live_peers_half_written_checkpoint_is_out_of_reach(tmp_path: Path) -> None:
    """The refusal comes before the clean-up of what torn saves left."""
    live = claimer(tmp_path)
    assert live.stdout is not None and live.stdout.readline() == "mine\n"
    (tmp_path / "run.yaml").write_text("{}")
    (tmp_path / "checkpoints" / ".writing-step-4").mkdir(parents=True)
    try:
        for resume in (None, "auto", "never", "4"):
            with pytest.raises(UserError, match="a run is live here"):
                open_for_training(RunFolder(tmp_path), resume, None, Owner(tmp_path))
    finally:
        live.kill()
        live.wait()
    assert (tmp_path / "checkpoints" / ".writing-step-4").exists() and (tmp_path / "run.yaml").exists()


# ---- folders of before there were starts


@pytest.mark.parametrize(
    ("state", "live"),
    [
        ({"host": "othernode", "time": -10}, True),
        ({"host": "othernode", "time": -500}, False),
        ({"host": "othernode", "time": +5000}, False),  # a clock ahead
        ({"host": "here", "pid": "mine", "time": 0}, False),
        ({"host": "here", "pid": "parent", "time": 0}, True),
        ({"host": "here", "pid": "parent", "time": 0, "process_start": "1"}, False),  # the number was used again
        ({"host": "here", "pid": "parent", "time": -1e8}, False),  # older than the process
        ({"host": "here", "pid": 2**40, "time": 0}, False),
    ],
)
def test_the_state_alone(tmp_path: Path, state: dict[str, Any], live: bool) -> None:
    pids = {"mine": os.getpid(), "parent": os.getppid()}
    reported = {
        "state": "running",
        **state,
        "time": time.time() + state["time"],
        "pid": pids.get(state.get("pid"), state.get("pid", 1)),
    }  # type: ignore[arg-type]
    reported["host"] = socket.gethostname() if state["host"] == "here" else state["host"]
    (tmp_path / "state.json").write_text(json.dumps(reported))
    assert RunFolder(tmp_path).is_live() is live


def test_the_launcher_goes_on_with_a_folder_of_before(tmp_path: Path, tiny_recipe: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    run = RunFolder(folder)
    run.save_config(load_recipe(str(tiny_recipe)))
    reported = {"state": "running", "host": "othernode", "pid": 1, "time": time.time() - 5, "step": 0}
    (folder / "state.json").write_text(json.dumps(reported))
    with pytest.raises(UserError, match="live here"):
        open_for_training(run, "auto", None, Owner(folder))
    attempt(folder, 1, job="18")
    attempt(folder, 2, job="18")
    with Owner(folder, 2) as owner:
        assert open_for_training(run, "auto", None, owner) is None
    assert runs.RunFolder(folder).is_live() is False


def test_processes_are_told_apart() -> None:
    me = os.getpid()
    assert process_lives(me, process_start(me)) and not process_lives(me, "1") and not process_lives(2**40)
    assert not process_lives(0) and not process_lives(-1)
    age = process_age(me)
    assert age is not None and 0 <= age < 1e6
