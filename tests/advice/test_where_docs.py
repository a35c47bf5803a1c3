"""``docs/where.md`` derives three answers by hand; the program gives the same."""

from __future__ import annotations

import json
import re

import helpers
import pytest
from test_where import NINE

from aifactory_train.cli import main

TEXT = (helpers.ROOT / "docs" / "where.md").read_text(encoding="utf-8")
#: options -> the table that follows them
PERSONAS = dict(re.findall(r"<!-- persona: (.+?) -->\n\n((?:\|.*\n)+)", TEXT))
JOB = ["health/phenotype-terms", "--tokens", "2e7", *(word for text in NINE for word in ("--set", text))]


def test_the_document_has_three() -> None:
    assert len(PERSONAS) == 3 and all(text in TEXT for text in NINE)


@pytest.mark.parametrize("options", PERSONAS)
def test_the_program_gives_what_the_document_derives(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["where", *JOB, *options.split(), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PERSONAS[options].splitlines()[2:]]
    found = [
        [
            str(row["rank"]),
            row["id"],
            f"{row['nodes']} x {row['gpus_per_node']}",
            f"{row['hours']:.2f}",
            " ".join(route["id"] for route in row["access"]),
        ]
        for row in answer["sites"]
        if row["fits"]
    ]
    assert found == rows


def test_what_the_clinic_may_not_use_for_its_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["where", *JOB, "--country", "BE", "--sensitive", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["sites"]
    said = re.search(r"Left out by the rule for data: ([^.]+)\.", TEXT)
    assert said and said[1].split() == [row["id"] for row in rows if row["excluded_by"] == "data"]
    assert all("; ask" in row["why"] for row in rows if row["excluded_by"] == "data")


def test_lumi_bills_half_of_what_the_scheduler_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["where", *JOB, "--country", "FI", "--sme", "--json"]) == 0
    lumi = json.loads(capsys.readouterr().out)["sites"][0]
    assert lumi["billed"]["unit"] == "GPU-hours" and f"{lumi['billed']['amount']:.1f} GPU-hours" in TEXT
    assert lumi["billed"]["amount"] == pytest.approx(lumi["gpu_hours"] / 2, rel=1e-3)
