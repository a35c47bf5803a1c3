"""Recipes, --set values and overlays made from the schema itself: what is given is found in what was loaded, or refused
with its place.

The default suite makes a few hundred; ``AIFACTORY_FUZZ=1`` several thousand. The generator writes each value in one of
the forms that people write (quoted or not, flow or block, numbers as numbers and as text) and knows what it means; it
does not use the reader's code.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from aifactory_train import sites
from aifactory_train.config import loading, wanted
from aifactory_train.config.data_blocks import DataSource
from aifactory_train.config.loading import load_recipe, read_run_config, to_tree
from aifactory_train.config.schema import Recipe
from aifactory_train.core import yaml_text
from aifactory_train.core.errors import UserError
from aifactory_train.sites.profiles import dig
from aifactory_train.sites.schema import UserValues

LONG = bool(os.environ.get("AIFACTORY_FUZZ"))
#: Seconds of processor time for one recipe; a hang is a fault.
PATIENCE = 3.0
#: Loaded, refused: for the figures of the long run.
SEEN: dict[str, int] = {}

WORDS = (
    "rows",
    "2024",
    "2024-05-01",
    "2024-13-45",
    "010",
    "017",
    "1e3",
    "8e25123",
    "0x1F",
    "0b_",
    "1_000",
    "yes",
    "no",
    "on",
    "off",
    "true",
    "False",
    "null",
    "~",
    "NULL",
    ".inf",
    "1:30",
    "a b",
    "a: b",
    "my rows #1.jsonl",
    "#x",
    "- x",
    "[x]",
    "[x",
    "{x}",
    "'q'",
    'say "x"',
    "größe",
    "東京",
    "x,y",
    "*a",
    "&a",
    "!x",
    "%x",
    "@x",
    "`x`",
    "|",
    ">",
    "?",
    "=",
    "<<",
    "a\\b",
    "C:\\x",
    "e\u0301",
    "😀",
    "a'b",
    "--",
    "...",
    "---",
)
PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./+-]*( [A-Za-z0-9_./+-]+)*")
NULLS = ("null", "Null", "NULL", "~", "")
#: Keys under rules that tie several together: left out where a recipe must load.
TIED = re.compile(
    r"parallel\.dims|train\.(batch_|grad_accum|micro|momentum|weight_decay|optimizer)|data\.(sequence|eval$|train$)|adapter\.(quantise|kind)|methods|"
    r"eval\.(early|best|every)|parallel\.(shard|engine)|model\.(vocabulary|start_from|rope_scaling)|\.format$|\.share$|id$|split_by|export.merge"
)
PATHS = ("model.base", "model.chat_template", "record.organisation", "record.sign_with", "privacy.identity")


@dataclass
class Value:
    """One value: what it means, how it stands in a YAML file, and what follows ``--set KEY=``."""

    means: Any
    text: str
    raw: str


# ---- the grammar


def quoted(text: str, style: str) -> str:
    if style == "plain" and PLAIN.fullmatch(text) and text not in NULLS:
        return text
    return "'" + text.replace("'", "''") + "'" if style == "single" else json.dumps(text, ensure_ascii=False)


def text_values(words: tuple[str, ...] = WORDS) -> st.SearchStrategy[Value]:
    def made(text: str, style: str) -> Value:
        odd = text in NULLS or text[0] in "'\"" or text != text.strip()
        return Value(text, quoted(text, style), quoted(text, "single") if odd else text)

    return st.builds(made, st.sampled_from(words), st.sampled_from(["plain", "single", "double"]))


def number_values(annotation: type, limits: list[Any]) -> st.SearchStrategy[Value]:
    low = next((getattr(m, n) for m in limits for n in ("ge", "gt") if getattr(m, n, None) is not None), None)
    high = next((getattr(m, n) for m in limits for n in ("le", "lt") if getattr(m, n, None) is not None), None)
    if annotation is int:
        first = 8 if low is None else int(low)
        numbers = st.integers(first, min(first + 5000, int(high) - 1 if high else first + 5000))
        forms = ["{0}", "+{0}", "00{0}", "{0:#x}", "'{0}'", "{0}.0"]
        return st.builds(lambda n, form: Value(n, form.format(n), form.format(n)), numbers, st.sampled_from(forms))
    first = 0.0 if low is None else float(low)
    width = 1.0 if high is None else min(float(high), first + 1.0) - first
    floats = st.sampled_from([first + width * share for share in (0.25, 0.5, 0.001)])
    forms = ["{0!r}", "{0:.17e}", "'{0!r}'"]
    return st.builds(lambda n, form: Value(n, form.format(n), form.format(n)), floats, st.sampled_from(forms))


def bool_values() -> st.SearchStrategy[Value]:
    forms = [(True, w) for w in ("true", "True", "TRUE", "yes", "on")] + [(False, w) for w in ("false", "no", "off")]
    return st.sampled_from(forms).map(lambda pair: Value(pair[0], pair[1], pair[1]))


def null_values() -> st.SearchStrategy[Value]:
    return st.sampled_from(["null", "~", "Null"]).map(lambda word: Value(None, word, word))


def list_values(items: st.SearchStrategy[Value], least: int = 0, most: int = 3) -> st.SearchStrategy[Value]:
    def made(values: list[Value]) -> Value:
        text = f"[{', '.join(v.text for v in values)}]"
        return Value([v.means for v in values], text, text)

    return st.lists(items, min_size=least, max_size=most).map(made)


def map_values(values: st.SearchStrategy[Value]) -> st.SearchStrategy[Value]:
    def made(pairs: dict[str, Value]) -> Value:
        text = "{" + ", ".join(f"{k}: {v.text}" for k, v in pairs.items()) + "}"
        return Value({k: v.means for k, v in pairs.items()}, text, text)

    return st.dictionaries(st.sampled_from(["question", "1", "yes", "on", "2024"]), values, max_size=2).map(made)


def any_values() -> st.SearchStrategy[Value]:
    """A converter's option: by the core schema alone."""
    plain = [
        (17, "017"),
        (10, "010"),
        (1000.0, "1e3"),
        (True, "true"),
        ("yes", "yes"),
        ("2024-05-01", "2024-05-01"),
        ("1:30", "'1:30'"),
    ]
    return st.sampled_from(plain).map(lambda pair: Value(pair[0], pair[1], pair[1]))


