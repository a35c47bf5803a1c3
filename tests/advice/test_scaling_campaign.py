"""A scaling campaign: never above its cap, its lines are launches, and its table is what the runs measured."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from test_where import NINE

from aifactory_train import sites
from aifactory_train.advice import campaign
from aifactory_train.cli import main
from aifactory_train.commands import launch
from aifactory_train.config.loading import load_recipe

SETS = [word for text in NINE for word in ("--set", text)]
JOB = ["health/phenotype-terms", *SETS, "--site", "lumi-g", "--account", "project_465000000"]


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main(["scale", *args])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_campaign_stays_under_its_cap(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: each job may take repeats x nodes x GPUs x its limit, and nothing else may run."""
    code, out, _ = run(capsys, *JOB, "--nodes", "1,2,4", "--cap", "100", "--json")
    answer = json.loads(out)
    assert code == 0 and [job["name"] for job in answer["jobs"]] == [
        "strong-0001", "strong-0002", "weak-0002", "strong-0004", "weak-0004",
    ]  # fmt: skip
    minutes = [int(line.split("--time ")[1].split("m ")[0]) for line in answer["lines"]]
    nodes = [job["nodes"] for job in answer["jobs"]]
    assert answer["gpu_hours_most"] == pytest.approx(
        sum(3 * n * 8 * m / 60 for n, m in zip(nodes, minutes, strict=True))
    )
    assert answer["gpu_hours_most"] <= 100
    code, _, err = run(capsys, *JOB, "--nodes", "1,2,4", "--cap", f"{answer['gpu_hours_most'] - 0.1:.2f}")
    assert code == 2 and "--cap" in err and "weak-0004 alone" in err


def test_strong_keeps_the_step_and_weak_lets_it_grow() -> None:
    recipe = load_recipe("health/phenotype-terms", NINE)
    jobs = campaign.jobs_of(recipe, sites.load("lumi-g", overlay=False), [1, 2], 3, 20, given=tuple(NINE))
    rows = {job.name: [text for text in job.overrides if text.startswith("train.batch_rows")] for job in jobs}
    assert rows == {
        "strong-0001": ["train.batch_rows=64"],
        "strong-0002": ["train.batch_rows=64"],
        "weak-0002": ["train.batch_rows=128"],
    }
    assert jobs[0].kinds == ("strong", "weak"), "the fewest nodes are measured once for both"
    load_recipe("health/phenotype-terms", list(jobs[2].overrides))  # every setting is one of the recipe


def test_a_line_is_a_launch_that_is_never_queued_again(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, *JOB, "--nodes", "1,2", "--cap", "100", "--json")
    words = json.loads(out)["lines"][1].split()
    assert words[:2] == ["aifactory", "launch"]
    assert main([*words[1:], "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert "--array=" in script and "--nodes=2" in script and "--no-requeue" in script


def test_submission_goes_through_launch_and_stops_where_one_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[argparse.Namespace] = []

    def submit(args: argparse.Namespace) -> int:
        seen.append(args)
        return 1 if len(seen) == 2 else 0

    monkeypatch.setattr(launch, "run", submit)
    folder = str(tmp_path / "c")
    code, _, err = run(capsys, *JOB, "--nodes", "1,2", "--cap", "100", "--folder", folder, "--submit")
    assert code == 2 and "strong-0002 was not submitted" in err and len(seen) == 2
    assert seen[0].array == ["train.seed=1,2,3"] and seen[0].resubmit == "none" and seen[0].nodes == 1
    assert (tmp_path / "c" / "campaign.json").is_file()
    code, _, err = run(capsys, *JOB, "--nodes", "1,2", "--cap", "100", "--folder", folder, "--submit")
    assert code == 2 and "holds a campaign already" in err and len(seen) == 2


def write_metrics(folder: Path, speeds: dict[str, list[float]]) -> None:
    """Runs of ten steps: 1,000 tokens a step; the first five are slow and do not count."""
    for name, found in speeds.items():
        for task, speed in enumerate(found):
            run_folder = folder / name / f"{task:03d}"
            run_folder.mkdir(parents=True)
            rows = [
                {"kind": "train", "step": s, "tokens": 1000, "seconds": 1000 / speed if s > 5 else 99.0}
                for s in range(1, 11)
            ]
            rows.insert(3, {"kind": "eval", "step": 3, "tokens": 0, "seconds": 0.0})
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (run_folder / "metrics.jsonl").write_text(text + '{"kind": "tra')


def test_table_and_plot_are_what_the_runs_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = load_recipe("health/phenotype-terms", NINE)
    jobs = campaign.jobs_of(recipe, sites.load("lumi-g", overlay=False), [1, 2, 4], 2, 10, given=tuple(NINE))
    campaign.write_campaign(tmp_path, "acme/<b>", "lumi-g", jobs, 50, 10)
    code, _, err = run(capsys, str(tmp_path))
    assert code == 2 and "no run has made more than 5 steps" in err
    write_metrics(tmp_path, {"strong-0001": [1000, 1000], "strong-0002": [1700, 1900], "weak-0002": [1980]})
    code, out, err = run(capsys, str(tmp_path), "--json")
    answer: dict[str, Any] = json.loads(out)
    assert code == 0 and answer["missing"] == ["strong-0004", "weak-0004"] and "strong-0004 has measured nothing" in err
    points = {(p["kind"], p["nodes"]): p for p in answer["points"]}
    assert set(points) == {("strong", 1), ("strong", 2), ("weak", 1), ("weak", 2)}
    two = points["strong", 2]
    assert (two["gpus"], two["repeats"]) == (16, 2)
    assert two["tokens_per_s"] == pytest.approx(1800) and two["spread"] == pytest.approx(100 / 1800)
    assert two["efficiency"] == pytest.approx(0.9) and points["weak", 2]["efficiency"] == pytest.approx(0.99)
    kept = json.loads((tmp_path / "scaling.json").read_text())
    assert kept["points"] == answer["points"]
    page = (tmp_path / "scaling.html").read_text()
    assert page.count("<circle") == 4 and "acme/&lt;b&gt;" in page and "<script" not in page
    assert main(["access", "health/phenotype-terms", *SETS, "--tokens", "2e7", "--route", "regular", "--site", "lumi-g",
                 "--scaling", str(tmp_path / "scaling.json"), "--json"]) == 0  # fmt: skip
    annex = json.loads(capsys.readouterr().out)
    assert next(f for f in annex["fields"] if f["key"] == "scaling_measured")["status"] == "measured"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--nodes", "1,x"], ["--nodes 1,x"]),
        (["--nodes", "2,3"], ["multiple of the fewest"]),
        (["--nodes", "0,2"], ["--nodes 0,2"]),
        (["--repeats", "0"], ["--repeats"]),
        (["--steps", "5"], ["--steps", "not counted"]),
        (["--cap", "-1"], ["--cap"]),
        (["--nodes", "64"], ["cannot be divided"]),
    ],
)
def test_bad_input_is_refused_by_name(capsys: pytest.CaptureFixture[str], args: list[str], words: list[str]) -> None:
    code, out, err = run(capsys, *JOB, "--cap", "100", *args)
    assert code == 2 and out == "" and all(word in err for word in words), err


def test_site_and_cap_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--site" in run(capsys, "health/phenotype-terms", "--cap", "9")[2]
    assert "--cap" in run(capsys, "health/phenotype-terms", "--site", "lumi-g")[2]
