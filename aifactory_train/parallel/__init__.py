"""Engines: how one model is trained by many ranks.

One small file an engine, all behind :class:`Engine`. The loop decides *what* a step computes (which documents, the global
number of supervised tokens); an engine only decides where parameters, gradients and optimizer state live. The contract that
keeps every engine on the same curve: gradients of the ranks are **summed**, never averaged, and nothing is divided by the
world size or by the number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from aifactory_train.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from aifactory_train.attention import Documents
    from aifactory_train.config import Recipe
    from aifactory_train.model import CausalLM, Precision
    from aifactory_train.parallel.state import Sharded
    from aifactory_train.parallel.world import World


@dataclass
class DeviceBatch:
    """One micro-batch on the device: arguments of :meth:`aifactory_train.model.CausalLM.forward`.

    input_ids and position_ids int64 ``[B, T]``; positions int64 ``[N]`` into the flattened batch; targets int64 ``[N]``.
    ``N`` may be 0: a rank with nothing to do still takes part in the collectives.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    documents: Documents
    positions: torch.Tensor
    targets: torch.Tensor
    #: what a training method adds (:mod:`aifactory_train.methods`): ``noise``, ``judged``
    extra: dict[str, Any] = field(default_factory=dict)

    def kwargs(self) -> dict[str, Any]:
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "documents": self.documents,
            "positions": self.positions,
            "targets": self.targets,
            **self.extra,
        }


class Engine(Protocol):
    """What the loop, the checkpoints and the export need of an engine."""

    name: str
    #: callable like CausalLM.forward; all ranks must call it together
    module: nn.Module
    #: the CausalLM inside, whose parameters the engine may have sharded in place
    core: CausalLM

    def forward_backward(self, batch: DeviceBatch, scale: float, last: bool) -> torch.Tensor:
        """Add the gradient of ``scale * sum of losses`` of this micro-batch; reduce over ranks only when ``last``.

        Returns the detached, unscaled loss sum of this rank (fp32 scalar on the device, no synchronisation).
        """

    def clip(self, max_norm: float | None, rest: float = 1.0) -> torch.Tensor:
        """Multiply the summed gradients by ``rest``; then scale them if their norm exceeds ``max_norm``.

        Returns their global L2 norm before clipping, ``rest`` included (fp32 scalar).
        """

    def step(self, learning_rate: float) -> None:
        """One optimizer step at this learning rate; gradients are cleared."""

    def discard(self) -> None:
        """Clear the gradients without a step."""

    #: files to store with the run, by name (DeepSpeed's JSON); values are JSON
    files: dict[str, Any]
    #: optimizer steps done; stored beside the tensors, so that no engine keeps a count per parameter
    updates: int

    def state(self) -> dict[str, dict[str, Sharded]]:
        """``{"model": {NAME: ...}, "optimizer": {MOMENT/NAME: ...}}``: live views of what this rank holds.

        Trained parameters alone (frozen weights come from the base model). Names, global shapes and types are the same for
        every engine and every world size, so that any engine reads any other's state. Moments are there once a step was
        made or :meth:`prepare_state` was called. No communication.
        """

    def prepare_state(self, updates: int) -> None:
        """Make room for the moments of a run that made ``updates`` steps, so that :meth:`state` shows where to read them."""

    def finish_load(self, updates: int) -> None:
        """After the views of :meth:`state` were overwritten: refresh whatever is derived from them. Collective."""

    def full_parameters(self, trained_only: bool = True) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Iterate ``(name, full tensor on the CPU)`` in a fixed order, one at a time; collective on all ranks.

        Tensors are given on rank 0 only (None elsewhere); no rank holds more than one parameter more than its shard.
        """

    def gathered(self) -> AbstractContextManager[None]:
        """Within it, parameters outside the blocks are whole on every rank (generation calls parts of the model)."""

    def describe(self) -> list[tuple[str, str, str]]:
        """``(what, choice, why)`` lines for the start-up report."""


def choose_engine(recipe: Recipe, world: World) -> tuple[str, str]:
    """Name of the engine and the reason. ``auto`` is ddp: the plan (``aifactory plan``) writes a sharded engine if the
    model does not fit otherwise."""
    wanted = recipe.parallel.engine
    if wanted != "auto":
        return wanted, "asked for"
    if recipe.parallel.shard_size is not None:
        raise UserError(
            "is of engine hsdp, and 'auto' is ddp where no plan wrote another",
            where="parallel.shard_size",
            fix="--set parallel.engine=hsdp, or leave parallel.shard_size out",
        )
    return "ddp", "one copy of the model per rank" if world.size > 1 else "one process"


def build_engine(name: str, core: CausalLM, recipe: Recipe, precision: Precision, world: World) -> Engine:
    """Construct the engine; its imports happen here, so that DeepSpeed is needed only where it is used.

    Order: compute type (DDP alone: the others cast gathered parameters), activation checkpointing, compilation, engine.
    """
    from aifactory_train.parallel.apply import apply_activation_checkpointing, apply_compile, apply_compute_type

    settings = recipe.parallel
    refuse_quantised(recipe, name)
    if name == "ddp":
        apply_compute_type(core, precision.compute)
    apply_activation_checkpointing(core, settings.activation_checkpointing)
    if settings.compile:
        apply_compile(core, name)
    core.train()
    if name == "ddp":
        from aifactory_train.parallel.ddp import DDPEngine

        return DDPEngine(core, recipe, precision, world)
    if name in ("fsdp2", "hsdp"):
        from aifactory_train.parallel.fsdp import FSDPEngine

        return FSDPEngine(core, recipe, precision, world, replicate=name == "hsdp")
    if name in ("zero1", "zero2", "zero3"):
        from aifactory_train.parallel.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(core, recipe, precision, world, stage=int(name[-1]))
    raise UserError(f"unknown engine '{name}'", where="parallel.engine")


def zero_stage(asked: int, *, bf16: bool, offload_optimizer: bool) -> int:
    """The ZeRO stage that runs where stage ``asked`` is wanted; the engine and the planner both ask here.

    In bf16, DeepSpeed hands its stage 1 to another optimizer, which keeps no partitions that norms and checkpoints could be
    read from: stage 2 runs instead. With the optimizer state in host memory stage 1 is DeepSpeed's own.
    """
    return 2 if asked == 1 and bf16 and not offload_optimizer else asked


def holds_quantised(name: str) -> bool:
    """Whether an engine can hold a 4-bit base: its weights are opaque bytes, which cannot be split or cast."""
    return name == "ddp"


def refuse_quantised(recipe: Recipe, name: str) -> None:
    """Raise :class:`UserError` for a 4-bit base with an engine that cannot hold one."""
    if recipe.adapter.quantise_base != "none" and not holds_quantised(name):
        raise UserError(
            f"engine {name} cannot hold a 4-bit base",
            where="adapter.quantise_base",
            fix="--set parallel.engine=ddp (the 4-bit base is small), or adapter.quantise_base=none",
        )
