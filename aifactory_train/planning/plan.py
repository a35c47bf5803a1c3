"""The plan: the configuration that should be run, what it is predicted to need, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from aifactory_train import flops
from aifactory_train.errors import UserError
from aifactory_train.planning import machine, memory, search, settings, timing
from aifactory_train.planning.job import STACKS, Gpu, Job, Links
from aifactory_train.planning.search import Candidate, Fixed, Workload
from aifactory_train.planning.size import Size
from aifactory_train.planning.timing import Constants

if TYPE_CHECKING:
    from aifactory_train.config import Recipe
    from aifactory_train.planning.shapes import Shape
    from aifactory_train.sites import System

#: Mean draw of a GPU in training as a share of its nominal (or capped) power. An assumption: measure it with the site's counters.
POWER_SHARE = 0.85


@dataclass(frozen=True)
class Request:
    """Everything that a plan depends on."""

    recipe: Recipe
    shape: Shape
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


def make(request: Request) -> tuple[dict[str, Any], Job]:
    """``(plan as plain values, its job)``: the keys of ``aifactory plan --json``. Raises :class:`UserError` where there can be none."""
    from aifactory_train.sites.selection import require_usable

    system, recipe = request.system, request.recipe
    require_usable(system)
    gpu, links = machine.gpu_of(system), machine.links_of(system)
    per_node = links.gpus_per_node if request.gpus_per_node is None else request.gpus_per_node
    if not 1 <= per_node <= links.gpus_per_node:
        raise UserError(
            f"a node of {system.name} has {links.gpus_per_node} GPUs, {per_node} are asked for", where="--gpus-per-node"
        )
    links = replace(links, gpus_per_node=per_node)  # ranks beyond these are on other nodes
    constants = Constants.load()
    work = search.workload(recipe, request.shape, request.size.document, request.size.supervised)
    fixed = search.fixed_by(recipe, request.given)
    host = machine.host_memory_gib(system)
    place = _partition(request)
    steps = _steps(request, work)
    most = _site_nodes(request, place, per_node)

    def tried(nodes: int) -> tuple[Totals, list[Candidate]]:
        """The best configuration on so many nodes, and all that fit."""
        world = nodes * per_node
        best, every = search.search(work, gpu, links, world, fixed, constants, host, most * per_node if most else None)
        before = 0.0
        if steps is not None and work.reference_passes:
            before = _reference_steps(request, work, steps) * search.reference_seconds(best, work, constants)
        hours = None if steps is None else (steps * best.step + before) / 3600
        return Totals(nodes, world, best, steps, hours, before), every

    def totals(nodes: int) -> Totals:
        return tried(nodes)[0]

    reasons: list[str] = []
    nodes = request.nodes if request.nodes is not None else _auto(request, work, per_node, place, totals, reasons)
    _check_limits(request, place, nodes, per_node)
    run, fitting = tried(nodes)
    chosen = run.candidate
    curve = _curve(nodes, totals, run, place, request)
    reasons += _reasons(request, work, gpu, links, run, fitting, fixed)
    reasons += _slower(run, curve, work)
    reasons += _limits_of_time(run, place, request)
    return _as_dict(request, work, gpu, run, fitting, reasons, curve, constants, place), chosen.job


# ---- numbers of nodes


def _partition(request: Request) -> str | None:
    system = request.system
    name = request.partition or system.default_partition
    if name is not None:
        system.partition(name)  # refuses an unknown one
    return name


def _check_limits(request: Request, place: str | None, nodes: int, per_node: int) -> None:
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


def _site_nodes(request: Request, place: str | None, per_node: int) -> int | None:
    """The largest number of nodes of a job that the site publishes."""
    found = [request.system.node.count]
    if place is not None:
        found.append(request.system.limits(place, request.qos, per_node)["max_nodes"])
    return min((n for n in found if n), default=None)


def _most_nodes(request: Request, place: str | None, work: Workload, per_node: int) -> int:
    """The largest number of nodes that the site and the size of a step allow."""
    limits = [search.MOST_RANKS // per_node, math.floor(work.step_rows + 1e-9) // per_node]
    return max(1, min(*limits, _site_nodes(request, place, per_node) or limits[0]))


def _auto(request: Request, work: Workload, per_node: int, place: str | None, totals: Any, reasons: list[str]) -> int:
    """How many nodes: the fewest that meet the deadline, the most that the budget pays, or else the cheapest."""
    most = _most_nodes(request, place, work, per_node)
    tried: list[Totals] = []
    refused: UserError | None = None
    count = 1
    counts = []
    while count < most:
        counts.append(count)
        count *= 2
    for n in dict.fromkeys([*counts, most]):
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
                f"no number of nodes up to {most} meets the deadline and the budget: the quickest is {quickest.nodes} node(s) with "
                f"{quickest.hours:.2f} h, the cheapest {cheapest.nodes} node(s) with {cheapest.gpu_hours:.2f} GPU-hours",
                where="--deadline" if request.deadline_hours is not None else "--budget",
                fix="allow more time or GPU-hours, fewer epochs (train.epochs), or an adapter instead of full fine-tuning",
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


def _curve(nodes: int, totals: Any, run: Totals, place: str | None, request: Request) -> list[Totals]:
    """The same run on 1, 2, 4, … nodes up to twice as many, at most seven counts; counts that fit nothing are left out."""
    counts, n = [], 1
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


def _steps(request: Request, work: Workload) -> int | None:
    """Optimizer steps of the whole run, or ``None`` where the size is not known and no maximum is set."""
    train = request.recipe.train
    epoch = _steps_of_epoch(request, work)
    if epoch is None:
        return train.max_steps
    whole = math.floor(train.epochs)  # steps do not span epochs (data/sampler.py)
    steps = max(1, whole * epoch + math.ceil((train.epochs - whole) * epoch))
    return min(steps, train.max_steps) if train.max_steps else steps


def _steps_of_epoch(request: Request, work: Workload) -> int | None:
    size = request.size
    if size.tokens is None:
        return None
    if work.by_rows and size.rows is not None:
        return math.ceil(size.rows / work.step_rows)
    return math.ceil(size.tokens / work.step_tokens)


def _reference_steps(request: Request, work: Workload, steps: int) -> int:
    """The reference scores each row once that the run comes by: so many steps' worth."""
    epoch = _steps_of_epoch(request, work)
    return steps if epoch is None else min(steps, epoch)


