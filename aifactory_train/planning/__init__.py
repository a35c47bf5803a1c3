"""Plan before you pay: memory, strategy, speed and cost of a recipe at a site. Torch-free, except ``verify_sharding``.

    shapes         dimensions of the base models, parameters per tensor
    job            what a prediction depends on: GPU, links, layout, batch, types
    memory         peak memory of a rank, component by component
    timing         time of a step: a roofline with calibrated shares of the peaks
    workload       what the recipe asks for;  size: how much there is to train on
    search         every configuration that fits, ranked
    plan           the plan (``aifactory plan --json``): request, plan, reasons, result
    verify_sharding  the sharded model really built for up to 4,096 ranks (imports torch when called)

For other rooms::

    plan, job = planning.plan_for(recipe, system, nodes=4, given={"parallel.engine"})
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.planning.job import TrainingJob
    from aifactory_train.sites import System


def keys_set(overrides: Iterable[str]) -> set[str]:
    """Keys that overrides (``a.b=c``) give a value; a micro-batch of ``auto`` is left to the plan."""
    return {
        text.partition("=")[0].strip() for text in overrides if text.replace(" ", "") != "train.micro_batch_tokens=auto"
    }


def plan_for(
    recipe: Recipe,
    system: System,
    nodes: int | None = 1,
    *,
    gpus_per_node: int | None = None,
    partition: str | None = None,
    qos: str | None = None,
    deadline_hours: float | None = None,
    budget_gpu_hours: float | None = None,
    tokens: float | None = None,
    model_config: str | None = None,
    given: Iterable[str] = (),
) -> tuple[dict[str, Any], TrainingJob]:
    """``(plan, job)`` of a loaded recipe at a loaded system; ``nodes=None`` chooses them, ``given`` names keys set on
    the command line.

    ``plan["overrides"]`` are the keys that ``train`` takes. Raises :class:`~aifactory_train.core.errors.UserError`
    where there is no plan.
    """
    from aifactory_train.config.quantised_base import check_quantised
    from aifactory_train.model import shapes
    from aifactory_train.planning import dimensions, plan, size

    shape = dimensions.of_model(recipe.model, model_config)
    copies = shapes.copies_of(shape) if shape.quantised else []
    check_quantised(shape.quantised, f"model.base: {recipe.model.base}", recipe.adapter.quantise_base, copies)
    given = frozenset(given)
    touched = any(
        key.startswith(("data.train", "data.supervise", "model.base", "data.sequence_length")) for key in given
    )
    return plan.make(
        plan.PlanRequest(
            recipe=recipe,
            shape=shape,
            system=system,
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            partition=partition,
            qos=qos,
            deadline_hours=deadline_hours,
            budget_gpu_hours=budget_gpu_hours,
            given=given,
            size=size.of_recipe(recipe, tokens, data_overridden=touched),
        )
    )
