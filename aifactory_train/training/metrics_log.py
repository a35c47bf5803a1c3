"""What the run says while it trains: metrics.jsonl, TensorBoard, the progress line and the tables at start and end."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import time
from typing import Any

from aifactory_train.core import output
from aifactory_train.core.errors import UserError
from aifactory_train.core.figures import duration, measured
from aifactory_train.core.files import read_json, write_atomic, write_json
from aifactory_train.evaluation.verdict import Verdict
from aifactory_train.metrics import ANSWER_METRICS, HEAD_METRICS, LIKELIHOOD_METRICS, PREFERENCE_METRICS
from aifactory_train.record.events import Evaluated, Event, Incident, RunEnded, StepDone
from aifactory_train.run.folder import RunFolder


class MetricsLog:
    """Appends rows to ``metrics.jsonl`` and TensorBoard (rank 0 only; elsewhere every call does nothing).

    Rows that could not be written (a full disk) are kept and written before the next one, so that a run which outlives
    the trouble has no hole in its curve.
    """

    def __init__(self, run: RunFolder, *, enabled: bool, tensorboard: bool, every: int = 1):
        self.run, self.enabled, self.tensorboard, self.every = run, enabled, tensorboard, every
        self._file: Any = None
        self._whole = 0  # bytes of the file that are whole rows
        self._waiting: list[bytes] = []
        self._board: Any = None

    def open(self, step: int) -> None:
        """Start, or go on after ``step``: records of later steps belong to work that will be repeated and are
        dropped.
        """
        if not self.enabled:
            return
        path = self.run.metrics_file
        if os.path.lexists(path) and not path.is_file():  # a pipe would be waited for without end
            raise UserError("is no regular file", where=str(path), fix="move what lies there away")
        if path.is_file():
            kept, odd = [], []
            # not splitlines: a row's id may hold U+2028
            *lines, torn = path.read_bytes().split(b"\n")
            for number, line in enumerate([*lines, torn], 1):
                try:
                    record = json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError):
                    record = None
                if isinstance(record, dict) and isinstance(record.get("step", 0), int):
                    kept += [line] if record.get("step", 0) <= step else []
                elif line is not torn:  # that one was being written when the run was killed
                    odd.append(number)
            if odd:
                output.note(f"{path}:{odd[0]}: {len(odd):,} lines that are no rows of metrics are left out")
            write_atomic(path, b"".join(line + b"\n" for line in kept).decode("utf-8"))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed in close()
        self._whole = self._file.seek(0, 2)
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.run.tensorboard), purge_step=step + 1 if step else None)

    def hear(self, event: Event) -> None:
        """Every step's figures, what the guard left out, and evaluations between steps."""
        if isinstance(event, StepDone):
            self.write(event.metrics, last=event.last)
        elif isinstance(event, Incident):
            self.write(event.metrics)
        elif isinstance(event, Evaluated) and event.when == "during":
            self.write({"kind": "eval", "step": event.step, **event.figures})
        elif isinstance(event, RunEnded):
            self.close()

    def write(self, record: dict[str, Any], *, last: bool = False) -> None:
        """One row. Of training steps every ``every``-th and the last one; a step that the guard left out is never
        dropped.
        """
        trained = record.get("kind", "train") == "train"
        if self._file is None or (trained and record.get("step", 0) % self.every and not last):
            return
        self._waiting.append((json.dumps(record, ensure_ascii=False, default=str) + "\n").encode())
        self._flush()
        if self._board is not None:
            kind = record.get("kind", "train")
            for key, value in record.items():
                if key not in ("step", "kind") and isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._board.add_scalar(f"{kind}/{key}", value, record.get("step", 0))

    def _flush(self) -> None:
        """All waiting rows, or none of a row: what was written of one that failed is taken back."""
        while self._waiting:
            row = self._waiting[0]
            try:
                if self._file.write(row) != len(row):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.run.metrics_file))
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._whole)
                raise
            self._whole += len(row)
            del self._waiting[0]

    def close(self) -> None:
        if self._file is not None:
            try:
                self._flush()
            finally:
                self._file.close()
                self._file = None
        if self._board is not None:
            self._board.close()
            self._board = None


