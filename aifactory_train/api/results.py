"""What a run did, and how it does on other rows."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from markupsafe import Markup

from aifactory_train.api import showing
from aifactory_train.api.preparing import FOLDER
from aifactory_train.api.rows import Rows, as_source
from aifactory_train.config.schema import Recipe
from aifactory_train.core.figures import FIGURES, certainty
from aifactory_train.core.files import object_or_nothing
from aifactory_train.evaluation.verdict import Verdict
from aifactory_train.run.folder import RunFolder, open_run

#: A run as the functions of the API take it: its name below ``runs/``, its folder, or what ``train`` gave.
AnyRun: TypeAlias = "str | os.PathLike[str] | TrainedRun"


@dataclass(frozen=True)
class TrainedRun:
    """A run, read from its folder whenever it is asked: also one that trains now.

    >>> import aifactory_train as af
    >>> run = af.TrainedRun.open("first")
    >>> run.state, run.step, len(run.metrics)
    ('finished', 4, 4)
    >>> run.before["bits_per_byte"] > run.after["bits_per_byte"]
    True
    """

    folder: RunFolder

    @classmethod
    def open(cls, run: AnyRun) -> TrainedRun:
        """A run by its name below ``runs/``, or by its folder. Raises :class:`UserError` where there is none."""
        return run if isinstance(run, TrainedRun) else cls(open_run(os.fspath(run)))

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def recipe(self) -> Recipe:
        """Everything resolved, as ``run.yaml`` holds it."""
        return self.folder.load_config()

    @property
    def state(self) -> str:
        """``running``, ``stopped``, ``failed`` or ``finished``."""
        return str(self.folder.state()["state"])

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.folder.state().get("step", 0))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``: a mapping for each step (``kind`` is ``train``) and evaluation (``eval``)."""
        from aifactory_train.report.build import read_metrics

        return read_metrics(self.folder.metrics_file)

    @property
    def results(self) -> dict[str, Any]:
        """``eval.json``: ``before``, ``after``, ``change``, ``forgetting``, ``verdict`` (docs/metrics.md)."""
        return object_or_nothing(self.folder.eval_file)

    @property
    def before(self) -> dict[str, Any]:
        """Held-out figures before the training; empty where there are none."""
        return self.results.get("before") or {}

    @property
    def after(self) -> dict[str, Any]:
        """Held-out figures after the training; empty where there are none."""
        return self.results.get("after") or {}

    @property
    def verdict(self) -> Verdict | None:
        """What the figures come to in a sentence; None before the end."""
        return Verdict.read(self.results)

    def report(self) -> Path:
        """Write ``report.html`` of the run, and return its path."""
        from aifactory_train.record.files import load_record
        from aifactory_train.report import write_report

        return write_report(self.folder, load_record(self.path))

    def __repr__(self) -> str:
        said = f": {self.verdict.sentence}" if self.verdict else ""
        return f"<TrainedRun {self.path} {self.state} after step {self.step}{said}>"

    def _repr_html_(self) -> str:
        from aifactory_train.report.curves import curves

        results, verdict = self.results, self.verdict
        parts: list[Markup] = []
        if verdict is not None:
            said = Markup('<p class="verdict {}">{}<br>next: <code>{}</code></p>')
            parts.append(said.format(verdict.word.replace(" ", "-"), verdict.sentence, verdict.next))
        parts.append(_compared(results))
        if self.recipe.privacy.profile == "open":
            earlier = {s.get("prompt"): s.get("answer") for s in self.before.get("samples") or []}
            parts.append(showing.samples(self.after.get("samples") or [], earlier))
        else:
            parts.append(showing.paragraph("Answers are withheld: the run's privacy profile keeps texts out."))
        parts.append(Markup(curves(self.metrics, {}, object_or_nothing(self.path / "plan.json"))))
        return showing.fragment(f"{self.path}: {self.state} after step {self.step}", parts)


def _compared(results: Mapping[str, Any]) -> Markup:
    """Figures before and after, with the difference and its interval."""
    before, after = results.get("before") or {}, results.get("after") or {}
    rows = []
    for name, (label, sense) in FIGURES.items():
        if not isinstance(after.get(name), (int, float)):
            continue
        old, change = before.get(name), (results.get("change") or {}).get(name) or {}
        ci = change.get("ci")
        interval = f"{ci[0]:+.3g} to {ci[1]:+.3g}" if ci else ""
        certain = certainty(change) if change else ""
        shown = f"{old:.4g}" if isinstance(old, (int, float)) else ""
        rows.append([f"{label} ({sense})", shown, f"{after[name]:.4g}", interval, certain])
    if not rows:
        return showing.paragraph("Nothing was evaluated yet.")
    return showing.table(["held-out rows", "before", "after", "95 % of the difference", ""], rows)


@dataclass(frozen=True)
class Evaluation:
    """How a run's model does on rows: ``figures`` with their intervals, and a prediction for each row.

    >>> import aifactory_train as af
    >>> found = af.evaluate("first", data="eval.jsonl", rows=4, generate=False)
    >>> found.figures["rows"], found.interval("bits_per_byte")[0] < found.figures["bits_per_byte"]
    (4, True)
    """

    run: Path
    data: str
    figures: dict[str, Any]
    predictions: list[dict[str, Any]]

    def interval(self, name: str) -> tuple[float, float] | None:
        """The 95 % bootstrap interval of a figure; None where it has none."""
        found = self.figures["ci"].get(name)
        return None if found is None else (float(found[0]), float(found[1]))

    def _repr_html_(self) -> str:
        rows = []
        for name, (label, sense) in FIGURES.items():
            if isinstance(self.figures.get(name), (int, float)):
                ci = self.interval(name)
                shown = f"{ci[0]:.4g} to {ci[1]:.4g}" if ci else ""
                rows.append([f"{label} ({sense})", f"{self.figures[name]:.4g}", shown])
        parts = [showing.table(["", "value", "95 % interval"], rows)]
        asked = [p for p in self.predictions if "answer" in p][:10]
        if asked and TrainedRun.open(self.run).recipe.privacy.profile == "open":
            cells = [[p["prompt"], p["expected"], p["answer"]] for p in asked]
            parts.append(showing.table(["prompt", "expected", "answer"], cells))
        return showing.fragment(f"{self.run.name} on {self.figures['rows']} rows of {self.data}", parts)


def evaluate(
    run: AnyRun,
    *,
    data: Rows,
    rows: int | None = None,
    generate: bool = True,
    max_new_tokens: int | None = None,
) -> Evaluation:
    """Score any rows with the model of a run.

    Args:
        run: its name below ``runs/``, its folder, or what ``train`` gave.
        data: rows as :func:`aifactory_train.recipe` takes them.
        rows: only so many, evenly spaced.
        generate: also let the model answer, and rate the answers; False: likelihood alone, which is quick.
        max_new_tokens: longest answer; default: the recipe's.

    Raises :class:`UserError` for an unknown run or rows that cannot be read.

    >>> import aifactory_train as af
    >>> rows = [{"prompt": "What colour is the door?", "completion": "The door is red."}] * 2
    >>> af.evaluate("first", data=rows, max_new_tokens=4).predictions[0]["expected"]
    'The door is red.'
    """
    from aifactory_train.commands import eval as command

    folder = TrainedRun.open(run).folder
    source = as_source(data, f"{folder.path.name}-scored", Path(FOLDER), "data")
    args = argparse.Namespace(data=source, rows=rows, max_new_tokens=max_new_tokens)
    figures, predictions = command.score(folder, command.scoring_recipe(folder.load_config(), args), generate=generate)
    return Evaluation(folder.path, source, figures, predictions)