def values_of(annotation: Any, limits: list[Any]) -> st.SearchStrategy[Value]:
    """Values that one field takes."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values_of(inner[0], [*limits, *inner[1:]])
    if origin in (Union, UnionType):
        return st.one_of([null_values() if a is type(None) else values_of(a, limits) for a in inner])
    if origin is Literal:
        return text_values(tuple(inner))
    if annotation is str:
        return text_values()
    if annotation is bool:
        return bool_values()
    if annotation in (int, float):
        return number_values(annotation, limits)
    if annotation is Any:
        return any_values()
    if origin is dict:
        return map_values(values_of(inner[1], []))
    if origin is tuple:
        return list_values(values_of(inner[0], []), 2, 2)
    if origin is list:
        least = next((m.min_length for m in limits if getattr(m, "min_length", None)), 0)
        return list_values(values_of(inner[0], []), least)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return st.deferred(lambda: block_value(annotation))
    raise AssertionError(f"the grammar does not know {annotation}")


@st.composite
def block_value(draw: Any, model: type[BaseModel]) -> Value:
    """A block in flow style: all keys that are needed and some others."""
    given_keys = [k for k, f in model.model_fields.items() if f.is_required()] + draw(some(*model.model_fields))
    values = {k: draw(field_values(model, k)) for k in dict.fromkeys(given_keys)}
    text = "{" + ", ".join(f"{k}: {v.text}" for k, v in values.items()) + "}"
    return Value({k: v.means for k, v in values.items()}, text, text)


@functools.cache
def field_values(model: type[BaseModel], name: str) -> st.SearchStrategy[Value]:
    info = model.model_fields[name]
    return values_of(info.annotation, list(info.metadata))


@functools.cache
def some(*names: str) -> st.SearchStrategy[list[str]]:
    """A few of the names."""
    return st.lists(st.sampled_from(names), unique=True, max_size=5)


@dataclass
class Case:
    """A recipe's text, ``--set`` values, and what must be found: dotted key to meaning. ``sure``: it has to load."""

    text: str
    overrides: list[str]
    found: dict[str, Any]
    sure: bool
    home: Path = field(default_factory=Path.home)


