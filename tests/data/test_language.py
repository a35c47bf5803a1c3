"""What is no language is left out before a language is told or its cost in tokens is measured; a warning means a
foreign language.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_own_report import SENTENCES

from aifactory_train.data import language, report

#: Questions in one language whose answers belong to none: tags, identifiers, calls, paths and part numbers.
CODES = [
    (
        "Which tag has the name of this feature, a stop for buses by the road?",
        "highway=bus_stop; public_transport=platform",
    ),
    ("Which element is it that the gain of the exciter belongs to?", "DiscExcContIEEEDEC1A.kan"),
    ("Which field holds the wavelength of the beam at the sample?", "/entry/instrument/beam/incident_wavelength"),
    (
        "Which message is sent when the battery of the vehicle is low?",
        "MAV_CMD_DO_SET_MODE <enum>MAV_BATTERY_LOW</enum>",
    ),
    ("What is the call for the shortest path in a graph?", "nx::shortest_path(G, source=a1, target=b2)"),
]


@pytest.mark.parametrize("_, answer", CODES)
def test_identifiers_tags_and_paths_are_no_prose(_, answer):
    assert not language.prose(answer).replace(";", "").replace(",", "").replace(")", "").split()
    assert language.detect(answer) == "und"


@pytest.mark.parametrize("code", SENTENCES)
def test_prose_stays(code):
    assert language.prose(SENTENCES[code]) == SENTENCES[code]


def test_an_identifier_takes_no_sentence_of_an_unspaced_script_along():
    assert language.prose("評議会はbus_stopで集まり、道沿いの家") == "評議会はで集まり、道沿いの家"


@settings(max_examples=100)
@given(st.text(max_size=200))
def test_prose_adds_nothing(text):
    assert not set(language.prose(text)) - {*text, " "}


@pytest.mark.parametrize(
    "text",
    [
        # i: Swedish, Norwegian, Irish, …
        "Minimum exciter current (<i>I</i><i><sub>FMN</sub></i>). Typical value = -5,2.",
        "Controller gain (<i>K</i><i><sub>AN</sub></i>) (&gt;= 0). Typical value = 400.",  # an, i: Irish
        "Regulator gain Ka. Typical Ka = 400. Ka may change.",  # ka: Albanian, Estonian
        "i. i. i. a. a. e. e. o. o.",
    ],
)
def test_symbols_of_a_formula_are_no_small_words(text):
    assert language.detect(text) == "und"


def test_an_english_instruction_does_not_make_rows_english():
    row = {
        "messages": [
            {
                "role": "system",
                "content": "This is the instruction that stands before each of the rows and is in English.",
            },
            {"role": "user", "content": SENTENCES["fi"]},
            {"role": "assistant", "content": "bus_stop"},
        ]
    }
    stated, text = report.spoken(row)
    assert stated is None and language.detect(text) == "fi"
    assert report.spoken({**row, "language": "fi-FI"})[0] == "fi" and report.spoken({**row, "language": "?"})[0] is None
    assert report.spoken({"text": "a", "language": "Finnish"}) == (None, "a")
    assert report.languages(["x", "y"], ["el", None])["shares"] == {"el": 0.5, "und": 0.5}


def test_the_preparation_measures_rows_as_they_speak(make_recipe, tiny_model_dir):
    """Stated languages and system turns arrive from the files of a recipe."""
    import helpers

    from aifactory_train.config.loading import load_recipe
    from aifactory_train.data import prepare

    path = make_recipe()
    rows = [
        {"system": SENTENCES["en"], "prompt": f"Στάση {i}", "completion": f"bus_stop={i}", "language": "el", "id": i}
        for i in range(40)
    ]
    helpers.write_jsonl(path.parent / "train.jsonl", rows)
    found = prepare(load_recipe(str(path))).report
    assert found["languages"]["shares"] == {"el": 1.0}
    assert list(found["fertility"]["languages"]) == ["el"]
    assert any("'el'" in warning for warning in found["warnings"])


# ---- the base of the recipes


@pytest.fixture
def smollm2(real_cache, monkeypatch):
    from transformers import AutoTokenizer

    from aifactory_train.config.loading import load_recipe
    from aifactory_train.core.errors import UserError
    from aifactory_train.sources import resolve_model

    monkeypatch.setenv("AIFACTORY_CACHE", str(real_cache))
    try:
        folder = resolve_model(load_recipe("health/phenotype-terms").model)
    except UserError:
        pytest.skip("not fetched: aifactory fetch health/phenotype-terms")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer


def warned(tokenizer, texts, stated=None) -> list[str]:
    return report.warnings_of({"fertility": report.fertility(tokenizer, texts, stated), "sources": []})


@pytest.mark.real_model
def test_smollm2_knows_english_and_codes_but_not_greek_finnish_icelandic(smollm2):
    for code in ("el", "fi", "is"):
        (warning,) = warned(smollm2, [SENTENCES[code]] * 9)
        assert f"the language '{code}'" in warning
        (warning,) = warned(smollm2, [SENTENCES["en"]] * 8 + [SENTENCES[code]] * 2)
        assert f"the language '{code}'" in warning and "'en'" not in warning
        answers = [f"{SENTENCES[code]} highway=bus_stop_{i}" for i in range(9)]
        assert f"'{code}'" in json.dumps(warned(smollm2, answers)), "a code in the answer hides no language"
    (warning,) = warned(smollm2, [SENTENCES[c] for c in ("el", "fi", "is")] * 3)
    assert "the languages" in warning and all(f"'{c}'" in warning for c in ("el", "fi", "is"))
    assert not warned(smollm2, [SENTENCES["en"]] * 9)


@pytest.mark.real_model
def test_answers_in_codes_are_no_foreign_language(smollm2):
    """Tags cost two to four times the tokens of prose, and yet a base learns them as quickly as words."""
    rows = [f"{question}\n{answer}" for question, answer in CODES] * 4
    assert not warned(smollm2, rows) and not warned(smollm2, rows, ["en"] * len(rows))
    assert not warned(smollm2, [answer for _, answer in CODES] * 4)
    # French beside tags is measured by its French alone.
    french = [f"{SENTENCES['fr']} {answer}" for _, answer in CODES]
    costs = [report.fertility(smollm2, texts)["languages"]["fr"] for texts in (french, [SENTENCES["fr"]] * 5)]
    assert costs[0]["tokens_per_byte"] == pytest.approx(costs[1]["tokens_per_byte"], rel=0.05)
