"""Why the plan is as it is, as lines for people."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from aifactory_train.planning import machine, memory, search
from aifactory_train.planning.job import SINGLE, STACKS, GpuRates, Links
from aifactory_train.planning.request import PlanRequest, Totals
from aifactory_train.planning.search import Candidate
from aifactory_train.planning.timing import Constants
from aifactory_train.planning.workload import Fixed, Workload


def of_choice(
    request: PlanRequest,
    work: Workload,
    gpu: GpuRates,
    links: Links,
    run: Totals,
    fitting: list[Candidate],
    fixed: Fixed,
) -> list[str]:
    """Each choice of the plan with its runner-up, then what the figures rest on."""
    chosen, job = run.candidate, run.candidate.job
    capacity = memory.capacity(job) or 0.0
    lines = _of_spreading(chosen, fitting, fixed) + _of_operators(work, gpu, chosen, fixed)
    margin = capacity - chosen.memory.total
    lines.append(
        f"memory: {chosen.memory.total:.1f} of {capacity:.1f} GiB, {margin:.1f} GiB to spare, in the worst-case "
        f"micro-batch "
        f"(a plan keeps {100 * search.MARGIN:.0f} % free)"
    )
    lines += _of_preference(work, run)
    if work.teacher is not None:
        lines.append(
            f"teacher pass: of {work.teacher}, before the run ('aifactory teach'); not planned, neither its time (a "
            "forward pass of the teacher over each row once) nor its memory; a step holds no teacher"
        )
    return lines + _of_figures(request, work, gpu, links)


def _of_spreading(chosen: Candidate, fitting: list[Candidate], fixed: Fixed) -> list[str]:
    """Engine, offload, checkpointing and micro-batch, each with its runner-up."""
    job, layout = chosen.job, chosen.job.layout
    lines: list[str] = []

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
                f"engine: {fixed.engine} runs as {layout.engine} in bf16 and is counted so (DeepSpeed's stage 1 in "
                f"bf16 keeps no "
                "partitions that checkpoints can be read from)"
            )
    else:
        rival = fastest(lambda c: c.job.layout.engine != layout.engine)
        name = rival.job.layout.engine if rival else ""
        single = layout.engine == SINGLE
        why = "one GPU, nothing to spread" if single else layout.traits.means.format(shard=layout.shard)
        lines.append(f"engine: {layout.engine}, {why}; {than(rival, name, 'no other engine fits')}")
    if layout.offload_optimizer:
        lines.append(
            f"offload: optimizer state in host memory ({chosen.memory.host:.1f} GiB a rank), because nothing fits "
            f"without"
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
    return lines


def _of_operators(work: Workload, gpu: GpuRates, chosen: Candidate, fixed: Fixed) -> list[str]:
    """Kernels, loss and compilation."""
    job = chosen.job
    lines: list[str] = []
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
        f"loss: {job.loss_chunk} rows of logits at a time, at least 4 x the machine balance of {gpu.ridge:.0f} FLOP/B "
        f"where 1 GiB allows"
    )
    lines.append(
        f"compile: {'on' if job.compiled else 'off'}, "
        + (
            "as the recipe asks"
            if fixed.compile is not None
            else "the kernels fuse what it would fuse, without its start-up time"
        )
    )
    return lines


def _of_figures(request: PlanRequest, work: Workload, gpu: GpuRates, links: Links) -> list[str]:
    """What the figures rest on."""
    lines: list[str] = []
    lines.append(f"dimensions: {work.shape.source or work.shape.name} ({work.shape.confidence or 'given'})")
    if work.shape.has_experts:
        lines.append(
            f"experts: all of them lie in memory ({work.shape.parameters / 1e9:.1f} billion parameters), a token meets "
            f"{work.shape.active_parameters / 1e9:.1f} billion; few runs of this kind are published, so the figures "
            f"are less sure than the interval says"
        )
    if any(kind.recurrence is not None for kind in work.shape.kinds):
        lines.append(
            "recurrent layers: as the kernels of flash-linear-attention and mamba-ssm run them; without these packages "
            "they need more memory and time"
        )
    lines.append(f"size: {request.size.source}")
    if request.size.document is None:
        lines.append(
            "documents: length unknown, so every row is taken to fill the sequence (an upper bound of work and memory)"
        )
    for text in links.assumed:
        lines.append(f"assumed: {text}; the interval is wider")
    if gpu.arch not in Constants.load().measured:
        lines.append(
            f"speed: no measurement of the calibration ran on {gpu.arch}, so its share of the peak is a prior and the "
            f"interval is wider"
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
    if work.preference == "embedding":
        parts.append("every step reads its texts once before their gradient is known, one forward pass more")
    elif work.scored:
        parts.append("every step scores its questions with exchanged answers, one forward pass more")
    if work.reference_passes:
        known = f"{run.reference_s / 3600:.3g} h" if run.steps is not None else "time unknown"
        parts.append(f"the reference is computed once before the first step ({known}); no second model is held")
    return [f"preference: {work.preference}, {'; '.join(parts)}"]


def slower(run: Totals, curve: list[Totals], work: Workload) -> list[str]:
    """More nodes that do not help are named, with the reason."""
    quicker = [t for t in curve if t.nodes < run.nodes and t.candidate.step <= run.candidate.step * 1.0001]
    if not quicker:
        return []
    least = min(quicker, key=lambda t: (t.candidate.step, t.nodes))
    times = run.candidate.times
    share = times.communication / times.step
    busy = work.busiest(run.gpus) / work.sequence
    return [
        f"scaling: {run.nodes} nodes take no less time than {least.nodes}: {share * 100:.0f} % of a step is exposed "
        f"communication and a "
        f"GPU has {busy:.1f} sequence(s) of a step; use fewer nodes, or raise train.batch_rows (which changes the "
        f"training)"
    ]


def limits_of_time(run: Totals, place: str | None, request: PlanRequest) -> list[str]:
    """A run longer than the partition's limit takes several jobs."""
    if run.hours is None or place is None:
        return []
    most = request.system.limits(place, request.qos)["max_time"]
    if most and run.hours * 3600 > most:
        jobs = math.ceil(run.hours * 3600 / (0.95 * most))
        return [
            f"time limit: {place} allows {most / 3600:g} h, so the run takes about {jobs} jobs, each resuming the one "
            f"before"
        ]
    return []


def whole_nodes(request: PlanRequest, place: str | None, per_node: int) -> list[str]:
    """A part of a node where the partition gives whole ones: ``launch`` will refuse it."""
    system = request.system
    has = system.node.gpus
    if place is None or system.partitions[place].shared is not False or not has or per_node >= has:
        return []
    shared = [name for name, part in system.partitions.items() if part.shared]
    other = f", or --partition {' or '.join(shared)}" if shared else ""
    return [
        f"whole nodes: {place} gives (and bills) all {has} GPUs of a node, so 'aifactory launch' refuses {per_node}: "
        f"--gpus-per-node {has}{other}"
    ]
