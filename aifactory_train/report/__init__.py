"""The report of a run for people: one self-contained page, a live view of it, and comparisons of runs."""

from aifactory_train.report.build import build, write_report

__all__ = ["build", "write_report"]