# ---- reasons


def _reasons(
    request: Request, work: Workload, gpu: Gpu, links: Links, run: Totals, fitting: list[Candidate], fixed: Fixed
) -> list[str]:
    chosen, job = run.candidate, run.candidate.job
    capacity = memory.capacity(job) or 0.0
    lines: list[str] = []
    layout = job.layout

    def fastest(test: Any) -> Candidate | None:
        found = [c for c in fitting if test(c)]
        return min(found, key=lambda c: (c.step, c.key())) if found else None

    def than(other: Candidate | None, what: str, absent: str) -> str:
        if other is None:
            return absent
        change = other.step / chosen.step - 1
        speed = f"{abs(change) * 100:.0f} % {'slower' if change >= 0 else 'faster'}"
        return f"runner-up {what}: {speed}, {other.memory.total:.1f} GiB"

    if fixed.engine:
        lines.append(f"engine: {fixed.engine}, as the recipe asks")
        if layout.deepspeed and layout.engine != fixed.engine:
            lines.append(
                f"engine: {fixed.engine} runs as {layout.engine} in bf16 and is counted so (DeepSpeed's stage 1 in bf16 keeps no "
                "partitions that checkpoints can be read from)"
            )
    else:
        rival = fastest(lambda c: c.job.layout.engine != layout.engine)
        name = rival.job.layout.engine if rival else ""
        why = {
            "single": "one GPU, nothing to spread",
            "ddp": "the whole model fits on each GPU, so only gradients have to travel",
            "fsdp2": "one copy of the model over all GPUs",
            "hsdp": f"copies of the model on {layout.shard} GPUs each keep gathering on the fast links",
            "zero1": "optimizer state in shards",
            "zero2": "optimizer state and gradients in shards",
            "zero3": "everything in shards",
        }[layout.engine]
        lines.append(f"engine: {layout.engine}, {why}; {than(rival, name, 'no other engine fits')}")
    if layout.offload_optimizer:
        lines.append(
            f"offload: optimizer state in host memory ({chosen.memory.host:.1f} GiB a rank), because nothing fits without"
        )
    if fixed.checkpointing:
        lines.append(f"activation checkpointing: {fixed.checkpointing}, as the recipe asks")
    else:
        rival = fastest(lambda c: c.job.checkpointing != job.checkpointing and c.job.layout == layout)
        name = f"{rival.job.checkpointing}" if rival else ""
        why = (
            "the fastest mode that fits"
            if job.checkpointing != "none"
            else "all activations fit, nothing is computed twice"
        )
        lines.append(f"activation checkpointing: {job.checkpointing}, {why}; {than(rival, name, 'no other mode fits')}")
    rival = fastest(
        lambda c: (
            c.job.micro_batch != job.micro_batch and c.job.layout == layout and c.job.checkpointing == job.checkpointing
        )
    )
    name = f"{rival.job.micro_batch:g} sequences" if rival else ""
    lines.append(
        f"micro-batch: {job.micro_batch:g} sequence(s) of {job.sequence} tokens, {job.grad_accum} a step; "
        + than(rival, name, "no other size fits or is needed")
    )
    if job.stack.name == "fused":
        eager = replace(job, stack=replace(STACKS["eager"], loss_bytes_per_logit=0.0))
        slower = search.timed(search.Counted(eager, chosen.memory), work, Constants.load()).step / chosen.step - 1
        lines.append(
            f"kernels: ours (Triton, {gpu.arch}); runner-up torch's own operators: {100 * slower:.0f} % slower"
        )
    else:
        off = "switched off" if work.kernels == "off" else f"none are compiled for {gpu.arch}"
        lines.append(f"kernels: torch's own, ours are {off}")
    lines.append(
        f"loss: {job.loss_chunk} rows of logits at a time, at least 4 x the machine balance of {gpu.ridge:.0f} FLOP/B where 1 GiB allows"
    )
    lines.append(
        f"compile: {'on' if job.compiled else 'off'}, "
        + (
            "as the recipe asks"
            if fixed.compile is not None
            else "the kernels fuse what it would fuse, without its start-up time"
        )
    )
    margin = capacity - chosen.memory.total
    lines.append(
        f"memory: {chosen.memory.total:.1f} of {capacity:.1f} GiB, {margin:.1f} GiB to spare, in the worst-case micro-batch "
        f"(a plan keeps {100 * search.MARGIN:.0f} % free)"
    )
    lines += _of_preference(work, run)
    lines.append(f"dimensions: {work.shape.source or work.shape.name} ({work.shape.confidence or 'given'})")
    lines.append(f"size: {request.size.source}")
    if request.size.document is None:
        lines.append(
            "documents: length unknown, so every row is taken to fill the sequence (an upper bound of work and memory)"
        )
    for text in links.assumed:
        lines.append(f"assumed: {text}; the interval is wider")
    if gpu.arch not in Constants.load().measured:
        lines.append(
            f"speed: no measurement of the calibration ran on {gpu.arch}, so its share of the peak is a prior and the interval is wider"
        )
    if gpu.unified_memory:
        lines.append(f"memory: host and GPU share one memory; {machine.UNIFIED_HOST_GIB:.0f} GiB are left to the host")
    if gpu.power_cap_w:
        lines.append(f"power: capped at {gpu.power_cap_w:.0f} W by the site")
    return lines