@st.composite
def cases(draw: Any, sure: bool = False) -> Case:
    """``model.base`` and ``data.train``, and some keys of some blocks, in the file or by ``--set``."""
    lines, overrides, found = [], [], {}
    blocks = draw(some(*(name for name in Recipe.model_fields if name != "id")))
    for block in dict.fromkeys(["model", "data", *blocks]):
        model = Recipe.model_fields[block].annotation
        assert isinstance(model, type) and issubclass(model, BaseModel)
        lines.append(f"{block}:" + draw(st.sampled_from(["", "   # why"])))
        indent = draw(st.sampled_from([1, 2, 4]))
        before = len(lines)
        if block == "model":
            lines.append(" " * indent + "base: org/model")
        if block == "data":
            lines.append(" " * indent + f"train: {draw(sources(found))}")
        for name in draw(some(*model.model_fields)):
            key = f"{block}.{name}"
            if key in ("model.base", "data.train") or (sure and TIED.search(key)):
                continue
            value = draw(field_values(model, name))
            if sure and value.means in ("null",) and key in PATHS:
                continue
            where = draw(st.integers(0, 3))
            if where < 3:
                lines += written(" " * indent, name, value, draw(st.booleans()))
            if where in (2, 3):  # 2: in both, and --set wins
                value = draw(field_values(model, name)) if where == 2 else value
                overrides.append(f"{key}={value.raw}")
            found[key] = value.means
        if len(lines) == before:
            lines[-1] = lines[-1].replace(":", ": {}", 1)
    if not sure:
        damage(draw, lines, overrides)
    return Case("\n".join(lines) + "\n", overrides, found, sure)


def written(indent: str, name: str, value: Value, block: bool) -> list[str]:
    """One key as lines: flow style, or a list in block style."""
    if (
        block
        and isinstance(value.means, list)
        and value.means
        and value.text.startswith("[")
        and all(isinstance(m, str) for m in value.means)
    ):
        return [f"{indent}{name}:", *(f"{indent}- {quoted(m, 'double')}" for m in value.means)]
    return [f"{indent}{name}: {value.text}"]


@st.composite
def sources(draw: Any, found: dict[str, Any]) -> str:
    """``data.train`` as text, block or list."""
    kind = draw(st.sampled_from(["text", "block", "list"]))
    made = []
    for i in range(1 if kind != "list" else draw(st.integers(1, 2))):
        name = draw(text_values(("rows", "2024", "017", "1e3", "yes", "größe", "x,y", "a: b", "org/rows", "0x1F")))
        more = {}
        for key in draw(some(*DataSource.model_fields)) if kind != "text" else ():
            if key not in ("source", "share", "format", "facts"):
                more[key] = draw(field_values(DataSource, key))
                found[f"data.train.{i}.{key}"] = more[key].means
        found[f"data.train.{i}.source"] = name.means
        bare = kind == "text" or (kind == "list" and not more)
        pairs = ", ".join(f"{k}: {v.text}" for k, v in {"source": name, **more}.items())
        made.append(name.text if bare else "{" + pairs + "}")
    return f"[{', '.join(made)}]" if kind == "list" else made[0]


DAMAGE = (
    "",
    "\t",
    "  ",
    "&a [*a]",
    "*b",
    "[",
    "]",
    "{",
    "}",
    ":",
    ": ",
    "#",
    "- ",
    "'",
    '"',
    "!!int ",
    "!x ",
    "<<: ",
    "? ",
    "|",
    "%",
    "\x07",
    "\u2028",
    "\ufeff",
    "9" * 5000,
    "[" * 300,
    "model:",
    "data: {}",
    "lr: 1",
    "null",
    "1:30",
    "~",
    "---",
    "...",
)


