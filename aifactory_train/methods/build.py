"""The training method of a recipe. A method is a block below ``methods`` of the recipe and a class in this table."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from aifactory_train.methods.supervised import Supervised

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.methods.base import TrainingMethod

#: Block of the recipe below ``methods`` -> ``module:class``, imported only where a recipe has the block. At most one
#: may be set.
METHODS = {
    "preference": "aifactory_train.methods.preference:Preference",
    "head": "aifactory_train.methods.head:head_method",
    "distill": "aifactory_train.methods.distill:Distill",
    "grpo": "aifactory_train.methods.grpo:Grpo",
}


def method_of(recipe: Recipe) -> TrainingMethod:
    """The method whose block the recipe sets; supervised fine-tuning where it sets none."""
    for block, place in METHODS.items():
        if getattr(recipe.methods, block, None) is not None:
            module, _, name = place.partition(":")
            return getattr(importlib.import_module(module), name)(recipe)
    return Supervised(recipe)