def _of_preference(work: Workload, run: Totals) -> list[str]:
    """What a preference method adds to a step, and before the first one."""
    if work.preference is None:
        return []
    parts = []
    if work.row_documents == 2:
        parts.append("a row is a pair, two documents that are never divided")
    if work.scored:
        parts.append("every step scores its questions with exchanged answers, one forward pass more")
    if work.reference_passes:
        known = f"{run.reference_s / 3600:.3g} h" if run.steps is not None else "time unknown"
        parts.append(f"the reference is computed once before the first step ({known}); no second model is held")
    return [f"preference: {work.preference}, {'; '.join(parts)}"]


def _slower(run: Totals, curve: list[Totals], work: Workload) -> list[str]:
    """More nodes that do not help are named, with the reason."""
    quicker = [t for t in curve if t.nodes < run.nodes and t.candidate.step <= run.candidate.step * 1.0001]
    if not quicker:
        return []
    least = min(quicker, key=lambda t: (t.candidate.step, t.nodes))
    times = run.candidate.times
    share = times.communication / times.step
    busy = work.busiest(run.gpus) / work.sequence
    return [
        f"scaling: {run.nodes} nodes take no less time than {least.nodes}: {share * 100:.0f} % of a step is exposed communication and a "
        f"GPU has {busy:.1f} sequence(s) of a step; use fewer nodes, or raise train.batch_rows (which changes the training)"
    ]


