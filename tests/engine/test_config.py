"""The configuration tree: every fault names its place through the real command line; schema, overrides, round trips."""

from __future__ import annotations

import json
import textwrap

import helpers
import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from aifactory_train.config.loading import RECIPES_DIR, from_tree, json_schema, load_recipe, recipe_ids, to_tree
from aifactory_train.core import yaml_text
from aifactory_train.core.errors import UserError

GOOD = """\
id: test/config
model:
  base: some/model
data:
  train: rows.jsonl
"""

# name: (recipe text, overrides, what the message must hold). Line numbers are those of the text.
BAD = {
    "unknown block": (
        GOOD + "modle:\n  base: x\n",
        [],
        ["recipe.yaml:6", "unknown key 'modle'", "did you mean 'model'"],
    ),
    "unknown key": (
        GOOD.replace("train: rows", "train: rows") + "train:\n  learning_rte: 1.0e-4\n",
        [],
        ["recipe.yaml:7", "unknown key 'train.learning_rte'", "did you mean 'learning_rate'"],
    ),
    "neither of two kinds": (
        GOOD + "train:\n  grad_accum: some\n",
        [],
        ["recipe.yaml:7: train.grad_accum: ", "valid integer", "or Input should be 'auto'", "got 'some'"],
    ),
    "hyphen for underscore": (
        GOOD + "train:\n  learning-rate: 1.0e-4\n",
        [],
        ["recipe.yaml:7", "unknown key 'train.learning-rate'", "did you mean 'learning_rate'"],
    ),
    "number for a key": (GOOD + "train:\n  7: 1\n", [], ["recipe.yaml", "7"]),
    "override of a number": (GOOD, ["0=1"], ["--set 0=1", "unknown key '0'"]),
    "unknown key in a list": (
        "model: {base: m}\ndata:\n  train:\n    - source: a.jsonl\n      wieght: 2\n",
        [],
        ["recipe.yaml:5", "data.train.0.wieght", "did you mean 'weight'"],
    ),
    "word for a number": (GOOD + "train:\n  epochs: many\n", [], ["recipe.yaml:7", "train.epochs", "got 'many'"]),
    "fraction for a count": (GOOD + "train:\n  max_steps: 2.5\n", [], ["recipe.yaml:7", "train.max_steps"]),
    "list for a value": (GOOD + "train:\n  seed: [1, 2]\n", [], ["recipe.yaml:7", "train.seed"]),
    "value for a block": (GOOD + "train: fast\n", [], ["recipe.yaml:6", "train"]),
    "negative rate": (
        GOOD + "train:\n  learning_rate: -1\n",
        [],
        ["recipe.yaml:7", "train.learning_rate", "greater than 0"],
    ),
    "zero rank": (GOOD + "adapter:\n  rank: 0\n", [], ["recipe.yaml:7", "adapter.rank"]),
    "unknown choice": (
        GOOD + "adapter:\n  kind: qlora\n",
        [],
        ["recipe.yaml:7", "adapter.kind", "lora", "got 'qlora'"],
    ),
    "unknown engine": (GOOD + "parallel:\n  engine: fsdp\n", [], ["recipe.yaml:7", "parallel.engine", "fsdp2"]),
    "unknown metric": (GOOD + "eval:\n  metrics: [bleu]\n", [], ["recipe.yaml:7", "eval.metrics.0"]),
    "no model": ("data:\n  train: rows.jsonl\n", [], ["recipe.yaml:1", "'model' is missing"]),
    "no base": ("model: {}\ndata:\n  train: rows.jsonl\n", [], ["recipe.yaml:1", "'model.base' is missing"]),
    "no data": ("model:\n  base: m\n", [], ["recipe.yaml:1", "'data' is missing"]),
    "no rows": (GOOD.replace("train: rows.jsonl", "train: []"), [], ["recipe.yaml:5", "data.train"]),
    "key given twice": (GOOD + "model:\n  base: other\n", [], ["recipe.yaml:6", "'model' is given twice"]),
    "tab in YAML": (GOOD + "train:\n\tepochs: 1\n", [], ["recipe.yaml:7", "not valid YAML"]),
    "open bracket": (GOOD + "eval:\n  metrics: [perplexity\n", [], ["recipe.yaml:", "not valid YAML"]),
    "a list of recipes": ("- model: m\n", [], ["recipe.yaml:1", "a recipe is a mapping"]),
    "an empty file": ("", [], ["recipe.yaml", "a recipe is a mapping"]),
    "a Python object": (GOOD + "about:\n  title: !!python/name:os.system\n", [], ["recipe.yaml:7", "not valid YAML"]),
    "not UTF-8": (GOOD.encode() + b"about:\n  title: caf\xe9\n", [], ["recipe.yaml:7", "not UTF-8"]),
    "bad id": (GOOD.replace("test/config", "Test Config"), [], ["recipe.yaml:1", "id"]),
    "two batch sizes": (GOOD + "train:\n  batch_rows: 8\n  batch_tokens: 4096\n", [], ["recipe.yaml", "batch_"]),
    "document above the micro-batch": (
        GOOD + "  sequence_length: 8192\n",
        [],
        ["recipe.yaml", "train.micro_batch_tokens", "8192"],
    ),
    "4-bit without adapter": (
        GOOD + "adapter:\n  kind: none\n  quantise_base: nf4\n",
        [],
        ["recipe.yaml:8", "adapter.quantise_base"],
    ),
    "patience without evaluation": (
        GOOD + "eval:\n  early_stopping: 2\n",
        [],
        ["recipe.yaml:7", "eval.early_stopping", "eval.every_steps"],
    ),
    "momentum for AdamW": (GOOD + "train:\n  momentum: 0.9\n", [], ["recipe.yaml:7", "train.momentum"]),
    "shard size without hsdp": (
        GOOD + "parallel:\n  engine: ddp\n  shard_size: 4\n",
        [],
        ["recipe.yaml:8", "parallel.shard_size"],
    ),
    "override of an unknown key": (GOOD, ["train.epoch=2"], ["--set train.epoch=2", "did you mean 'epochs'"]),
    "override without a value": (GOOD, ["train.epochs"], ["--set train.epochs", "a.b=c"]),
    "override of a wrong type": (GOOD, ["train.epochs=soon"], ["--set train.epochs=soon", "got 'soon'"]),
    "override below a value": (GOOD, ["model.base.name=x"], ["--set model.base.name=x"]),
    "override beyond a list": (GOOD, ["data.train.3.weight=2"], ["--set data.train.3.weight=2", "list of 1"]),
    "override with an empty name": (GOOD, ["train..epochs=2"], ["--set train..epochs=2"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_fault_is_refused_with_its_place(tmp_path, name):
    text, overrides, words = BAD[name]
    (tmp_path / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    flags = [part for override in overrides for part in ("--set", override)]
    result = helpers.cli("config", "show", "recipe.yaml", *flags, cwd=tmp_path)
    message = helpers.refused(result, *words)
    assert result.stdout == ""
    assert len(message.splitlines()) <= 3  # one message and its fix


def test_there_are_at_least_25_faults():
    assert len(BAD) >= 25


def test_missing_files_folders_and_unknown_recipes(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    helpers.refused(helpers.cli("config", "show", "none.yaml", cwd=tmp_path), "none.yaml", "no such recipe file")
    helpers.refused(helpers.cli("config", "show", "folder.yaml", cwd=tmp_path), "folder.yaml")
    helpers.refused(
        helpers.cli("config", "show", "health/phenotype-term", cwd=tmp_path), "did you mean 'health/phenotype-terms'"
    )
    helpers.refused(helpers.cli("config", "show", "../../etc/passwd", cwd=tmp_path), "unknown recipe")


def test_a_good_recipe_is_shown_resolved_and_reads_back(tmp_path):
    (tmp_path / "recipe.yaml").write_text(GOOD)
    shown = helpers.cli("config", "show", "recipe.yaml", "--set", "train.epochs=3", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    tree = yaml.safe_load(shown.stdout)
    assert tree["train"]["epochs"] == 3 and tree["data"]["train"][0]["source"] == "rows.jsonl"
    again = from_tree(tree, "shown")
    assert to_tree(again) == tree
    line = helpers.cli("config", "show", "recipe.yaml", "--set", "train.epochs=3", "--json", cwd=tmp_path).stdout
    assert line.count("\n") == 1 and json.loads(line) == tree


# ---- schema


def test_the_schema_beside_the_recipes_is_fresh():
    from aifactory_train.commands.config import schema_text

    path = RECIPES_DIR / "recipe.schema.json"
    assert path.read_text(encoding="utf-8") == schema_text(), "run: aifactory config schema --write"


@pytest.mark.parametrize("recipe", recipe_ids())
def test_recipes_follow_the_schema_and_point_to_it(recipe):
    text = (RECIPES_DIR / f"{recipe}.yaml").read_text(encoding="utf-8")
    jsonschema.validate(yaml_text.parse(text, recipe).value, json_schema())
    depth = recipe.count("/")
    assert text.splitlines()[0] == f"# yaml-language-server: $schema={'../' * depth}recipe.schema.json"


def test_the_schema_refuses_what_the_loader_refuses():
    schema = json_schema()
    jsonschema.validate(yaml.safe_load(GOOD), schema)
    for name in ("unknown key", "word for a number", "unknown choice", "no base", "zero rank"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(yaml.safe_load(BAD[name][0]), schema)


def test_schema_command(tmp_path):
    shown = helpers.cli("config", "schema", cwd=tmp_path)
    line = helpers.cli("config", "schema", "--json", cwd=tmp_path)
    assert json.loads(shown.stdout) == json.loads(line.stdout) == json_schema()
    assert line.stdout.count("\n") == 1


# ---- overrides


def load(folder, text, overrides=()):
    path = folder / "recipe.yaml"
    path.write_text(textwrap.dedent(text))
    return load_recipe(str(path), list(overrides))


def test_overrides_reach_every_kind_of_value(tmp_path):
    recipe = load(
        tmp_path,
        GOOD,
        [
            "train.learning_rate=3e-5",
            "train.max_grad_norm=null",
            "adapter.targets=[q_proj, v_proj]",
            "data.train.0.weight=2",
            "data.train.0.licence=CC-BY-4.0",
            "eval.before=false",
            "about.title='a: b # c'",
        ],
    )
    assert recipe.train.learning_rate == 3e-5
    assert recipe.train.max_grad_norm is None
    assert recipe.adapter.targets == ["q_proj", "v_proj"]
    assert (recipe.data.train[0].source, recipe.data.train[0].weight) == ("rows.jsonl", 2)
    assert recipe.data.train[0].licence == "CC-BY-4.0"
    assert recipe.eval.before is False
    assert recipe.about.title == "a: b # c"


def test_own_rows_replace_those_of_the_recipe_with_their_held_out_part(tmp_path):
    text = GOOD + "  eval: held.jsonl\n  eval_fraction: 0.2\n"
    assert load(tmp_path, text).data.eval[0].source == "held.jsonl"
    assert load(tmp_path, text, ["data.train=mine.jsonl"]).data.eval is None
    both = load(tmp_path, text, ["data.train=mine.jsonl", "data.eval=also.jsonl"])
    assert (both.data.train[0].source, both.data.eval[0].source) == ("mine.jsonl", "also.jsonl")


def test_one_source_needs_no_number(tmp_path):
    assert load(tmp_path, GOOD, ["data.train.licence=own"]).data.train[0].licence == "own"
    moved = load(tmp_path, GOOD, ["data.train.source=mine.jsonl", "data.train.licence=own"]).data.train[0]
    assert (moved.source, moved.licence) == ("mine.jsonl", "own")
    two = GOOD.replace("train: rows.jsonl", "train: [rows.jsonl, more.jsonl]")
    with pytest.raises(UserError, match=r"a list of 2\n  fix: .*data\.train\.0"):
        load(tmp_path, two, ["data.train.licence=own"])
    with pytest.raises(UserError, match="a list of 2"):
        load(tmp_path, GOOD, ["data.train=[a.jsonl, b.jsonl]", "data.train.licence=own"])
    replaced = load(tmp_path, two, ["data.train=mine.jsonl", "data.train.licence=own"]).data.train
    assert [(s.source, s.licence) for s in replaced] == [("mine.jsonl", "own")]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("My Orders (2).yaml", "local/my-orders-2"), ("Übung.yaml", "local/ubung"), ("日本.yaml", "local/recipe")],
)
def test_a_file_of_any_name_is_a_recipe(tmp_path, name, wanted):
    (tmp_path / name).write_text(GOOD.replace("id: test/config\n", ""), encoding="utf-8")
    assert load_recipe(str(tmp_path / name)).id == wanted


def test_a_recipe_beside_is_named_with_its_ending(tmp_path, monkeypatch):
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "orders.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"did you mean 'acme/orders\.yaml'"):
        load_recipe("acme/orders")


@pytest.mark.parametrize(
    ("override", "reported"),
    [
        ("train.epochs=.inf", "finite"),
        ("train.learning_rate=.inf", "finite"),
        ("train.betas=[0.9, 1.5]", "less than 1"),
        ("train.betas=[-0.1, 0.9]", "greater than or equal to 0"),
        ("train.seed=-1", "greater than or equal to 0"),
        ("train.seed=99999999999999999999", "less than"),
        ("data.split_seed=-1", "greater than or equal to 0"),
        ("data.train.²=1", "unknown key"),
    ],
)
def test_numbers_that_no_training_could_use_are_refused(tmp_path, override, reported):
    with pytest.raises(UserError, match=reported):
        load(tmp_path, GOOD, [override])


@pytest.mark.parametrize(
    "text",
    [
        "? [a, b]\n: c\n",
        "{[a]: b}\n",
        "a: &a [*a]\n",
        "x: &x {base: y}\nmodel: {<<: *x}\n",
        "x: " + "[" * 2000 + "]" * 2000,
    ],
)
def test_yaml_that_is_no_recipe_is_refused_by_name(tmp_path, text):
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        load(tmp_path, text)


def test_files_named_with_a_dot_lie_beside_the_recipe(tmp_path):
    recipe = load(tmp_path, GOOD.replace("rows.jsonl", "./rows.jsonl"))
    assert recipe.data.train[0].source == str(tmp_path / "rows.jsonl")


def test_a_named_base_brings_its_licence(tmp_path):
    text = """\
    model:
      base: small
      licence: MIT
      options:
        - {base: org/large, parameters: 8B, licence: Apache-2.0, revision: abc}
    data: {train: rows.jsonl}
    """
    assert load(tmp_path, text).model.licence == "MIT"
    large = load(tmp_path, text, ["model.base=org/large"]).model
    assert (large.licence, large.revision) == ("Apache-2.0", "abc")
    assert load(tmp_path, text, ["model.base=org/other"]).model.licence == "unknown"
    assert load(tmp_path, text, ["model.base=org/other", "model.licence=MIT"]).model.licence == "MIT"


keys = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=8)
scalars = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=8)
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3))


@settings(max_examples=150, deadline=None)
@given(
    block=st.sampled_from(["model", "data", "train", "eval", "adapter", "parallel", "export", "about"]),
    key=keys | st.sampled_from(["base", "train", "epochs", "targets", "kind", "metrics"]),
    value=trees,
)
def test_any_value_anywhere_is_taken_or_refused_never_a_crash(tmp_path_factory, block, key, value):
    tree = yaml.safe_load(GOOD)
    tree.setdefault(block, {})[key] = value
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    try:
        recipe = load_recipe(str(path))
    except UserError as error:
        assert str(error)
    else:
        assert to_tree(from_tree(to_tree(recipe), "again")) == to_tree(recipe)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_any_override_is_taken_or_refused_never_a_crash(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        load(folder, GOOD, [text])
    except UserError as error:
        assert "--set" in str(error) or "recipe.yaml" in str(error)


def test_on_and_off_are_words(tiny_recipe) -> None:
    from aifactory_train.config.loading import load_recipe

    for word in ("on", "off", "auto"):
        assert load_recipe(str(tiny_recipe), [f"kernels.enabled={word}"]).kernels.enabled == word
    assert load_recipe(str(tiny_recipe), ["model.trust_remote_code=true"]).model.trust_remote_code is True


@pytest.mark.parametrize(
    ("overrides", "tokens", "reported"),
    [
        (["data.sequence_length=2048"], 2048, "2048 instead of 1024"),  # the recipe's figure suits the recipe's length
        (["train.micro_batch_tokens=auto"], 4096, ""),
        (["train.micro_batch_tokens=auto", "data.sequence_length=32768"], 32768, ""),
        (["train.micro_batch_tokens=16384"], 16384, ""),
    ],
)
def test_a_longer_sequence_makes_room_in_the_micro_batch(tmp_path, capsys, overrides, tokens, reported):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: {base: a/b, licence: MIT}\ndata: {train: {source: c/d, licence: MIT}, sequence_length: 512}\n"
        "train: {micro_batch_tokens: 1024}\n"
    )
    assert load_recipe(str(path), overrides).train.micro_batch_tokens == tokens
    said = capsys.readouterr().err
    assert reported in said if reported else said == ""


def test_a_micro_batch_that_was_asked_for_is_not_changed(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: {base: a/b, licence: MIT}\ndata: {train: {source: c/d, licence: MIT}}\n")
    with pytest.raises(UserError, match="a document would not fit"):
        load_recipe(str(path), ["data.sequence_length=8192", "train.micro_batch_tokens=4096"])
