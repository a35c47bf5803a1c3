"""SIGUSR1, SIGTERM, the stop file and the deadline each end in a complete checkpoint, on all ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from aifactory_train.core.errors import EXIT_STOPPED, UserError
from aifactory_train.training.stopping import StopChannels, deadline_from


def scenarios(group: str, folder: Path, timeout: float) -> dict[str, Any]:
    script = Path(__file__).resolve().parent / "scenarios.py"
    done = subprocess.run(
        [sys.executable, str(script), group, str(folder)], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def check_stops(found: dict[str, Any], save_s: float) -> None:
    for channel, seen in found.items():
        assert set(seen["codes"].values()) == {EXIT_STOPPED} and len(seen["codes"]) == 2, (channel, seen)
        outcomes = list(seen["outcomes"].values())
        assert [o["status"] for o in outcomes] == ["stopped", "stopped"], (channel, outcomes)
        step = outcomes[0]["step"]
        assert outcomes[1]["step"] == step and seen["complete"][0] == step, (channel, seen)
        assert seen["records"][-1]["step"] == step, channel  # no step after the checkpoint
        assert channel in outcomes[0]["message"]
        assert seen["state"] == "stopped" and not seen["stop_file"]
        print(f"{channel}: {seen['seconds']:.1f} s after the request, step {seen['asked_at_step']} -> {step}")
        if channel == "deadline":
            assert seen["saved_before_deadline"] > 0, seen
            assert seen["before_deadline"] > -10, (
                seen
            )  # busy cores: five seconds are kept free for the end of the processes
        else:
            # The step in progress, the one that the request may have missed by a moment, and the save itself.
            assert step <= seen["asked_at_step"] + 2
            assert seen["seconds"] <= save_s + 60, (channel, seen["seconds"])


def test_every_channel_ends_in_a_complete_checkpoint(tmp_path: Path) -> None:
    check_stops(scenarios("stop-1", tmp_path, 400), 1)


@pytest.mark.slow
def test_every_channel_ends_in_a_complete_checkpoint_with_slow_saves(tmp_path: Path) -> None:
    check_stops(scenarios("stop-20", tmp_path, 580), 20)


# ---- one rank's view


@pytest.fixture
def channels(monkeypatch: pytest.MonkeyPatch) -> Any:
    import signal

    monkeypatch.delenv("AIFACTORY_STOP_AT", raising=False)
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)}
    yield StopChannels
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_deadline_leaves_room_for_a_step_and_a_save(channels: Any) -> None:
    stop = channels(time.time() + 100)
    assert stop.look(save_seconds=1.0) == ""
    stop.step_took(10.0)
    assert stop.look(save_seconds=10.0) == ""  # 15 + 24 + 5 < 100
    stop.step_took(60.0)
    assert stop.look(save_seconds=10.0) == "deadline"  # 90 + 24 + 5 > 100
    assert stop.look(save_seconds=0.0) == "deadline"  # once said, it stays


def test_signals_only_set_a_flag_and_the_second_interrupt_interrupts(channels: Any) -> None:
    import signal

    stop = channels(None)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert stop.look(0.0) == "SIGUSR2"
    again = channels(None)
    os.kill(os.getpid(), signal.SIGINT)
    assert again.look(0.0) == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_a_stop_file_of_an_earlier_attempt_does_not_stop_this_one(channels: Any, tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    os.utime(tmp_path / "stop", (time.time() - 60, time.time() - 60))
    stop = channels(None)
    stop.watch_file(tmp_path / "stop", since=time.time() - 30)
    assert stop.look(0.0) == "" and not (tmp_path / "stop").exists()
    (tmp_path / "stop").write_text("user noon\n")
    stop._looked = 0.0
    assert stop.look(0.0) == "stop file" and stop.request == "user noon"


@pytest.mark.parametrize(("ranks", "asked"), [(1, 21), (512, 6)])
def test_the_file_system_of_many_ranks_is_asked_seldom(
    channels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, asked: int
) -> None:
    stop, clock, looks = channels(None), [100.0], []
    stop.watch_file(tmp_path / "stop", ranks=ranks)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Path, "exists", lambda self: bool(looks.append(self.name)))
    for _ in range(101):  # ten seconds of micro-batches
        assert stop.look(0.0) == ""
        clock[0] = round(clock[0] + 0.1, 1)
    assert looks == ["stop"] * asked


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_a_stop_that_is_no_file_is_asked_all_the_same(channels: Any, tmp_path: Path, kind: str) -> None:
    stop, path = channels(None), tmp_path / "stop"
    stop.watch_file(path)
    {"pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "loop": lambda: path.symlink_to("stop")}[kind]()
    assert stop.look(0.0) == "stop file" and stop.request == ""


@pytest.mark.parametrize("since", ["this start", "the launcher"])
def test_a_stop_that_is_asked_while_things_are_loaded_counts(channels: Any, tmp_path: Path, since: str) -> None:
    (tmp_path / "stop").touch()
    stop = channels(None)
    stop.watch_file(tmp_path / "stop", since=time.time() - 30 if since == "this start" else None)
    assert (tmp_path / "stop").exists() and stop.look(0.0) == "stop file"
    assert [p.name for p in tmp_path.iterdir()] == ["stop"]


def test_the_age_of_a_request_is_told_by_the_clock_of_its_file_system(
    channels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server whose clock is five minutes behind: a request of this moment looks older than the process."""
    behind, real = 300.0, Path.stat

    def stat(self: Path, **more: Any) -> Any:
        found = real(self, **more)
        return (
            os.stat_result([*found[:8], int(found.st_mtime - behind), found.st_ctime])
            if self.parent == tmp_path
            else found
        )

    monkeypatch.setattr(Path, "stat", stat)
    (tmp_path / "stop").touch()
    stop = channels(None)
    stop.watch_file(tmp_path / "stop", since=time.time() - 30)
    assert stop.look(0.0) == "stop file"


def test_the_deadline_comes_from_the_flag_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", "300")
    assert deadline_from(None) == 300
    monkeypatch.setenv("AIFACTORY_STOP_AT", "200")
    assert deadline_from(None) == 200
    assert deadline_from(100.0) == 100
    monkeypatch.setenv("AIFACTORY_STOP_AT", "noon")
    with pytest.raises(UserError, match="AIFACTORY_STOP_AT"):
        deadline_from(None)