class Progress:
    """A live line on a terminal; in a batch log one plain line every few seconds."""

    PLAIN_EVERY_S = 15.0

    def __init__(self, total: int, done: int, *, enabled: bool):
        self.total, self.enabled = total, enabled
        self._bar: Any = None
        self._task: Any = None
        self._done_at_start = done
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> Progress:
        if self.enabled and sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("step"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=output.console(stderr=True),
            )
            self._task = self._bar.add_task("", total=self.total, completed=self._done_at_start)
            self._bar.start()
        return self

    def __exit__(self, *exc) -> None:
        if self._bar is not None:
            self._bar.stop()

    def hear(self, event: Event) -> None:
        """The line moves on with every optimizer step."""
        if isinstance(event, StepDone):
            self.update(event.metrics)

    def update(self, record: dict[str, Any]) -> None:
        if not self.enabled:
            return
        text = (
            f"loss {record['loss']:.4f}  grad {record['grad_norm']:.3f}  lr {record['learning_rate']:.2e}  "
            f"{record['tokens_per_s']:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], description=text)
            return
        now, step = time.monotonic(), record["step"]
        if step == self.total or step == self._done_at_start + 1 or now - self._printed >= self.PLAIN_EVERY_S:
            self._printed = now
            left = (now - self._started) / max(1, step - self._done_at_start) * (self.total - step)
            output.note(f"step {step}/{self.total}  {text}  {duration(left)} left")


def print_start(recipe, run: RunFolder, world, report, data, total_steps: int) -> None:
    """What was chosen, and why, before any work is done."""
    from aifactory_train.data.report import rows_line

    train_set = data.train
    count = "GPU" if world.device != "cpu" else "CPU process"
    rows = [
        ["recipe", recipe.id, recipe.about.title],
        [
            "model",
            recipe.model.base,
            f"{report.parameters / 1e6:,.1f} M parameters, {report.trainable / 1e6:,.2f} M trained",
        ],
        [
            "ranks",
            f"{world.size} {count}{'es' if world.device == 'cpu' else 's (on MI250X a GPU is one GCD)'}"
            if world.size > 1
            else f"1 {count}",
            world.started_by,
        ],
        *[[what, choice, why] for what, choice, why in report.lines],
        [
            "data",
            f"{len(train_set.lengths):,} documents, {int(train_set.lengths.sum()):,} tokens, "
            f"{int(train_set.supervised.sum()):,} supervised",
            ", ".join(f"{name}: {len(held.lengths):,} held out" for name, held in data.evals.items()),
        ],
        *([["rows", *rows_line(data.report)]] if "rows" in data.report else []),
        [
            "step",
            f"{recipe.train.batch_rows} documents"
            if recipe.train.batch_rows
            else f"{recipe.train.batch_tokens} tokens",
            f"{recipe.data.batching}; {total_steps} steps",
        ],
        ["run folder", str(run.path), ""],
    ]
    output.table(None, ["", "chosen", "why"], rows)
    for warning in data.report.get("warnings", []):
        output.note(f"warning: {warning}")


def print_comparison(results: dict[str, Any], run: RunFolder, exported: dict[str, Any] | None) -> None:
    """Held-out figures before and after, with the change, where things lie, and what it all comes to."""
    before, after = results.get("before") or {}, results.get("after") or {}
    names = [k for k in (*LIKELIHOOD_METRICS, *ANSWER_METRICS, "memorisation") if k in before or k in after]
    names += [k for k in (*HEAD_METRICS, *PREFERENCE_METRICS) if k in before or k in after]
    rows = []
    paired = results.get("change") or {}
    for name in names:
        old, new = before.get(name), after.get(name)
        change = ""
        if isinstance(old, float) and isinstance(new, float) and old and math.isfinite(old) and math.isfinite(new):
            change = f"{100 * (new - old) / abs(old):+.1f} %"
        ci = (paired.get(name) or {}).get("ci")
        shown = f"{ci[0]:+.3g} to {ci[1]:+.3g}" if ci else ""
        rows.append([name.replace("_", " "), measured(old), measured(new), change, shown])
    if rows:
        head = ["", "before", "after", "change", "95 % of the difference"]
        output.table("held-out rows", head, rows, right=(1, 2, 3, 4))
    forgotten = results.get("forgetting")
    if forgotten:
        if forgotten["warning"]:
            output.note(f"warning: {forgotten['warning']}")
        else:
            print(
                f"general text: {forgotten['before']:.3f} to {forgotten['after']:.3f} bits per byte "
                f"({forgotten['change']:+.1%})"
            )
    for label, path in (exported or {}).get("paths", {}).items():
        print(f"{label}: {path}")
    print(f"run folder: {run.path}")
    verdict = Verdict.read(results)
    if verdict is not None:
        print(f"verdict: {verdict.sentence}\nnext: {verdict.next}")


def compare_with_plan(run: RunFolder, world) -> dict[str, Any] | None:
    """Write ``reality.json``: what the run measured over what its plan predicted. Nothing where there is no plan.

    Speed is the median step after the first three (compilation, caches); peak memory is torch's on a GPU, the process's
    on a CPU.
    """
    import resource
    import statistics

    from aifactory_train.planning.reality import compare

    if not (run.path / "plan.json").is_file():
        return None
    plan = read_json(run.path / "plan.json")
    if not isinstance(plan, dict) or "tokens_per_s_per_gpu" not in plan:
        return None  # the planner refused, and the job was sent all the same
    steps = []
    for line in filter(None, run.metrics_file.read_text(encoding="utf-8").split("\n")):
        record = json.loads(line)
        if record.get("kind") == "train":
            steps.append(record["tokens"] / record["seconds"] / world.size)
    speed = statistics.median(steps[3:]) if len(steps) > 3 else None
    if world.device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    else:
        import torch

        peak = torch.cuda.max_memory_reserved(world.device) / 2**30
    found = compare(plan, speed, peak)
    write_json(run.path / "reality.json", found)
    return found
