"""From a recipe and a number of GPUs to the configuration that should be run, deterministically.

Every combination of engine, activation checkpointing and micro-batch that the recipe leaves open is counted (memory) and timed
(roofline); what fits is ranked by predicted time. Configurations within two per cent count as equally fast, and the simpler one wins; an
engine that needs a package of its own (DeepSpeed) has to win by five per cent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aifactory_train.errors import UserError
from aifactory_train.parallel import holds_quantised, zero_stage
from aifactory_train.planning import memory, timing
from aifactory_train.planning.job import STACKS, Bytes, Gpu, Job, Layout, Links
from aifactory_train.planning.memory import Memory
from aifactory_train.planning.shapes import Shape
from aifactory_train.planning.timing import Constants, Times

if TYPE_CHECKING:
    from aifactory_train.config import Recipe

#: Architectures that our Triton kernels are compiled for (kernels/hardware.py says more).
KERNEL_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "gfx90a", "gfx942", "gfx950")
#: Share of a GPU's memory that a plan leaves free: the count of memory is itself uncertain (benchmarks/planner_accuracy.py).
MARGIN = 0.05
#: The simpler engine first.
SIMPLICITY = ("single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
#: GPUs of the largest plan.
MOST_RANKS = 4096


def documents_of_a_row(preference: str | None) -> int:
    """Documents of a row of training data, by ``methods.preference.kind``: a pair has two."""
    return 2 if preference in ("dpo", "orpo") else 1


@dataclass(frozen=True)
class Workload:
    """What a recipe asks for, apart from how it is carried out."""

    shape: Shape
    sequence: int
    step_tokens: float  # token positions of one optimizer step over all ranks
    step_rows: float  # rows of one step: documents, or pairs of them
    document: float  # mean tokens of a document
    supervised: float
    method: str
    lora_rank: int
    targets: str | tuple[str, ...]
    dora: bool
    train_embeddings: bool
    bytes: Bytes
    kernels: str  # auto | on | off
    loss_chunk: int | None
    by_rows: bool  # the step is a number of rows (else of tokens)
    preference: str | None = None  # methods.preference.kind

    @property
    def row_documents(self) -> int:
        """Documents of one row, which are never divided: a pair's two answers (DPO, IPO, ORPO), else one."""
        return documents_of_a_row(self.preference)

    @property
    def scored(self) -> float:
        """Forward passes over a step without a backward: KTO scores each question with another one's answer."""
        return 1.0 if self.preference == "kto" else 0.0

    @property
    def reference_passes(self) -> int:
        """Forward passes over the run's documents before the first step; KTO's also over the exchanged answers."""
        return {"dpo": 1, "kto": 2}.get(self.preference or "", 0)

    def busiest(self, world: int) -> float:
        """Positions of the rank that has most of a step: rows are whole, and the others wait for it."""
        if self.by_rows:
            return math.ceil(self.step_rows / world - 1e-9) * self.step_tokens / self.step_rows
        return self.step_tokens / world


@dataclass(frozen=True)
class Fixed:
    """What the recipe or the command line already decided; ``None`` is open."""

    engine: str | None = None
    shard_size: int | None = None
    checkpointing: str | None = None
    offload: bool | None = None
    compile: bool | None = None
    micro_tokens: int | None = None
    grad_accum: int | None = None


@dataclass(frozen=True)
class Counted:
    """One configuration and the memory of its worst-case micro-batch."""

    job: Job
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
        """A stable order among equals: simpler engine, less offload, less checkpointing, smaller groups and micro-batches."""
        layout = self.job.layout
        return (
            layout.offload_optimizer,
            SIMPLICITY.index(layout.engine),
            memory_order(self.job.checkpointing),
            self.job.compiled,
            layout.shard,
            self.job.micro_batch,
        )


def memory_order(mode: str) -> int:
    return ("none", "selective", "full").index(mode)


