"""Where a recipe's base model gets its dimensions from: a given file, what was fetched, or the shipped table."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from aifactory_train.core.errors import UserError
from aifactory_train.model import shapes

if TYPE_CHECKING:
    from aifactory_train.config.schema import ModelConfig
    from aifactory_train.model.shapes import ModelShape


def of_model(model: ModelConfig, config_file: str | None = None) -> ModelShape:
    """The base model's dimensions: given, fetched, or shipped; positions as ``model.rope_scaling`` stretches them."""
    scaling = model.rope_scaling
    if scaling is not None:
        shape = of_model(model.model_copy(update={"rope_scaling": None}), config_file)
        longest = shape.max_positions
        return shape if longest is None else replace(shape, max_positions=scaling.positions(longest))
    if config_file:
        return shapes.load(model.base, config_file=config_file)
    folders: list[Path] = []
    if model.base.startswith(("pypi:", "npm:")) or model.base.endswith(".gguf"):
        from aifactory_train.sources import resolve_model

        try:
            folders.append(resolve_model(model))
        except UserError:
            folders = []  # not fetched yet: the shipped table is asked instead
    elif not Path(model.base).is_dir():
        folders = hub_folders(model.base, model.revision)
    base = model.base
    if base.startswith(("pypi:", "npm:")) and not folders:
        # a packaged model file is named after the model that it holds
        stem = re.sub(r"\.(Q\w+|gguf|safetensors)(?=\.|$)", "", base.rpartition("/")[2].rpartition("#")[2])
        match = next((name for name in shapes.known() if name.rpartition("/")[2].lower() == stem.lower()), None)
        base = match or base
    return shapes.load(base, folders)


def hub_folders(base: str, revision: str | None) -> list[Path]:
    """Snapshot folders of a Hugging Face id in the local cache (documented layout ``models--org--name/refs,
    snapshots``).

    Read here without ``huggingface_hub``, whose import takes longer than a whole plan.
    """
    home = Path(
        os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    )
    root = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser() / f"models--{base.replace('/', '--')}"
    wanted = revision or "main"
    reference = root / "refs" / wanted
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else wanted
    folder = root / "snapshots" / commit
    return [folder] if folder.is_dir() else []
