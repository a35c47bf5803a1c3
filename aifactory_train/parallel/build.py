"""Which engine, and building it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aifactory_train.core.errors import UserError
from aifactory_train.parallel.engine import Engine
from aifactory_train.parallel.traits import DEFAULT, refuse_what_it_cannot_do, traits_of

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
    return DEFAULT, "one copy of the model per rank" if world.size > 1 else "one process"


def build_engine(name: str, core: CausalLM, recipe: Recipe, precision: Precision, world: World) -> Engine:
    """Construct the engine; its imports happen here, so that DeepSpeed is needed only where it is used.

    Order: compute type (where the engine does not cast what it gathers), activation checkpointing, compilation, engine.
    """
    from aifactory_train.parallel.apply import apply_activation_checkpointing, apply_compile, apply_compute_type

    settings, traits = recipe.parallel, traits_of(name)
    refuse_what_it_cannot_do(recipe, name)
    if traits.compute_copies:
        apply_compute_type(core, precision.compute)
    apply_activation_checkpointing(core, settings.activation_checkpointing)
    if settings.compile:
        apply_compile(core)
    core.train()
    return traits.load()(name, core, recipe, precision, world)
