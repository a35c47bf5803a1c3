"""What a plan is asked for, and a run of some number of nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aifactory_train.planning.size import Size

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.model.shapes import ModelShape
    from aifactory_train.planning.search import Candidate
    from aifactory_train.sites import System


@dataclass(frozen=True)
class PlanRequest:
    """Everything that a plan depends on."""

    recipe: Recipe
    shape: ModelShape
    system: System
    nodes: int | None  # None: auto
    gpus_per_node: int | None = None
    partition: str | None = None
    qos: str | None = None
    deadline_hours: float | None = None
    budget_gpu_hours: float | None = None
    given: frozenset[str] = frozenset()  # keys that were set for this plan (--set): they are not the plan's to choose
    size: Size = field(default_factory=lambda: Size(None, None, None, None, "unknown"))


@dataclass(frozen=True)
class Totals:
    """A run from start to end on some number of GPUs."""

    nodes: int
    gpus: int
    candidate: Candidate
    steps: int | None
    hours: float | None  # the reference's pass included
    reference_s: float = 0.0  # scoring the run's rows before the first step (methods.preference)

    @property
    def gpu_hours(self) -> float | None:
        return None if self.hours is None else self.hours * self.gpus
