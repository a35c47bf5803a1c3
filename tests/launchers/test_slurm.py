"""The unmodified generated script on a real Slurm of four fake nodes: success, every kind of failure, restarts, arrays.

The stand-in trainer keeps these fast; what needs a model (same curve, same weights) is in test_training.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launcher_bench import fake_request, prepared, submitted, wait_for

from aifactory_train.launchers import backends, follow, runs, stopping
from aifactory_train.launchers.request import Restarts

pytestmark = pytest.mark.slurm
NEVER = Restarts(time=0, node=0, crash=0, preempted=0)
END = ("done", "stopped", "failed", "cancelled")


def release(run: Path, seconds: float = 120) -> None:
    """A requeued job is held for two minutes; the test does not wait for that."""
    end = time.time() + seconds
    while time.time() < end:
        job = runs.jobs_of(run)[-1]
        shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
        if "JobState=PENDING" in shown:
            time.sleep(3)  # started again in the same second, its credential counts as revoked: what the hold is for
            subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], check=True, capture_output=True)
            return
        time.sleep(0.3)
    raise AssertionError("the job did not come back to the queue")


def wait_until(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f"not after {seconds} s: {what}"
        time.sleep(0.2)


def working(run: Path, attempt: int = 1) -> None:
    """Wait until rank 0 of an attempt makes steps."""
    beat = run / "attempts" / f"{attempt:03d}" / "alive-0.json"
    wait_until(beat.exists, f"no heartbeat in {beat}")


def env(**values: object) -> tuple[tuple[str, str], ...]:
    return tuple((k, str(v)) for k, v in values.items())


@pytest.mark.parametrize("style", ["srun", "torchrun"])
def test_success(cluster, lab_system, plain_recipe, tmp_path, style):
    run = tmp_path / "run"
    sub = submitted(
        fake_request(
            plain_recipe, run, style=style, env=env(FAKE_PRINT="MASTER_ADDR,OMP_NUM_THREADS,MINE", MINE="a b'c")
        ),
        lab_system,
    )
    found = wait_for(run, *END, seconds=180)
    assert found["state"] == "done", found
    assert found["cause"] is None and found["attempts"][0]["outcomes"] == {"done": 4}
    assert found["attempts"][0]["nodes"] == ["g1", "g2"] and found["step"] == 6
    assert found["gpu_hours"] > 0
    logs = (run / "attempts" / "001" / "rank-3.log").read_text()
    assert "MASTER_ADDR='127.0.0.1'" in logs and "OMP_NUM_THREADS='1'" in logs and 'MINE="a b\'c"' in logs
    places = [json.loads((run / "attempts" / "001" / f"place-{r}.json").read_text())["node"] for r in range(4)]
    assert places == ["g1", "g1", "g2", "g2"], "ranks follow the order of nodes"
    assert sub.script == (run / "submission" / "job.sh").read_text(), "the script ran unmodified"


FAILURES = [
    ("raise", {"FAKE_FAIL": "2:3:raise"}, "exception", 2, "g2", "ValueError: deliberate failure at step 3"),
    ("kill", {"FAKE_FAIL": "1:2:kill"}, "signal", 1, "g1", "SIGKILL"),
    ("segfault", {"FAKE_FAIL": "3:2:segv"}, "signal", 3, "g2", "SIGSEGV"),
    ("exit", {"FAKE_FAIL": "0:2:exit"}, "exit", 0, "g1", "exit code 9"),
    ("hang", {"FAKE_FAIL": "2:3:hang", "FAKE_TIMEOUT": 4}, "hang", 2, "g2", "hung at step 3"),
]


@pytest.mark.parametrize(("name", "what", "kind", "rank", "node", "text"), FAILURES, ids=[f[0] for f in FAILURES])
def test_failure_names_its_cause(cluster, lab_system, plain_recipe, tmp_path, name, what, kind, rank, node, text):
    """Whatever srun's exit code says, status names rank, node and exception or signal."""
    run = tmp_path / "run"
    submitted(fake_request(plain_recipe, run, restarts=NEVER, env=env(**what)), lab_system)
    found = wait_for(run, *END, seconds=120)
    assert found["state"] == "failed"
    cause = found["cause"]
    assert (cause["kind"], cause["rank"], cause["node"]) == (kind, rank, node), cause
    assert text in cause["message"], cause
    assert found["attempts"][0]["final"]


