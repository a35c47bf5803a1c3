"""A run folder with odd contents: resuming it is refused, or what is odd is repaired and named. Never a start from
step 1, and nothing is left out without a word."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import helpers
import pytest

from aifactory_train.config.loading import load_recipe
from aifactory_train.core.errors import UserError
from aifactory_train.record.chain import Chain, read_events
from aifactory_train.run.folder import RunFolder
from aifactory_train.run.opening import open_for_training
from aifactory_train.training import identity
from aifactory_train.training.metrics_log import MetricsLog

INPUTS = {"base": {"config": "c", "files": {}}, "tokenizer": {"file": "f", "content": "t", "template": "x", "ids": [0]}}
INPUTS |= {"data": {"train": {"tokens": "a"}, "eval": {}, "eval_rows": 1}}


def _replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: p.write_bytes(b""),
    "half": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "wrong type": lambda p: p.write_bytes(b"[1, 2]\n"),
    "NUL": lambda p: p.write_bytes(b"\0" * 64 + b"\n"),
    "folder": _replaced(Path.mkdir),
    "pipe": _replaced(os.mkfifo),
    "loop": _replaced(lambda p: p.symlink_to(p.name)),
    "huge number": lambda p: p.write_bytes(b'{"state": "running", "step": ' + b"9" * 5000 + b"}\n"),
    "not UTF-8": lambda p: p.write_bytes(b'{"state": "\xff\xfe"}\n'),
}


@pytest.fixture
def run(tmp_path: Path, tiny_model_dir: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    marker = run.checkpoints / "step-4" / "COMPLETE"
    marker.parent.mkdir(parents=True)
    marker.write_text("{}")
    recipe = load_recipe(str(helpers.write_recipe(tmp_path / "r", tiny_model_dir)))
    run.save_config(recipe)
    run.set_state("stopped", step=4)
    (run.path / "inputs.json").write_text(json.dumps(INPUTS))
    (run.path / "saved.json").write_text('{"step": 4, "time": 1}')
    run.metrics_file.write_text("".join(json.dumps({"kind": "train", "step": s, "loss": 1.0}) + "\n" for s in (1, 4)))
    for kind in ("attempt-started", "evaluated"):
        Chain(run.path / "events.jsonl").append(kind, {"x": 1})
    return run


def resume(run: RunFolder, recipe) -> int | None:
    """What a start does with these files before and while it goes on."""
    step = open_for_training(run, "auto", recipe)
    identity.check(run, recipe, INPUTS)
    log = MetricsLog(run, enabled=True, tensorboard=False)
    log.open(step or 0)
    log.write({"kind": "train", "step": 5, "loss": 1.0})
    run.set_state("running", step=5)
    run.save_config(recipe)
    return step


@pytest.mark.parametrize("how", DAMAGE)
def test_odd_files_of_a_run(run, how, capsys, tmp_path):
    recipe = load_recipe(str(tmp_path / "r" / "recipe.yaml"))
    whole = tmp_path / "whole"
    shutil.copytree(run.path, whole)
    for name in ("inputs.json", "run.yaml", "state.json", "metrics.jsonl", "saved.json"):
        shutil.rmtree(run.path)
        shutil.copytree(whole, run.path)
        assert resume(run, recipe) == 4 and not capsys.readouterr().err
        shutil.rmtree(run.path)
        shutil.copytree(whole, run.path)
        DAMAGE[how](run.path / name)
        try:
            step = resume(run, recipe)
        except UserError as error:
            assert name in str(error), (name, str(error))
            continue
        assert step == 4, name
        said = capsys.readouterr().err
        quiet = how in ("empty", "half") and name == "metrics.jsonl"  # the line that was being written at the end
        assert name in said or quiet or name == "saved.json", name
        assert run.state()["step"] == 5 and run.load_config()  # repaired


def test_a_configuration_that_was_cut_anywhere_is_never_read_as_a_whole_one(run, tmp_path):
    text = run.config_file.read_text()
    whole = run.load_config()
    lines = text.splitlines(keepends=True)
    for kept in range(1, len(lines)):
        run.config_file.write_text("".join(lines[:kept]))
        with pytest.raises(UserError, match=r"cut|not valid YAML"):
            run.load_config()
        with pytest.raises(UserError, match=r"cut|not valid YAML"):
            load_recipe(str(run.config_file))
    run.config_file.write_text(text)
    assert run.load_config() == whole
    # of an earlier version, without the mark
    run.config_file.write_text("".join(lines[1:-1]))
    assert lines[-1] == "...\n" and run.load_config() == whole


def test_lines_of_metrics_that_are_damaged_are_counted_and_the_torn_end_is_not(run, capsys):
    whole = run.metrics_file.read_text()
    run.metrics_file.write_text("\0\0\n" + whole + "[1]\n" + '{"kind": "tr')
    log = MetricsLog(run, enabled=True, tensorboard=False)
    log.open(4)
    assert run.metrics_file.read_text() == whole
    assert "metrics.jsonl:1: 2 lines" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("how", DAMAGE)
def test_an_event_log_that_is_damaged_is_never_written_on_in_silence(run, how):
    path = run.path / "events.jsonl"
    DAMAGE[how](path)
    try:
        Chain(path).append("attempt-started", {"x": 2})
    except (ValueError, KeyError, TypeError, OSError, UserError):
        return  # the recorder says it
    events, faults = read_events(path)
    assert events and (faults or how in ("empty", "half"))
    assert how != "half" or "torn-line-cut" in [event["kind"] for event in events]
