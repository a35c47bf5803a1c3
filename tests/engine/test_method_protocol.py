"""A training method is a class and a line in a table: a toy one from the test tree trains, and sees nothing but frozen
contexts.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from aifactory_train.config.loading import load_recipe
from aifactory_train.config.objective import objective
from aifactory_train.config.schema import MethodsConfig
from aifactory_train.config.strict import Strict
from aifactory_train.core.errors import UserError
from aifactory_train.methods import build
from aifactory_train.methods.supervised import Supervised
from aifactory_train.training.start import train


class Focal(Strict):
    gamma: float = 2.0


class MoreMethods(MethodsConfig):
    """A block that objective.py has no words for."""

    focal: Focal | None = None


def test_every_block_is_a_method_or_goes_with_one() -> None:
    """A block that is neither would be accepted and do nothing."""
    assert sorted(MethodsConfig.model_fields) == sorted([*build.METHODS, *MethodsConfig.ADDITIONS])


def test_two_methods_are_refused(make_recipe, monkeypatch) -> None:
    both = make_recipe(settings={"methods.goldfish": {"k": 4}, "methods.neftune": {"alpha": 5}})
    load_recipe(str(both))
    monkeypatch.setattr(MethodsConfig, "ADDITIONS", ())
    with pytest.raises(UserError, match="goldfish and neftune are each a training method"):
        load_recipe(str(both))


def test_the_record_names_a_block_without_words_of_its_own(make_recipe) -> None:
    recipe = load_recipe(str(make_recipe()))
    assert "focal" not in objective(recipe)
    recipe.__dict__["methods"] = MoreMethods(focal=Focal(gamma=3.0))
    assert objective(recipe).endswith("changed by methods.focal (gamma 3.0)")


SEEN: list[tuple[str, int]] = []


class Halved(Supervised):
    """Counts every supervised token twice, so each loss is half of what supervised fine-tuning says."""

    def prepare(self, run, *, resumed):
        SEEN.append(("prepare", int(resumed)))
        with pytest.raises(dataclasses.FrozenInstanceError):
            run.total_steps = 1
        assert not any(type(value).__name__ == "Trainer" for value in vars(run).values())
        return [("toy", "halved", "a test")]

    def before_step(self, step):
        SEEN.append(("step", step.step))

    def units(self, supervised):
        return 2 * supervised

    def figures(self):
        return {"toy": 1.0}

    def state(self):
        return {"seen": len(SEEN)}

    def load(self, state):
        SEEN.append(("load", state["seen"]))


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_toy_method_trains_and_resumes(make_recipe, tmp_path, monkeypatch) -> None:
    SEEN.clear()
    off = ["eval.before=false", "eval.after=false", "export.automatic=false"]
    settings = [*off, "checkpoint.every_steps=2", "train.schedule=constant", "train.warmup_steps=0"]
    recipe = load_recipe(str(make_recipe(settings={"train.max_steps": 4})), settings)
    assert train(recipe, tmp_path / "plain", quiet=True) == 0
    monkeypatch.setattr(build, "METHODS", {"goldfish": f"{__name__}:Halved"})
    with_toy = load_recipe(str(make_recipe(settings={"train.max_steps": 4, "methods.goldfish": {"k": 4}})), settings)
    monkeypatch.setattr(Halved, "view", lambda self, data: data)
    assert train(with_toy, tmp_path / "toy", quiet=True) == 0
    plain, toy = rows(tmp_path / "plain"), rows(tmp_path / "toy")
    assert [r["loss"] for r in toy] == pytest.approx([r["loss"] / 2 for r in plain], rel=1e-3)
    assert all(r["toy"] == 1.0 for r in toy) and [s for k, s in SEEN if k == "step"] == [0, 1, 2, 3]
    assert SEEN[0] == ("prepare", 0)
    seen = len(SEEN)
    SEEN.clear()
    with_toy.train.max_steps = 6
    assert train(with_toy, tmp_path / "toy", resume="auto", quiet=True) == 0
    assert SEEN[:2] == [("load", seen), ("prepare", 1)] and [s for k, s in SEEN if k == "step"] == [4, 5]
