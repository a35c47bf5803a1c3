"""One training step of one rank on the meta device: built in the order in which training builds it, run under the
:class:`~aifactory_train.audit.recorder.StepRecorder`.

The model is transformers' own (from its configuration, without weights), with our adapters, operators, blocks, engine,
loss and optimizer. A step is the forward and backward of its micro-batches, the norm with clipping, and the update.
The optimizer's state exists already, as in every step but the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aifactory_train.audit import pretend, ranks
from aifactory_train.audit.recorder import COMPONENTS, Booked, HostAnswers, StepRecorder
from aifactory_train.core.errors import UserError
from aifactory_train.parallel.traits import traits_of

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.model.causal_lm import CausalLM
    from aifactory_train.model.precision import Precision

GIB = 2**30
#: ends the name of a phase of every micro-batch but the first
AGAIN = " again"


@dataclass(frozen=True)
class StepSpec:
    """What is audited. ``lengths`` are the tokens of the documents of a micro-batch, which lie end to end; every token
    but the last of a document is supervised. ``config`` is a transformers configuration; ``loss_rows`` the rows of
    logits that exist at once."""

    config: Any
    recipe: Recipe
    arch: str
    sku: str | None
    lengths: tuple[int, ...]
    engine: str = "ddp"
    micro_batches: int = 1
    loss_rows: int | None = None
    world: int = 1
    shard: int = 1

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def targets(self) -> int:
        return self.tokens - len(self.lengths)


@dataclass
class StepAccount:
    """What one step does: totals, by phase, by operator, what lives at the peak (bytes)."""

    rows: dict[tuple[str, str], Booked]
    collectives: dict[tuple[str, str], Booked]
    syncs: dict[str, int]
    peak: dict[str, int]
    weights: int

    def total(self) -> Booked:
        out = Booked()
        for row in self.rows.values():
            out.add(row)
        return out

    def as_dict(self) -> dict[str, Any]:
        """Plain values: bytes, FLOPs and launches of the step, GiB at its peak."""
        total = self.total()
        phases = {phase: Booked() for phase, _ in self.rows}
        names: dict[str, Booked] = {}
        for (phase, name), row in self.rows.items():
            phases[phase].add(row)
            names.setdefault(name, Booked()).add(row)
        collectives: dict[str, Booked] = {}
        for (_, name), row in self.collectives.items():
            collectives.setdefault(name, Booked()).add(row)
        return {
            **_plain(total),
            "syncs": sum(self.syncs.values()),
            "syncs_by": dict(self.syncs),
            "peak_gib": round(sum(self.peak.values()) / GIB, 3),
            "weights_gib": round(self.weights / GIB, 3),
            "peak_by_component_gib": {name: round(self.peak.get(name, 0) / GIB, 3) for name in COMPONENTS},
            "phases": {name: _plain(row) for name, row in phases.items()},
            "operators": {n: _plain(r) for n, r in sorted(names.items(), key=lambda item: -item[1].bytes)},
            "collectives": {n: {"count": r.launches, "bytes": r.read} for n, r in collectives.items()},
        }


def _plain(row: Booked) -> dict[str, int]:
    return {
        "bytes": row.bytes, "bytes_read": row.read, "bytes_written": row.written, "launches": row.launches,
        "flops": row.flops,
    }  # fmt: skip


@contextmanager
def audited(
    module: nn.Module, answers: HostAnswers, inputs: Sequence[torch.Tensor], state: Callable[[], Any]
) -> Iterator:
    """A recorder over a step of ``module``: its parameters are weights, what accumulates in them gradients, what
    ``state()`` returns (tensors in any nesting) the optimizer's. Yields the :class:`StepRecorder`."""
    from torch.utils._pytree import tree_leaves

    recorder = StepRecorder(answers)
    recorder.meta = any(p.device.type == "meta" for p in map(_local, module.parameters()))
    held = recorder.holdings
    handles = []
    for parameter in module.parameters():
        held.see(parameter, "weights")
        if parameter.requires_grad:
            hook = lambda p: held.see(p.grad, "gradients", move=True)  # noqa: E731
            handles.append(parameter.register_post_accumulate_grad_hook(hook))
    for tensor in [*module.buffers(), *inputs]:
        held.see(tensor, "inputs")
    for tensor in tree_leaves(state()):
        if isinstance(tensor, torch.Tensor):
            held.see(tensor, "optimizer", move=True)
    held.forget_peak()
    try:
        with recorder:
            yield recorder
    finally:
        for handle in handles:
            handle.remove()


