"""A run that an earlier version began, and whose rows are other tokens today: the refusal says what to set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.parallel.changes import check_changes
from aifactory_train.run.folder import RunFolder
from aifactory_train.training import identity
from aifactory_train.training.state import refuse_other_rows

AS_TOKENS, TEMPLATE = "data.control_tokens_in_content=as_tokens", "model.chat_template=FILE"


def begun(tmp_path: Path, model: Path, **data: Any) -> tuple[RunFolder, Recipe, dict[str, Any]]:
    tree = {"model": {"base": str(model), "licence": "own"}, "data": {"train": "a.jsonl", **data}}
    recipe = Recipe.model_validate({**tree, "train": {"batch_rows": 2}})
    inputs = {
        "base": {"config": "c", "files": {}},
        "tokenizer": {"file": "f", "content": "t", "template": "one", "ids": [0]},
        "data": {"train": {"tokens": "before"}, "eval": {}, "eval_rows": 1},
    }
    run = RunFolder(tmp_path)
    run.config_file.write_text("data: {train: a.jsonl}\n")
    (tmp_path / identity.INPUTS).write_text(json.dumps(inputs))
    return run, recipe, json.loads(json.dumps(inputs))


def fix_of(run: RunFolder, recipe: Recipe, now: dict[str, Any]) -> str:
    with pytest.raises(UserError) as refused:
        identity.check(run, recipe, now)
    return str(refused.value.fix)


def test_special_tokens_in_rows(tmp_path, tiny_model_dir):
    run, recipe, now = begun(tmp_path, tiny_model_dir)
    now["data"]["train"]["tokens"] = "now"
    assert AS_TOKENS in fix_of(run, recipe, now) and TEMPLATE not in fix_of(run, recipe, now)
    now["base"]["files"]["x"] = "new"
    now["base"]["config"] = "other"  # where more changed it is no matter of this setting alone, but it may be one too
    assert "put back" in fix_of(run, recipe, now)
    now = begun(tmp_path, tiny_model_dir)[2] | {"data": {**now["data"]}}
    run.config_file.write_text("data: {control_tokens_in_content: as_text}\n")  # this version began it
    assert AS_TOKENS not in fix_of(run, recipe, now)


@pytest.mark.parametrize("folder", [True, False])
def test_named_templates(tmp_path, tiny_model_dir, monkeypatch, folder):
    named = tmp_path / "named"
    named.mkdir()
    if folder:
        (named / "additional_chat_templates").mkdir()
    else:
        content = {"chat_template": [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]}
        (named / "tokenizer_config.json").write_text(json.dumps(content))
    run, recipe, now = begun(tmp_path, tiny_model_dir)
    now["tokenizer"]["template"] = "one and another"
    assert TEMPLATE not in fix_of(run, recipe, now)
    monkeypatch.setattr("aifactory_train.sources.resolve_model", lambda model: named)
    assert TEMPLATE in fix_of(run, recipe, now)


def test_rows_that_the_checkpoint_did_not_count(tmp_path, tiny_model_dir):
    run, recipe, _ = begun(tmp_path, tiny_model_dir)
    with pytest.raises(UserError) as refused:
        refuse_other_rows({"data": "before"}, "now", identity.as_before(run, recipe, {"data.train", "model.base"}))
    assert AS_TOKENS in refused.value.fix and "restore the data" in refused.value.fix


def test_what_the_fix_says_is_allowed():
    for key, value in (("model", {"chat_template": "f.jinja"}), ("data", {"control_tokens_in_content": "as_tokens"})):
        assert check_changes({key: {"x": 0}}, {key: {"x": 0, **value}}, same_rates=True)
    with pytest.raises(UserError):
        check_changes({"data": {"x": 0}}, {"data": {"x": 0, "supervise": "all"}}, same_rates=True)