def test_crash_under_torchrun_names_its_cause(cluster, lab_system, plain_recipe, tmp_path):
    run = tmp_path / "run"
    submitted(
        fake_request(plain_recipe, run, style="torchrun", restarts=NEVER, env=env(FAKE_FAIL="3:2:raise")), lab_system
    )
    found = wait_for(run, *END, seconds=180)
    assert (found["cause"]["kind"], found["cause"]["rank"], found["cause"]["node"]) == ("exception", 3, "g2"), found[
        "cause"
    ]


def test_silent_job_is_ended_by_the_watch(cluster, lab_system, plain_recipe, tmp_path):
    """No step for so long: ended by us, not by the wall-time."""
    run = tmp_path / "run"
    request = fake_request(plain_recipe, run, restarts=NEVER, hang_s=5, env=env(FAKE_FAIL="1:2:hang", FAKE_TIMEOUT=600))
    sub = prepared(request, lab_system)
    script = run / "submission" / "job.sh"
    assert "--hang 5" in script.read_text()
    runs.remember_jobs(run, [backends.get("slurm").submit(sub.run_dir)])
    found = wait_for(run, *END, seconds=150)
    assert found["state"] == "failed" and found["cause"]["kind"] == "hang", found["cause"]
    assert "no rank made a step" in found["cause"]["message"]


def test_killed_rank_is_started_again_by_a_chained_job_and_finishes(cluster, lab_system, plain_recipe, tmp_path):
    run = tmp_path / "run"
    submitted(fake_request(plain_recipe, run, env=env(FAKE_FAIL="1:2:kill", FAKE_ATTEMPT=1)), lab_system)
    found = wait_for(run, "done", "failed", seconds=120, attempts=2)
    assert found["state"] == "done"
    first, second = found["attempts"]
    assert first["cause"]["rank"] == 1 and first["next"] == "chain" and second["job"] != first["job"]


def test_exception_is_not_repeated(cluster, lab_system, plain_recipe, tmp_path):
    run = tmp_path / "run"
    submitted(fake_request(plain_recipe, run, env=env(FAKE_FAIL="0:1:raise")), lab_system)
    found = wait_for(run, "failed", seconds=120)
    slurm, (job,) = backends.get("slurm"), runs.jobs_of(run)
    wait_until(lambda: slurm.query(job).state not in ("pending", "running"), "the job does not end")
    assert runs.jobs_of(run) == [job] and len(follow.status_of(run)["attempts"]) == 1
    assert "would fail again" in found["attempts"][0]["why"]


@pytest.mark.parametrize("how", ["requeue", "chain"])
def test_time_limit_saves_and_goes_on(cluster, lab_system, plain_recipe, tmp_path, how):
    """The deadline stops the ranks; the job goes on by requeue (same id) or by a new job, from the saved step."""
    run = tmp_path / "run"
    request = fake_request(
        plain_recipe,
        run,
        resubmit=how,
        time_s=120,
        grace_s=15,
        env=env(FAKE_STEPS=400, FAKE_PACE=0.25, FAKE_LEAD=108, FAKE_ATTEMPT=1),
    )
    submitted(request, lab_system)
    if how == "requeue":
        wait_for(run, "stopped", "pending", "done", seconds=150, attempts=1)
        release(run)
    found = wait_for(run, "running", "done", seconds=150, attempts=2)
    first, second = found["attempts"][:2]
    assert first["state"] == "stopped" and first["next"] == how
    assert second["step_from"] == first["step_to"] > 0
    assert (second["job"] == first["job"]) is (how == "requeue")
    stopping.stop(run, cancel=True)
    assert wait_for(run, "cancelled", seconds=120)["cause"]["kind"] == "cancelled"