def account(recorder: StepRecorder, module: nn.Module, micro_batches: int = 1) -> StepAccount:
    """What ``recorder`` saw of a step of ``module``; the second of its micro-batches stands for all further ones."""
    held = recorder.holdings
    weights = {id(p.untyped_storage()): p.untyped_storage().nbytes() for p in map(_local, module.parameters())}
    rows, collectives = (_all_micro_batches(part, micro_batches) for part in (recorder.rows, recorder.collectives))
    return StepAccount(rows, collectives, dict(recorder.syncs), dict(held.peak), sum(weights.values()))


def _all_micro_batches(seen: dict[tuple[str, str], Booked], count: int) -> dict[tuple[str, str], Booked]:
    rows: dict[tuple[str, str], Booked] = {}
    for (phase, name), row in seen.items():
        times = count - 1 if phase.endswith(AGAIN) else 1
        rows.setdefault((phase.removesuffix(AGAIN), name), Booked()).add(row, times)
    return rows


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# ---- our step


def run(spec: StepSpec) -> StepAccount:
    """One step of ``spec``, counted. Raises :class:`UserError` for a chip without kernels, and for ZeRO, whose engine
    is DeepSpeed's own and needs a device."""
    if traits_of(spec.engine).zero_stage is not None:
        raise UserError(
            f"the step audit runs torch's engines, not {spec.engine}",
            where="--audit",
            fix="--set parallel.engine=fsdp2, which holds what ZeRO-3 holds",
        )
    with ExitStack() as stack:
        if spec.recipe.kernels.enabled != "off":
            pretend.refuse_unknown(spec.arch)
        stack.enter_context(pretend.chip(spec.arch, spec.sku))
        if traits_of(spec.engine).cuts == "rows":
            stack.enter_context(ranks.sharding(spec.world))
        with torch.device("meta"):
            engine = _engine(spec, _core(spec))
        engine.prepare_state(1)
        batch = _batch(spec)
        module: nn.Module = engine.core
        inputs = [batch.input_ids, batch.position_ids, batch.documents.cu_seqlens, batch.positions, batch.targets]
        kept = engine.average.kept if engine.average is not None else {}
        state = lambda: [*engine.optimizer.state.values(), *kept.values()]  # noqa: E731
        answers = HostAnswers(spec.targets, list(spec.lengths), routed=spec.tokens * _chosen(spec.config))
        with audited(module, answers, inputs, state) as recorder:
            _steps(engine, batch, spec, recorder)
        made = account(recorder, module, spec.micro_batches)
        if traits_of(spec.engine).cuts == "whole" and spec.world > 1:
            _summed_copies(made, engine)
        return made


def _chosen(config: Any) -> int:
    """How many experts a token is sent to; 0: there are none."""
    return int(getattr(config.get_text_config(), "num_experts_per_tok", None) or 0)