def workload(recipe: Recipe, shape: Shape, document: float | None, supervised: float | None) -> Workload:
    """The recipe's demand. ``document``: mean tokens of a document where known (else every row is taken to fill the sequence)."""
    data, train = recipe.data, recipe.train
    if shape.max_positions and data.sequence_length > shape.max_positions:
        raise UserError(
            f"sequences of {data.sequence_length} tokens are longer than the {shape.max_positions} positions of {shape.name}",
            where="data.sequence_length",
            fix=f"--set data.sequence_length={shape.max_positions}",
        )
    mean = min(document or data.sequence_length, data.sequence_length)
    preference = recipe.methods.preference.kind if recipe.methods.preference else None
    per_row = documents_of_a_row(preference) * (data.sequence_length if data.batching == "padded" else mean)
    if train.batch_tokens:
        tokens, rows = float(train.batch_tokens), train.batch_tokens / per_row
    else:
        rows = float(train.batch_rows or 16)
        tokens = rows * per_row
    adapter = recipe.adapter
    if adapter.kind != "none" and not shape.lora_parameters(adapter.rank, adapter.targets):
        raise UserError(
            f"none of these names a linear layer of {shape.name}: {adapter.targets}",
            where="adapter.targets",
            fix="--set adapter.targets=all-linear, or names such as q_proj, v_proj, down_proj",
        )
    method = "full" if adapter.kind == "none" else ("qlora" if adapter.quantise_base == "nf4" else "lora")
    return Workload(
        shape=shape,
        sequence=data.sequence_length,
        step_tokens=tokens,
        step_rows=rows,
        document=mean,
        supervised=1.0 if supervised is None else supervised,
        method=method,
        lora_rank=adapter.rank,
        targets=adapter.targets if isinstance(adapter.targets, str) else tuple(adapter.targets),
        dora=adapter.kind == "dora",
        train_embeddings=adapter.train_embeddings,
        bytes=_bytes(recipe),
        kernels=recipe.kernels.enabled,
        loss_chunk=train.loss_chunk_tokens,
        by_rows=train.batch_tokens is None,
        preference=preference,
    )


def _bytes(recipe: Recipe) -> Bytes:
    """The precision policy (see ``model.choose_precision``): fp32 master and moments, bf16 arithmetic, unless the recipe differs."""
    p, train = recipe.precision, recipe.train
    size = {"fp32": 4, "bf16": 2}
    if p.compute == "fp32":
        raise UserError(
            "the planner's speed figures are for bf16 arithmetic",
            where="precision.compute",
            fix="--set precision.compute=bf16 (or auto)",
        )
    master = size.get(p.parameters, 4)
    if train.optimizer == "sgd":
        moments = master if train.momentum else 0
    else:
        moments = 2 * master
    return Bytes(
        parameters=master,
        working=2 if master != 2 else 0,
        gradients=master,
        optimizer=moments,
        frozen=size.get(p.frozen, 2),
        compute=2,
        reduce=size.get(p.reduce, 4),
    )


def fixed_by(recipe: Recipe, given_now: frozenset[str] = frozenset()) -> Fixed:
    """What is decided already: the recipe's own ``parallel`` keys, and of ``train`` what was given for this plan (``given_now``, the
    keys of ``--set``). A recipe's micro-batch suits the machine that it was written on; here it is the plan's to choose."""
    parallel, train = recipe.parallel, recipe.train
    given = parallel.model_fields_set
    return Fixed(
        engine=parallel.engine if parallel.engine != "auto" else None,
        shard_size=parallel.shard_size,
        checkpointing=parallel.activation_checkpointing if "activation_checkpointing" in given else None,
        offload=parallel.offload_optimizer if "offload_optimizer" in given else None,
        compile=parallel.compile if "compile" in given else None,
        micro_tokens=train.micro_batch_tokens if "train.micro_batch_tokens" in given_now else None,
        grad_accum=train.grad_accum if train.grad_accum != "auto" and "train.grad_accum" in given_now else None,
    )


