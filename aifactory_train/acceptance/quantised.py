"""One step on a 4-bit base."""

from __future__ import annotations

import importlib.util

from aifactory_train.acceptance import processes, small
from aifactory_train.acceptance.report import NotHere, Report


def check(report: Report) -> None:
    """``adapter.quantise_base: nf4`` through the command line, where bitsandbytes is installed."""
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise NotHere(f"{package} is not installed: no 4-bit bases here (pip install 'aifactory-train[qlora]')")
    recipe = small.run_files(report.work / "files", adapter__quantise_base="nf4", train__max_steps=2,
                             eval__before=False, eval__after=False, export__automatic=False)  # fmt: skip
    log, run = report.work / "train.log", report.work / "run"
    report.begin("two steps")
    code, _ = processes.call("train", recipe, "--run-dir", run, "--quiet", log=log, fork=not report.gpu)
    if report.expect(code == 0, f"the run ended with {code}: {processes.end_of(log)}"):
        from aifactory_train.acceptance.resume import losses

        report.figures["losses"] = list(losses(run).values())
