"""The sources of a preparation, and the key of the cache: everything that decides what is in it."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aifactory_train.config.data_blocks import DataSource
from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.data import folders
from aifactory_train.data.encoder_spec import EncoderSpec
from aifactory_train.data.split import has_labels
from aifactory_train.private import vault
from aifactory_train.sources.digests import sha256_of

#: Raised when the same input would give other files; older caches are then built again.
PREPARED_FORMAT = 7


@dataclass
class Input:
    """One source with its place; ``role`` is ``train`` or ``eval``."""

    source: DataSource
    role: str
    name: str
    path: Path
    hub: bool
    content: str
    converter: Callable[..., Iterator[dict[str, Any]]] | None = None
    converter_digest: str | None = None


def resolve(recipe: Recipe) -> list[Input]:
    from aifactory_train import sources

    out: list[Input] = []
    taken: set[tuple[str, str]] = set()
    for role, listed in (("train", recipe.data.train), ("eval", recipe.data.eval or [])):
        for number, source in enumerate(listed):
            key = f"data.{role}.{number}"
            try:
                path = sources.resolve_data(source)
            except UserError as error:
                raise UserError(
                    error.what, where=error.where if error.where != "data" else f"{key}.source", fix=error.fix
                ) from None
            name = source.name or _default_name(source.source)
            while (role, name) in taken:
                name += "+"
            taken.add((role, name))
            converter = _converter(source.converter, key) if source.converter else None
            digest = None
            if converter is not None:
                digest = _source_digest(converter)
            kind = sources.parse(source.source).kind
            if converter is not None and kind == "local" and path.is_dir():
                _refuse_links_out(path, f"{key}.source")
            hub = kind == "hub"
            out.append(Input(source, role, name, path, hub, content_of(path), converter, digest))
    return out


def _refuse_links_out(folder: Path, key: str) -> None:
    """A converter opens files by itself and would follow every link (:mod:`aifactory_train.data.folders`)."""
    for link, why in folders.walk(folder).left_out:
        if why == folders.LEADS_OUT:
            raise UserError(
                f"{why}, and a converter would follow it", where=f"{key}: {link}", fix="take it away, or copy the file"
            )


def _source_digest(converter: Any) -> str:
    """SHA-256 of what decides a converter's rows: its module, and what the package's converters share."""
    module = sys.modules[converter.__module__]
    sources = [inspect.getsource(module)]
    common = sys.modules.get("aifactory_train.recipes.common")
    shared = (getattr(value, "__module__", None) for value in vars(module).values())
    if common is not None and common.__name__ in shared:
        sources.append(inspect.getsource(common))
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def _default_name(text: str) -> str:
    return re.sub(
        r"(\.(jsonl|ndjson|json|csv|tsv|parquet|txt|md|html?|pdf|gz|obo))+$",
        "",
        text.rstrip("/").replace("#", "/").rpartition("/")[2],
    )


_CONVERTER = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")


def _converter(text: str, key: str) -> Callable[..., Iterator[dict[str, Any]]]:
    """The function named ``MODULE:FUNCTION`` below ``aifactory_train.recipes`` (and nowhere else)."""
    where = f"{key}.converter"
    if not _CONVERTER.match(text):
        raise UserError(
            f"'{text}' does not have the form MODULE:FUNCTION", where=where, fix="e.g. health.phenotype:rows"
        )
    module_name, _, function_name = text.partition(":")
    full = f"aifactory_train.recipes.{module_name}"
    try:
        module = importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name and full.startswith(error.name):
            raise UserError(f"there is no recipe module '{module_name}'", where=where) from None
        raise
    function = getattr(module, function_name, None)
    if not callable(function) or function_name.startswith("_"):
        raise UserError(f"the module '{module_name}' has no function '{function_name}'", where=where)
    return function


def content_of(path: Path) -> str:
    """sha256 of a file, or of names and contents of a folder's files. Remembered
    (:mod:`aifactory_train.sources.digests`).
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    known = sha256_of(files)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path) if path.is_dir() else ''}\0{known[file]}\n".encode())
    return digest.hexdigest()


def cache_key(recipe: Recipe, spec: EncoderSpec, inputs: list[Input]) -> str:
    data = recipe.data
    decides: dict[str, Any] = {
        "format": PREPARED_FORMAT,
        **({"sealed": True} if vault.seals() else {}),
        "encoder": spec.digest(),
        "inputs": [
            [
                i.role,
                i.name,
                i.content,
                i.source.split,
                i.source.format,
                i.source.columns,
                i.source.options,
                i.source.max_rows,
                i.source.weight,
                *([{"share": i.source.share}] if i.source.share is not None else []),
                i.source.licence,
                i.source.converter,
                i.converter_digest,
            ]
            for i in inputs
        ],
        "rules": [data.eval_fraction, data.eval_rows, data.deduplicate, data.overlap, data.split_seed, data.unreadable],
        # what lies between several labels decides with the labels alone
        "row_rules": [
            data.split_by.model_dump() if data.split_by else None,
            (data.labels or has_labels(data)) and [data.labels, recipe.eval.label_separator],
        ],
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', recipe.id)}-{digest[:16]}"
