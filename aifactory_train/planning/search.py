"""From a recipe and a number of GPUs to the configuration that should be run, deterministically.

Every combination of engine, activation checkpointing and micro-batch that the recipe leaves open is counted (memory)
and timed (roofline); what fits is ranked by predicted time. Configurations within two per cent count as equally fast,
and the simpler one wins; an engine that needs a package of its own (DeepSpeed) has to win by five per cent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.parallel.traits import DEFAULT, ENGINES, EngineTraits, engine_that_runs
from aifactory_train.planning import memory, timing
from aifactory_train.planning.job import SINGLE, STACKS, GpuRates, Layout, Links, TrainingJob
from aifactory_train.planning.memory import Memory
from aifactory_train.planning.timing import Constants, Times
from aifactory_train.planning.workload import Fixed, Workload

#: Architectures that our Triton kernels are compiled for (kernels/hardware.py says more).
KERNEL_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "gfx90a", "gfx942", "gfx950")
#: Share of a GPU's memory that a plan leaves free: the count of memory is itself uncertain
#: (benchmarks/planner_accuracy.py).
MARGIN = 0.05
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
#: GPUs of the largest plan.
MOST_RANKS = 4096


@dataclass(frozen=True)
class Counted:
    """One configuration and the memory of its worst-case micro-batch."""

    job: TrainingJob
    memory: Memory

    @property
    def fits(self) -> bool:
        capacity = memory.capacity(self.job)
        return capacity is not None and self.memory.total <= capacity * (1 - MARGIN)


@dataclass(frozen=True)
class Candidate(Counted):
    """A configuration that fits, with its predicted time."""

    times: Times
    tokens_per_s: float  # per GPU, averaged over the ranks

    @property
    def step(self) -> float:
        return self.times.step

    def key(self) -> tuple:
        """A stable order among equals: simpler engine, less offload, less checkpointing, smaller groups and
        micro-batches.
        """
        layout = self.job.layout
        return (
            layout.offload_optimizer,
            list(ENGINES).index(layout.setting),  # the simpler engine first
            memory_order(self.job.checkpointing),
            self.job.compiled,
            layout.shard,
            self.job.micro_batch,
        )


def memory_order(mode: str) -> int:
    return ("none", "selective", "full").index(mode)


def loss_chunk(work: Workload, gpu: GpuRates) -> int:
    """Rows of logits at once: twice what hides the traffic of the weight's fp32 gradient, 4 x (peak / bandwidth) rows
    (docs/planning.md), as a power of two, at most 1 GiB of fp32 logits."""
    if work.loss_chunk:
        return work.loss_chunk
    wanted = 2 ** math.ceil(math.log2(max(256.0, 2 * 4 * gpu.ridge)))
    most = 2 ** math.floor(math.log2(max(32, 2**30 // (4 * work.shape.vocab))))
    return int(min(wanted, most))


def uses_kernels(work: Workload, gpu: GpuRates) -> bool:
    return work.kernels != "off" and gpu.arch in KERNEL_ARCHS


def layouts(work: Workload, world: int, per_node: int, fixed: Fixed, offload: bool) -> Iterator[Layout]:
    """Every way of spreading the model over ``world`` ranks that the recipe leaves open."""
    for name, traits in ENGINES.items():
        if fixed.engine not in (None, name) or (offload and not traits.offloads_optimizer):
            continue
        if (
            work.method == "qlora" and not traits.holds_four_bits(work.dora)
        ) or work.optimizer not in traits.optimizers:
            continue
        if work.keeps_mean and not traits.keeps_mean:
            continue
        runs = engine_that_runs(name, bf16=work.bytes.compute == 2, offload_optimizer=offload)
        if fixed.engine is None:
            if world == 1 and name != DEFAULT:
                continue  # nothing to spread
            if (traits.fp32_masters and work.bytes.parameters != 4) or runs != name:
                continue  # what runs as another engine is not tried twice
        if world == 1 and name == DEFAULT:
            if fixed.takes(1, 1):
                yield Layout(SINGLE, 1, 1)
            continue
        for shard in _shards(traits, world, per_node, fixed):
            if not fixed.takes(world // shard, shard):
                continue
            yield Layout(runs, world, shard, offload, offload and traits.offloads_parameters)


def _shards(traits: EngineTraits, world: int, per_node: int, fixed: Fixed) -> list[int]:
    """How many ranks may share one copy of what the engine shards."""
    if world == 1 or traits.shard_group == "none":
        return [1]
    if traits.shard_group == "all":
        return [world]
    if not fixed.shard_size:
        if fixed.dp_replicate and world % fixed.dp_replicate == 0:
            return [world // fixed.dp_replicate]
        sizes = dict.fromkeys((per_node // 2, per_node, 2 * per_node, 4 * per_node, 8 * per_node))
        return [size for size in sizes if 1 < size < world and world % size == 0]
    if world % fixed.shard_size:
        raise UserError(
            f"{world} ranks cannot be divided into groups of {fixed.shard_size}",
            where="parallel.shard_size",
            fix=f"--set parallel.shard_size={math.gcd(world, fixed.shard_size)}",
        )
    return [fixed.shard_size]


def candidates(
    work: Workload, gpu: GpuRates, links: Links, world: int, fixed: Fixed, offloads: tuple[bool, ...] = (False, True)
) -> Iterator[Counted]:
    """Every configuration, fitting or not, in a fixed order."""
    chunk = loss_chunk(work, gpu)
    ours = uses_kernels(work, gpu)
    stack = replace(STACKS["fused" if ours else "eager"], loss_bytes_per_logit=0.0, remakes=ours and not work.dropout)
    if fixed.offload is not None:
        offloads = tuple(o for o in offloads if o == fixed.offload)
    modes = ("none", "selective", "full") if fixed.checkpointing is None else (fixed.checkpointing,)
    per_rank = work.busiest(world)
    for offload in offloads:
        if offload and gpu.unified_memory:
            continue  # host and GPU share one memory: nothing is won
        for layout in layouts(work, world, links.gpus_per_node, fixed, offload):
            for mode in modes:
                for micro, accumulation in _micro_batches(work, per_rank, fixed):
                    compiled = bool(fixed.compile) and layout.traits.compiles
                    job = TrainingJob(
                        shape=work.shape,
                        gpu=gpu,
                        links=links,
                        layout=layout,
                        sequence=work.sequence,
                        micro_batch=micro,
                        grad_accum=accumulation,
                        method=work.method,
                        lora_rank=work.lora_rank,
                        targets=work.targets,
                        dora=work.dora,
                        train_embeddings=work.train_embeddings,
                        bytes=work.bytes,
                        checkpointing=mode,
                        stack=stack,
                        document=work.document,
                        loss_chunk=chunk,
                        attention="flash",
                        accumulates_whole=True,
                        overlaps=layout.traits.overlaps,
                        compiled=compiled,
                        preference=work.preference is not None or work.teacher is not None,
                        scored=work.scored,
                    )
                    yield Counted(job, memory.predict(job))


def timed(counted: Counted, work: Workload, constants: Constants) -> Candidate:
    """Time of the positions that there are; memory was counted for a full micro-batch, the worst case that can come."""
    job = counted.job
    world = job.layout.world
    real = work.busiest(world) / job.grad_accum / job.sequence
    times = timing.predict(replace(job, micro_batch=real, supervised=work.supervised), constants)
    return Candidate(job, counted.memory, times, work.step_tokens / world / times.step)


def reference_seconds(candidate: Candidate, work: Workload, constants: Constants) -> float:
    """Seconds that scoring one step's worth of rows takes before the first step: what a forward pass more would add to
    a step, times the passes of the method (:attr:`Workload.reference_passes`)."""
    job = replace(candidate.job, scored=candidate.job.scored + 1)
    once = timed(Counted(job, candidate.memory), work, constants).step - candidate.step
    return work.reference_passes * once


def _micro_batches(work: Workload, per_rank: float, fixed: Fixed) -> Iterator[tuple[float, int]]:
    """``(sequences, accumulation)``: as many micro-batches as the rank's share of a step needs. None is smaller than a
    row.
    """
    share, least = per_rank / work.sequence, work.row_documents
    if fixed.grad_accum:
        yield float(max(least, math.ceil(share / fixed.grad_accum))), fixed.grad_accum
        return
    if fixed.micro_tokens:
        micro = float(max(least, fixed.micro_tokens // work.sequence))
        yield micro, max(1, math.ceil(share / micro))
        return
    for micro in MICRO_BATCHES:
        if micro < least:
            continue
        if micro > least and micro >= 2 * share:
            return  # larger than the whole share
        accumulation = max(1, math.ceil(share / micro - 1e-9))
        yield float(micro), accumulation


def best(found: list[Candidate]) -> Candidate:
    """The fastest; among those within two per cent of it, the simplest. One with a package of its own (DeepSpeed) has
    to win by five per cent.
    """

    def handicapped(c: Candidate) -> float:
        return c.step * (1.05 if c.job.layout.traits.package else 1.0)

    fastest = min(map(handicapped, found))
    return min((c for c in found if handicapped(c) <= fastest * 1.02), key=lambda c: (*c.key(), c.step))


def check_batch(work: Workload, world: int) -> None:
    """Refuse more ranks than a step has rows."""
    rows = math.floor(work.step_rows + 1e-9)
    if rows < world:
        key = "train.batch_rows" if work.by_rows else "train.batch_tokens"
        value = world if work.by_rows else math.ceil(world * work.step_tokens / max(work.step_rows, 1e-9))
        what = "pair" if work.row_documents == 2 else "document"
        raise UserError(
            f"a step of {max(rows, 1)} {what}(s) cannot be divided over {world} GPUs",
            where=key,
            fix=f"--set {key}={value} (this changes the training), or use fewer GPUs",
        )


def what_fits(
    work: Workload, gpu: GpuRates, links: Links, world: int, fixed: Fixed, host_gib: float | None
) -> tuple[list[Counted], list[Counted]]:
    """``(what fits, all that was counted)`` for ``world`` ranks; refuses more ranks than a step has rows."""
    check_batch(work, world)
    # offload is for what fits in no other way
    every = list(candidates(work, gpu, links, world, fixed, (False,)))
    possible = [c for c in every if c.fits]
    if not possible:
        offloaded = list(candidates(work, gpu, links, world, fixed, (True,)))
        possible = [c for c in offloaded if c.fits and _host_fits(c, links, host_gib)]
        every += offloaded
    return possible, every


def search(
    work: Workload,
    gpu: GpuRates,
    links: Links,
    world: int,
    fixed: Fixed | None = None,
    constants: Constants | None = None,
    host_gib: float | None = None,
    most_ranks: int | None = None,
) -> tuple[Candidate, list[Candidate]]:
    """``(best, all that fit)`` for ``world`` ranks. Raises :class:`UserError` where nothing fits, with the smallest
    change that would; more than ``most_ranks`` are not proposed."""
    fixed, constants = fixed or Fixed(), constants or Constants.load()
    possible, every = what_fits(work, gpu, links, world, fixed, host_gib)
    if not every:
        raise _no_engine(work, gpu, world, fixed)
    if not possible:
        fixes = changes_that_fit(work, gpu, links, world, fixed, host_gib, most_ranks)
        raise _does_not_fit(every, [c for c in every if _host_fits(c, links, host_gib)], fixes)
    fitting = [timed(c, work, constants) for c in possible]
    return best(fitting), fitting


def _no_engine(work: Workload, gpu: GpuRates, world: int, fixed: Fixed) -> UserError:
    """The refusal where the settings leave no configuration at all."""
    where, fix = "parallel.engine", "--set parallel.engine=auto"
    if fixed.dp_replicate or fixed.dp_shard:
        where, fix = "parallel.dims", f"degrees whose product is {world}, and --set parallel.engine=auto"
    if fixed.offload:
        where, fix = "parallel.offload_optimizer", "--set parallel.offload_optimizer=false"
        if not gpu.unified_memory and not (work.method == "qlora" and work.dora):
            fix = f"--set parallel.engine=fsdp2 (ddp cannot offload), or {fix}"
    return UserError(f"no engine can be used with these settings on {world} rank(s)", where=where, fix=fix)


def _host_fits(candidate: Counted, links: Links, host_gib: float | None) -> bool:
    """Offloaded state of all ranks of a node within 80 % of its host memory; unknown memory means no offload."""
    if not candidate.memory.host:
        return True
    if host_gib is None:
        return False
    ranks = min(links.gpus_per_node, candidate.job.layout.world)
    return candidate.memory.host * ranks <= 0.8 * host_gib


def _does_not_fit(every: list[Counted], on_host: list[Counted], fixes: list[str]) -> UserError:
    """The refusal: by how much the leanest configuration misses, and the smallest changes that would make one fit.

    on_host: those whose offloaded state fits into the host's memory.
    """
    leanest = min(on_host, key=lambda c: c.memory.total, default=every[0])
    job, gpu = leanest.job, leanest.job.gpu
    over = max(
        ((n, v) for n, v in leanest.memory.as_dict().items() if n not in ("total", "host")), key=lambda item: item[1]
    )
    return UserError(
        f"{job.shape.name} ({job.method}) does not fit on {job.layout.world} x {gpu.sku}: the leanest configuration "
        f"({job.layout.engine}, {job.checkpointing} checkpointing) needs {leanest.memory.total:.1f} GiB of "
        f"{gpu.memory_gib:.1f} GiB per GPU ({100 * MARGIN:.0f} % are kept free), most of it {over[0]} ({over[1]:.1f} "
        f"GiB)",
        where="memory",
        fix="; or ".join(fixes[:3])
        if fixes
        else "a smaller base model (model.options of the recipe) or a site with larger GPUs",
    )


def changes_that_fit(
    work: Workload,
    gpu: GpuRates,
    links: Links,
    world: int,
    fixed: Fixed,
    host_gib: float | None,
    most_ranks: int | None = None,
) -> list[str]:
    """Single changes, the least intrusive first, each of which makes some configuration fit."""

    def fits(w: Workload, ranks: int, f: Fixed) -> bool:
        try:
            found = candidates(w, gpu, links, ranks, f)
            return any(c.fits and _host_fits(c, links, host_gib) for c in found)
        except UserError:
            return False

    found: list[str] = []
    for key, open_ in (
        ("parallel.activation_checkpointing=full", replace(fixed, checkpointing=None)),
        ("parallel.engine=auto", replace(fixed, engine=None, shard_size=None)),
        (
            f"train.micro_batch_tokens={work.row_documents * work.sequence}",
            replace(fixed, micro_tokens=None, grad_accum=None),
        ),
        ("parallel.offload_optimizer=true", replace(fixed, offload=None)),
    ):
        if open_ != fixed and fits(work, world, open_):
            found.append(f"--set {key}")
    ranks, most = world, min(MOST_RANKS // links.gpus_per_node * links.gpus_per_node, most_ranks or MOST_RANKS)
    while ranks < most:
        ranks = links.gpus_per_node if ranks < links.gpus_per_node else min(ranks * 2, most)
        larger = work.with_rows(ranks)
        if fits(larger, ranks, fixed):
            nodes, key = -(-ranks // links.gpus_per_node), "batch_rows" if work.by_rows else "batch_tokens"
            value = ranks if work.by_rows else math.ceil(larger.step_tokens)
            changed = "" if larger is work else f" --set train.{key}={value}"
            found.append(f"--nodes {nodes}{changed} ({ranks} GPUs{', larger steps' if changed else ''})")
            break
    length = work.sequence // 2
    while length >= 256:
        shorter = replace(work, sequence=length, document=min(work.document, length))
        if fits(shorter, world, fixed):
            found.append(f"--set data.sequence_length={length}")
            break
        length //= 2
    if work.method == "full" and fits(replace(work, method="lora"), world, fixed):
        found.append("--set adapter.kind=lora")
    if work.method != "qlora" and fits(replace(work, method="qlora"), world, fixed):
        found.append("--set adapter.kind=lora --set adapter.quantise_base=nf4")
    return found


def overrides(candidate: Candidate, work: Workload) -> dict[str, Any]:
    """The configuration as keys of the recipe, as ``train --set`` takes them."""
    job = candidate.job
    found: dict[str, Any] = {
        "parallel.engine": job.layout.setting,
        "parallel.activation_checkpointing": job.checkpointing,
        "parallel.compile": job.compiled,
        "parallel.offload_optimizer": job.layout.offload_optimizer,
        "train.grad_accum": "auto",
        "train.micro_batch_tokens": int(job.tokens),
        "train.loss_chunk_tokens": job.loss_chunk,
    }
    if job.stack.name == "fused":
        found["kernels.enabled"] = "auto"  # on wherever they run; where the recipe says off, it stays so
    if job.layout.traits.shard_group == "chosen":
        found["parallel.shard_size"] = job.layout.shard
    return found
