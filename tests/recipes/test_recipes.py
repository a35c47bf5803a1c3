"""The recipes that ship: each loads, names what it must, and its converter gives rows that do not leak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from aifactory_train.commands.recipes import listed
from aifactory_train.config.loading import RECIPES_DIR, load_recipe, recipe_ids
from aifactory_train.core.errors import UserError
from aifactory_train.recipes.health import phenotype
from aifactory_train.recipes.language import udhr

OBO = """format-version: 1.2

[Term]
id: HP:1
name: Short thumb
def: "Reduced length of the \\"thumb\\" relative to the hand." [PMID:1]
synonym: "Brief thumb" EXACT layperson []
synonym: "Short thumb" EXACT []
synonym: "Thumb thing" RELATED []

[Term]
id: HP:2
name: Short left thumb
def: "Reduced length of the left \\"thumb\\" relative to the hand." []

[Term]
id: HP:3
name: obsolete Gone
def: "Something else entirely." []
is_obsolete: true

[Term]
id: HP:4
name: No definition

[Typedef]
id: part_of
name: part of
"""


@pytest.fixture
def obo(tmp_path: Path) -> Path:
    (tmp_path / "hp.obo").write_text(OBO, encoding="utf-8")
    return tmp_path / "hp.obo"


def many(tmp_path: Path, n: int = 400) -> Path:
    stanzas = [
        f'[Term]\nid: HP:{i}\nname: Term {chr(97 + i % 26)}{i}\ndef: "A finding of kind '
        f'{"abcdefghij"[i % 10] * (1 + i // 10)}." []\n'
        for i in range(n)
    ]
    (tmp_path / "many.obo").write_text("format-version: 1.2\n\n" + "\n".join(stanzas), encoding="utf-8")
    return tmp_path / "many.obo"


def test_obo_terms(obo):
    terms = list(phenotype.terms(obo))
    assert [t["id"] for t in terms] == ["HP:1", "HP:2", "HP:4"]
    assert terms[0]["definition"] == 'Reduced length of the "thumb" relative to the hand.'
    assert terms[0]["synonyms"] == ["Brief thumb"]


def test_left_and_right_of_the_same_finding_share_a_group(obo):
    first, second, _ = phenotype.terms(obo)
    assert phenotype.group_of(first["definition"]) == phenotype.group_of(second["definition"])


def test_each_direction_asks_its_question(obo):
    part = "train" if list(phenotype.rows(obo, part="train")) else "held_out"
    rows = {r["id"]: r for r in phenotype.rows(obo, part=part)}
    assert rows["HP:1/term-to-definition"]["completion"].startswith("Reduced length")
    assert rows["HP:1/definition-to-term"]["completion"] == "Short thumb"
    assert rows["HP:1/term-to-synonyms"]["completion"] == "Brief thumb"
    assert "HP:2/term-to-synonyms" not in rows


def test_parts_share_no_group_and_together_hold_every_row(tmp_path):
    path = many(tmp_path)
    train, held = list(phenotype.rows(path, part="train")), list(phenotype.rows(path, part="held_out"))
    assert not {r["group"] for r in train} & {r["group"] for r in held}
    assert len(train) + len(held) == 800 and 40 <= len(held) <= 130
    assert len({r["id"] for r in train + held}) == 800
    assert list(phenotype.rows(path, part="held_out")) == held


def write_udhr(folder: Path, language: str, articles: int = 12) -> None:
    body = "".join(
        f'<article data-number="{n}"><h2>{n}. grein.</h2><p>Text {language}&nbsp;{n}</p><ol><li>a &amp; '
        f"b</li></ol></article>"
        for n in range(1, articles + 1)
    )
    (folder / f"{language}.html").write_text(
        f"<html><body><header><h2>Preamble</h2><p>Before</p></header>{body}</body></html>", encoding="utf-8"
    )


def test_articles_are_held_out_in_every_language_alike(tmp_path):
    for language in ("isl", "fao"):
        write_udhr(tmp_path, language)
    held = list(udhr.rows(tmp_path, languages=["isl", "fao"], part="held_out"))
    assert [r["id"] for r in held] == ["isl/6", "isl/12", "fao/6", "fao/12"]
    train = list(udhr.rows(tmp_path, languages=["isl", "fao"], part="train"))
    assert len(train) == 2 * 11 and not {r["group"] for r in train} & {r["group"] for r in held}
    assert held[0]["text"] == "Text isl 6\na & b"


def test_unknown_translation_names_some(tmp_path):
    write_udhr(tmp_path, "isl")
    with pytest.raises(UserError, match="no translation 'xyz'"):
        list(udhr.rows(tmp_path, languages=["xyz"]))
    with pytest.raises(UserError, match=r"no translation '\.\./isl'"):
        list(udhr.rows(tmp_path, languages=["../isl"]))


@pytest.mark.parametrize("name", recipe_ids())
def test_recipe_says_what_a_reader_needs(name):
    recipe = load_recipe(name)
    text = (RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=../recipe.schema.json\n")
    about = recipe.about
    assert (
        about.title
        and about.sector == name.split("/")[0]
        and about.task
        and about.metric
        and about.summary
        and about.risks
    )
    assert recipe.model.licence != "unknown" and all(o.licence for o in recipe.model.options)
    assert len(recipe.model.options) >= 2, "a larger base model for the factory run"
    for source in [*recipe.data.train, *(recipe.data.eval or [])]:
        assert source.licence != "unknown"
    assert len(text.split()) < 700, "a person reads it in two minutes"


@pytest.mark.parametrize("name", recipe_ids())
def test_every_base_of_a_recipe_is_one_override_away(name):
    for option in load_recipe(name).model.options:
        changed = load_recipe(name, [f"model.base={option.base}"])
        assert changed.model.base == option.base and changed.model.licence == option.licence


@pytest.mark.parametrize("name", recipe_ids())
def test_own_rows_are_one_override_away(name, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "q", "completion": "a"}\n' * 2)
    recipe = load_recipe(name, [f"data.train={tmp_path / 'mine.jsonl'}"])
    assert [s.converter for s in recipe.data.train] == [None] and recipe.data.eval is None


def test_every_package_of_a_recipe_has_its_expected_digest():
    """A registry that serves other content than the recipe was written for is refused."""
    from aifactory_train.sources import known_digests

    digests = known_digests()
    assert all(len(d) == 64 and int(d, 16) >= 0 for d in digests.values())
    for name in recipe_ids():
        recipe = load_recipe(name)
        used = [recipe.model.base, *(s.source for s in [*recipe.data.train, *(recipe.data.eval or [])])]
        for source in used:
            if source.startswith(("pypi:", "npm:")):
                assert source.partition("#")[0] in digests, f"{name}: {source}"


def aifactory(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aifactory_train", *args], capture_output=True, text=True, timeout=60, check=False
    )


def test_list_is_one_line_of_json_with_the_agreed_keys():
    done = aifactory("recipes", "--json")
    (line,) = done.stdout.splitlines()
    rows = json.loads(line)
    assert {r["id"] for r in rows} == set(recipe_ids())
    for row in rows:
        assert set(row) == {"id", "sector", "task", "metric", "embedded", "licences", "bases", "sites"}
        assert isinstance(row["sites"], list)


def test_list_of_a_sector_and_an_unknown_one():
    rows = json.loads(aifactory("recipes", "--sector", "health", "--json").stdout)
    assert rows and {r["sector"] for r in rows} == {"health"}
    done = aifactory("recipes", "--sector", "helth")
    assert done.returncode == 2 and "did you mean 'health'" in done.stderr and "Traceback" not in done.stderr


def test_one_recipe_resolved():
    shown = json.loads(aifactory("recipes", "health/phenotype-terms", "--set", "train.max_steps=3", "--json").stdout)
    assert shown["recipe"]["train"]["max_steps"] == 3 and shown["recipe"]["model"]["attention"] == "auto"


def test_list_imports_neither_torch_nor_numpy():
    code = (
        "import sys; from aifactory_train.cli import main; main(['recipes', '--json'])\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'rich') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip().endswith("[]")


@pytest.mark.network
@pytest.mark.parametrize("name", [r["id"] for r in listed() if r["embedded"]])
def test_embedded_recipe_prepares_from_the_real_sources(name, real_cache, monkeypatch, tmp_path):
    """Fetched for real; at most a hundredth of the held-out rows is repeated in the training rows; answers carry
    loss.
    """
    from aifactory_train.data import prepare
    from aifactory_train.sources import fetch

    monkeypatch.setenv("AIFACTORY_CACHE", str(real_cache))
    recipe = load_recipe(name, ["data.train.0.max_rows=2000"])
    fetch(recipe)
    prepared = prepare(recipe, cache_dir=tmp_path)
    overlap = prepared.report["overlap"]
    held = sum(len(e) for e in prepared.evals.values())
    assert held >= min(recipe.data.eval_rows, 5)
    assert overlap["held_out_rows_repeated"] <= 0.01 * held
    for i in range(5):
        assert prepared.train.supervised[i] > 0