def _summed_copies(made: StepAccount, engine: Any) -> None:
    """DDP's sum over the copies, once a step in buckets of 25 MiB. Its C++ part takes no meta tensors, so that the step
    of one process is run, and the sum is said by the engine's own rule: every trained gradient in the type of
    reduction."""
    size = sum(p.numel() for _, p in engine.named) * engine.precision.reduce.itemsize
    made.collectives["backward", "c10d::allreduce_"] = Booked(max(1, -(-size // (25 * 2**20))), size)


def _steps(engine: Any, batch: Any, spec: StepSpec, recorder: StepRecorder) -> None:
    settings = spec.recipe.train
    counted = min(2, spec.micro_batches)  # all but the first are alike: they find gradients
    if engine.core.routing is not None:
        engine.core.routing.begin(spec.tokens * spec.micro_batches, spec.targets * spec.micro_batches)
        engine.core.routing.count_before([_forward(engine, batch, recorder, number) for number in range(counted)])
    for number in range(counted):
        again = AGAIN if number else ""
        recorder.phase = "forward" + again
        with _turns_to_backward(recorder, "backward" + again):
            engine.forward_backward(batch, 1 / 2**13, last=number == counted - 1)
    recorder.phase = "update"
    engine.clip(settings.max_grad_norm, 0.75)
    engine.step(settings.learning_rate)


def _forward(engine: Any, batch: Any, recorder: StepRecorder, number: int) -> Callable[[], Any]:
    """The forward pass of a micro-batch by itself: what routers' losses count first."""

    def run() -> None:
        recorder.phase = "forward" + (AGAIN if number else "")
        engine.module(**batch.kwargs())

    return run


@contextmanager
def _turns_to_backward(recorder: StepRecorder, phase: str) -> Iterator[None]:
    """The phase is ``phase`` from the call of ``Tensor.backward`` on, which is inside the engine."""
    before = torch.Tensor.backward

    def backward(self, *args, **kwargs):
        recorder.phase = phase
        return before(self, *args, **kwargs)

    torch.Tensor.backward = backward  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.backward = before  # type: ignore[method-assign]


def precision_of(recipe: Recipe) -> Precision:
    """The policy that the recipe has on a GPU with bf16."""
    from aifactory_train.model.precision import policy

    return policy(recipe.precision, fast=True)


def _core(spec: StepSpec) -> CausalLM:
    """The model as ``training`` makes it, without weights."""
    from transformers import AutoModelForCausalLM

    from aifactory_train.kernels import hardware
    from aifactory_train.model import attention, experts, routing
    from aifactory_train.model.adapters import apply_adapter
    from aifactory_train.model.causal_lm import CausalLM
    from aifactory_train.model.gpu_operators import apply_kernels
    from aifactory_train.model.loss import chunk_rows
    from aifactory_train.model.operators import skipped
    from aifactory_train.model.precision import apply_precision
    from aifactory_train.model.report import ModelReport

    recipe, precision = spec.recipe, precision_of(spec.recipe)
    attention.register()
    whole = recipe.adapter.kind == "none"
    model: Any = AutoModelForCausalLM.from_config(
        spec.config,
        dtype=precision.parameters if whole else precision.frozen,
        attn_implementation=attention.VARLEN,
    )
    model.config.use_cache = False
    experts.use(model)
    model = apply_adapter(model, recipe, ModelReport())
    apply_precision(model, precision)
    rows = spec.loss_rows or recipe.train.loss_chunk_tokens
    if rows is None:
        vocabulary = spec.config.get_text_config().vocab_size
        rows = min(chunk_rows(vocabulary, device="meta"), hardware.chunk_rows(hardware.sku(spec.sku, spec.arch)))
    core = CausalLM(model, rows)
    core.routing = routing.watch(model, core.language_model, recipe, ModelReport(), "meta")
    if recipe.kernels.enabled != "off":
        skip = skipped(traits_of(spec.engine).weights, recipe.parallel.compile)
        apply_kernels(core.model, arch=spec.arch, sku=spec.sku, dtype=precision.frozen, skip=skip)
        core.kernels = True
    else:
        experts.without_kernels(core.model)
    return core


def _engine(spec: StepSpec, core: CausalLM) -> Any:
    from aifactory_train.parallel.apply import prepare_blocks
    from aifactory_train.parallel.world import World

    precision, traits = precision_of(spec.recipe), traits_of(spec.engine)
    prepare_blocks(
        core,
        compute=precision.compute if traits.compute_copies else None,
        checkpointing=spec.recipe.parallel.activation_checkpointing,
        compiled=False,
    )
    core.train()
    world = World(0, spec.world, 0, 1, "meta", "audit", "audit")
    return traits.load()(spec.engine, core, spec.recipe, precision, world)


def _batch(spec: StepSpec) -> Any:
    from aifactory_train.model.attention import Documents
    from aifactory_train.parallel.engine import DeviceBatch

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")

    bounds = torch.empty(len(spec.lengths) + 1, dtype=torch.int32, device="meta")
    documents = Documents(list(spec.lengths), bounds, max(spec.lengths))
    return DeviceBatch(
        integers(1, spec.tokens), integers(1, spec.tokens), documents, integers(spec.targets), integers(spec.targets)
    )
