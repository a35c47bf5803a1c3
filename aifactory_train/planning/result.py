"""The plan as plain values: memory, speed, time, energy and cost, the settings, what else would do."""

from __future__ import annotations

import math
from typing import Any

from aifactory_train.model import flops
from aifactory_train.planning import memory, search, settings, timing
from aifactory_train.planning.job import GpuRates, TrainingJob
from aifactory_train.planning.request import PlanRequest, Totals
from aifactory_train.planning.search import Candidate
from aifactory_train.planning.timing import Constants
from aifactory_train.planning.workload import Workload
from aifactory_train.sites import billing

#: Mean draw of a GPU in training as a share of its nominal (or capped) power. An assumption: measure it with the site's
#: counters.
POWER_SHARE = 0.85
#: What a plan's figures are.
BASIS = "modelled: tensors counted, times from a roofline calibrated on published measurements (docs/planning.md)"


def as_dict(
    request: PlanRequest,
    work: Workload,
    gpu: GpuRates,
    run: Totals,
    fitting: list[Candidate],
    reasons: list[str],
    curve: list[Totals],
    constants: Constants,
    place: str | None,
) -> dict[str, Any]:
    """The plan: the keys of ``aifactory plan --json``."""
    chosen, job = run.candidate, run.candidate.job
    mid = chosen.tokens_per_s
    low, high = timing.interval(job, mid, constants)
    per_token = flops.step(
        work.shape,
        work.document,
        trains_base=work.method == "full",
        trains_head=work.method == "full" or work.train_embeddings,
        adapter_parameters=job.active_adapter_parameters,
        recomputed=timing.recomputed_share(job),
        supervised=work.supervised,
    )
    executed = per_token.executed + timing.executed_beside(job, work.document, work.supervised)
    peak = (gpu.bf16_tflops or 0) * 1e12
    reference = work.reference_passes and run.steps is not None
    return {
        "recipe": request.recipe.id,
        "base": work.shape.name,
        "method": work.method,
        "parameters": work.shape.parameters,
        "trained_parameters": job.trained_parameters,
        "site": request.system.id,
        "partition": place,
        "gpu": gpu.sku,
        "nodes": run.nodes,
        "gpus": run.gpus,
        **_configuration(job, gpu),
        "memory_gib": {k: v for k, v in chosen.memory.as_dict().items() if k != "host"},
        "host_memory_gib": round(chosen.memory.host, 3),
        "capacity_gib": round(memory.capacity(job) or 0.0, 3),
        "tokens_per_s_per_gpu": {"low": round(low, 1), "mid": round(mid, 1), "high": round(high, 1)},
        "step_seconds": {k: round(v, 6) for k, v in vars(chosen.times).items()} | {"total": round(chosen.step, 6)},
        "step_tokens": round(work.step_tokens, 1),
        "steps": run.steps,
        "reference_hours": _rounded(run.reference_s / 3600) if reference else None,
        **time_and_cost(request, gpu, run, place, (low, mid, high)),
        "mfu": _rounded(mid * per_token.model / peak),
        "hfu": _rounded(mid * executed / peak),
        "flops_per_token": {"model": per_token.model, "executed": executed},
        "size": {"tokens_per_epoch": request.size.tokens, "source": request.size.source},
        "overrides": search.overrides(chosen, work),
        "settings": settings.of(job),
        "reasons": reasons,
        "alternatives": _alternatives(chosen, fitting),
        "scaling": _scaling(curve),
        "basis": BASIS,
    }


def _configuration(job: TrainingJob, gpu: GpuRates) -> dict[str, Any]:
    """How the run is carried out."""
    return {
        "active_parameters": job.shape.active_parameters,
        "engine": job.layout.setting,
        "mesh": {"replicate": job.layout.replicas, "shard": job.layout.shard},
        "dims": {"dp_replicate": job.layout.replicas, "dp_shard": job.layout.shard, "tp": 1, "cp": 1, "ep": 1},
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
    }


def time_and_cost(
    request: PlanRequest, gpu: GpuRates, run: Totals, place: str | None, speeds: tuple[float, float, float]
) -> dict[str, Any]:
    """Hours, energy and cost of the run; ``None`` where the size of the data or a price is not known. speeds: tokens/s
    of a GPU, low, middle and high.
    """
    system, (low, mid, high) = request.system, speeds
    watts = min(w for w in (gpu.tdp_w, gpu.power_cap_w) if w) * POWER_SHARE if gpu.tdp_w else None
    kwh = run.gpu_hours * watts / 1000 if run.gpu_hours is not None and watts else None
    pue, grid = system.energy.pue, system.energy.grid_g_co2_per_kwh
    price, allocation = system.user.price_per_gpu_hour, system.user.budget_gpu_hours
    return {
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
        **_billed(request, run, place),
    }


def _billed(request: PlanRequest, run: Totals, place: str | None) -> dict[str, Any]:
    """What the site bills for the run in its own unit, and the share of the user's budget in it; ``None``: unknown."""
    system, budget = request.system, request.system.user.site_budget
    found = None
    if run.hours is not None:
        job = {"gpus_per_node": run.gpus // run.nodes, "partition": place, "qos": request.qos}
        found = billing.bill(system, run.nodes, run.hours, **job)
    return {
        "billed": found.as_dict() if found else None,
        "billed_share": _rounded(found.amount / budget) if found and budget else None,
    }


def _scaling(curve: list[Totals]) -> list[dict[str, Any]]:
    """The same run on other numbers of nodes."""
    return [
        {
            "nodes": t.nodes,
            "gpus": t.gpus,
            "engine": t.candidate.job.layout.setting,
            "step_seconds": round(t.candidate.step, 6),
            "tokens_per_s": round(t.candidate.tokens_per_s * t.gpus, 1),
            "hours": _rounded(t.hours),
            "gpu_hours": _rounded(t.gpu_hours),
        }
        for t in curve
    ]


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
            "engine": c.job.layout.setting,
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
