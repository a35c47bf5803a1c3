"""One rank of a node writes for all: no outcome is lost whoever dies, and the files tell what the ranks said."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.launchers.programs.attempt import diagnose, ranked
from aifactory_train.run import node_board, outcome, saved
from aifactory_train.run.folder import RunFolder
from aifactory_train.run.node_board import NodeBoard
from aifactory_train.run.outcome import Attempt

RANKS = 4


@pytest.fixture(autouse=True)
def near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node's own place; nobody waits long."""
    place = tmp_path / "node"
    place.mkdir()
    monkeypatch.setattr(node_board, "_places", lambda: iter([place]))
    monkeypatch.setattr(node_board, "TOGETHER_S", 0.5)
    monkeypatch.setattr(outcome, "BEAT_EVERY_S", 0.05)
    return place


def rank_of(run: Path, rank: int, code: int | None = 0, error: BaseException | None = None, step: int = 3) -> None:
    """One rank's attempt, as the trainer makes it."""
    try:
        with Attempt(RunFolder(run), rank, rank, 1, timeout_s=60, ranks=RANKS, local_size=RANKS) as attempt:
            attempt.beat(step, "forward")
            if error is not None:
                raise error
            attempt.code, attempt.step = code, step
    except (UserError, KeyError):
        pass