def _limits_of_time(run: Totals, place: str | None, request: Request) -> list[str]:
    if run.hours is None or place is None:
        return []
    most = request.system.limits(place, request.qos)["max_time"]
    if most and run.hours * 3600 > most:
        jobs = math.ceil(run.hours * 3600 / (0.95 * most))
        return [
            f"time limit: {place} allows {most / 3600:g} h, so the run takes about {jobs} jobs, each resuming the one before"
        ]
    return []


# ---- the result


def _as_dict(
    request: Request,
    work: Workload,
    gpu: Gpu,
    run: Totals,
    fitting: list[Candidate],
    reasons: list[str],
    curve: list[Totals],
    constants: Constants,
    place: str | None,
) -> dict[str, Any]:
    chosen, job, system = run.candidate, run.candidate.job, request.system
    mid = chosen.tokens_per_s
    low, high = timing.interval(job, mid, constants)
    per_token = flops.step(
        work.shape,
        work.document,
        trains_base=work.method == "full",
        trains_head=work.method == "full" or work.train_embeddings,
        adapter_parameters=job.adapter_parameters,
        recomputed=timing.recomputed_share(job),
        supervised=work.supervised,
    )
    executed = per_token.executed + timing.executed_beside(job, work.document, work.supervised)
    peak = (gpu.bf16_tflops or 0) * 1e12
    watts = min(w for w in (gpu.tdp_w, gpu.power_cap_w) if w) * POWER_SHARE if gpu.tdp_w else None
    kwh = run.gpu_hours * watts / 1000 if run.gpu_hours is not None and watts else None
    pue, grid = system.energy.pue, system.energy.grid_g_co2_per_kwh
    price, allocation = system.user.price_per_gpu_hour, system.user.budget_gpu_hours
    return {
        "recipe": request.recipe.id,
        "base": work.shape.name,
        "method": work.method,
        "parameters": work.shape.parameters,
        "trained_parameters": job.trained_parameters,
        "site": system.id,
        "partition": place,
        "gpu": gpu.sku,
        "nodes": run.nodes,
        "gpus": run.gpus,
        "engine": "ddp" if job.layout.engine == "single" else job.layout.engine,
        "mesh": {"replicate": job.layout.replicas, "shard": job.layout.shard},
        "micro_batch": int(job.micro_batch),
        "micro_batch_tokens": int(job.tokens),
        "sequence_length": job.sequence,
        "grad_accum": job.grad_accum,
        "activation_checkpointing": job.checkpointing,
        "offload_optimizer": job.layout.offload_optimizer,
        "compile": job.compiled,
        "kernels": {
            "enabled": job.stack.name == "fused",
            "key": f"{gpu.arch}/{gpu.sku}",
            "loss_chunk_tokens": job.loss_chunk,
        },
        "memory_gib": {k: v for k, v in chosen.memory.as_dict().items() if k != "host"},
        "host_memory_gib": round(chosen.memory.host, 3),
        "capacity_gib": round(memory.capacity(job) or 0.0, 3),
        "tokens_per_s_per_gpu": {"low": round(low, 1), "mid": round(mid, 1), "high": round(high, 1)},
        "step_seconds": {k: round(v, 6) for k, v in vars(chosen.times).items()} | {"total": round(chosen.step, 6)},
        "step_tokens": round(work.step_tokens, 1),
        "steps": run.steps,
        "reference_hours": _rounded(run.reference_s / 3600)
        if work.reference_passes and run.steps is not None
        else None,
        "hours": _rounded(run.hours),
        "gpu_hours": _rounded(run.gpu_hours),
        "gpu_hours_interval": None
        if run.gpu_hours is None
        else {"low": _rounded(run.gpu_hours * mid / high), "high": _rounded(run.gpu_hours * mid / low)},
        "kwh": _rounded(kwh),
        "co2_kg": _rounded(kwh * (pue or 1.0) * grid / 1000) if kwh is not None and grid is not None else None,
        "cost": None
        if price is None or run.gpu_hours is None
        else {"amount": round(price * run.gpu_hours, 2), "currency": system.user.currency},
        "allocation_share": _rounded(run.gpu_hours / allocation) if allocation and run.gpu_hours is not None else None,
        "mfu": _rounded(mid * per_token.model / peak),
        "hfu": _rounded(mid * executed / peak),
        "flops_per_token": {"model": per_token.model, "executed": executed},
        "size": {"tokens_per_epoch": request.size.tokens, "source": request.size.source},
        "overrides": search.overrides(chosen, work),
        "settings": settings.of(job),
        "reasons": reasons,
        "alternatives": _alternatives(chosen, fitting),
        "scaling": [
            {
                "nodes": t.nodes,
                "gpus": t.gpus,
                "engine": "ddp" if t.candidate.job.layout.engine == "single" else t.candidate.job.layout.engine,
                "step_seconds": round(t.candidate.step, 6),
                "tokens_per_s": round(t.candidate.tokens_per_s * t.gpus, 1),
                "hours": _rounded(t.hours),
                "gpu_hours": _rounded(t.gpu_hours),
            }
            for t in curve
        ],
        "basis": "modelled: tensors counted, times from a roofline calibrated on published measurements (docs/planning.md)",
    }


