"""The recipe: schema, rules across keys, loading, overrides."""

from aifactory_train.config import rules as rules  # a recipe is never validated without them