def damage(draw: Any, lines: list[str], overrides: list[str]) -> None:
    """Some recipes are broken on purpose: pieces put in, keys misspelt, lines twice or gone; --set of nonsense."""
    for _ in range(draw(st.integers(0, 2))):
        i = draw(st.integers(0, len(lines) - 1))
        how = draw(st.sampled_from(["insert", "double", "gone", "spell", "set"]))
        at = draw(st.integers(0, len(lines[i])))
        piece = draw(st.sampled_from(DAMAGE))
        if how == "insert":
            lines[i] = lines[i][:at] + piece + lines[i][at:]
        elif how == "double":
            lines.insert(i, lines[i])
        elif how == "gone" and len(lines) > 1:
            del lines[i]
        elif how == "spell":
            lines[i] = lines[i].replace("e", "", 1)
        else:
            key = draw(
                st.sampled_from(
                    [
                        "train.lr",
                        "data.train.9.x",
                        "model",
                        "data.train",
                        "eval.metrics",
                        "train.seed",
                        "",
                        "a.b",
                        "about.title",
                    ]
                )
            )
            overrides.append(f"{key}={piece}")


# ---- the oracle


def count(what: str) -> None:
    SEEN[what] = SEEN.get(what, 0) + 1


def at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[int(part) if isinstance(tree, list) else part]
    return tree


def agrees(found: Any, means: Any) -> bool:
    """Whether what was loaded is what was given; blocks may have more keys (their defaults)."""
    if isinstance(means, dict) and isinstance(found, dict):
        return all(k in found and agrees(found[k], v) for k, v in means.items())
    if isinstance(means, list) and isinstance(found, list):
        return len(means) == len(found) and all(map(agrees, found, means))
    if isinstance(means, str) and isinstance(found, dict):  # a source that was written as its text
        return found.get("source") == means
    if isinstance(means, str) and means.startswith("~") and isinstance(found, str):
        return found in (means, os.path.expanduser(means))
    if isinstance(means, bool) or means is None or isinstance(means, str):
        return found is means or found == means
    return not isinstance(found, bool) and found == pytest.approx(means, rel=1e-12)


