"""Drafts of applications: every field has its status and source, nothing is invented, three formats say the same."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from test_where import NINE

from aifactory_train.advice.answers import ANSWERS
from aifactory_train.advice.documents import markdown
from aifactory_train.cli import main

JOB = ["health/phenotype-terms", "--tokens", "2e7", *(word for text in NINE for word in ("--set", text))]
LUMI = [*JOB, "--route", "development", "--site", "lumi-g"]


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main(["access", *args])
    out = capsys.readouterr()
    return code, out.out, out.err


def draft(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    code, out, err = run(capsys, *args, "--json")
    assert code == 0, err
    return json.loads(out)


def field(annex: dict[str, Any], key: str) -> dict[str, Any]:
    return next(f for f in annex["fields"] if f["key"] == key)


def test_nine_billion_on_lumi_is_filled_to_nine_tenths_with_provenance(capsys: pytest.CaptureFixture[str]) -> None:
    annex = draft(capsys, *LUMI)
    technical = [f for f in annex["fields"] if f["technical"]]
    assert annex["technical"] == len(technical) and annex["filled"] >= 0.9 * len(technical)
    for f in annex["fields"]:
        if f["value"] is None:
            assert re.fullmatch(r"MISSING \(.+\)", f["status"]), f
        else:
            assert f["status"] in ("from the plan", "measured") and f["source"], f
    assert {f["key"] for f in annex["fields"] if f["key"]} == set(ANSWERS), "the generic annex asks all that is known"
    assert "was not at hand" in annex["note"] and "https://" in annex["note"]
    missing = {f["key"] for f in technical if f["value"] is None}
    assert missing == {"scaling_measured", "personal_data"}


def test_figures_are_those_of_the_plan_times_the_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: five runs of 4.985 GPU-hours are 24.9; LUMI bills a node-hour with four GPU-hours, half of that."""
    assert main(["plan", *JOB, "--site", "lumi-g", "--nodes", "1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    annex = draft(capsys, *LUMI, "--nodes", "1", "--runs", "5")
    row = field(annex, "derivation")["value"]["rows"][0]
    assert row[1:4] == ["5", "1", "8"] and float(row[5]) == pytest.approx(5 * plan["gpu_hours"], rel=5e-3)
    assert f"{5 * plan['billed']['amount']:.3g} GPU-hours" in field(annex, "billed")["value"]
    assert f"{plan['trained_parameters']:,}" in field(annex, "method")["value"]
    assert "profile of lumi-g, accounting.per_node_hour" in field(annex, "billed")["source"]


def test_every_figure_of_the_markdown_stands_in_a_labelled_field(capsys: pytest.CaptureFixture[str]) -> None:
    annex = draft(capsys, *LUMI)
    text = markdown(annex)
    blocks = re.split(r"\n\*\*.+\*\*\n", text)[1:]
    assert len(blocks) == len(annex["fields"])
    for block in blocks:
        assert re.search(r"^\*(from the plan|measured|MISSING \().*\*$", block, re.M), block


def test_the_three_formats_say_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    docx = pytest.importorskip("docx", reason="DOCX is written with python-docx (extra access)")
    outs = [word for end in ("md", "docx", "json") for word in ("--out", str(tmp_path / f"a.{end}"))]
    code, out, _ = run(capsys, *LUMI, *outs)
    assert code == 0 and out == ""
    annex = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert (tmp_path / "a.md").read_text(encoding="utf-8") == markdown(annex)
    document = docx.Document(str(tmp_path / "a.docx"))
    words = [p.text for p in document.paragraphs]
    tables = [[[c.text for c in row.cells] for row in t.rows] for t in document.tables]
    for f in annex["fields"]:
        assert f["asks"] in words and any(text.startswith(f["status"]) for text in words)
        if isinstance(f["value"], dict):
            assert [f["value"]["columns"], *f["value"]["rows"]] in tables
        elif f["value"] is not None:
            assert f["value"] in words
    code, _, err = run(capsys, *LUMI, "--out", str(tmp_path / "a.md"))
    assert code == 2 and "exists" in err, "a draft that was worked on is not overwritten"


def test_docx_without_its_library_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "docx", None)
    code, _, err = run(capsys, *LUMI, "--out", str(tmp_path / "a.docx"))
    assert (
        code == 2 and "python-docx" in err and "aifactory-train[access]" in err and not (tmp_path / "a.docx").exists()
    )


def test_a_measured_campaign_fills_its_field(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    point = {
        "kind": "strong",
        "nodes": 2,
        "gpus": 16,
        "repeats": 3,
        "tokens_per_s": 31000.0,
        "spread": 0.01,
        "efficiency": 0.93,
    }
    campaign = {
        "format": 1,
        "recipe": "r",
        "site": "lumi-g",
        "date": "2026-11-30",
        "source": "9 runs",
        "points": [point],
    }
    path = tmp_path / "scaling.json"
    path.write_text(json.dumps(campaign))
    found = field(draft(capsys, *LUMI, "--scaling", str(path)), "scaling_measured")
    assert found["status"] == "measured" and found["value"]["rows"] == [
        ["strong", "2", "16", "3", "31,000", "1.0%", "93%"]
    ]
    assert "9 runs" in found["source"] and "lumi-g" in found["source"]
    path.write_text(json.dumps(campaign | {"points": [point | {"tokens_per_s": "fast"}]}))
    code, _, err = run(capsys, *LUMI, "--scaling", str(path))
    assert code == 2 and "points.0.tokens_per_s" in err


def test_what_is_not_known_is_missing_with_whom_to_ask(capsys: pytest.CaptureFixture[str]) -> None:
    """Vega publishes no rate and no rule for sensitive data; without a size there are no hours."""
    annex = draft(capsys, *JOB, "--route", "playground", "--site", "vega")
    assert field(annex, "billed")["status"].startswith("MISSING (the site")
    assert "support@sling.si" in field(annex, "site_rule")["status"]
    unsized = draft(capsys, *JOB[:1], *JOB[3:], "--route", "playground", "--site", "vega")
    for key in ("derivation", "gpu_hours", "energy", "steps", "ai_act", "input"):
        assert "aifactory prepare" in field(unsized, key)["status"] and field(unsized, key)["value"] is None


def test_a_form_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    form = tmp_path / "form.yaml"
    text = (
        "id: mine\ntitle: Annex 7\nsource: {title: my call, date: 2026-11}\nsections:\n- title: Resources\n  fields:\n"
        "  - {key: gpu_hours, asks: 4.1 Hours}\n  - {asks: 4.2 Why, who: dean}\n"
    )
    form.write_text(text)
    annex = draft(capsys, *LUMI, "--form", str(form))
    assert annex["note"] is None and annex["title"].startswith("Annex 7") and annex["filled"] == 1
    assert annex["fields"][1]["status"] == "MISSING (dean)"
    form.write_text(text.replace("gpu_hours", "gpu_hour"))
    code, _, err = run(capsys, *LUMI, "--form", str(form))
    assert code == 2 and "did you mean 'gpu_hours'" in err
    form.write_text(text.replace("asks: 4.1", "ask: 4.1"))
    code, _, err = run(capsys, *LUMI, "--form", str(form))
    assert code == 2 and str(form) in err


def test_the_site_is_the_first_that_the_route_leads_to(capsys: pytest.CaptureFixture[str]) -> None:
    annex = draft(capsys, *JOB, "--route", "naiss")
    assert annex["site"] == "arrhenius"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--route", "playgound"], ["did you mean 'playground'"]),
        (["--route", "playground", "--site", "alps-clariden"], ["gives no hours", "cscs-user-lab"]),
        (["--route", "extreme", "--site", "vega"], ["gives no hours"]),
        (["--route", "regular", "--site", "lumi-g", "--runs", "0"], ["--runs"]),
        (["--route", "regular", "--site", "lumi-g", "--nodes", "some"], ["--nodes some"]),
        (["--route", "regular", "--site", "lumi-g", "--out", "annex.pdf"], [".docx"]),
        (["--route", "regular", "--site", "lumi-g", "--scaling", "none.json"], ["none.json"]),
        (["--route", "regular", "--site", "lumi-g", "--form", "none.yaml"], ["none.yaml"]),
    ],
)
def test_bad_input_is_refused_by_name(capsys: pytest.CaptureFixture[str], args: list[str], words: list[str]) -> None:
    code, out, err = run(capsys, *JOB, *args)
    assert code == 2 and out == "" and all(word in err for word in words), err