def together(run: Path, **what) -> None:
    """All ranks at once; ``what`` gives a rank's (``r0``, ``r1``, …) other arguments."""
    threads = [threading.Thread(target=rank_of, args=(run, r), kwargs=what.get(f"r{r}", {})) for r in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def names(run: Path, kind: str) -> list[str]:
    return sorted(p.name for p in (run / "attempts/001").glob(f"{kind}-*"))


def test_ranks_that_end_well_say_so_in_one_file(tmp_path: Path, near: Path, monkeypatch) -> None:
    monkeypatch.setattr(node_board, "TOGETHER_S", 30.0)
    together(tmp_path / "run")
    folder = str(tmp_path / "run/attempts/001")
    assert names(tmp_path / "run", "outcome") == ["outcome-node-0.json"]
    told = ranked(folder, "outcome")
    assert {r: (o["rank"], o["status"], o["step"]) for r, o in told.items()} == {r: (r, "done", 3) for r in range(4)}
    assert diagnose(folder, RANKS) == ("done", None)
    assert not list(near.iterdir())  # the board is taken away by the last one


def test_a_stop_is_known_to_have_saved(tmp_path: Path) -> None:
    """What tells a run without ``saved.json`` from one that was killed before its first save."""
    together(tmp_path, **{f"r{r}": {"code": 75} for r in range(RANKS)})
    assert diagnose(str(tmp_path / "attempts/001"), RANKS)[0] == "stopped"
    assert "attempt 1 stopped" in str(saved.evidence(RunFolder(tmp_path)))


@pytest.mark.parametrize("who", [0, 2])
def test_a_rank_that_failed_is_named_and_the_others_are_not_lost(tmp_path: Path, who: int) -> None:
    together(tmp_path, **{f"r{who}": {"error": RunFailed("a row is bad")}})
    assert f"outcome-{who}.json" in names(tmp_path, "outcome")
    told = ranked(str(tmp_path / "attempts/001"), "outcome")
    assert {r: o["status"] for r, o in told.items()} == {r: "failed" if r == who else "done" for r in range(RANKS)}
    state, cause = diagnose(str(tmp_path / "attempts/001"), RANKS)
    assert state == "failed" and (cause["rank"], cause["message"]) == (who, "RunFailed: a row is bad")


def published(run: Path, rank: int, step: int) -> None:
    """Until the run folder tells that ``rank`` reached ``step``."""
    end = time.monotonic() + 60
    while ranked(str(run / "attempts/001"), "alive").get(rank, {}).get("step") != step:
        assert time.monotonic() < end
        time.sleep(0.02)


def child(run: Path, rank: int, ready: int, go: int, start: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.close(start)
        with Attempt(RunFolder(run), rank, rank, 1, timeout_s=60, ranks=RANKS, local_size=RANKS) as attempt:
            attempt.beat(10 + rank, "forward")
            os.write(ready, b"x")
            os.read(go, 1)  # until the parent closes the other end
            attempt.beat(20 + rank, "forward")
            published(run, rank, 20 + rank)
            attempt.code, attempt.step = 0, 20 + rank
    finally:
        os._exit(0)


@pytest.mark.parametrize("who", [0, 3])
def test_another_rank_writes_for_a_node_whose_first_is_killed(tmp_path: Path, who: int) -> None:
    ready, told = os.pipe()
    go, start = os.pipe()
    pids = [child(tmp_path, rank, told, go, start) for rank in range(RANKS)]
    for _ in range(RANKS):
        os.read(ready, 1)
    folder = str(tmp_path / "attempts/001")
    for rank in range(RANKS):
        published(tmp_path, rank, 10 + rank)
    os.kill(pids[who], signal.SIGKILL)
    os.waitpid(pids[who], 0)
    for handle in (start, go, ready, told):
        os.close(handle)
    for rank, pid in enumerate(pids):
        if rank != who:
            os.waitpid(pid, 0)
    beats = {r: b["step"] for r, b in ranked(folder, "alive").items()}
    assert beats == {r: 10 + r if r == who else 20 + r for r in range(RANKS)}
    assert {r: o["status"] for r, o in ranked(folder, "outcome").items()} == {
        r: "done" for r in range(RANKS) if r != who
    }
    (Path(folder) / f"exit-{who}.json").write_text(json.dumps({"exit_code": 137, "signal": 9, "ended": 1.0}))
    state, cause = diagnose(folder, RANKS)
    assert state == "failed" and (cause["rank"], cause["kind"]) == (who, "signal")


def test_ranks_that_do_not_see_each_other_write_each_for_itself(tmp_path: Path, monkeypatch) -> None:
    """Containers may give every rank a ``/dev/shm`` of its own; or there is no place at all."""
    own = threading.local()
    monkeypatch.setattr(node_board, "_places", lambda: iter([own.place] if own.place else [tmp_path / "no" / "place"]))
    mine = rank_of

    for places in (True, False):
        run = tmp_path / f"run-{places}"

        def alone(rank: int, run: Path = run, places: bool = places) -> None:
            own.place = run.with_name(f"shm-{rank}") if places else None
            if own.place:
                own.place.mkdir()
            mine(run, rank)

        threads = [threading.Thread(target=alone, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert diagnose(str(run / "attempts/001"), RANKS) == ("done", None), places


def test_words_of_an_earlier_run_in_the_same_place_are_not_taken(tmp_path: Path) -> None:
    attempt = tmp_path / "attempts/001"
    attempt.mkdir(parents=True)
    before = NodeBoard(attempt, 1)
    before.put("outcome", {"status": "done"})
    before.put("published", {"ranks": [1]})
    assert NodeBoard(attempt, 0).all("outcome") == {1: {"status": "done"}}
    assert NodeBoard(attempt, 1).all("outcome") == {} == NodeBoard(attempt, 1).all("published")


def test_only_what_is_news_is_written(tmp_path: Path, monkeypatch) -> None:
    """A rank that stands still writes nothing, and one file tells of all."""
    monkeypatch.setattr(outcome, "BEAT_EVERY_S", 3600.0)
    attempts = [
        Attempt(RunFolder(tmp_path), r, r, 1, timeout_s=60, ranks=RANKS, local_size=RANKS) for r in range(RANKS)
    ]
    file = tmp_path / "attempts/001/alive-node-0.json"
    for step in (1, 1, 2):
        for attempt in attempts:
            attempt.beat(step, "forward")
        written = []
        for attempt in [*attempts[1:], attempts[0], *attempts[1:]]:
            attempt._write_down()
            written.append(file.stat().st_mtime_ns)
        assert names(tmp_path, "alive") == ["alive-node-0.json"]
        beats = ranked(str(file.parent), "alive")
        assert {b["step"] for b in beats.values()} == {step} and len(beats) == RANKS
        assert len(set(written[3:])) == 1
    last = file.stat().st_mtime_ns
    attempts[0]._write_down()
    assert file.stat().st_mtime_ns == last
    for attempt in attempts:
        attempt.__exit__(None, RuntimeError("over"), None)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"ranks": 3}', '{"ranks": {"x": {}, "-1": {}, "1": 7, "' + "9" * 5000 + '": {}}}', '{"ranks": {"'],
)
def test_a_damaged_file_of_a_node_is_taken_for_missing(tmp_path: Path, text: str) -> None:
    (tmp_path / "outcome-node-0.json").write_text(text)
    (tmp_path / "outcome-2.json").write_text('{"rank": 2, "status": "done"}')
    assert set(ranked(str(tmp_path), "outcome")) == {2}


def test_the_latest_heartbeat_counts_and_a_word_of_ones_own(tmp_path: Path) -> None:
    beats = {"a": {"step": 5, "time": 50.0}, "b": {"step": 6, "time": 60.0}}
    for order in (("a", "b"), ("b", "a")):
        for rank, key in enumerate(order):
            (tmp_path / f"alive-node-{rank}.json").write_text(json.dumps({"ranks": {"1": beats[key]}}))
        assert ranked(str(tmp_path), "alive")[1]["step"] == 6
    (tmp_path / "outcome-node-0.json").write_text(json.dumps({"ranks": {"1": {"status": "done"}}}))
    (tmp_path / "outcome-1.json").write_text(json.dumps({"status": "failed"}))
    assert ranked(str(tmp_path), "outcome")[1]["status"] == "failed"
