"""Which engine, and building it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aifactory_train.core.errors import UserError
from aifactory_train.parallel.capabilities import holds_quantised
from aifactory_train.parallel.engine import Engine

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.model.causal_lm import CausalLM
    from aifactory_train.model.precision import Precision
    from aifactory_train.parallel.world import World


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


def refuse_quantised(recipe: Recipe, name: str) -> None:
    """Raise :class:`UserError` for a 4-bit base with an engine that cannot hold one."""
    if recipe.adapter.quantise_base != "none" and not holds_quantised(name):
        raise UserError(
            f"engine {name} cannot hold a 4-bit base",
            where="adapter.quantise_base",
            fix="--set parallel.engine=ddp (the 4-bit base is small), or adapter.quantise_base=none",
        )
