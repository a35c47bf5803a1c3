"""A run goes on from what it was begun with, or is refused by name: checkpoints, base model, tokenizer, rows, token
cache.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest

from aifactory_train.cli import main
from aifactory_train.config.loading import cache_dir
from aifactory_train.parallel.storage import same_tensors
from aifactory_train.record.check import verify

SETTINGS: dict[str, Any] = {
    "train.max_steps": 4,
    "checkpoint.every_steps": 1,
    "checkpoint.keep": 9,
    "eval.before": False,
    "eval.after": False,
    "export.automatic": False,
    "record.pack": False,
    "parallel.threads": 1,
}


class Run:
    """A recipe with a model of its own, and its run folder."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]):
        self.folder, self.capfd = folder, capfd
        self.path, self.model = folder / "run", folder / "model"

    def train(self, *more: str) -> tuple[int, str]:
        """Exit code, and what was said."""
        self.capfd.readouterr()
        code = main(["train", str(self.folder / "recipe.yaml"), "--run-dir", str(self.path), "--quiet", *more])
        said = self.capfd.readouterr().err
        assert "Traceback" not in said, said
        return code, said

    def resume(self, *more: str) -> tuple[int, str]:
        return self.train("--resume", "auto", *more)

    def tree(self) -> list[str]:
        return sorted(str(p.relative_to(self.path)) for p in (self.path / "checkpoints").rglob("*"))

    def metrics(self) -> list[tuple[int, float]]:
        lines = map(json.loads, (self.path / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]

    def state(self, state: str, step: int) -> None:
        content = {"state": state, "host": "elsewhere", "pid": 1, "time": 0, "step": step}
        (self.path / "state.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """Four steps at a stretch, each with its checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(tiny_model_dir, folder / "model")
    helpers.write_recipe(folder, folder / "model", settings=SETTINGS)
    assert main(["train", str(folder / "recipe.yaml"), "--run-dir", str(folder / "run"), "--quiet"]) == 0
    return folder


@pytest.fixture
def cut(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """The same run as a kill after step 3 leaves it, somewhere else."""
    folder = tmp_path / "moved"
    shutil.copytree(whole, folder)
    for name in ("recipe.yaml", "run/run.yaml"):
        file = folder / name
        file.write_text(file.read_text().replace(str(whole), str(folder)))
    for step in (1, 2, 3):  # the checkpoints know the configuration, with the model's path in it
        _move(folder / "run" / "checkpoints" / f"step-{step}", whole, folder)
    shutil.rmtree(folder / "run" / "checkpoints" / "step-4")
    run = Run(folder, capfd)
    run.state("running", 3)
    return run


def _move(step: Path, before: Path, now: Path) -> None:
    from aifactory_train.parallel.storage import file_digest, json_bytes, self_digest

    trainer, marker = step / "trainer.json", json.loads((step / "COMPLETE").read_text())
    trainer.write_text(trainer.read_text().replace(str(before), str(now)))
    marker["files"]["trainer.json"] = {"bytes": trainer.stat().st_size, "sha256": file_digest(trainer)}
    marker["sha256"] = self_digest(marker)
    (step / "COMPLETE").write_bytes(json_bytes(marker))


def flip(path: Path, at: float = 0.7) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 0x10
    path.write_bytes(bytes(content))


# ---- checkpoints


def test_a_run_that_is_what_it_was_goes_on_to_the_bit(cut: Run, whole: Path) -> None:
    code, said = cut.resume()
    assert code == 0, said
    assert cut.metrics() == Run(whole, cut.capfd).metrics() and len(cut.metrics()) == 4
    assert not same_tensors(cut.path / "checkpoints/step-4", whole / "run/checkpoints/step-4")
    assert "checked" not in said


def steps_of(run: Run) -> list[Path]:
    return sorted((run.path / "checkpoints").glob("step-*"))


LOST: dict[str, Callable[[Run], Any]] = {
    "all damaged": lambda run: [flip(step / "trainer.json") for step in steps_of(run)],
    "no markers": lambda run: [(step / "COMPLETE").unlink() for step in steps_of(run)],
    "no folder": lambda run: shutil.rmtree(run.path / "checkpoints"),
    "set aside by the first version": lambda run: [s.rename(s.with_name(f"damaged-{s.name}")) for s in steps_of(run)],
}


@pytest.mark.parametrize(("kind", "noted"), [*((kind, True) for kind in LOST), ("no folder", False)])
def test_a_run_that_lost_its_checkpoints_is_refused_every_time(cut: Run, kind: str, noted: bool) -> None:
    LOST[kind](cut)
    if not noted:  # as a run of the first version looks
        (cut.path / "saved.json").unlink()
        (cut.path / "inputs.json").unlink()
    before, metrics = cut.tree(), cut.metrics()
    for _ in range(2):
        code, said = cut.resume()
        assert code == 2, said
        assert "--name" in said and "--resume never" in said and "checkpoints" in said
        assert cut.metrics() == metrics
        assert [f for f in cut.tree() if "step-" in f] == [f for f in before if "step-" in f]
    if kind == "no folder" and noted:  # the way that the message names
        code, said = cut.train("--resume", "never")
        assert code == 0, said
        assert len(cut.metrics()) == 4


def test_a_run_killed_before_its_first_checkpoint_starts_at_step_1_and_says_so(cut: Run) -> None:
    shutil.rmtree(cut.path / "checkpoints")
    (cut.path / "checkpoints" / ".writing-step-1").mkdir(parents=True)
    shutil.rmtree(cut.path / "attempts")
    (cut.path / "saved.json").unlink()
    cut.state("running", 1)  # the first save was being written: with more steps one would have been complete
    file = cut.path / "metrics.jsonl"
    file.write_text(file.read_text().split("\n")[0] + "\n")
    code, said = cut.resume()
    assert code == 0, said
    assert "starts at step 1" in said
    assert [step for step, _ in cut.metrics()] == [1, 2, 3, 4]


def test_the_note_of_a_save_says_which(whole: Path) -> None:
    assert json.loads((whole / "run" / "saved.json").read_text())["step"] == 4


def test_a_damaged_one_is_set_aside_once_an_older_good_one_is_found(cut: Run) -> None:
    flip(cut.path / "checkpoints/step-3/trainer.json")
    code, said = cut.resume()
    assert code == 0 and "going on after step 2" in said, said
    assert (cut.path / "checkpoints/damaged-step-3").is_dir()


def test_a_checkpoint_under_another_steps_name_is_refused_as_damaged(cut: Run) -> None:
    place = cut.path / "checkpoints"
    for before, now in (("step-2", "x"), ("step-3", "step-2"), ("x", "step-3")):
        (place / before).rename(place / now)
    code, said = cut.resume()
    assert code == 0 and "going on after step 1" in said, said
    assert "is the checkpoint of step 2 under another step's name" in said
    assert "is the checkpoint of step 3 under another step's name" in said


# ---- base model, tokenizer, rows


def other_weights(run: Run) -> None:
    flip(run.model / "model.safetensors", 0.9)


def other_weights_of_the_same_time(run: Run) -> None:
    import os

    file = run.model / "model.safetensors"
    stat = file.stat()
    flip(file, 0.9)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def other_config(run: Run) -> None:
    tree = json.loads((run.model / "config.json").read_text())
    tree["rms_norm_eps"] = 1e-3
    (run.model / "config.json").write_text(json.dumps(tree))


def swapped_tokens(run: Run) -> None:
    file = run.model / "tokenizer.json"
    tree = json.loads(file.read_text())
    vocabulary = tree["model"]["vocab"]
    one, other = [t for t, i in vocabulary.items() if i in (20, 30)]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(tree))


def other_template(run: Run) -> None:
    file = run.model / "chat_template.jinja"
    file.write_text(file.read_text().replace("assistant", "Assistant"))


def swapped_answers(run: Run) -> None:
    """Answers of the same lengths change places: the cursor's count stays right."""
    file = run.folder / "train.jsonl"
    file.write_text(file.read_text().replace("red", "RED").replace("green", "red"))


def same_length_rows(run: Run) -> None:
    file = run.folder / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    answers = [row["messages"][1] for row in rows]
    pairs = itertools.combinations(answers, 2)
    one, other = next((a, b) for a, b in pairs if len(a["content"]) == len(b["content"]))
    one["content"], other["content"] = other["content"], one["content"]
    helpers.write_jsonl(file, rows)


def other_held_out(run: Run) -> None:
    file = run.folder / "eval.jsonl"
    file.write_text(file.read_text().replace("What colour", "Which colour"))


CHANGED: dict[str, tuple[Callable[[Run], None], str]] = {
    "weights": (other_weights, "model.safetensors of"),
    "weights, time put back": (other_weights_of_the_same_time, "model.safetensors of"),
    "config": (other_config, "config.json of"),
    "tokenizer": (swapped_tokens, "tokenizer"),
    "template": (other_template, ""),
    "rows": (swapped_answers, "data.train"),
    "two answers": (same_length_rows, "data.train"),
    "held-out rows": (other_held_out, "data.eval"),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_changed_inputs_are_refused_by_name(cut: Run, kind: str) -> None:
    change, word = CHANGED[kind]
    kept = {p: p.read_bytes() for p in cut.folder.iterdir() if p.is_file()}
    kept |= {p: p.read_bytes() for p in cut.model.iterdir() if p.is_file()}
    change(cut)
    record, metrics, tree = (cut.path / "record.json").read_text(), cut.metrics(), cut.tree()
    code, said = cut.resume()
    assert code == 2 and word in said, said
    assert "--run-dir NEW" in said
    assert (cut.path / "record.json").read_text() == record and cut.metrics() == metrics and cut.tree() == tree
    if kind == "weights":
        for path, content in kept.items():
            path.write_bytes(content)
        code, said = cut.resume()  # put back, it goes on
        assert code == 0, said


def test_what_only_looks_changed_is_taken(cut: Run) -> None:
    """Another order of keys, another writer's name, touched files, ids and line ends of rows: nothing that a step
    computes.
    """
    config = json.loads((cut.model / "config.json").read_text())
    config = {"transformers_version": "9.9", **dict(reversed([*config.items()]))} | {"transformers_version": "9.9"}
    (cut.model / "config.json").write_text(json.dumps(config))
    (cut.model / "README.md").write_text("read me")
    (cut.model / "model.safetensors").touch()
    rows = cut.folder / "eval.jsonl"
    rows.write_text(rows.read_text().replace('"id": "row-', '"id": "number-'))
    code, said = cut.resume("--set", "data.eval_rows=7")
    assert code == 0, said


def test_without_the_digests_of_the_first_attempt_it_goes_on_and_says_so(cut: Run) -> None:
    (cut.path / "inputs.json").unlink()
    code, said = cut.resume()
    assert code == 0 and "not checked" in said, said
    assert (cut.path / "inputs.json").is_file()
    (cut.path / "inputs.json").write_text("[]")
    cut.state("stopped", 3)
    shutil.rmtree(cut.path / "checkpoints/step-4")
    code, said = cut.resume()
    assert code == 2 and "inputs.json" in said, said


def test_the_record_keeps_the_inputs_that_the_run_was_begun_with(cut: Run) -> None:
    before = json.loads((cut.path / "record.json").read_text())
    other_weights(cut)
    same_length_rows(cut)
    (cut.path / "inputs.json").unlink()  # the named way to go on unchecked
    code, said = cut.resume()
    assert code == 0, said
    record = json.loads((cut.path / "record.json").read_text())
    assert record["base"]["files"] == before["base"]["files"] and record["data"] == before["data"]
    assert record["data_sets"]["digests"] == before["data_sets"]["digests"]
    changes = record["run"]["input_changes"]
    (changed,) = changes.values()
    assert set(changed) >= {"base", "data", "data_sets"}
    kinds = {(f["where"].split(":")[0], f["kind"]) for f in verify(cut.path, inputs=True)["faults"]}
    assert ("base model", "file-changed") in kinds


def test_a_base_that_all_weights_have_replaced_may_change(tmp_path: Path, tiny_model_dir: Path, capfd) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    helpers.write_recipe(tmp_path, tmp_path / "model", settings={**SETTINGS, "adapter.kind": "none"})
    run = Run(tmp_path, capfd)
    assert run.train()[0] == 0
    losses = run.metrics()
    for later in steps_of(run)[2:]:
        shutil.rmtree(later)
    run.state("running", 2)
    other_weights(run)
    code, said = run.resume()
    assert code == 0 and "all weights come from the checkpoint" in said, said
    assert run.metrics() == losses


# ---- the token cache under a run


@pytest.mark.parametrize("name", ["tokens.bin", "lengths.bin", "store.json"])
def test_a_damaged_cache_is_built_again_before_a_run_goes_on(cut: Run, whole: Path, name: str) -> None:
    for store in (cache_dir() / "prepared").glob("test-tiny-*/store"):  # the run's own is among them
        flip(store / name, 0.5)
    code, said = cut.resume()
    assert code == 0 and name in said and "built again" in said, said
    assert cut.metrics() == Run(whole, cut.capfd).metrics()
