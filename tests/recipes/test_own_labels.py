"""Rows of one's own in a recipe that classifies: answers outside the recipe's labels are refused with file and line,
and others are one override away."""

from __future__ import annotations

from pathlib import Path

import helpers
import pytest

from aifactory_train.config.loading import load_recipe, recipe_ids
from aifactory_train.core.errors import UserError
from aifactory_train.recipes.cybersecurity import attack, incidents

ALERT = "Somebody sends mails with a login page that looks like ours, number {}"


def own(name: str, model: Path, tmp_path: Path, answers: list[str], *more: str, file: str = "alerts.jsonl"):
    """The preparation of ``name`` with rows of our own."""
    from aifactory_train.data import prepare

    rows = [{"prompt": ALERT.format(i), "completion": answer} for i, answer in enumerate(answers)]
    path = helpers.write_jsonl(tmp_path / file, rows)
    settings = [f"data.train={path}", f"model.base={model}", "data.workers=1", "data.sequence_length=256", *more]
    return prepare(load_recipe(name, settings), cache_dir=tmp_path / "cache")


def test_recipes_that_classify_list_their_labels():
    for name in recipe_ids():
        recipe = load_recipe(name)
        labelled = recipe.about.metric in ("accuracy", "micro_f1", "macro_f1")
        schema = any("schema" in source.options for source in recipe.data.train)
        assert bool(recipe.data.labels) == (labelled and not schema), name
    assert tuple(load_recipe("cybersecurity/attack-tactic").data.labels or ()) == attack.TACTICS
    assert tuple(load_recipe("trustworthy-ai/incident-severity").data.labels or ()) == incidents.LABELS


def test_a_label_outside_the_recipe_is_refused_with_its_line(tiny_model_dir, tmp_path):
    answers = ["initial-access", "initial-access, execution", "execution", "persistance"]
    with pytest.raises(UserError, match=r"the label 'persistance'.*did you mean 'persistence'") as refused:
        own("cybersecurity/attack-tactic", tiny_model_dir, tmp_path, answers)
    assert "alerts.jsonl:4" in str(refused.value) and "data.labels=" in str(refused.value.fix)
    with pytest.raises(UserError, match="the label 'spam'") as refused:
        own("cybersecurity/attack-tactic", tiny_model_dir, tmp_path, ["impact, spam", "impact"])
    assert "alerts.jsonl:1" in str(refused.value)
    with pytest.raises(UserError, match="the label 'severe'"):
        own("trustworthy-ai/incident-severity", tiny_model_dir, tmp_path, ["High", "severe"])


def test_several_labels_pass_and_own_ones_are_one_override_away(tiny_model_dir, tmp_path):
    answers = ["initial-access", "initial-access, execution", "execution", "impact"] * 5
    prepared = own("cybersecurity/attack-tactic", tiny_model_dir, tmp_path, answers)
    assert len(prepared.train) + sum(len(e) for e in prepared.evals.values()) == 20
    prepared = own(
        "cybersecurity/attack-tactic", tiny_model_dir, tmp_path, ["red", "green, red"] * 5, "data.labels=[red, green]"
    )
    assert len(prepared.train)
    # the separator decides as well: nothing prepared with another one is taken from the cache
    with pytest.raises(UserError, match="the label 'green, red'"):
        own(
            "cybersecurity/attack-tactic",
            tiny_model_dir,
            tmp_path,
            ["red", "green, red"] * 5,
            "data.labels=[red, green]",
            "eval.label_separator=null",
        )


def test_any_recipe_takes_a_schema_of_ones_own(tiny_model_dir, tmp_path):
    from aifactory_train.data import prepare

    helpers.write_jsonl(
        tmp_path / "mine.schema.json",
        [
            {
                "properties": {"alert": {"type": "string"}, "team": {"enum": ["red", "green"]}},
                "required": ["alert", "team"],
                "x-prompt": "{alert}",
                "x-completion": "{team}",
            }
        ],
    )
    rows = [{"alert": ALERT.format(i), "team": "red" if i % 2 else "green"} for i in range(20)]
    path = helpers.write_jsonl(tmp_path / "mine.jsonl", rows)
    settings = [
        f"data.train={path}",
        "data.train.converter=own_rows:rows",
        "data.train.options.schema=mine.schema.json",
        f"model.base={tiny_model_dir}",
        "data.workers=1",
        "data.sequence_length=256",
    ]
    for name in ("finance/account-positions", "health/phenotype-terms"):
        prepared = prepare(load_recipe(name, settings), cache_dir=tmp_path / "cache")
        assert len(prepared.train) + sum(len(e) for e in prepared.evals.values()) == 20
    helpers.write_jsonl(path, [*rows, {"alert": ALERT.format(20), "team": "rad"}])
    with pytest.raises(UserError, match="the label 'rad' is not in the schema") as refused:
        prepare(load_recipe("finance/account-positions", settings), cache_dir=tmp_path / "cache")
    assert "mine.jsonl:21" in str(refused.value)
