"""What tells that a run had a checkpoint, whatever lies in its folder by now: decided without training."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from aifactory_train.cli import main
from aifactory_train.config.loading import load_recipe
from aifactory_train.core.errors import UserError
from aifactory_train.core.files import foreign
from aifactory_train.parallel.storage import steps_in
from aifactory_train.run.folder import RunFolder
from aifactory_train.run.opening import open_for_training
from aifactory_train.training.metrics_log import MetricsLog


@pytest.fixture
def run(tmp_path: Path, tiny_recipe: Path) -> RunFolder:
    """A run that was killed, without any checkpoint and with the note of what it was begun with."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    recipe = load_recipe(str(tiny_recipe))
    recipe.checkpoint.every_steps = 2
    run.save_config(recipe)
    run.state_file.write_text(json.dumps({"state": "failed", "step": 1}))
    (run.path / "inputs.json").write_text("{}")
    return run


def step(run: RunFolder, name: str) -> None:
    (run.checkpoints / name).mkdir(parents=True)
    (run.checkpoints / name / "COMPLETE").write_text("{}")


def put(path: Path, kind: str) -> None:
    """Something of another kind than a file."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text("x")


def test_a_run_without_any_witness_starts_over(run: RunFolder) -> None:
    assert open_for_training(run, "auto") is None


@pytest.mark.parametrize("kind", ["pipe", "loop", "folder", "file"])
def test_a_note_of_a_save_that_is_no_file_any_more_still_tells(run: RunFolder, kind: str) -> None:
    put(run.path / "saved.json", kind)
    with pytest.raises(UserError, match=r"saved\.json is there, but damaged"):
        open_for_training(run, "auto")


@pytest.mark.parametrize("where", ["state", "metrics"])
def test_steps_beyond_the_second_save_tell_too(run: RunFolder, where: str) -> None:
    if where == "state":
        run.state_file.write_text(json.dumps({"state": "failed", "step": 5}))
    else:
        run.metrics_file.write_text("".join(json.dumps({"step": n, "kind": "train"}) + "\n" for n in range(1, 6)))
    with pytest.raises(UserError, match="5 steps were made, and checkpoints were due every 2"):
        open_for_training(run, "auto")


@pytest.mark.parametrize(
    "record", [{"compute": [1]}, {"compute": None}, {"compute": {"attempts": [1]}}, {"compute": {"attempts": {"1": 3}}}]
)
def test_an_odd_record_is_no_witness(run: RunFolder, record: dict) -> None:
    (run.path / "record.json").write_text(json.dumps(record))
    assert open_for_training(run, "auto") is None


def test_a_later_checkpoint_that_is_gone_is_named(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    step(run, "step-2")
    (run.path / "saved.json").write_text(json.dumps({"step": 4}))
    assert open_for_training(run, "auto") == 2
    assert "the checkpoint of step 4 was complete" in capsys.readouterr().err
    step(run, "left-step-4")  # by --resume 2: somebody wanted it so
    assert open_for_training(run, "auto") == 2
    assert not capsys.readouterr().err


def test_digits_that_are_no_numbers(run: RunFolder) -> None:
    step(run, "step-2")
    step(run, "step-²")
    (run.path / "attempts" / "1²").mkdir(parents=True)
    assert run.complete_checkpoints() == [2] == steps_in(run.checkpoints) and run.attempts() == []
    for text in ("²", "9" * 5000, "2.0", ""):
        with pytest.raises(UserError, match="neither auto, never nor a step"):
            open_for_training(run, text)
    assert open_for_training(run, "2") == 2


def test_a_library_whose_first_line_is_a_title_gives_its_reason() -> None:
    with (
        pytest.raises(UserError, match="cannot be loaded: Validation error: it is 3"),
        foreign("x", "cannot be loaded"),
    ):
        raise ValueError("Validation error:\n    it is 3\nmore")


def test_a_name_that_no_file_can_have_is_one_message(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(tiny_recipe), "--set", "model.base=" + "a" * 5000]) in (1, 2)
    assert 300 < len(capsys.readouterr().err) < 500


@pytest.mark.parametrize("kind", ["file", "pipe", "loop"])
def test_what_is_in_the_way_is_one_message(run: RunFolder, kind: str, tiny_recipe: Path, capsys) -> None:
    put(run.path / "starts", kind)
    assert main(["train", str(tiny_recipe), "--run-dir", str(run.path), "--resume", "auto"]) in (1, 2)
    said = capsys.readouterr().err
    assert str(run.path / "starts") in said and "fix:" in said


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_metrics_log_that_is_no_file_is_not_waited_for(run: RunFolder, kind: str) -> None:
    put(run.metrics_file, kind)
    with pytest.raises(UserError, match="is no regular file"):
        MetricsLog(run, enabled=True, tensorboard=False).open(0)


@pytest.mark.parametrize("manifest", [{"backend": 3}, {"backend": "local", "array": 5}])
def test_an_odd_manifest_of_a_submission_is_one_message(run: RunFolder, manifest: dict, capsys) -> None:
    (run.path / "submission").mkdir()
    (run.path / "submission" / "manifest.json").write_text(json.dumps(manifest))
    assert main(["status", str(run.path)]) == 2
    assert "manifest.json: is damaged" in capsys.readouterr().err
