"""The plan: the configuration that should be run on some nodes, and how many nodes that should be."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.planning import machine, search, timing, workload
from aifactory_train.planning import reasons as why
from aifactory_train.planning.job import GpuRates, Links, TrainingJob
from aifactory_train.planning.request import PlanRequest, Totals
from aifactory_train.planning.result import as_dict, time_and_cost
from aifactory_train.planning.search import Candidate
from aifactory_train.planning.timing import Constants
from aifactory_train.planning.workload import Fixed, Workload


@dataclass(frozen=True)
class Ready:
    """A request with what every number of nodes shares."""

    request: PlanRequest
    gpu: GpuRates
    links: Links
    work: Workload
    fixed: Fixed
    constants: Constants
    host_gib: float | None
    place: str | None  # the partition
    steps: int | None  # of the whole run

    @property
    def per_node(self) -> int:
        """GPUs of a node that the job takes."""
        return self.links.gpus_per_node

    @property
    def most(self) -> int | None:
        """Nodes of the largest job that the site publishes."""
        return _site_nodes(self.request, self.place, self.per_node)

    def node_counts(self) -> list[int]:
        """The fewest nodes of a job, powers of two, and the most that site and step allow."""
        least = _least_nodes(self.request, self.place)
        most = max(least, _most_nodes(self.request, self.place, self.work, self.per_node))
        powers = [1 << i for i in range(most.bit_length()) if least < 1 << i < most]
        return sorted({least, *powers, most})

    def check_limits(self, nodes: int) -> None:
        """Refuse a job of so many nodes where the partition or its QoS takes none."""
        _check_limits(self.request, self.place, nodes, self.per_node)

    def figures(self, run: Totals) -> dict[str, Any]:
        """Hours, GPU-hours, energy, CO2, cost and bill of a run: the keys that the plan has."""
        speeds = timing.interval(run.candidate.job, run.candidate.tokens_per_s, self.constants)
        mid = run.candidate.tokens_per_s
        return time_and_cost(self.request, self.gpu, run, self.place, (speeds[0], mid, speeds[1]))

    def tried(self, nodes: int) -> tuple[Totals, list[Candidate]]:
        """The best configuration on so many nodes, and all that fit; raises :class:`UserError` where none does."""
        world = nodes * self.per_node
        most = self.most * self.per_node if self.most else None
        found = search.search(self.work, self.gpu, self.links, world, self.fixed, self.constants, self.host_gib, most)
        return self.totals(nodes, found[0]), found[1]

    def totals(self, nodes: int, best: Candidate) -> Totals:
        """The run of a configuration from start to end."""
        before = 0.0
        if self.steps is not None and self.work.reference_passes:
            steps = _reference_steps(self.request, self.work, self.steps)
            before = steps * search.reference_seconds(best, self.work, self.constants)
        hours = None if self.steps is None else (self.steps * best.step + before) / 3600
        return Totals(nodes, nodes * self.per_node, best, self.steps, hours, before)


def ready(request: PlanRequest) -> Ready:
    """What a request comes to before a number of nodes is chosen. Raises :class:`UserError` where it comes to none."""
    from aifactory_train.sites.limits import require_usable

    system, recipe = request.system, request.recipe
    require_usable(system)
    gpu, links = machine.gpu_of(system), machine.links_of(system)
    per_node = links.gpus_per_node if request.gpus_per_node is None else request.gpus_per_node
    if not 1 <= per_node <= links.gpus_per_node:
        raise UserError(
            f"a node of {system.name} has {links.gpus_per_node} GPUs, {per_node} are asked for", where="--gpus-per-node"
        )
    work = workload.of_recipe(recipe, request.shape, request.size.document, request.size.supervised)
    return Ready(
        request,
        gpu,
        replace(links, gpus_per_node=per_node),  # ranks beyond these are on other nodes
        work,
        workload.fixed_by(recipe, request.given),
        Constants.load(),
        machine.host_memory_gib(system),
        _partition(request),
        _steps(request, work),
    )


def make(request: PlanRequest) -> tuple[dict[str, Any], TrainingJob]:
    """``(plan as plain values, its job)``: the keys of ``aifactory plan --json``. Raises :class:`UserError` where there
    can be none.
    """
    at = ready(request)
    gpu, links, work, place, per_node = at.gpu, at.links, at.work, at.place, at.per_node

    def totals(nodes: int) -> Totals:
        return at.tried(nodes)[0]

    reasons: list[str] = []
    nodes = request.nodes if request.nodes is not None else _auto(request, at, totals, reasons)
    _check_limits(request, place, nodes, per_node)
    run, fitting = at.tried(nodes)
    chosen = run.candidate
    curve = _curve(nodes, totals, run, place, request)
    reasons += why.of_choice(request, work, gpu, links, run, fitting, at.fixed)
    reasons += why.slower(run, curve, work)
    reasons += why.limits_of_time(run, place, request) + why.whole_nodes(request, place, per_node)
    return as_dict(request, work, gpu, run, fitting, reasons, curve, at.constants, place), chosen.job


# ---- numbers of nodes


def _partition(request: PlanRequest) -> str | None:
    system = request.system
    name = request.partition or system.default_partition
    if name is not None:
        system.partition(name)  # refuses an unknown one
    return name


def _check_limits(request: PlanRequest, place: str | None, nodes: int, per_node: int) -> None:
    system = request.system
    if nodes < 1:
        raise UserError("at least one node is needed", where="--nodes")
    if place is None:
        if system.node.count and nodes > system.node.count:
            raise UserError(f"{system.name} has {system.node.count} nodes, {nodes} are asked for", where="--nodes")
        return
    from aifactory_train.sites import broken_limit

    broken = broken_limit(system, place, request.qos, nodes, None, per_node)
    if broken:
        raise UserError(broken, where="--nodes", fix="fewer nodes, or another --partition or --qos of the site")


def _site_nodes(request: PlanRequest, place: str | None, per_node: int) -> int | None:
    """The largest number of nodes of a job that the site publishes."""
    found = [request.system.node.count]
    if place is not None:
        found.append(request.system.limits(place, request.qos, per_node)["max_nodes"])
    return min((n for n in found if n), default=None)


def _least_nodes(request: PlanRequest, place: str | None) -> int:
    """The smallest number of nodes of a job that the site publishes for that partition and QoS."""
    found = request.system.limits(place, request.qos)["min_nodes"] if place is not None else None
    return found or 1


def _most_nodes(request: PlanRequest, place: str | None, work: Workload, per_node: int) -> int:
    """The largest number of nodes that the site and the size of a step allow."""
    limits = [search.MOST_RANKS // per_node, math.floor(work.step_rows + 1e-9) // per_node]
    return max(1, min(*limits, _site_nodes(request, place, per_node) or limits[0]))


def _auto(request: PlanRequest, at: Ready, totals: Any, reasons: list[str]) -> int:
    """How many nodes: the fewest that meet the deadline, the most that the budget pays, or else the cheapest."""
    tried: list[Totals] = []
    refused: UserError | None = None
    counts = at.node_counts()
    for n in counts:
        try:
            tried.append(totals(n))
        except UserError as error:
            refused = error
    if not tried:
        assert refused is not None
        raise refused
    if request.deadline_hours is not None or request.budget_gpu_hours is not None:
        if tried[0].hours is None:
            raise UserError(
                "a deadline or a budget needs to know how much there is to train on",
                where="--tokens",
                fix="run 'aifactory prepare' first, give --tokens, or set train.max_steps",
            )
        good = [
            t
            for t in tried
            if (request.deadline_hours is None or (t.hours or 0) <= request.deadline_hours)
            and (request.budget_gpu_hours is None or (t.gpu_hours or 0) <= request.budget_gpu_hours)
        ]
        if not good:
            quickest = min(tried, key=lambda t: t.hours or 0)
            cheapest = min(tried, key=lambda t: t.gpu_hours or 0)
            raise UserError(
                f"no number of nodes up to {counts[-1]} meets the deadline and the budget: the quickest is "
                f"{quickest.nodes} node(s) with {quickest.hours:.2f} h, the cheapest {cheapest.nodes} node(s) with "
                f"{cheapest.gpu_hours:.2f} GPU-hours",
                where="--deadline" if request.deadline_hours is not None else "--budget",
                fix="allow more time or GPU-hours, fewer epochs (train.epochs), or an adapter instead of full "
                "fine-tuning",
            )
        if request.deadline_hours is not None:
            pick = min(good, key=lambda t: (t.nodes, t.gpu_hours or 0))
            reasons.append(
                f"nodes: {pick.nodes}, the fewest of 1, 2, 4, … that finish within {request.deadline_hours:g} h"
            )
        else:
            pick = min(good, key=lambda t: (t.hours or 0, t.nodes))
            reasons.append(f"nodes: {pick.nodes}, the quickest that {request.budget_gpu_hours:g} GPU-hours pay")
        return pick.nodes
    cost = [t.gpus * t.candidate.step for t in tried]
    pick = next(t for t, c in zip(tried, cost, strict=True) if c <= 1.05 * min(cost))
    reasons.append(
        f"nodes: {pick.nodes}, the fewest within 5 % of the least GPU-hours (no deadline and no budget was given)"
    )
    return pick.nodes


def _curve(nodes: int, totals: Any, run: Totals, place: str | None, request: PlanRequest) -> list[Totals]:
    """The same run on 1, 2, 4, … nodes up to twice as many, at most seven counts; counts that fit nothing, or that the
    partition takes no job of, are left out."""
    counts, n = [], _least_nodes(request, place)
    limit = _site_nodes(request, place, run.gpus // run.nodes)
    while n <= min(2 * nodes, limit or 2 * nodes):
        counts.append(n)
        n *= 2
    found = []
    for count in sorted({*counts[-7:], nodes}):
        if count == nodes:
            found.append(run)
            continue
        try:
            found.append(totals(count))
        except UserError:
            continue  # too few GPUs for the model, or too many for the step: no point of the curve
    return found


def _steps(request: PlanRequest, work: Workload) -> int | None:
    """Optimizer steps of the whole run, or ``None`` where the size is not known and no maximum is set."""
    train = request.recipe.train
    epoch = _steps_of_epoch(request, work)
    if epoch is None:
        return train.max_steps
    whole = math.floor(train.epochs)  # steps do not span epochs (data/sampler.py)
    steps = max(1, whole * epoch + math.ceil((train.epochs - whole) * epoch))
    return min(steps, train.max_steps) if train.max_steps else steps


def _steps_of_epoch(request: PlanRequest, work: Workload) -> int | None:
    size = request.size
    if size.tokens is None:
        return None
    if work.by_rows and size.rows is not None:
        return math.ceil(size.rows / work.step_rows)
    return math.ceil(size.tokens / work.step_tokens)


def _reference_steps(request: PlanRequest, work: Workload, steps: int) -> int:
    """The reference scores each row once that the run comes by: so many steps' worth."""
    epoch = _steps_of_epoch(request, work)
    return steps if epoch is None else min(steps, epoch)
