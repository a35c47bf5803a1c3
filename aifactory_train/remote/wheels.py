"""The program for a login node as wheels: this project's own and its light dependencies, for the Python over there.

They are taken from a folder, from what is installed here where that fits, or from the package index where that is asked
for. Nothing is asked of the network over there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
import io
import platform
import re
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import aifactory_train
from aifactory_train.core.errors import RunFailed, UserError

#: What a login node needs; their own dependencies are followed.
LIGHT = ("pydantic", "pyyaml", "jinja2", "rich")
#: What looks into Hugging Face's cache, where it is installed here; its accelerator in C is left out.
_HUB, _LEFT_OUT = ("huggingface-hub",), ("hf-xet",)
#: Parts that are C and have no substitute in Python: they fit one version and one instruction set.
_BINARY = ("pydantic-core",)
_OWN = "aifactory-train"
_STAMP = (2020, 1, 1, 0, 0, 0)


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed() -> dict[str, str]:
    """Distribution -> version, as they are installed here: the versions that this program was tried with."""
    found: dict[str, str] = {}
    open_names = [*LIGHT, *_HUB]
    while open_names:
        name = plain(open_names.pop())
        if name in found or name in _LEFT_OUT:
            continue
        try:
            dist = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            if name in LIGHT:
                raise UserError(f"{name} is not installed here", fix="pip install aifactory-train") from None
            continue  # needed by other versions of Python
        found[name] = dist.version
        for line in dist.requires or []:
            match = re.match(r"[A-Za-z0-9._-]+", line)
            if match and "extra" not in line.partition(";")[2]:
                open_names.append(match[0])
    return found


def own_wheel() -> tuple[str, bytes]:
    """(file name, content) of this package as it runs here; the same bytes for the same files."""
    root = Path(aifactory_train.__file__).parent
    version = aifactory_train.__version__
    info = f"{_OWN.replace('-', '_')}-{version}.dist-info"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for path, name in sorted(_files(root, "aifactory_train"), key=lambda pair: pair[1]):
            _add(archive, name, path.read_bytes())
        requires = "".join(f"Requires-Dist: {line}\n" for line in _requirements())
        text = f"Metadata-Version: 2.1\nName: {_OWN}\nVersion: {version}\n{requires}"
        _add(archive, f"{info}/METADATA", text.encode())
        _add(archive, f"{info}/WHEEL", b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    return f"{info.removesuffix('.dist-info')}-py3-none-any.whl", out.getvalue()


def _requirements() -> list[str]:
    try:
        return metadata.requires(_OWN) or []
    except metadata.PackageNotFoundError:
        return []


def _files(folder: Path, prefix: str) -> list[tuple[Path, str]]:
    """Files below ``folder`` with their names in the archive; links to folders (a checkout has four) are followed."""
    found: list[tuple[Path, str]] = []
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name == "__pycache__" or path.suffix in (".pyc", ".so"):
            continue
        if path.is_dir():
            found += _files(path, f"{prefix}/{path.name}")
        elif path.is_file():
            found.append((path, f"{prefix}/{path.name}"))
    return found


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, _STAMP), data, zipfile.ZIP_DEFLATED)


def installed_wheel(name: str, version: str) -> tuple[str, bytes]:
    """A distribution of this environment as an archive that is unpacked beside others."""
    dist = metadata.distribution(name)
    out = io.BytesIO()
    pure = plain(name) not in _BINARY
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(dist.files or [], key=str):
            parts = PurePosixPath(file).parts
            skipped = (".pyc", ".so") if pure else (".pyc",)
            if ".." in parts or "__pycache__" in parts or file.suffix in skipped:
                continue  # scripts, byte code, and accelerators that have a substitute in Python
            _add(archive, str(PurePosixPath(file)), Path(str(dist.locate_file(file))).read_bytes())
    return f"{plain(name).replace('-', '_')}-{version}-here.whl", out.getvalue()


def wheels_for(
    python: tuple[int, int], machine: str, *, folder: Path | None, download: bool, cache: Path
) -> dict[str, bytes]:
    """File name -> content of everything that an environment of this Python and instruction set needs.

    Raises UserError where parts are not here and nobody allowed to ask for them.
    """
    wanted = needed()
    here = sys.version_info[:2] == python and platform.machine() == machine and sys.platform == "linux"
    name, data = own_wheel()
    found = {name: data}
    store = cache / "remote-wheels" / f"cp{python[0]}{python[1]}-{machine}"
    missing: dict[str, str] = {}
    for name, version in wanted.items():
        if file := _lying(folder, name, version, python, machine) or _lying(store, name, version, python, machine):
            found[file.name] = file.read_bytes()
        elif name not in _BINARY or here:
            file_name, data = installed_wheel(name, version)
            found[file_name] = data
        else:
            missing[name] = version
    if missing and not download:
        what = ", ".join(f"{name} {version}" for name, version in missing.items())
        raise UserError(
            f"wheels for CPython {python[0]}.{python[1]} on {machine} are not here: {what}",
            where="remote add",
            fix="--download asks the package index from this machine, --wheels DIR takes them from a folder, --python "
            "PATH names another Python there",
        )
    if missing:
        _download(missing, python, machine, store)
        for name, version in missing.items():
            file = _lying(store, name, version, python, machine)
            if file is None:
                raise RunFailed(f"no wheel of {name} {version} for CPython {python[0]}.{python[1]} on {machine}")
            found[file.name] = file.read_bytes()
    return found


def _lying(folder: Path | None, name: str, version: str, python: tuple[int, int], machine: str) -> Path | None:
    if folder is None or not folder.is_dir():
        return None
    for path in sorted(folder.glob("*.whl")):
        parts = path.stem.split("-")
        if len(parts) < 5 or plain(parts[0]) != name or parts[1] != version:
            continue
        fits = parts[-1] == "any" or (f"cp{python[0]}{python[1]}" in parts[-3] and parts[-1].endswith(machine))
        if fits and "musl" not in parts[-1]:
            return path
    return None


def _download(missing: dict[str, str], python: tuple[int, int], machine: str, store: Path) -> None:
    store.mkdir(parents=True, exist_ok=True)
    tags = [f"--platform={tag}_{machine}" for tag in ("manylinux_2_17", "manylinux2014", "manylinux_2_28")]
    argv = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(store),
    ]
    argv += [f"--python-version={python[0]}.{python[1]}", "--implementation=cp", *tags]
    argv += [f"{name}=={version}" for name, version in missing.items()]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RunFailed(f"the wheels could not be had: {'; '.join(done.stderr.strip().splitlines()[-2:])}")


def key_of(wheels: dict[str, bytes]) -> str:
    """The digest of a whole environment: what stands there is this, or something else."""
    found = hashlib.sha256()
    for name in sorted(wheels):
        found.update(f"{name} {hashlib.sha256(wheels[name]).hexdigest()}\n".encode())
    return found.hexdigest()[:24]