def test_warning_signal_alone_stops_in_time(cluster, lab_system, plain_recipe, tmp_path):
    """A trainer that never looks at the clock: Slurm's warning reaches the batch shell, its stop file all ranks."""
    run = tmp_path / "run"
    request = fake_request(
        plain_recipe,
        run,
        resubmit="none",
        time_s=120,
        grace_s=50,
        env=env(FAKE_STEPS=2000, FAKE_PACE=0.25, FAKE_LEAD=-9999),
    )
    submitted(request, lab_system)
    found = wait_for(run, *END, seconds=150)
    assert found["state"] == "stopped", found
    assert found["step"] > 0 and found["attempts"][0]["outcomes"] == {"stopped": 4}


def test_lost_node(cluster, lab_system, plain_recipe, tmp_path):
    """kill -9 of one node's daemon: the scheduler requeues, status names the node, the next attempt runs elsewhere."""
    run = tmp_path / "run"
    base = Path(cluster["SLURM_CONF"]).parent.parent
    submitted(fake_request(plain_recipe, run, env=env(FAKE_STEPS=400, FAKE_PACE=0.2)), lab_system)
    found = wait_for(run, "running", seconds=120, attempts=1)
    working(run)
    victim = found["attempts"][0]["nodes"][-1]
    os.kill(int((base / "run" / f"slurmd-{victim}.pid").read_text()), signal.SIGKILL)
    try:
        wait_for(run, "failed", "pending", seconds=120)
        status = follow.status_of(run)
        cause = status["cause"] or status["attempts"][0]["cause"]
        assert cause["kind"] == "node-failure" and cause["node"] == victim, status
        release(run)
        again = wait_for(run, "running", seconds=120, attempts=2)
        assert victim not in again["attempts"][1]["nodes"]
        first = again["attempts"][0]
        assert first["cause"]["kind"] == "node-failure" and first["cause"]["node"] == victim, first
        stopping.stop(run, cancel=True)
        wait_for(run, "cancelled", seconds=120)
    finally:
        subprocess.run(["slurmd", "-N", victim], check=True)
        ask = ["sinfo", "-h", "-p", "main", "-n", victim, "-o", "%T"]
        wait_until(
            lambda: subprocess.run(ask, capture_output=True, text=True).stdout.strip() == "idle",
            f"{victim} is not back",
        )


def test_cancel_by_the_scheduler_and_by_us(cluster, lab_system, plain_recipe, tmp_path):
    run = tmp_path / "run"
    submitted(fake_request(plain_recipe, run, env=env(FAKE_STEPS=400)), lab_system)
    wait_for(run, "running", seconds=120, attempts=1)
    subprocess.run(["scancel", runs.jobs_of(run)[0]], check=True)
    found = wait_for(run, "cancelled", seconds=120)
    assert found["cause"]["kind"] == "cancelled", found
    assert json.loads((run / "attempts" / "001" / "scheduler.json").read_text())["state"] == "cancelled"


def test_stop_saves_and_does_not_come_back_until_resumed(cluster, lab_system, plain_recipe, tmp_path, cli):
    run = tmp_path / "run"
    submitted(fake_request(plain_recipe, run, env=env(FAKE_STEPS=400, FAKE_PACE=0.2)), lab_system)
    wait_for(run, "running", seconds=120, attempts=1)
    working(run)
    code, out, _ = cli("stop", run, "--wait", "120", "--json")
    assert code == 0 and json.loads(out)["state"] == "stopped"
    found = follow.status_of(run)
    assert found["attempts"][0]["final"] and found["step"] > 0
    environment = run / "submission" / "environment"
    environment.write_bytes(environment.read_bytes().replace(b"FAKE_STEPS=400", b"FAKE_STEPS=%d" % (found["step"] + 4)))
    code, out, err = cli("launch", "--resume", run, "--json")
    assert code == 0, err
    found = wait_for(run, "done", seconds=120, attempts=2)
    assert found["attempts"][1]["step_from"] == found["attempts"][0]["step_to"]
    code, out, _ = cli("status", run, "--json")
    shown = json.loads(out)
    assert shown["state"] == "done" and set(shown) >= {"state", "attempts", "cause"}
    code, out, _ = cli("logs", run)
    assert "rank 0/4" in out
    code, _, err = cli("launch", "--resume", run)
    assert code == 2 and "finished" in err


