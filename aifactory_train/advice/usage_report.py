"""Usage for people: the table, a page, a draft of the final report, and the figures that name nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.core.errors import UserError
from aifactory_train.core.output import plain_table
from aifactory_train.core.templates import render

if TYPE_CHECKING:
    from aifactory_train.advice.usage import RunRecord

TEMPLATE = Path(__file__).with_name("usage.html.j2")


def write(path: Path, text: str) -> None:
    """Write a file; refuses by name what cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(path)) from None


def hours(value: float | None) -> str:
    return "?" if value is None else f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def against(award: dict[str, Any] | None) -> list[str]:
    """The award in lines."""
    if award is None:
        return []
    if award["used"] is None:
        return [
            f"award: {hours(award['amount'])} {award['unit']}; what was used in it is not known (no published rate)"
        ]
    lines = [
        f"award: {hours(award['used'])} of {hours(award['amount'])} {award['unit']} used ({award['share']:.1%}), "
        f"{hours(award['left'])} left"
    ]
    if award["end"]:
        days = award["days_left"]
        more = f": {hours(award['left_a_day'])} a day" if award["left_a_day"] is not None else ""
        lines.append(f"ends on {award['end']}, in {days} days{more}" if days > 0 else f"it ended on {award['end']}")
    return lines


def show(answer: dict[str, Any]) -> None:
    """Print the answer."""
    what = {"sacct": "Slurm's accounting", "records": "run records: the training processes' own time"}[answer["source"]]
    print(f"{answer['from']} to {answer['to']}, from {what}")
    print(
        f"{answer['jobs']} jobs in {answer['starts']} starts: {hours(answer['gpu_hours'])} GPU-hours, "
        f"{hours(answer['node_hours'])} node-hours"
    )
    if answer["billed"]:
        print(f"billed: {hours(answer['billed']['amount'])} {answer['billed']['unit']} ({answer['billed']['basis']})")
    if answer["kwh"]:
        kwh = answer["kwh"]
        print(f"energy: {hours(kwh['measured'])} kWh measured in {kwh['runs_measured']} of {kwh['runs']} runs")
    for line in against(answer["award"]):
        print(line)
    print()
    plain_table(
        ["run", "jobs", "starts", "GPU-h", "again GPU-h", "state", "causes"], [_line(r) for r in answer["by_run"]]
    )
    print()
    rows = [[r["state"], str(r["starts"]), hours(r["gpu_hours"])] for r in answer["by_end"]]
    plain_table(["ended as", "starts", "GPU-h"], rows)


def _line(row: dict[str, Any]) -> list[str]:
    again = row["repeated_gpu_hours"]
    return [
        row["run"],
        str(row["jobs"]),
        str(row["starts"]),
        hours(row["gpu_hours"]),
        "-" if again is None else hours(again),
        row["state"] or "-",
        ", ".join(row["causes"]) or "-",
    ]


def page(answer: dict[str, Any]) -> str:
    """The answer as one HTML page. No script, no outside resource; every text escaped."""
    most = max((day["gpu_hours"] for day in answer["by_day"]), default=0.0)
    return render(TEMPLATE, autoescape=True, answer=answer, most=most, hours=hours, award=against(answer["award"]))


def anonymous(answer: dict[str, Any], path: Path) -> str:
    """The figures that name nobody, as JSON or as a page, by the file's name."""
    figures = answer["anonymous"]
    if path.suffix == ".json":
        return json.dumps(figures, indent=1) + "\n"
    if path.suffix == ".html":
        return render(TEMPLATE.with_name("anonymous.html.j2"), autoescape=True, figures=figures)
    raise UserError("figures are written as .json or .html", where=f"--anonymous {path}")


def final_report(answer: dict[str, Any], runs: list[RunRecord]) -> str:
    """A draft in Markdown: what was trained and used; what only people know is MISSING."""
    records = {run.name: run.record for run in runs}
    lines = ["# Final report", "", f"Period: {answer['from']} to {answer['to']} (source: {answer['source']})", ""]
    lines += ["## Use", "", *[f"* {text}" for text in against(answer["award"])]]
    if answer["award"] is None:
        lines.append("* award: MISSING (applicant)")
    lines.append(
        f"* {answer['jobs']} jobs, {hours(answer['gpu_hours'])} GPU-hours, {hours(answer['node_hours'])} node-hours"
    )
    if answer["billed"]:
        lines.append(f"* {hours(answer['billed']['amount'])} {answer['billed']['unit']} ({answer['billed']['basis']})")
    kwh = answer["kwh"]
    energy = f"{hours(kwh['measured'])} kWh measured in {kwh['runs_measured']} of {kwh['runs']} runs" if kwh else None
    lines.append(f"* energy: {energy or 'MISSING (site: no run could read a counter)'}")
    lines += [
        "",
        "## What was trained",
        "",
        "| run | recipe | base | GPU-hours | steps | state |",
        "|---|---|---|---|---|---|",
    ]
    for row in answer["by_run"]:
        record = records.get(row["run"], {})
        steps = record.get("compute", {}).get("totals", {}).get("steps", "-")
        cells = [
            row["run"],
            record.get("run", {}).get("recipe", "-"),
            row["base"] or "-",
            hours(row["gpu_hours"]),
            steps,
        ]
        lines.append("| " + " | ".join(str(c).replace("|", "\\|") for c in [*cells, row["state"] or "-"]) + " |")
    lines += ["", "## How jobs ended", ""]
    lines += [f"* {r['state']}: {r['starts']} starts, {hours(r['gpu_hours'])} GPU-hours" for r in answer["by_end"]]
    for title in ("Results", "Publications", "Impact", "Feedback on the service"):
        lines += ["", f"## {title}", "", "MISSING (applicant)"]
    return "\n".join(lines) + "\n"
