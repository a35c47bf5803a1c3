"""Text where text is wanted, YAML 1.2 for the rest: the same after --set, in a recipe and after a run.yaml."""

from __future__ import annotations

import os
import time

import pytest
import yaml

from aifactory_train.config.loading import from_tree, load_recipe, read_run_config, to_tree
from aifactory_train.core import yaml_text
from aifactory_train.core.errors import UserError

MINIMAL = "model: {base: some/model}\ndata: {train: rows.jsonl}\n"
ODD = (
    "2024",
    "2024-05-01",
    "my rows #1.jsonl",
    "rows: final.jsonl",
    "010",
    "1e3",
    "no.jsonl",
    "[1].jsonl",
    "0b_",
    "{x}",
)


def load(folder, *overrides, text=MINIMAL):
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return load_recipe(str(folder / "recipe.yaml"), list(overrides))


@pytest.mark.parametrize("name", ODD)
def test_a_path_is_the_text_that_was_given(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("")
    assert load(tmp_path, f"data.train={name}").data.train[0].source == str(tmp_path / name)
    assert load(tmp_path, f"data.train.source={name}").data.train[0].source == str(tmp_path / name)
    os.remove(name)
    if name[0] not in "[{":
        assert load(tmp_path, f"data.train={name}").data.train[0].source == name, "a name of the hub, or a mistake"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.revision=8e25123", "8e25123"),
        ("model.revision=1234567", "1234567"),
        ("model.revision=null", None),
        ("model.revision='null'", "null"),
        ("model.start_from=17", "17"),
        ("train.seed=017", 17),
        ("train.seed=010", 10),
        ("train.seed=0x10", 16),
        ("data.sequence_length=1_024", 1024),
        ("data.labels=[yes,no]", ["yes", "no"]),
        ("data.labels=[1,2]", ["1", "2"]),
        ("data.labels=[01, 02]", ["01", "02"]),
        ("data.labels=[true,false]", ["true", "false"]),
        ("data.labels=01", ["01"]),
        ("data.labels=a, b", ["a, b"]),
        ("data.labels=null", None),
        ("eval.metrics=chrf", ["chrf"]),
        ("eval.metrics=[chrf, rouge_l]", ["chrf", "rouge_l"]),
        ("adapter.targets=all-linear", "all-linear"),
        ("adapter.targets=[q_proj]", ["q_proj"]),
        ("train.learning_rate=1e-3", 1e-3),
        ("train.grad_accum=4", 4),
        ("train.grad_accum=auto", "auto"),
        ("about.title=[draft] a: b # c", "[draft] a: b # c"),
        ("about.title= 2024 ", "2024"),
        ("about.title='one' or 'two'", "'one' or 'two'"),
        ("eval.label_separator= | ", " | "),
        ("data.train.0.facts.collected_from=2024-05", "2024-05"),
        ("data.train.0.columns.question=no", "no"),
        ("data.train.0.columns={question: 1}", {"question": "1"}),
        ("data.train.0.options.year=2024", 2024),
        ("data.train.0.options.day=2024-13-45", "2024-13-45"),
        ("data.train.0.options.word=[a", "[a"),
        ("model.trust_remote_code=yes", True),
    ],
)
def test_every_key_takes_what_it_wants(tmp_path, override, value):
    recipe = load(tmp_path, override)
    node = to_tree(recipe)
    for part in override.partition("=")[0].split("."):
        node = node[int(part) if part.isdigit() else part]
    assert node == value
    (tmp_path / "run.yaml").write_text(yaml_text.dump(to_tree(recipe)), encoding="utf-8")
    assert read_run_config(tmp_path / "run.yaml") == recipe == load_recipe(str(tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    ("override", "reported"),
    [
        ("train.max_steps=1:30", "got '1:30'"),
        ("train.learning_rate=2,5e-4", "got '2,5e-4'"),
        ("train.seed=2024-13-45", "got '2024-13-45'"),
        ("train.seed=0b_", "got '0b_'"),
        ("train.max_steps=true", "got 'true'"),
        ("train.epochs=False", "got 'False'"),
        ("train.epochs=.inf", "finite"),
        ("train.seed=" + "9" * 5000, "(5000 characters) cannot be read as int"),
        ("train.seed=" + "9" * 4000, "9..."),
        ("train.seed=" + "[" * 5000, "nested more than 100 deep"),
        ("data.train=" + "[" * 5000, "nested more than 100 deep"),
        ("data.train.0.options.x=\ud800", "--set"),
        ("data.labels=[yes, no", "not a list"),
        ("data.labels=[a, null]", "in quotes: 'null'"),
        ("data.train=null", "in quotes: 'null'"),
        ("about.title=null", "in quotes: 'null'"),
    ],
)
def test_what_no_key_could_mean_is_refused_in_one_short_message(tmp_path, override, reported):
    with pytest.raises(UserError) as refused:
        load(tmp_path, override)
    assert reported in str(refused.value) and "--set" in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_a_recipe_is_read_by_the_same_rules(tmp_path):
    text = """\
    model: {base: 2024, revision: 8e25123}
    data:
      train: {source: 010, revision: 1e3, columns: {question: no, 1: prompt}, options: {n: 017, on: off}}
      labels: [01, yes, true, 2024-05-01]
    train: {seed: 017, learning_rate: 1e-3}
    kernels: {enabled: off}
    """
    recipe = load(tmp_path, text=text)
    assert (recipe.model.base, recipe.model.revision) == ("2024", "8e25123")
    source = recipe.data.train[0]
    assert (source.source, source.revision, source.columns) == ("010", "1e3", {"question": "no", "1": "prompt"})
    assert source.options == {"n": 17, "on": "off"}
    assert recipe.data.labels == ["01", "yes", "true", "2024-05-01"]
    assert (recipe.train.seed, recipe.train.learning_rate, recipe.kernels.enabled) == (17, 1e-3, "off")


def test_a_tilde_is_the_home_folder_wherever_a_path_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    base = str(tmp_path / "home" / "x")
    for override in ("data.train=~/x", "model.base=~/x", "model.chat_template=~/x", "record.organisation=~/x",
                     "record.sign_with=~/x", "privacy.identity=~/x", "data.eval=[~/x]", "model.start_from=~/x"):  # fmt: skip # noqa: E501
        assert base in yaml_text.dump(to_tree(load(tmp_path, override))), override
    in_file = load(tmp_path, text="model: {base: ~/x}\ndata: {train: [~/x, {source: ~/x}]}\n")
    assert [in_file.model.base, *(s.source for s in in_file.data.train)] == [base] * 3


def test_an_overlay_is_read_by_the_same_rules(tmp_path):
    from aifactory_train import sites

    path = tmp_path / "vega.yaml"
    path.write_text(
        "overlay_for: vega\nuser: {account: 0042, modules: [1.50], env: {A: 010, on: 1e3}, price_per_gpu_hour: 1e0}\n"
    )
    user = sites.load("vega", overlay=path).user
    assert (user.account, user.modules, user.env) == ("0042", ["1.50"], {"A": "010", "on": "1e3"})
    assert user.price_per_gpu_hour == 1.0
    path.write_text("overlay_for: vega\ncorrections:\n  energy.pue: true\n")
    with pytest.raises(UserError, match=r"vega\.yaml:3.*true and false are no value of 'pue'"):
        sites.load("vega", overlay=path)


def test_what_is_written_reads_back_by_both_versions_of_yaml():
    words = [
        "1e3",
        "0o17",
        "017",
        "0x1F",
        "on",
        "no",
        "=",
        "<<",
        "~",
        "",
        "null",
        "2024-01-01",
        "1:30",
        "8e25123",
        ".inf",
        "a: b",
        "#",
    ]
    value = {"words": words, "numbers": [1e-05, 2.5, 10, True, None, float("inf")], "1e3": {"on": 1}}
    assert yaml_text.parse(yaml_text.dump(value), "").value == yaml.safe_load(yaml_text.dump(value)) == value


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join(['*' + a] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
CHAIN = "a: &a0 [x]\n" + "".join(f"k{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000))


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        (LAUGHS, "f.yaml:5: not valid YAML: its aliases unfold to more than"),
        (MERGED, "f.yaml:6: not valid YAML: its aliases unfold to more than"),
        (CHAIN, "f.yaml:100: not valid YAML: nested more than 100 deep"),
        ("a: 1\nb: &b [*b]\n", "f.yaml:2: not valid YAML: a value that holds itself"),
        ("a: " + "[" * 500_000, "f.yaml:1: not valid YAML: nested more than 100 deep"),
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: not valid YAML: key 'a' is given twice (first in line 1)"),
        ("1: x\n'1': y\n", "f.yaml:2: not valid YAML: key '1' is given twice"),
        ("a: 1\nb: \x07\n", "f.yaml:2: not valid YAML: control characters"),
        ("a: 1\nb: !!python/name:os.system x\n", "f.yaml:2: not valid YAML: could not determine a constructor"),
        ("a: 1\nb: !!int x\n", "f.yaml:2: not valid YAML: 'x' (1 characters) cannot be read as int"),
        ("a: 1\n? [b]\n: c\n", "f.yaml:2: not valid YAML: a key is a word"),
    ],
)  # fmt: skip
def test_hostile_yaml_is_refused_by_name_and_at_once(tmp_path, text, reported):
    (tmp_path / "f.yaml").write_text(text)
    begun = time.process_time()
    with pytest.raises(UserError) as refused:
        yaml_text.read(tmp_path / "f.yaml")
    assert reported in str(refused.value)
    assert time.process_time() - begun < 5


def test_honest_aliases_and_long_texts_are_read():
    document = yaml_text.parse("a: &a {x: 017, y: 2}\nb:\n  <<: *a\n  y: 3\nc: [*a, *a]\n", "f")
    assert document.value == {"a": {"x": 17, "y": 2}, "b": {"x": 17, "y": 3}, "c": [{"x": 17, "y": 2}] * 2}
    assert (document.line(("b", "y")), document.line(("b", "x")), document.line(("c", 1, "x"))) == (4, 1, 1)
    assert document.line(("b", "none")) == 2 and document.written(("b", "x")) == "017"
    long = "\n".join(f"- {'x' * 100}" for _ in range(yaml_text.LARGEST // 90))
    assert len(yaml_text.parse(long, "f").value) == yaml_text.LARGEST // 90


@pytest.mark.parametrize(
    ("override", "reported"),
    [
        ("train.lr=1e-4", "unknown key 'train.lr' (did you mean 'learning_rate'?)"),
        ("adapter.lora_r=8", "(did you mean 'rank'?)"),
        ("train.max_seq_length=8", "(did you mean 'data.sequence_length'?)"),
        ("learning_rate=1", "(did you mean 'train.learning_rate'?)"),
        ("train.lerning_rate=1", "(did you mean 'learning_rate'?)"),
        ("data.train.0.wieght=1", "(did you mean 'weight'?)"),
        ("methods.preference={knd: dpo}", "(did you mean 'kind'?)"),
        ("train.qqq=1", "fix: known keys here: average, batch_rows"),
    ],
)
def test_a_key_of_another_name_is_found(tmp_path, override, reported):
    with pytest.raises(UserError) as refused:
        load(tmp_path, override)
    assert reported in str(refused.value)


def test_a_name_of_the_hub_may_be_said_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("hf:openai/gsm8k", "https://huggingface.co/datasets/openai/gsm8k"):
        assert load(tmp_path, f"data.train={text}").data.train[0].source == "openai/gsm8k"
    assert load(tmp_path, "model.base=hf:org/model").model.base == "org/model"
    with pytest.raises(UserError, match=r"hf:squad: is no name of the hub\n  fix: hf:ORG/NAME"):
        load(tmp_path, "data.train=hf:squad")
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
    with pytest.raises(UserError, match="lies in this folder too"):
        load(tmp_path, "data.train=hf:openai/gsm8k")


def test_a_fault_in_a_run_is_named_with_its_line(tmp_path):
    tree = to_tree(load(tmp_path))
    tree["train"]["seed"] = "x"
    (tmp_path / "run.yaml").write_text(yaml_text.dump(tree))
    line = (tmp_path / "run.yaml").read_text().splitlines().index("  seed: x") + 1
    with pytest.raises(UserError, match=rf"run\.yaml:{line}: train\.seed"):
        read_run_config(tmp_path / "run.yaml")
    with pytest.raises(UserError, match=r"train\.seed"):
        from_tree(tree, "here")
