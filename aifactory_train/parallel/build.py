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
    """Construct the engine; its imports happen here, so that DeepSpeed is needed only where it is used."""
    from aifactory_train.core import compat
    from aifactory_train.model.base import base_folder
    from aifactory_train.model.weight_files import forget_pages
    from aifactory_train.parallel.apply import prepare_blocks

    settings, traits = recipe.parallel, traits_of(name)
    refuse_what_it_cannot_do(recipe, name)
    prepare_blocks(
        core,
        compute=precision.compute if traits.compute_copies else None,
        checkpointing=settings.activation_checkpointing,
        compiled=settings.compile,
    )
    core.train()
    engine = traits.load()(name, core, recipe, precision, world)
    if world.local_rank == 0 and compat.shares_memory(world.device):
        # Cached pages of the files would push the model's own memory away from its GPU; the engine's collectives said
        # that all ranks have read them.
        forget_pages(base_folder(recipe))
    return engine
