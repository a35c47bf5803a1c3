"""Looking into the cache; never the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aifactory_train.config.data_blocks import DataSource
from aifactory_train.config.schema import ModelConfig
from aifactory_train.config.source_spec import parse
from aifactory_train.core.errors import UserError
from aifactory_train.core.files import check_regular
from aifactory_train.sources import hub
from aifactory_train.sources.cache import (
    MANIFEST,
    MODEL_FORMS,
    check_model_folder,
    complete_item,
    hub_manifest_folder,
    inside,
    item_folder,
    model_folder,
)


def resolve_model(model: ModelConfig) -> Path:
    """Folder of a fetched base model (``config.json``, safetensors, tokenizer). Never uses the network.

    With ``model.vocabulary`` it is the folder with the larger vocabulary, with ``model.rope_scaling`` the one whose
    configuration has the scaling. Raises :class:`UserError` when the model was not fetched or a local folder is not a
    model.
    """
    folder = _resolve_base(model)
    if model.vocabulary is not None:
        from aifactory_train.sources.vocabulary import extended

        folder = extended(folder, model.vocabulary)
    if model.rope_scaling is not None:
        from aifactory_train.sources.rope_scaling import scaled

        folder = scaled(folder, model.rope_scaling, trust_remote_code=model.trust_remote_code)
    return folder


def _resolve_base(model: ModelConfig) -> Path:
    spec = parse(model.base)
    if spec.kind == "hub":
        return hub.cached(spec, model.revision, "model", "model.base")
    if spec.kind == "local":
        path = Path(spec.name)
        if path.is_file() and path.suffix == ".gguf":
            return complete_item(model_folder(spec, path), spec, "model.base") / "model"
        if not path.exists():
            raise UserError(f"no such model folder: {spec.text}", where="model.base", fix=MODEL_FORMS)
        check_model_folder(path, spec.text)
        return path
    folder = complete_item(model_folder(spec), spec, "model.base") / "model"
    check_model_folder(folder, spec.text)
    return folder


def resolve_data(source: DataSource) -> Path:
    """File or folder of a fetched (or local) data source. Never uses the network."""
    spec = parse(source.source)
    if spec.kind == "hub":
        return hub.cached(spec, source.revision, "dataset", "data")
    if spec.kind == "local":
        path = Path(spec.name)
        if not path.exists():
            raise UserError(
                "no such file or folder",
                where=spec.text,
                fix="check the path; a data set of the Hugging Face hub is written ORG/NAME",
            )
        check_regular(path)
        return path
    item = complete_item(item_folder(spec), spec, "data")
    return inside(item / "files", spec)


def manifest_of(source: str, *, model: bool = False) -> dict[str, Any] | None:
    """The manifest that :func:`fetch` wrote for a source, or None (local sources, and what was not fetched)."""
    spec = parse(source)
    if spec.kind == "hub":
        folder = hub_manifest_folder(spec, "model" if model else "dataset")
    elif spec.kind == "local":
        path = Path(spec.name)
        if not (model and path.is_file()):
            return None
        folder = model_folder(spec, path)
    else:
        folder = model_folder(spec) if model else item_folder(spec)
    file = folder / MANIFEST
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
