"""Several runs side by side: one row each, and their curves laid over one another."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from markupsafe import Markup

from aifactory_train.core.errors import UserError
from aifactory_train.core.files import object_or_nothing, reading
from aifactory_train.core.missing import is_missing
from aifactory_train.core.output import note
from aifactory_train.report.build import read_metrics
from aifactory_train.report.page_parts import page, table
from aifactory_train.report.svg import Curve, chart
from aifactory_train.run.folder import RunFolder, open_run

#: key, heading, is a number
COLUMNS: list[tuple[str, str, bool]] = [
    ("run", "run", False),
    ("state", "state", False),
    ("recipe", "recipe", False),
    ("base", "base", False),
    ("method", "method", False),
    ("steps", "steps", True),
    ("loss", "last loss", True),
    ("bits_per_byte_before", "bits/byte before", True),
    ("bits_per_byte_after", "after", True),
    ("tokens_per_s", "tokens/s", True),
    ("device_hours", "device h", True),
    ("kwh", "kWh", True),
]


def find_runs(folder: Path, names: list[str]) -> list[RunFolder]:
    """The named runs, or all below ``folder``, oldest first."""
    if names:
        found = []
        for name in names:
            path = folder / name
            found.append(RunFolder(path) if (path / "run.yaml").is_file() else open_run(name))
        return found
    runs = [RunFolder(p.parent) for p in folder.glob("*/run.yaml")]
    if not runs:
        raise UserError("holds no runs", where=str(folder), fix="name another folder with --folder")
    return sorted(runs, key=lambda r: r.config_file.stat().st_mtime)


def row(run: RunFolder) -> dict[str, Any]:
    """One line of the table. What a run did not record is None, never a guess; a run whose files are damaged says so
    and why (``fault``), and keeps no other from being shown."""
    try:
        with reading(run.path, "a file of this run is damaged", "aifactory verify RUN"):
            return _row(run)
    except UserError as error:
        note(str(error))
        return {**{key: None for key, _, _ in COLUMNS}, "run": run.path.name, "state": "damaged", "fault": str(error)}


def _row(run: RunFolder) -> dict[str, Any]:
    record = object_or_nothing(run.path / "record.json")
    results = object_or_nothing(run.eval_file)
    metrics = [m for m in read_metrics(run.metrics_file) if m.get("kind", "train") == "train"]
    state = run.state()
    totals = record.get("compute", {}).get("totals", {})
    speeds = [m["tokens_per_s"] for m in metrics if m.get("tokens_per_s")]
    kwh = record.get("energy", {}).get("measured_kwh")

    def figure(when: str) -> float | None:
        value = (results.get(when) or {}).get("bits_per_byte")
        return value if isinstance(value, (int, float)) else None

    return {
        "run": run.path.name,
        "state": state.get("state"),
        "recipe": record.get("run", {}).get("recipe"),
        "base": record.get("base", {}).get("id"),
        "method": record.get("method", {}).get("kind"),
        "steps": state.get("step"),
        "loss": metrics[-1].get("loss") if metrics else None,
        "bits_per_byte_before": figure("before"),
        "bits_per_byte_after": figure("after"),
        "tokens_per_s": statistics.median(speeds) if speeds else None,  # as `aifactory report` does: the median step
        "device_hours": totals.get("device_hours"),
        "kwh": None if is_missing(kwh) else kwh,
    }


def short_base(base: Any) -> Any:
    """The last part of a local path or of a file in a package: what tells models apart in a narrow column."""
    if not isinstance(base, str) or not base.startswith(("/", ".", "~", "pypi:", "npm:")):
        return base
    return base.rstrip("/").rpartition("#")[2].rpartition("/")[2]


def compare_page(runs: list[RunFolder], rows: list[dict[str, Any]]) -> str:
    """A self-contained page: the table, and the losses of up to three runs a chart (more would not be told apart)."""
    cells = [[_cell(r[key]) for key, _, _ in COLUMNS] for r in rows]
    charts = []
    for start in range(0, len(runs), 3):
        curves = []
        for run in runs[start : start + 3]:
            train = [m for m in read_metrics(run.metrics_file) if m.get("kind", "train") == "train" and "step" in m]
            if train:
                with reading(run.metrics_file, "is damaged"):
                    curves.append(Curve(run.path.name, [m["step"] for m in train], [m.get("loss") for m in train]))
        charts.append(
            chart(
                f"loss-{start}",
                "Loss" if len(runs) <= 3 else f"Loss, runs {start + 1} to {min(start + 3, len(runs))}",
                "nats per supervised token",
                curves,
            )
        )
    figures = table(
        "One row a run; what a run did not record is said",
        [label for _, label, _ in COLUMNS],
        cells,
        right=tuple(i for i, (_, _, number) in enumerate(COLUMNS) if number),
        label="Figures of the runs",
    )
    return page("compare.html.j2", f"{len(runs)} runs", runs=len(runs), table=figures, charts=Markup("".join(charts)))


def _cell(value: Any) -> str:
    return "not recorded" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
