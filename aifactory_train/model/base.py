"""Which folder holds the base weights of a recipe, and what the base is called in public."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.run.folder import RunFolder, open_run

if TYPE_CHECKING:
    pass


def base_folder(recipe: Recipe) -> Path:
    """Folder of the weights below the adapter: the recipe's base, or what ``model.start_from`` put in its place.

    A run that trained all weights leaves a new base; a run that trained an adapter keeps the base it had.
    """
    return _base_below(recipe, [])


def _base_below(recipe: Recipe, seen: list[Path]) -> Path:
    from aifactory_train.sources import resolve_model, same_source
    from aifactory_train.sources.cache import check_weight_index

    if not recipe.model.start_from:
        return resolve_model(recipe.model)
    run = open_run(recipe.model.start_from)
    if run.path.resolve() in seen:
        raise UserError("the chain of earlier runs leads back to itself", where=f"model.start_from: {run.path}")
    if _trained_head(run):
        raise UserError(
            "the earlier run trained a head: its weights are those of a classifier, and its head has no place here",
            where=f"model.start_from: {recipe.model.start_from}",
            fix="start from a run that learnt text, or prolong that run (the same --run-dir with more epochs)",
        )
    if (run.export / "model" / "config.json").is_file():
        check_weight_index(run.export / "model")
        return run.export / "model"
    earlier = run.load_config()
    if not same_source(earlier.model.base, recipe.model.base):
        raise UserError(
            f"the earlier run's adapter belongs to {earlier.model.base}, this recipe trains {recipe.model.base}",
            where="model.start_from",
            fix=f"--set model.base={earlier.model.base}",
        )
    return _base_below(earlier, [*seen, run.path.resolve()])


def _trained_head(run: RunFolder) -> bool:
    """Whether what ``run`` exported is a classifier."""
    config = run.export / "model" / "config.json"
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, RecursionError):  # named by its own loader
        if config.is_file():
            return any("SequenceClassification" in n for n in json.loads(config.read_text("utf-8"))["architectures"])
        adapter = json.loads((run.export / "adapter" / "adapter_config.json").read_text("utf-8"))
        return adapter.get("task_type") == "SEQ_CLS"
    return False


def public_base(recipe: Recipe) -> tuple[str, str | None]:
    """(name, revision) of the base for ``adapter_config.json``: the weights that were used, and nothing that they are
    only said to be.

    Hub ids and package sources are kept as given. A local folder is named by its absolute path: what its configuration
    calls itself (:func:`claimed_name`) is no proof that it holds the same weights.
    """
    from aifactory_train.sources import parse, resolve_model

    if recipe.model.vocabulary is not None or recipe.model.rope_scaling is not None:
        # the original base has too few embeddings for what was trained, or other positions
        return absolute(base_folder(recipe)), None
    if recipe.model.start_from:
        below = base_folder(recipe)
        if below != resolve_model(recipe.model):
            return absolute(below), None  # an earlier run trained all weights
    if parse(recipe.model.base).kind != "local":
        return recipe.model.base, recipe.model.revision
    return absolute(Path(recipe.model.base)), None


def claimed_name(recipe: Recipe) -> str | None:
    """The hub id that the configuration of a local base calls itself (``_name_or_path``), if it names one: a claim, not
    a fact.
    """
    from aifactory_train.sources import parse

    if parse(recipe.model.base).kind != "local":
        return None
    folder = Path(recipe.model.base).expanduser()
    with contextlib.suppress(
        OSError, ValueError, AttributeError, RecursionError
    ):  # its own loader names what is wrong with it
        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path", "")
        if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
            return name
    return None


def absolute(path: Path) -> str:
    return os.path.abspath(path.expanduser())
