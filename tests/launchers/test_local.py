"""Local runs, the pre-flight and following, with the stand-in trainer: no scheduler, no model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import helpers
import pytest
from launcher_bench import FAKE, prepared

from aifactory_train.launchers import backends, follow, runs
from aifactory_train.launchers.here import this_machine
from aifactory_train.launchers.programs import attempt
from aifactory_train.launchers.request import LaunchRequest, Refusal


def local(recipe, run, ranks: int = 2, **more) -> LaunchRequest:
    return LaunchRequest(
        **{
            "recipe": str(recipe),
            "run_dir": str(run),
            "backend": "mpi",
            "nproc": ranks,
            "program": (str(FAKE),),
            "hang_s": 0,
            **more,
        }
    )


@pytest.fixture
def started(tmp_path, plain_recipe, monkeypatch):
    """Runs the generated script with ranks started by a loop instead of mpirun: no torch, no MPI, the same rank
    program.
    """

    def start(run=None, ranks: int = 2, wait: bool = True, **more):
        run = run or tmp_path / "run"
        sub = prepared(local(plain_recipe, run, ranks, **more), this_machine())
        script = run / "submission" / "job.sh"
        text = script.read_text()
        begin, end = text.index("start=("), text.index(")\n", text.index("start=(")) + 2
        loop = run / "submission" / "start-ranks.sh"
        loop.write_text(
            f"#!/bin/bash\npids=()\nfor i in $(seq 0 {ranks - 1}); do\n"
            f'OMPI_COMM_WORLD_RANK=$i OMPI_COMM_WORLD_SIZE={ranks} OMPI_COMM_WORLD_LOCAL_RANK=$i "$@" '
            f"&\npids+=($!)\ndone\n"
            'rc=0\nfor p in "${pids[@]}"; do wait "$p" || rc=1; done\nexit $rc\n'
        )
        loop.chmod(0o755)
        script.write_text(text[:begin] + f"start=({loop})\n" + text[end:])
        backend = backends.get("local")
        if wait:
            return sub.run_dir, backend.run(sub.run_dir)
        runs.remember_jobs(run, [backend.submit(sub.run_dir)])
        return sub.run_dir, None

    return start


def test_exit_codes_and_status(started, tmp_path):
    run, code = started()
    assert code == 0
    found = follow.status_of(run)
    assert found["state"] == "done" and found["attempts"][0]["outcomes"] == {"done": 2} and found["step"] == 6


def test_failure_is_told_with_its_cause(started):
    run, code = started(env=(("FAKE_FAIL", "1:2:raise"),))
    assert code == 1
    cause = follow.status_of(run)["cause"]
    assert cause["rank"] == 1 and cause["kind"] == "exception" and "deliberate failure" in cause["message"]


def test_killed_rank(started):
    run, code = started(env=(("FAKE_FAIL", "0:2:kill"),))
    cause = follow.status_of(run)["cause"]
    assert code == 1 and cause["rank"] == 0 and "SIGKILL" in cause["message"]


def test_stop_command_ends_with_75_and_resume_goes_on(started, cli, tmp_path):
    run, _ = started(wait=False, env=(("FAKE_STEPS", "2000"), ("FAKE_PACE", "0.1")))
    begun(run, "alive-0.json")
    code, out, err = cli("stop", run, "--wait", "120", "--json")
    assert code == 0 and json.loads(out)["state"] == "stopped", err
    found = follow.status_of(run)
    assert found["step"] > 0 and found["cause"]["kind"] == "stopped"
    code, _, err = cli("stop", run)
    assert code == 1 and "nothing to stop" in err
    environment = run / "submission" / "environment"
    environment.write_bytes(
        environment.read_bytes().replace(b"FAKE_STEPS=2000", b"FAKE_STEPS=%d" % (found["step"] + 2))
    )
    code, out, _ = cli("launch", "--resume", run)
    assert code == 0
    again = follow.status_of(run)
    assert (
        again["state"] == "done" and len(again["attempts"]) == 2 and again["attempts"][1]["step_from"] == found["step"]
    )


def test_cancel_is_not_mistaken_for_a_crash(started, cli):
    run, _ = started(wait=False, env=(("FAKE_STEPS", "2000"),))
    begun(run, "alive-0.json")
    code, _, _ = cli("stop", run, "--cancel", "--wait", "120")
    assert code == 0
    found = follow.status_of(run)
    assert found["state"] == "cancelled" and found["cause"]["kind"] == "cancelled"


def test_logs_of_ranks_and_attempts(started, cli):
    run, _ = started()
    code, out, _ = cli("logs", run)
    assert code == 0 and "rank 0/2" in out
    code, out, _ = cli("logs", run, "--rank", "1", "-n", "1")
    assert "rank 1/2" in out
    code, out, _ = cli("logs", run, "--batch")
    assert "attempt 001: done" in out
    code, _, err = cli("logs", run, "--attempt", "9")
    assert code == 2 and "attempts: 1" in err
    code, _, err = cli("logs", run, "--rank", "7")
    assert code == 2 and "0 to 1" in err


def test_logs_follow_until_the_end(started, cli):
    run, _ = started(wait=False, env=(("FAKE_STEPS", "20"), ("FAKE_PACE", "0.1")))
    begun(run, "rank-0.log")
    code, out, _ = cli("logs", "-f", run)
    assert code == 0 and "rank 0/2" in out and follow.status_of(run)["state"] == "done"


def test_a_second_run_in_the_same_folder_is_refused(started, plain_recipe, tmp_path):
    run, _ = started()
    with pytest.raises(Refusal) as caught:
        prepared(local(plain_recipe, run), this_machine())
    assert caught.value.rule == "run-folder-new" and "--resume" in str(caught.value)


def test_unknown_run(cli):
    code, _, err = cli("status", "nothing-here")
    assert code == 2 and "no run" in err


def ignores_sigterm(pid: int) -> bool:
    """Whether a process of this machine has set SIGTERM to be ignored."""
    found = re.search(r"^SigIgn:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    return found is not None and bool(int(found[1], 16) >> (signal.SIGTERM - 1) & 1)


def begun(run: Path, name: str) -> Path:
    """A file of the first attempt, once it is there."""
    path, end = run / "attempts" / "001" / name, time.time() + 120
    while not path.exists():
        assert time.time() < end, f"{path} does not come"
        time.sleep(0.1)
    return path


def test_a_rank_that_ignores_sigterm_is_not_orphaned(started):
    """The rank program kills its trainer before a launcher would kill the rank program alone."""
    run, _ = started(wait=False, ranks=1, env=(("FAKE_FAIL", "0:1:hang"),))
    script = (run / "submission" / "rank.sh").read_text()
    assert "sleep 25; kill -KILL" in script
    trainer = json.loads(begun(run, "alive-0.json").read_text())["pid"]
    place = json.loads((run / "attempts/001/place-0.json").read_text())
    end = time.time() + 60
    while not ignores_sigterm(trainer):  # it hangs from its second step on
        assert time.time() < end
        time.sleep(0.1)
    os.kill(place["pid"], signal.SIGTERM)
    end = time.time() + 120
    while time.time() < end and attempt.read_json(str(run / "attempts/001/exit-0.json")) is None:
        time.sleep(0.2)
    gone = attempt.read_json(str(run / "attempts/001/exit-0.json"))
    assert gone["terminated"] is True and gone["signal"] == 9
    with pytest.raises(ProcessLookupError):
        os.kill(trainer, 0)


def test_preflight_meets_and_measures(tmp_path):
    """Two real ranks over gloo; needs torch."""
    port = helpers.reserved_port()
    program = os.path.join(os.path.dirname(attempt.__file__), "preflight.py")
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                program,
                "--dir",
                str(tmp_path),
                "--nodes",
                "2",
                "--gpus",
                "0",
                "--scratch",
                str(tmp_path),
                "--groups",
                "2",
            ],
            env={
                **os.environ,
                "RANK": str(r),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": str(r),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port.getsockname()[1]),
                "AIFACTORY_NODE": f"n{r}",
            },
        )
        for r in range(2)
    ]
    assert [p.wait(timeout=300) for p in processes] == [0, 0]
    port.close()
    reports = attempt.ranked(str(tmp_path), "preflight")
    assert sorted(reports) == [0, 1]
    for report in reports.values():
        assert report["ok"], report
        assert report["allreduce_gb_s"] > 0 and report["torch"] and report["scratch_mb_s"] > 0
        assert set(report["groups"]) == {"all ranks", "ranks that share a copy"}, "each its own part: nobody to meet"


def test_dry_run_prints_the_script_alone(cli, plain_recipe):
    code, out, err = cli("launch", plain_recipe, "--dry-run", "--nproc", "2")
    assert code in (
        0,
        2,
    )  # the model of this recipe is nowhere: refused by name, or printed where only a site could tell
    if code == 2:
        assert "[model-staged]" in err and out == ""


def test_keyboard_interrupt_asks_for_a_clean_stop(started, monkeypatch):
    """Ctrl-C once: the stop file is written, ranks save, exit code 75."""
    run_holder = {}
    real = backends.get("local")._show
    fired = threading.Event()

    def show(run_dir, before, offset):
        run_holder["run"] = run_dir
        if list(run_dir.glob("attempts/001/alive-*")) and not fired.is_set():
            fired.set()
            raise KeyboardInterrupt
        return real(run_dir, before, offset)

    monkeypatch.setattr(backends.get("local"), "_show", show)
    run, code = started(env=(("FAKE_STEPS", "2000"),))
    assert code == 75 and follow.status_of(run)["state"] == "stopped"
    assert (run / "attempts/001/stop-request.txt").read_text().startswith("interrupted")
    assert not (run / "stop").exists(), "it was answered"