def _rounded(value: float | None) -> float | None:
    """Four significant figures."""
    if value is None or value == 0:
        return value
    return round(value, 3 - math.floor(math.log10(abs(value))))


def _alternatives(chosen: Candidate, fitting: list[Candidate]) -> list[dict[str, Any]]:
    """The fastest of every other engine and checkpointing mode, quickest first, at most six."""
    groups: dict[tuple, Candidate] = {}
    for c in fitting:
        if c is chosen:
            continue
        key = (c.job.layout.engine, c.job.layout.shard, c.job.checkpointing, c.job.layout.offload_optimizer)
        if key not in groups or (c.step, c.key()) < (groups[key].step, groups[key].key()):
            groups[key] = c
    same = (
        chosen.job.layout.engine,
        chosen.job.layout.shard,
        chosen.job.checkpointing,
        chosen.job.layout.offload_optimizer,
    )
    groups.pop(same, None)
    ranked = sorted(groups.values(), key=lambda c: (c.step, c.key()))[:6]
    return [
        {
            "engine": "ddp" if c.job.layout.engine == "single" else c.job.layout.engine,
            "mesh": {"replicate": c.job.layout.replicas, "shard": c.job.layout.shard},
            "activation_checkpointing": c.job.checkpointing,
            "offload_optimizer": c.job.layout.offload_optimizer,
            "micro_batch": int(c.job.micro_batch),
            "grad_accum": c.job.grad_accum,
            "memory_gib": round(c.memory.total, 2),
            "tokens_per_s_per_gpu": round(c.tokens_per_s, 1),
            "slower": round(c.step / chosen.step - 1, 4),
        }
        for c in ranked
    ]
