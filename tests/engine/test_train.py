"""A whole run through the command line: what it leaves behind, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest

from aifactory_train.parallel.storage import steps_in


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    settings = {"logging.row_ids": True, "logging.tensorboard": True}
    recipe = helpers.write_recipe(folder, tiny_model_dir, settings=settings)
    result = helpers.cli("train", recipe, "--name", "done", cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_run_folder_holds_what_tools_rely_on(finished: Path) -> None:
    run = finished / "runs/done"
    for name in (
        "run.yaml",
        "metrics.jsonl",
        "eval.json",
        "tensorboard",
        "checkpoints",
        "export/adapter",
        "attempts/001",
    ):
        assert (run / name).exists(), name
    figures = json.loads((run / "eval.json").read_text())
    assert {"before", "after"} <= set(figures)
    assert all(isinstance(figures[k]["bits_per_byte"], float) for k in ("before", "after"))
    assert json.loads((run / "attempts/001/outcome-0.json").read_text())["status"] == "done"
    steps = [r for r in metrics(run) if r["kind"] == "train"]
    assert [r["step"] for r in steps] == list(range(1, len(steps) + 1))
    assert all(len(r["row_ids"]) == r["rows"] for r in steps)


def test_early_stopping_exports_the_best_checkpoint(tmp_path: Path, tiny_model_dir: Path) -> None:
    # a rate that grows by 0.02 a step: the held-out loss falls first and then rises
    settings = {"adapter.kind": "none", "train.learning_rate": 20.0, "train.warmup_steps": 1000, "train.epochs": 10}
    settings |= {"train.max_steps": 24, "eval.every_steps": 2, "eval.early_stopping": 2, "eval.before": False}
    recipe = helpers.write_recipe(tmp_path, tiny_model_dir, settings=settings)
    result = helpers.cli("train", recipe, "--name", "best", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "stays below 20" in result.stdout and "warmup_steps 1000" in result.stdout
    evaluations = [r for r in metrics(tmp_path / "runs/best") if r["kind"] == "eval"]
    best = min(evaluations, key=lambda r: r["loss"])
    assert (
        evaluations.index(best) == len(evaluations) - 3
    )  # patience 2: two evaluations without a new best, then the end
    after = json.loads((tmp_path / "runs/best/eval.json").read_text())["after"]
    assert after["loss"] == pytest.approx(best["loss"], rel=1e-6)
    assert (tmp_path / "runs/best/export/model/model.safetensors").is_file()


def test_run_yaml_repeats_the_run(finished: Path) -> None:
    result = helpers.cli("train", finished / "runs/done/run.yaml", "--name", "again", cwd=finished)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (
        [r["loss"] for r in metrics(finished / f"runs/{n}") if r["kind"] == "train"] for n in ("done", "again")
    )
    assert first == second


def test_finished_run_is_refused(finished: Path) -> None:
    result = helpers.cli("train", finished / "recipe.yaml", "--name", "done", "--resume", "auto", cwd=finished)
    helpers.refused(result, "finished run", "--name")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume", "sometimes"], ["--resume", "auto"]),
        (["--name", "../elsewhere"], ["--name"]),
        (["--resume", "7"], ["no checkpoint of step 7"]),
    ],
)
def test_wrong_requests_are_refused(arguments: list[str], words: list[str], tiny_recipe: Path, tmp_path: Path) -> None:
    helpers.refused(helpers.cli("train", tiny_recipe, *arguments, cwd=tmp_path), *words)


def test_stranger_folder_is_refused(tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"x")
    helpers.refused(helpers.cli("train", tiny_recipe, "--run-dir", "photos", cwd=tmp_path), "cat.jpg", "--run-dir")
    assert (tmp_path / "photos/cat.jpg").exists()


def test_live_run_is_refused_and_unfinished_run_is_not_touched_unasked(tiny_recipe: Path, tmp_path: Path) -> None:
    import os
    import socket
    import time

    run = tmp_path / "runs/busy"
    run.mkdir(parents=True)
    (run / "run.yaml").write_text(tiny_recipe.read_text())
    state = {"state": "running", "host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), "step": 3}
    (run / "state.json").write_text(json.dumps(state))
    helpers.refused(helpers.cli("train", tiny_recipe, "--name", "busy", cwd=tmp_path), "live", str(os.getpid()))
    (run / "state.json").write_text(json.dumps({**state, "pid": 2**22 - 1}))  # no such process
    helpers.refused(helpers.cli("train", tiny_recipe, "--name", "busy", cwd=tmp_path), "unfinished", "--resume auto")


def test_what_a_run_goes_back_behind_is_set_aside(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from aifactory_train.training.checkpoint import Checkpointer

    for step in (80, 90, 100):
        (tmp_path / f"step-{step}").mkdir()
    checkpoints = Checkpointer.__new__(Checkpointer)
    checkpoints.path, checkpoints.world = tmp_path, SimpleNamespace(is_main=True)  # type: ignore[assignment]
    checkpoints.leave_behind(100)
    assert steps_in(tmp_path) == [100, 90, 80]
    checkpoints.leave_behind(80)
    assert steps_in(tmp_path) == [80]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["left-step-100", "left-step-90", "step-80"]


def test_own_rows_train_with_one_override(tiny_recipe: Path, tmp_path: Path) -> None:
    helpers.write_jsonl(tmp_path / "mine.jsonl", helpers.chat_rows(40, start=900))
    result = helpers.cli("train", tiny_recipe, "--set", "data.train=mine.jsonl", "--run-dir", "here", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    figures = json.loads((tmp_path / "here/eval.json").read_text())
    assert figures["after"]["bits_per_byte"] < figures["before"]["bits_per_byte"]


def test_two_ranks_by_torchrun(tiny_recipe: Path, tmp_path: Path) -> None:
    one = helpers.cli("train", tiny_recipe, "--name", "one", cwd=tmp_path)
    two = helpers.torchrun(2, "train", tiny_recipe, "--name", "two", cwd=tmp_path)
    assert one.returncode == two.returncode == 0, (one.stderr[-2000:], two.stderr[-2000:])
    curves = [[r["loss"] for r in metrics(tmp_path / f"runs/{n}")] for n in ("one", "two")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert "before" in two.stdout and "export/adapter" in two.stdout
    assert "find_unused_parameters" not in two.stderr  # DDP's advice on a flag that is set on purpose


def test_prediction_and_reality_are_both_in_the_run(tiny_recipe: Path, tmp_path: Path) -> None:
    plan = {
        "tokens_per_s_per_gpu": {"low": 1.0, "mid": 10.0, "high": 1e9},
        "memory_gib": {"framework": 0.5, "total": 1.0},
    }
    (tmp_path / "planned").mkdir()
    (tmp_path / "planned/plan.json").write_text(json.dumps(plan))
    result = helpers.cli("train", tiny_recipe, "--run-dir", "planned", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads((tmp_path / "planned/reality.json").read_text())
    speed = found["tokens_per_s_per_gpu"]
    assert speed["inside_interval"] and speed["ratio"] == pytest.approx(speed["measured"] / 10.0, rel=1e-3)
    assert found["peak_gib"]["predicted"] == 0.5 and found["peak_gib"]["measured"] > 0.1
