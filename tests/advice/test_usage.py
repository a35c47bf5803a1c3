"""Usage: equal to sacct over requeue, array, cancel, node loss; from records elsewhere; published without names."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from aifactory_train.advice import sacct
from aifactory_train.cli import main
from aifactory_train.core.errors import UserError

#: JobIDRaw JobID State Start End ElapsedRaw NNodes AllocTRES Partition, of account project_465000000.
JOBS = """
100 100   NODE_FAIL  2026-11-01T10:00:00 2026-11-01T11:00:00 3600 2 16    standard-g
100 100   COMPLETED  2026-11-01T11:05:00 2026-11-01T13:05:00 7200 2 16    standard-g
101 101   REQUEUED   2026-11-02T08:00:00 2026-11-02T08:10:00 600  1 8     standard-g
101 101   TIMEOUT    2026-11-02T08:20:00 2026-11-02T10:20:00 7200 1 8     standard-g
102 102_1 COMPLETED  2026-11-03T00:00:00 2026-11-03T00:30:00 1800 1 typed small-g
103 102_2 FAILED     2026-11-03T00:00:00 2026-11-03T00:15:00 900  1 typed small-g
104 102_3 CANCELLED  2026-11-03T00:00:00 2026-11-03T00:05:00 300  1 both  small-g
105 105   CANCELLED  None                2026-11-04T00:00:00 0    0 none  standard-g
106 106   RUNNING    2026-11-05T00:00:00 Unknown             450  1 8     standard-g
"""
SAID = {"typed": "cpu=7,gres/gpu:mi250=2,node=1", "both": "cpu=7,gres/gpu=2,gres/gpu:mi250=2,node=1", "none": ""}


def line(text: str) -> str:
    """A job as sacct prints it."""
    raw, job, state, start, end, seconds, nodes, gpus, partition = text.split()
    tres = SAID.get(gpus, f"billing=64,cpu=56,gres/gpu={gpus},mem=480G,node={nodes}")
    state = "CANCELLED by 1000" if state == "CANCELLED" else state
    return "|".join([raw, job, "project_465000000", state, start, end, seconds, nodes, tres, partition, "normal"])


LINES = [line(text) for text in JOBS.strip().splitlines()]
TEXT = "\n".join(LINES) + "\n"
#: By hand, seconds x GPUs / 3600.
GPU_HOURS = (3600 * 16 + 7200 * 16 + 600 * 8 + 7200 * 8 + 1800 * 2 + 900 * 2 + 300 * 2 + 450 * 8) / 3600
NODE_HOURS = (3600 * 2 + 7200 * 2 + 600 + 7200 + 1800 + 900 + 300 + 450) / 3600


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a ``sacct`` that prints the lines and keeps what it was asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "answer").write_text(TEXT)
    program = folder / "sacct"
    program.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/asked\n'
        f"if [ -e {folder}/fault ]; then cat {folder}/fault >&2; exit 1; fi\ncat {folder}/answer\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return folder


def write_run(folder: Path, name: str, jobs: list[str], attempts: list[dict[str, Any]], **more: Any) -> None:
    run = folder / name
    (run / "submission").mkdir(parents=True)
    (run / "run.yaml").write_text("id: x\n")
    (run / "submission" / "jobs").write_text("".join(f"{job}\n" for job in jobs))
    found = {f"{i:03d}": attempt for i, attempt in enumerate(attempts, start=1)}
    totals = {"wasted_device_hours": 1.5, "steps": 40, "mfu": 0.4}
    record = {
        "run": {"recipe": "acme/orders"},
        "base": {"id": "base/secret-name"},
        "compute": {"attempts": found, "totals": totals},
    }
    (run / "record.json").write_text(json.dumps(record | more))


ATTEMPT = {
    "state": "finished",
    "cause": None,
    "started": "2026-11-01T10:00:00Z",
    "nodes": 2,
    "ranks": 16,
    "job": "100",
    "wall_s": 3500.0,
}


def usage(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    code = main(["usage", *args, "--json"])
    out = capsys.readouterr()
    assert code == 0, out.err
    return json.loads(out.out)


WINDOW = ["--from", "2026-11-01", "--to", "2026-11-30"]
PROJECT = ["--project", "project_465000000", "--site", "lumi-g", *WINDOW]


def test_hours_are_those_of_sacct(capsys: pytest.CaptureFixture[str], slurm: Path) -> None:
    answer = usage(capsys, *PROJECT)
    assert answer["source"] == "sacct" and answer["gpu_hours"] == pytest.approx(GPU_HOURS, rel=1e-9)
    assert answer["node_hours"] == pytest.approx(NODE_HOURS, rel=1e-9)
    assert (answer["jobs"], answer["starts"]) == (7, 9), "a requeued job is one job that started twice"
    for key in ("by_run", "by_end", "by_day"):
        assert sum(row["gpu_hours"] for row in answer[key]) == pytest.approx(GPU_HOURS), key
    ends = {row["state"]: row["gpu_hours"] for row in answer["by_end"]}
    assert (
        ends["NODE_FAIL"] == 16
        and ends["REQUEUED"] == pytest.approx(8 / 6)
        and ends["CANCELLED"] == pytest.approx(1 / 6)
    )
    asked = (slurm / "asked").read_text().split("\n")
    assert {"--duplicates", "--allocations", "--truncate", "--allusers", "--accounts=project_465000000"} <= set(asked)
    assert "--starttime=2026-11-01" in asked and "--endtime=2026-11-30T23:59:59" in asked


def test_the_bill_is_that_of_each_partition(capsys: pytest.CaptureFixture[str], slurm: Path) -> None:
    """LUMI: standard-g bills whole nodes, four GPU-hours an hour; small-g half a GPU-hour for each GCD taken."""
    answer = usage(capsys, *PROJECT, "--award", "100", "--end", "2099-01-01")
    standard, small = (3600 * 2 + 7200 * 2 + 600 + 7200 + 450) / 3600, (1800 + 900 + 300) / 3600
    assert answer["billed"]["unit"] == "GPU-hours" and answer["billed"]["amount"] == pytest.approx(standard * 4 + small)
    award = answer["award"]
    assert award["used"] == answer["billed"]["amount"] and award["left"] == pytest.approx(100 - award["used"])
    assert award["left_a_day"] == pytest.approx(award["left"] / award["days_left"])
    nodes = usage(capsys, *PROJECT, "--award", "100", "--unit", "node-hours")
    assert nodes["award"]["used"] == pytest.approx(NODE_HOURS)


def test_jobs_belong_to_runs(capsys: pytest.CaptureFixture[str], slurm: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "first", ["100"], [ATTEMPT | {"state": "failed", "cause": "node-lost"}, ATTEMPT])
    write_run(tmp_path / "runs", "sweep", ["102"], [])
    rows = {row["run"]: row for row in usage(capsys, *PROJECT)["by_run"]}
    assert (
        rows["first"]["gpu_hours"] == 48 and rows["first"]["starts"] == 2 and rows["first"]["causes"] == ["node-lost"]
    )
    assert rows["sweep"]["jobs"] == 3, "array tasks have numbers of their own"
    assert rows["(no run folder here)"]["jobs"] == 3


def test_records_where_there_is_no_sacct(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["usage"]) == 2 and "no sacct here" in capsys.readouterr().err
    write_run(tmp_path / "runs", "one", [], [ATTEMPT | {"job": None}], energy={"measured_kwh": 2.5})
    write_run(tmp_path / "runs", "old", [], [ATTEMPT | {"started": "2025-01-01T00:00:00Z"}])
    answer = usage(capsys, *WINDOW)
    assert answer["source"] == "records" and answer["gpu_hours"] == pytest.approx(3500 * 16 / 3600)
    assert [row["run"] for row in answer["by_run"]] == ["one"] and answer["kwh"] == {
        "measured": 2.5,
        "runs_measured": 1,
        "runs": 1,
    }
    assert main(["usage", "--project", "p"]) == 2 and "nobody can tell" in capsys.readouterr().err


def test_what_is_published_names_nobody(capsys: pytest.CaptureFixture[str], slurm: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "private-name", ["100"], [ATTEMPT])
    files = [tmp_path / "f.json", tmp_path / "f.html"]
    for path in files:
        usage(capsys, *PROJECT, "--anonymous", str(path))
        text = path.read_text()
        for name in ("project_465000000", "private-name", "secret-name", "acme", "lumi", str(tmp_path), "|100|"):
            assert name not in text, name
    figures = json.loads(files[0].read_text())
    assert figures["gpu_hours"] == pytest.approx(GPU_HOURS, abs=0.05) and figures["projects"] == 1
    assert figures["models_trained"] == 1 and figures["utilisation"] == {"mean_mfu": 0.4, "runs": 1}
    done = (7200 * 16 + 1800 * 2) / 3600
    assert figures["share_of_hours_in_completed_jobs"] == pytest.approx(done / GPU_HOURS, abs=1e-3)


def test_page_and_report(capsys: pytest.CaptureFixture[str], slurm: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "a<b>", ["100"], [ATTEMPT])
    page, report = tmp_path / "u.html", tmp_path / "r.md"
    answer = usage(
        capsys, *PROJECT, "--html", str(page), "--report", str(report), "--award", "50", "--end", "2026-12-31"
    )
    text = page.read_text(encoding="utf-8")
    assert (
        "a&lt;b&gt;" in text
        and "a<b>" not in text
        and "<script" not in text
        and text.count("<rect") == len(answer["by_day"])
    )
    draft = report.read_text(encoding="utf-8")
    assert "| a<b> | acme/orders | base/secret-name | 48 | 40 | finished |" in draft
    assert draft.count("MISSING (applicant)") == 4 and "MISSING (site" in draft and "of 50 GPU-hours used" in draft
    assert main(["usage", *PROJECT]) == 0
    assert "NODE_FAIL" in capsys.readouterr().out


def test_no_answer_is_not_zero_hours(capsys: pytest.CaptureFixture[str], slurm: Path) -> None:
    (slurm / "fault").write_text("sacct: error: Problem talking to the database\n")
    assert main(["usage", *PROJECT]) == 2
    assert "Problem talking to the database" in capsys.readouterr().err
    (slurm / "fault").unlink()
    (slurm / "answer").write_text("100|COMPLETED|3600\n")
    assert main(["usage", *PROJECT]) == 2
    assert "another shape" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tres", "gpus"),
    [("", 0), ("cpu=1", 0), ("gres/gpu=4", 4), ("gres/gpu:a100=4", 4), ("gres/gpu=8,gres/gpu:mi250=8", 8),
     ("gres/gpu:a100_40.v2=2,gres/gpu:h100=1,node=1", 3), ("gres/gpumem=40,gres/gpu=1", 1)],
)  # fmt: skip
def test_gpus_of_an_allocation(tres: str, gpus: int) -> None:
    assert sacct.gpus_of(tres) == gpus


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--from", "yesterday"], ["--from", "2027-03-31"]),
        (["--from", "2026-11-02", "--to", "2026-11-01"], ["before"]),
        (["--award", "0"], ["--award"]),
        (["--award", "5", "--unit", "euros"], ["--unit", "GPU-hours"]),
        (["--end", "2027-01-01"], ["--award N"]),
        (["--anonymous", "figures.pdf"], [".json or .html"]),
    ],
)
def test_bad_input_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], slurm: Path, args: list[str], words: list[str]
) -> None:
    code = main(["usage", "--site", "lumi-g", *args])
    err = capsys.readouterr().err
    assert code == 2 and all(word in err for word in words), err


def test_a_line_of_another_shape_is_refused() -> None:
    with pytest.raises(UserError):
        sacct.parse(LINES[0].rpartition("|")[0])
