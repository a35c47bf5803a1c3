"""How many nodes of each system a recipe's job takes, and what that comes to: the planner, asked once for each kind of
machine."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aifactory_train.core.errors import UserError
from aifactory_train.planning import search
from aifactory_train.planning.plan import Ready, ready
from aifactory_train.planning.request import PlanRequest, Totals

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.model.shapes import ModelShape
    from aifactory_train.planning.search import Candidate
    from aifactory_train.planning.size import Size
    from aifactory_train.sites import System


@dataclass(frozen=True)
class Demand:
    """A recipe with what a plan needs to know of it beside the system."""

    recipe: Recipe
    shape: ModelShape
    size: Size
    given: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, recipe: Recipe, tokens: float | None = None, model_config: str | None = None, given: Iterable[str] = ()
    ) -> Demand:
        """Raises :class:`UserError` where the recipe cannot be planned anywhere."""
        from aifactory_train.config.quantised_base import check_quantised
        from aifactory_train.planning import dimensions, size, workload

        shape = dimensions.of_model(recipe.model, model_config)
        check_quantised(shape.quantised, f"model.base: {recipe.model.base}", recipe.adapter.quantise_base)
        given = frozenset(given)
        touched = any(
            key.startswith(("data.train", "data.supervise", "model.base", "data.sequence_length")) for key in given
        )
        counted = size.of_recipe(recipe, tokens, data_overridden=touched)
        workload.of_recipe(recipe, shape, counted.document, counted.supervised)  # refuses what no site could run
        return cls(recipe, shape, counted, given)


@dataclass(frozen=True)
class Fit:
    """A job on a system: as many nodes as it takes, and the figures of the plan for them."""

    nodes: int
    gpus_per_node: int
    whole_nodes: bool  # all GPUs of a node are taken
    figures: dict[str, Any]  # planning.plan.Ready.figures
    pieces: int  # jobs that follow each other under the time limit; 1 where none is known


@dataclass(frozen=True)
class NoFit:
    """Why a job is not for a system. kind: facts, memory, limits, deadline or budget."""

    kind: str
    why: str


class Sizer:
    """Sizes one job on many systems. Systems with the same GPU, links and host memory are searched once."""

    def __init__(self, job: Demand, deadline_hours: float | None = None, budget_gpu_hours: float | None = None) -> None:
        self.job, self.deadline, self.budget = job, deadline_hours, budget_gpu_hours
        self._searched: dict[Hashable, tuple[Candidate | None, float]] = {}

    def of(self, system: System) -> Fit | NoFit:
        """The fewest nodes that do the job, within the deadline where there is one."""
        qos = system.user.qos if system.user.qos in system.qos else None
        request = PlanRequest(
            recipe=self.job.recipe,
            shape=self.job.shape,
            system=system,
            nodes=None,
            partition=system.user.partition,
            qos=qos,
            given=self.job.given,
            size=self.job.size,
        )
        try:
            at = _within_a_step(ready(request))
        except UserError as error:
            return NoFit("facts", error.what)
        return self._fewest(at, system)

    def _fewest(self, at: Ready, system: System) -> Fit | NoFit:
        short: NoFit | None = None
        quickest: Totals | None = None
        for nodes in at.node_counts():
            try:
                at.check_limits(nodes)
                best, leanest = self._best(at, nodes)
            except UserError as error:
                short = short or NoFit("limits", error.what)
                continue
            if best is None:
                short = NoFit(
                    "memory",
                    f"needs {leanest:.1f} GiB on each of {nodes * at.per_node} GPUs, {at.gpu.memory_gib:.1f} are there "
                    f"({100 * search.MARGIN:.0f} % stay free)",
                )
                continue
            run = at.totals(nodes, best)
            if self.deadline is None or (run.hours or 0.0) <= self.deadline:
                return self._priced(at, run, system)
            if quickest is None or (run.hours or 0.0) < (quickest.hours or 0.0):
                quickest = run
        if quickest is not None:
            return NoFit("deadline", f"takes {quickest.hours:.3g} h on {quickest.nodes} node(s), the quickest there")
        return short or NoFit("limits", "takes no job of this size")

    def _best(self, at: Ready, nodes: int) -> tuple[Candidate | None, float]:
        """``(the best configuration or None, GiB of the leanest)`` on so many nodes."""
        world = nodes * at.per_node
        key = (at.gpu, at.links, at.host_gib, world)
        if key not in self._searched:
            fits, every = search.what_fits(at.work, at.gpu, at.links, world, at.fixed, at.host_gib)
            best = search.best([search.timed(c, at.work, at.constants) for c in fits]) if fits else None
            self._searched[key] = best, min((c.memory.total for c in every), default=math.inf)
        return self._searched[key]

    def _priced(self, at: Ready, run: Totals, system: System) -> Fit | NoFit:
        if self.budget is not None and (run.gpu_hours or 0.0) > self.budget:
            return NoFit("budget", f"takes {run.gpu_hours:,.4g} GPU-hours on {run.nodes} node(s)")
        limit = system.limits(at.place, at.request.qos)["max_time"] if at.place is not None else None
        pieces = math.ceil(run.hours * 3600 / limit) if limit and run.hours else 1
        whole = at.per_node == system.node.gpus
        return Fit(run.nodes, at.per_node, whole, at.figures(run), max(1, pieces))


def _within_a_step(at: Ready) -> Ready:
    """Where a step has fewer rows than a node has GPUs: as many GPUs of it as can be given a row each."""
    rows = math.floor(at.work.step_rows + 1e-9)
    if rows >= at.per_node:
        return at
    most = max((n for n in range(1, at.per_node) if at.per_node % n == 0 and n <= rows), default=1)
    return ready(replace(at.request, gpus_per_node=most))