def loss_chunk(work: Workload, gpu: Gpu) -> int:
    """Rows of logits at once: twice what hides the traffic of the weight's fp32 gradient, 4 x (peak / bandwidth) rows
    (docs/planning.md), as a power of two, at most 1 GiB of fp32 logits."""
    if work.loss_chunk:
        return work.loss_chunk
    wanted = 2 ** math.ceil(math.log2(max(256.0, 2 * 4 * gpu.ridge)))
    most = 2 ** math.floor(math.log2(max(32, 2**30 // (4 * work.shape.vocab))))
    return int(min(wanted, most))


def uses_kernels(work: Workload, gpu: Gpu) -> bool:
    return work.kernels != "off" and gpu.arch in KERNEL_ARCHS


def engine_that_runs(engine: str, work: Workload, offload: bool) -> str:
    """``engine``, but for a ZeRO stage that DeepSpeed runs as another one (:func:`aifactory_train.parallel.zero_stage`)."""
    if not engine.startswith("zero"):
        return engine
    return f"zero{zero_stage(int(engine[-1]), bf16=work.bytes.compute == 2, offload_optimizer=offload)}"


def layouts(work: Workload, world: int, per_node: int, fixed: Fixed, offload: bool) -> Iterator[Layout]:
    """Every way of spreading the model over ``world`` ranks that the recipe leaves open."""
    wanted = fixed.engine
    if work.method == "qlora":
        if wanted is not None and not holds_quantised(wanted):
            return
        wanted = "ddp"
    if world == 1:
        if wanted in (None, "ddp"):
            if not offload:
                yield Layout("single", 1, 1)
            return
        yield Layout(engine_that_runs(wanted, work, offload), 1, 1, offload, offload and wanted in ("fsdp2", "hsdp"))
        return
    if wanted in (None, "ddp") and not offload:
        yield Layout("ddp", world, 1)
    if wanted in (None, "fsdp2"):
        yield Layout("fsdp2", world, world, offload, offload)
    if wanted in (None, "hsdp"):
        if fixed.shard_size:
            if world % fixed.shard_size:
                raise UserError(
                    f"{world} ranks cannot be divided into groups of {fixed.shard_size}",
                    where="parallel.shard_size",
                    fix=f"--set parallel.shard_size={math.gcd(world, fixed.shard_size)}",
                )
            sizes = [fixed.shard_size]
        else:
            sizes = [
                s
                for s in dict.fromkeys((per_node // 2, per_node, 2 * per_node, 4 * per_node, 8 * per_node))
                if 1 < s < world
            ]
        for size in sizes:
            if world % size == 0:
                yield Layout("hsdp", world, size, offload, offload)
    for engine in ("zero1", "zero2", "zero3"):
        runs = engine_that_runs(engine, work, offload)
        # left open: ZeRO keeps trained parameters in fp32, and what runs as another stage is not tried twice
        if wanted == engine or (wanted is None and work.bytes.parameters == 4 and runs == engine):
            yield Layout(runs, world, world, offload)


def candidates(
    work: Workload, gpu: Gpu, links: Links, world: int, fixed: Fixed, offloads: tuple[bool, ...] = (False, True)
) -> Iterator[Counted]:
    """Every configuration, fitting or not, in a fixed order."""
    chunk = loss_chunk(work, gpu)
    stack = replace(STACKS["fused" if uses_kernels(work, gpu) else "eager"], loss_bytes_per_logit=0.0)
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
                    compiled = bool(fixed.compile) and layout.engine != "zero3"
                    job = Job(
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
                        overlaps=not layout.deepspeed,
                        compiled=compiled,
                        judged=work.preference is not None,
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
    """Seconds that scoring one step's worth of rows takes before the first step: what a forward pass more would add to a step, times
    the passes of the method (:attr:`Workload.reference_passes`)."""
    job = replace(candidate.job, scored=candidate.job.scored + 1)
    once = timed(Counted(job, candidate.memory), work, constants).step - candidate.step
    return work.reference_passes * once


def _micro_batches(work: Workload, per_rank: float, fixed: Fixed) -> Iterator[tuple[float, int]]:
    """``(sequences, accumulation)``: as many micro-batches as the rank's share of a step needs. None is smaller than a row."""
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
    """The fastest; among those within two per cent of it, the simplest. DeepSpeed, a package of its own, has to win by five per cent."""

    def handicapped(c: Candidate) -> float:
        return c.step * (1.05 if c.job.layout.deepspeed else 1.0)

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


def search(
    work: Workload,
    gpu: Gpu,
    links: Links,
    world: int,
    fixed: Fixed | None = None,
    constants: Constants | None = None,
    host_gib: float | None = None,
    most_ranks: int | None = None,
) -> tuple[Candidate, list[Candidate]]:
    """``(best, all that fit)`` for ``world`` ranks. Raises :class:`UserError` where nothing fits, with the smallest change that would;
    more than ``most_ranks`` are not proposed."""
    fixed, constants = fixed or Fixed(), constants or Constants.load()
    check_batch(work, world)
    # offload is for what fits in no other way
    every = list(candidates(work, gpu, links, world, fixed, (False,)))
    possible = [c for c in every if c.fits]
    if not possible:
        offloaded = list(candidates(work, gpu, links, world, fixed, (True,)))
        possible = [c for c in offloaded if c.fits and _host_fits(c, links, host_gib)]
        every += offloaded
    if not every:
        raise _no_engine(work, gpu, world, fixed)
    if not possible:
        raise _does_not_fit(every, work, gpu, links, world, fixed, host_gib, most_ranks)
    fitting = [timed(c, work, constants) for c in possible]
    return best(fitting), fitting


def _no_engine(work: Workload, gpu: Gpu, world: int, fixed: Fixed) -> UserError:
    """The refusal where the settings leave no configuration at all."""
    where, fix = "parallel.engine", "--set parallel.engine=auto"
    if fixed.offload:
        where, fix = "parallel.offload_optimizer", "--set parallel.offload_optimizer=false"
        if not gpu.unified_memory and work.method != "qlora":
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


def _does_not_fit(
    every: list[Counted],
    work: Workload,
    gpu: Gpu,
    links: Links,
    world: int,
    fixed: Fixed,
    host_gib: float | None,
    most_ranks: int | None,
) -> UserError:
    """The refusal: by how much the leanest configuration misses, and the smallest changes that would make one fit."""
    leanest = min((c for c in every if _host_fits(c, links, host_gib)), key=lambda c: c.memory.total, default=every[0])
    over = max(
        ((n, v) for n, v in leanest.memory.as_dict().items() if n not in ("total", "host")), key=lambda item: item[1]
    )
    fixes = changes_that_fit(work, gpu, links, world, fixed, host_gib, most_ranks)
    return UserError(
        f"{work.shape.name} ({work.method}) does not fit on {world} x {gpu.sku}: the leanest configuration "
        f"({leanest.job.layout.engine}, {leanest.job.checkpointing} checkpointing) needs {leanest.memory.total:.1f} GiB of "
        f"{gpu.memory_gib:.1f} GiB per GPU ({100 * MARGIN:.0f} % are kept free), most of it {over[0]} ({over[1]:.1f} GiB)",
        where="memory",
        fix="; or ".join(fixes[:3])
        if fixes
        else "a smaller base model (model.options of the recipe) or a site with larger GPUs",
    )


def changes_that_fit(
    work: Workload,
    gpu: Gpu,
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
        if work.step_rows >= ranks and fits(work, ranks, fixed):
            nodes = -(-ranks // links.gpus_per_node)
            found.append(f"--nodes {nodes} ({ranks} GPUs)")
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
    engine = "ddp" if job.layout.engine == "single" else job.layout.engine
    found: dict[str, Any] = {
        "parallel.engine": engine,
        "parallel.activation_checkpointing": job.checkpointing,
        "parallel.compile": job.compiled,
        "parallel.offload_optimizer": job.layout.offload_optimizer,
        "train.grad_accum": "auto",
        "train.micro_batch_tokens": int(job.tokens),
        "train.loss_chunk_tokens": job.loss_chunk,
    }
    if job.stack.name == "fused":
        found["kernels.enabled"] = "auto"  # on wherever they run; where the recipe says off, it stays so
    if engine == "hsdp":
        found["parallel.shard_size"] = job.layout.shard
    return found
