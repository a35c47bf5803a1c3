"""``mpirun`` and ``torchrun`` start the same training; a sharded engine reads its rows from the files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers
import pytest

SETTINGS = {
    "train.max_steps": 4,
    "eval.before": False,
    "eval.after": False,
    "export.automatic": False,
    "logging.row_ids": True,
    "parallel.engine": "fsdp2",
    "parallel.threads": 1,
}


def curve(run: Path) -> list[tuple[Any, ...]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"], tuple(r["row_ids"])) for r in records]


@pytest.fixture
def recipe(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return helpers.write_recipe(tmp_path / "recipe", tiny_model_dir, settings=SETTINGS)


@pytest.mark.slow
def test_mpirun_and_torchrun_give_the_same_curve(recipe: Path, tmp_path: Path) -> None:
    mpirun = shutil.which("mpirun") or str(Path(sys.executable).parent / "mpirun")
    if not Path(mpirun).exists():
        pytest.skip("no mpirun here")
    pytest.importorskip("mpi4py")
    command = [mpirun, "-n", "2", "--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    command += [
        sys.executable,
        "-m",
        "aifactory_train",
        "train",
        str(recipe),
        "--run-dir",
        str(tmp_path / "mpi"),
        "--quiet",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=helpers.environment(), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    other = helpers.torchrun(2, "train", recipe, "--run-dir", tmp_path / "torchrun", "--quiet", cwd=tmp_path)
    assert other.returncode == 0, other.stderr[-3000:]
    assert curve(tmp_path / "mpi") == curve(tmp_path / "torchrun")


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_reading_shard_by_shard_gives_the_curve_of_the_loaded_model(recipe: Path, tmp_path: Path, adapter: str) -> None:
    """fsdp2 on two ranks (each reads its rows) against ddp on two ranks (each loads all); tied embeddings."""
    more = ["--set", f"adapter.kind={adapter}", "--quiet"]
    for engine in ("fsdp2", "ddp"):
        args = ["train", recipe, "--run-dir", tmp_path / engine, "--set", f"parallel.engine={engine}", *more]
        done = helpers.torchrun(2, *args, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    for one, other in zip(curve(tmp_path / "fsdp2"), curve(tmp_path / "ddp"), strict=True):
        assert one[0] == other[0] and one[3] == other[3]
        assert abs(one[1] - other[1]) <= 1e-5 * other[1]
        assert abs(one[2] - other[2]) <= 1e-4 * other[2]


def test_leaving_puts_the_environment_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another library in this process must not take a lone run's RANK for a launcher's."""
    from aifactory_train.parallel.world import join_world, leave_world

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    join_world()
    assert os.environ["RANK"] == "0" and os.environ["WORLD_SIZE"] == "1"
    leave_world()
    assert "RANK" not in os.environ and "WORLD_SIZE" not in os.environ and os.environ["LOCAL_RANK"] == "0"