def check(case: Case) -> None:
    """Loaded with exactly what was given, or refused with its place; never a traceback, never a hang; a run.yaml says
    the same again.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(case.text, encoding="utf-8")
        begun = time.process_time()
        try:
            recipe = load_recipe(str(path), case.overrides)
        except UserError as error:
            reported = str(error)
            assert not case.sure, f"refused: {reported}\n{case}"
            assert re.search(r"recipe\.yaml:\d+|recipe\.yaml: not UTF-8|--set ", str(error.where)), (
                f"no place: {reported}"
            )
            assert len(error.what) > 8 and len(reported) < 2500, f"not one message: {reported}"
            count("refused")
            return
        finally:
            assert time.process_time() - begun < PATIENCE, "too slow"
        count("loaded, all keys found" if case.sure else "loaded")
        tree = to_tree(recipe)
        if case.sure:
            for key, means in case.found.items():
                assert agrees(at(tree, key), means), (
                    f"{key}: {means!r} was given, {at(tree, key)!r} was taken\n{case.text}\n{case.overrides}"
                )
        run = Path(folder) / "run.yaml"
        run.write_text(loading.yaml_text.dump(tree), encoding="utf-8")
        assert read_run_config(run) == recipe, "a run.yaml reads back as another recipe"
        assert yaml.load(run.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) == tree, (
            "YAML 1.1 reads another run.yaml"
        )


@st.composite
def overlays(draw: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """An overlay's text, the user's values and the corrections in it."""
    user = draw(block_value(UserValues))
    facts = draw(
        st.dictionaries(
            st.sampled_from(
                [
                    "node.gpus",
                    "node.memory_gib",
                    "energy.pue",
                    "access.account",
                    "partitions.gpu.max_nodes",
                    "node",
                    "x.y",
                    "gpu.sku",
                ]
            ),
            st.one_of(number_values(int, []), text_values(), any_values()),
            max_size=2,
        )
    )
    lines = [
        "overlay_for: vega",
        f"user: {user.text}",
        "corrections: {" + ", ".join(f"{k}: {v.text}" for k, v in facts.items()) + "}",
    ]
    for _ in range(draw(st.integers(0, 1))):
        i, piece = draw(st.integers(0, 2)), draw(st.sampled_from(DAMAGE))
        cut = draw(st.integers(0, len(lines[i])))
        lines[i] = lines[i][:cut] + piece + lines[i][cut:]
        return "\n".join(lines) + "\n", {}, {}
    return "\n".join(lines) + "\n", user.means, {k: v.means for k, v in facts.items()}


def check_overlay(made: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    text, user, facts = made
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vega.yaml"
        path.write_text(text, encoding="utf-8")
        begun = time.process_time()
        try:
            system = sites.load("vega", overlay=path)
        except UserError as error:
            assert re.search(r"vega\.yaml(:\d+)?", str(error.where)), f"no place: {error}\n{text}"
            count("overlays refused")
            return
        finally:
            assert time.process_time() - begun < PATIENCE, "too slow"
        count("overlays loaded")
        for key, means in user.items():
            found = system.user.model_dump()[key]
            assert agrees(found, means) or str(found) == str(means), (
                f"user.{key}: {means!r} was given, {found!r} was taken"
            )
        for key, means in facts.items():
            found = dig(system, key)
            same = agrees(found, means) or str(found) == str(means)
            if isinstance(means, str) and isinstance(found, (int, float)):  # a number in quotes
                same = float(means) == found
            assert same, f"{key}: {means!r} was given, {found!r} was taken\n{text}"


# ---- the runs


def how(few: int, many: int) -> Any:
    """Examples of the default suite (always the same) or of the long run."""
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    return settings(
        max_examples=many if LONG else few,
        phases=(Phase.generate,),
        deadline=None,
        derandomize=not LONG,
        suppress_health_check=quiet,
        database=None,
        print_blob=False,
    )


@how(25, 1200)
@given(cases(sure=True))
def test_what_is_given_is_found(case):
    check(case)


@how(35, 1000)
@given(cases())
def test_what_is_broken_is_refused_with_its_place(case):
    check(case)


@how(15, 400)
@given(overlays())
def test_overlays_are_taken_or_refused_with_their_place(made):
    check_overlay(made)


# ---- what the oracle is worth: faults that are put in on purpose are found


def _seed_dropped_key(monkeypatch: pytest.MonkeyPatch) -> None:
    true = Recipe.model_validate

    def dropping(tree: Any) -> Any:
        tree.get("train", {}).pop("warmup_ratio", None)
        tree.get("about", {}).pop("sector", None)
        return true(tree)

    monkeypatch.setattr(Recipe, "model_validate", dropping)


def _seed_typed_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wanted, "as_written", lambda value, *more: value)


def _seed_octal(monkeypatch: pytest.MonkeyPatch) -> None:
    constructors = {**yaml_text._Loader.yaml_constructors, "tag:yaml.org,2002:int": yaml.SafeLoader.construct_yaml_int}
    monkeypatch.setattr(yaml_text._Loader, "yaml_constructors", constructors)


def _seed_override_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    true = loading._apply_overrides
    monkeypatch.setattr(
        loading, "_apply_overrides", lambda tree, given: true(tree, [o for o in given if "eval." not in o])
    )


def _seed_comment_in_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text of --set by YAML, as it once was: what follows '#' is lost."""
    monkeypatch.setattr(wanted, "given", lambda raw, path, where: yaml_text.parse(raw, where).value)


def _seed_unquoted_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        yaml_text, "dump", lambda value, **more: json.dumps(value).replace('"1e3"', "1e3").replace('"017"', "017")
    )
    monkeypatch.setattr(wanted, "as_written", lambda value, *more: value)


def _seed_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_readable", lambda *more: UserError("something is wrong in it"))


def _seed_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        yaml_text, "_check_keys", lambda node, doubled: {key.value: 0 for key, _ in node.value}["model"]
    )


def _seed_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "process_time", iter(range(0, 10**6, 4)).__next__)


SEEDED = [value for name, value in sorted(globals().items()) if name.startswith("_seed_")]


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(
            seed, marks=[] if seed in (_seed_dropped_key, _seed_no_place) else pytest.mark.slow, id=seed.__name__[6:]
        )
        for seed in SEEDED
    ],
)
def test_a_fault_that_is_put_in_is_found(seed, monkeypatch):
    seed(monkeypatch)

    @settings(how(60, 60), max_examples=200)
    @given(cases(sure=True), cases())
    def search(sure, broken):
        check(sure)
        check(broken)

    with pytest.raises((AssertionError, KeyError)):
        search()
