"""The list of recipes as others read it: sectors both ways, sites, examples, speed, and the generated document."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

from aifactory_train.commands import recipes as command
from aifactory_train.config.loading import RECIPES_DIR, load_recipe, recipe_ids
from aifactory_train.core.errors import UserError
from aifactory_train.recipes import own_rows
from aifactory_train.sites import members

ROOT = Path(__file__).resolve().parents[2]
BROUGHT = [n for n in recipe_ids() if (RECIPES_DIR / f"{n}.schema.json").is_file()]


def bench():
    spec = importlib.util.spec_from_file_location("bench_recipes", ROOT / "benchmarks" / "recipes.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_enough_recipes_over_enough_sectors():
    rows = command.listed()
    assert len(rows) >= 18 and len({r["sector"] for r in rows}) >= 15
    assert len({r["sector"] for r in rows if r["embedded"]}) >= 9


def test_every_sector_of_a_factory_or_antenna_has_a_recipe_and_every_recipe_a_reader():
    wanted = {s for m in members() for s in m["sectors"]}
    rows = command.listed()
    assert wanted <= {r["sector"] for r in rows}
    strangers = {r["sector"] for r in rows} - wanted
    assert strangers <= {"code"}, "a sector that no site names: add it to the sites or to this test"
    for row in rows:
        assert bool(row["sites"]) == (row["sector"] in wanted)
        for member in members():
            assert (member["id"] in row["sites"]) == (row["sector"] in member["sectors"])


def test_the_quick_list_equals_the_validated_recipes():
    assert command.listed() == [command.summary(load_recipe(name)) for name in recipe_ids()]


def test_rows_name_task_licences_metric_and_bases():
    for row in command.listed():
        assert row["task"] and row["metric"] and row["licences"]["model"] and row["licences"]["data"]
        assert len(row["bases"]) >= 3 and all(b["licence"] for b in row["bases"])


def test_by_site():
    rows = command.listed()
    hearts = command.chosen(rows, None, "hearts")
    assert {r["sector"] for r in hearts} == {"earth", "data"}
    system = command.chosen(rows, None, "leonardo-booster")
    assert {r["sector"] for r in system} == {"agrifood", "cybersecurity", "earth", "manufacturing"}
    assert command.chosen(rows, "earth", "hearts") == [r for r in rows if r["sector"] == "earth"]
    assert {r["sector"] for r in command.chosen(rows, None, "czai")} == {"education"}
    with pytest.raises(UserError, match="did you mean 'hearts'"):
        command.chosen(rows, None, "heart")


def test_every_site_finds_something():
    rows = command.listed()
    for member in members():
        assert command.chosen(rows, None, member["id"]), member["id"]


def test_listing_costs_little():
    start = time.process_time()  # processor time: other work on the machine does not count
    command.listed()
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("name", BROUGHT)
def test_a_recipe_without_data_ships_converter_schema_and_ten_rows(name, tmp_path):
    recipe = load_recipe(name)
    (source,) = recipe.data.train
    assert source.converter == "own_rows:rows" and source.options == {"schema": name}
    assert source.name == "example-of-the-form", "nobody takes the example for data"
    example = Path(source.source)
    assert example.parent == RECIPES_DIR / name.split("/")[0] and recipe.data.eval is None
    rows = list(own_rows.rows(example, schema=name))
    assert len(rows) == 10 and len({r["group"] for r in rows}) == 10
    assert all(r["prompt"] and r["completion"] and "{" not in r["prompt"] for r in rows)
    assert "no result" in " ".join(recipe.about.notes)


@pytest.mark.parametrize("name", BROUGHT)
def test_the_schema_is_json_schema_and_agrees_with_our_reading_of_it(name):
    jsonschema = pytest.importorskip("jsonschema")
    rules = own_rows.load_schema(name)
    jsonschema.Draft202012Validator.check_schema(rules)
    validator = jsonschema.Draft202012Validator(rules)
    good = [json.loads(line) for line in (RECIPES_DIR / f"{name}.example.jsonl").read_text().splitlines()]
    for row in good:
        validator.validate(row)
        own_rows.check(row, rules, "example")
    for field in rules["required"]:
        bad = {k: v for k, v in good[0].items() if k != field}
        assert list(validator.iter_errors(bad))
        with pytest.raises(UserError):
            own_rows.check(bad, rules, "example")


def test_the_document_is_what_the_results_and_recipes_say():
    script = bench()
    assert (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8") == script.document(script.kept()), (
        "run: python benchmarks/recipes.py --document"
    )


def figures(before, after, metric="bits_per_byte", change=None):
    """eval.json with ``(value, low, high)`` before and after, and the paired change."""

    def one(value, low, high):
        ci = [low, high]
        both = {metric: value, "bits_per_byte": value}
        return {**both, "rows": 9, "answered_rows": 7, "ci": {metric: ci, "bits_per_byte": ci}}

    return {"before": one(*before), "after": one(*after), "change": {metric: change} if change else {}}


def test_improved_means_that_the_change_leaves_out_zero():
    judge = bench().judge
    wide = ((2.0, 1.5, 2.5), (1.8, 1.4, 2.2))
    assert not judge("bits_per_byte", figures(*wide))["improved"], "not paired, and the intervals meet"
    better = {"difference": -0.2, "ci": [-0.3, -0.1], "better": True}
    assert judge("bits_per_byte", figures(*wide, change=better))["improved"]
    for ci, verdict in (([-0.3, 0.1], None), ([0.1, 0.3], False)):
        change = {"difference": 0.1, "ci": ci, "better": verdict}
        assert not judge("bits_per_byte", figures((2.0, 1.9, 2.1), (1.0, 0.9, 1.1), change=change))["improved"]


def test_without_a_pair_the_intervals_must_not_meet():
    judge = bench().judge
    assert judge("bits_per_byte", figures((2.0, 1.9, 2.1), (1.0, 0.9, 1.1)))["improved"]
    assert not judge("bits_per_byte", figures((1.0, 0.9, 1.1), (2.0, 1.9, 2.1)))["improved"]
    assert judge("exact_match", figures((0.1, 0.0, 0.2), (0.9, 0.8, 1.0), "exact_match"))["improved"]


def test_the_metric_of_the_sector_is_judged_and_bits_per_byte_stand_beside_it():
    """No figure of the metric is an error: bits per byte never stand in for it."""
    judge = bench().judge
    held = {"difference": 0.0, "ci": [0.0, 0.0], "better": None}
    found = judge("exact_match", figures((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), "exact_match", held))
    assert found["metric"] == "exact_match" and not found["improved"] and found["rows"] == 7
    assert not found["bits_per_byte"]["improved"], "0 to 0 is no improvement"
    moved = figures((0.3, 0.2, 0.4), (0.3, 0.2, 0.4), "exact_match", held)
    for when, bits in (("before", 3.0), ("after", 1.0)):
        moved[when]["bits_per_byte"] = bits
        moved[when]["ci"]["bits_per_byte"] = [bits - 0.1, bits + 0.1]
    found = judge("exact_match", moved)
    assert not found["improved"] and found["bits_per_byte"]["improved"]
    assert "bits_per_byte" not in judge("bits_per_byte", moved) and judge("bits_per_byte", moved)["rows"] == 9
    for broken in ({}, {"chrf": None}):
        with pytest.raises(ValueError, match="no chrf"):
            judge("chrf", {**moved, "after": {**moved["after"], **broken}})


def test_kept_results_are_of_the_metric_of_their_recipe():
    """The table may not show another figure than the one that the recipe names."""
    for name, result in bench().kept().items():
        assert result["metric"] == load_recipe(name).about.metric, f"{name}: measure it again"
        assert result["seconds"] <= 300 or result["machine"]["note"], f"{name}: too long for an idle machine"
        assert result["before"] is not None and result["ci"]["after"]
        if result["metric"] != "bits_per_byte" and load_recipe(name).methods.head is None:
            assert (
                result["bits_per_byte"]["ci"]["after"] and f"eval.generate_rows={result['rows']}" in result["command"]
            )


def test_at_least_nine_recipes_improve_their_metric_within_five_minutes():
    """What the results say, not what a run of the tests trained: ``python benchmarks/recipes.py`` measures."""
    assert sum(r["improved"] and r["seconds"] <= 300 for r in bench().kept().values()) >= 9


def test_a_result_that_was_not_kept_is_said_to_be_missing(monkeypatch):
    text = bench().document({})
    assert "Not run yet" in text and "`energy/grid-model`" in text
    assert "wait for your data" in text and "`smes/customer-mail`" in text
