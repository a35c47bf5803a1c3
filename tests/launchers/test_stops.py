"""Stops at random moments: ten of the real trainer on every change, and forty of it on a real Slurm (``-m "slurm and
slow"``).
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest
from launcher_bench import submitted, wait_for
from test_slurm import wait_until
from test_training import LONG, curve, lab_request

from aifactory_train.launchers import backends, follow, runs
from aifactory_train.launchers.programs import attempt as book


def campaign(folder: Path, *arguments: str) -> dict:
    script = helpers.ROOT / "benchmarks" / "stops.py"
    done = subprocess.run(
        [sys.executable, str(script), "--json", "--keep", str(folder), *arguments],
        env=helpers.environment(),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return json.loads(done.stdout)


def test_ten_stops_at_random_moments(tmp_path: Path) -> None:
    found = campaign(tmp_path, "--local", "10", "--seed", "5", "--beside", "10")["local"]
    assert found["stops"] == 10 and not found["faults"], found
    assert len(found["phases"]) >= 2 and len(found["channels"]) >= 3, found


@pytest.mark.slow
def test_stops_of_every_launcher_and_many_starts_at_once(tmp_path: Path) -> None:
    found = campaign(tmp_path, "--local", "100", "--standins", "60", "--starts", "50")
    assert not any(part["faults"] for part in found.values() if isinstance(part, dict)), found
    assert sum(found["standins"]["backends"].values()) == 60 and len(found["standins"]["backends"]) == 5


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_forty_stops_at_random_moments_on_slurm(cluster, lab_system, tiny_recipe, tmp_path, cli) -> None:
    """Four at a time, from the moment of submission to beyond the start of training; every fourth is resumed and must
    come to its end.
    """
    dice, slurm = random.Random(7), backends.get("slurm")
    faults: list[str] = []
    for first in range(0, 40, 4):
        asked: list[tuple[float, Path]] = []
        for number in range(first, first + 4):
            run = tmp_path / f"run-{number:02d}"
            how = dice.choice(["requeue", "chain"])
            overrides = (*LONG, "train.max_steps=120", "train.epochs=120")
            submitted(
                lab_request(tiny_recipe, run, overrides=overrides, nodes=1, style="srun", resubmit=how), lab_system
            )
            asked.append((time.time() + dice.uniform(0, 40), run))
        for when, run in sorted(asked):
            time.sleep(max(0.0, when - time.time()))
            code, _, err = cli("stop", run, "--wait", "300", "--json")
            if code != 0 and "nothing to stop" not in err:
                faults.append(f"{run.name}: {err}")
        for _, run in asked:
            for job in runs.jobs_of(run):
                wait_until(
                    lambda job=job: slurm.query(job) is None or slurm.query(job).state not in ("pending", "running"),
                    f"{job} does not end",
                )
            found = follow.status_of(run)
            steps = curve(run) if (run / "metrics.jsonl").exists() else []
            if (
                len(runs.jobs_of(run)) != 1
                or len(found["attempts"]) > 1
                or found["state"] not in ("stopped", "done", "cancelled")
            ):
                faults.append(
                    f"{run.name}: {found['state']} {found['cause']}, jobs {runs.jobs_of(run)}, "
                    f"{len(found['attempts'])} attempts"
                )
            if found["attempts"] and book.latest_checkpoint(str(run)) != len(steps):
                faults.append(f"{run.name}: {len(steps)} steps, kept {book.latest_checkpoint(str(run))}")
        run = asked[0][1]
        if follow.status_of(run)["state"] == "stopped":
            code, _, err = cli("launch", "--resume", run, "--json")
            ended = (
                wait_for(run, "done", "failed", seconds=600, attempts=1) if code == 0 else {"state": err, "cause": None}
            )
            if ended["state"] != "done" or len(curve(run)) != 120:
                faults.append(f"{run.name}, resumed: {ended['state']} {ended['cause']}")
    assert not faults, "\n".join(faults)