def test_array_runs_each_setting(cluster, lab_system, plain_recipe, tmp_path):
    run = tmp_path / "sweep"
    request = fake_request(
        plain_recipe, run, nodes=1, gpus_per_node=1, array=(("train.seed", ("1", "2", "3")),), env=env(FAKE_FAIL="")
    )
    submitted(request, lab_system)
    found = wait_for(run, "done", "failed", seconds=150)
    assert found["state"] == "done" and len(found["tasks"]) == 3
    for i in range(3):
        text = (run / f"{i:03d}" / "submission" / "recipe.yaml").read_text()
        assert f"seed: {i + 1}" in text
        assert (run / f"{i:03d}" / "checkpoints" / "step-6" / "COMPLETE").exists()


def test_links_queued_at_once_stop_when_the_run_is_done(cluster, lab_system, plain_recipe, tmp_path):
    run = tmp_path / "run"
    sub = prepared(fake_request(plain_recipe, run, chain=1), lab_system)
    slurm = backends.get("slurm")
    runs.remember_jobs(run, [slurm.submit(sub.run_dir), slurm.submit(sub.run_dir)])
    wait_for(run, "done", seconds=120)
    second = runs.jobs_of(run)[1]
    wait_until(lambda: slurm.query(second).state not in ("pending", "running"), "the second link does not end")
    assert slurm.query(second).state == "done"
    assert len(follow.status_of(run)["attempts"]) == 1


def test_inherited_variables_do_not_change_the_job(cluster, lab_system, plain_recipe, tmp_path, monkeypatch):
    for name, value in {
        "SBATCH_PARTITION": "dev",
        "SBATCH_TIMELIMIT": "1",
        "SLURM_CPU_BIND": "verbose,mask_cpu:0x1",
        "SLURM_EXPORT_ENV": "NONE",
        "SLURM_WAIT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    submitted(
        fake_request(plain_recipe, run, nodes=1, env=env(FAKE_PRINT="SLURM_CPU_BIND,SLURM_WAIT,SLURM_JOB_PARTITION")),
        lab_system,
    )
    assert wait_for(run, *END, seconds=120)["state"] == "done"
    text = (run / "attempts" / "001" / "rank-0.log").read_text()
    assert "SLURM_JOB_PARTITION='main'" in text and "mask_cpu:0x1" not in text


def test_wrong_directive_is_refused_by_the_real_scheduler(cluster, lab_system, plain_recipe, tmp_path):
    from aifactory_train.core.errors import RunFailed

    sub = prepared(fake_request(plain_recipe, tmp_path / "run", partition="dev", nodes=3), lab_system)
    with pytest.raises(RunFailed, match="sbatch refused"):
        backends.get("slurm").submit(sub.run_dir)


def test_the_command_line_from_launch_to_status(cluster, plain_recipe, tmp_path, cli, make_recipe):
    """``aifactory launch --site`` with all checks, on a site where everything can be looked at."""
    from launcher_bench import LAB

    recipe = make_recipe(settings={"train.max_steps": 2, "train.batch_rows": 4})
    run = tmp_path / "by-hand"
    common = [
        recipe,
        "--site",
        LAB,
        "--run-dir",
        run,
        "--nodes",
        "2",
        "--gpus-per-node",
        "1",
        "--time",
        "00:10:00",
        "--preflight",
        "off",
    ]
    code, out, err = cli("launch", *common, "--test-only")
    assert code == 0 and "accepts" in err, err
    run2 = tmp_path / "by-hand-2"
    common[4] = run2
    code, out, err = cli("launch", *common, "--json")
    assert code == 0, err
    reported = json.loads(out)
    assert reported["jobs"] and reported["ranks"] == 2 and not [f for f in reported["findings"] if f["level"] != "warn"]
    found = wait_for(run2, *END, seconds=240)
    assert found["state"] == "done", found
    code, out, _ = cli("status", run2)
    assert "done" in out and "GPU-hours" in out
