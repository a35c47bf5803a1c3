"""The planner's word for a job. Where it has none, launching goes on with the recipe's own settings, and that is
said.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from aifactory_train.core.errors import UserError
from aifactory_train.launchers import backends
from aifactory_train.launchers.request import LaunchRequest
from aifactory_train.launchers.shape import JobShape
from aifactory_train.sites.profiles import System

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe

#: Where the planner says that it cannot know (a fact is not published, a format is not covered): no reason to refuse a
#: job.
UNKNOWN = ("--site", "precision.compute", "model.base")


def plan_for(
    request: LaunchRequest, system: System, shape: JobShape, recipe: Recipe
) -> tuple[dict[str, Any] | None, list[str], str | None]:
    """(plan.json or None, overrides ``key=value`` that it wants, a note for people or None).

    A plan with ``fits: False`` carries the planner's refusal; the rule ``plan-possible`` reports it.
    """
    if not backends.get(shape.backend).batch:
        return None, [], None
    from aifactory_train.planning import keys_set
    from aifactory_train.planning import plan_for as plan

    given = keys_set(request.overrides)
    try:
        found, _ = plan(
            recipe,
            system,
            shape.nodes,
            gpus_per_node=shape.gpus_per_node,
            partition=shape.partition_key,
            qos=shape.qos if shape.qos in system.qos else None,
            given=given,
        )
    except UserError as error:
        if error.where in UNKNOWN:
            return None, [], f"no plan: {error.what}; the recipe's own settings are taken as they are"
        return {"fits": False, "reason": error.what, "where": error.where, "fix": error.fix}, [], None
    wanted = [f"{key}={json.dumps(value)}" for key, value in found.get("overrides", {}).items() if key not in given]
    return found, wanted, None
