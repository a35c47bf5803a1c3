"""The planner's word for a submission, where the planner is installed; it is never needed to launch."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from aifactory_train.errors import UserError
from aifactory_train.launchers.submission import Submission

if TYPE_CHECKING:
    from aifactory_train.config import Recipe

OWN = "no planner is asked: the recipe's own settings (engine, micro-batch, accumulation) are taken as they are"


def plan_for(sub: Submission, recipe: Recipe) -> tuple[dict[str, Any] | None, str | None]:
    """(plan as JSON data or None, a note for the user or None)."""
    if importlib.util.find_spec("aifactory_train.planning.search") is None:
        return None, OWN
    return None, OWN


__all__ = ["OWN", "UserError", "plan_for"]
