"""An answer to a question of a form, and all that answers are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.planning.job import TrainingJob
    from aifactory_train.sites.system import System

PLAN, MEASURED = "from the plan", "measured"
Value = str | dict[str, Any] | None


@dataclass(frozen=True)
class Case:
    """All that an annex is drafted from. ``report``: name and report of the prepared data, where there are some;
    ``scaling``: a measured campaign of ``aifactory scale``; ``runs``: how often the job is to be run."""

    recipe: Recipe
    system: System
    route: str
    plan: dict[str, Any]
    job: TrainingJob
    runs: int = 1
    report: tuple[str, dict[str, Any]] | None = None
    scaling: dict[str, Any] | None = None


@dataclass(frozen=True)
class Said:
    """An answer with where it comes from; without a value ``who`` has to give it."""

    value: Value
    source: str
    who: str | None = None
    status: str = PLAN


def table(columns: list[str], rows: list[list[Any]]) -> dict[str, Any]:
    return {"columns": columns, "rows": [[str(cell) for cell in row] for row in rows]}


def gib(count: float) -> str:
    return f"{count / 2**30:,.3g} GiB"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def fact_of(case: Case, path: str) -> str:
    """The source of a fact of the profile, as words."""
    fact = case.system.provenance(path)
    return f"profile of {case.system.id}, {path}: {fact.source} ({fact.confidence})" if fact else "profile, not stated"


#: Who is to say how much there is to train on.
UNSIZED = "applicant: 'aifactory prepare' counts the data, or --tokens"
