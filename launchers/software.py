"""The software at a site: which of three ways its profile allows, the script that builds it there, and a bundle for
machines without internet.

    overlay     inside the site's container: a virtual environment with --system-site-packages over the image's own
                torch
    modules     the same over the torch that the site's modules bring
    venv        an environment of our own, torch included, from the package index
    wheelhouse  the same, from wheels that were fetched elsewhere for the compute nodes' instruction set and carried
                over

Nothing here installs anything on the machine that calls it, except ``verify_here``, which looks at one environment.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aifactory_train import __version__
from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.core.files import file_digest
from aifactory_train.launchers import request as rq
from aifactory_train.launchers.container import IMAGE_SUFFIXES, container_of, env_folder, image_commands
from aifactory_train.launchers.rendering import templates
from aifactory_train.launchers.request import LaunchRequest
from aifactory_train.launchers.submission import quoted
from aifactory_train.sites.profiles import System

#: What `aifactory train` imports beside torch (extras "train" of setup.py, read from there when a source tree is at
#: hand).
IMPORTS = ("torch", "transformers", "peft", "datasets", "safetensors", "numpy", "yaml", "pydantic", "aifactory_train")
#: manylinux tags that pip accepts for a target, newest glibc first (RHEL 8 has 2.28, SLES 15 has 2.31, RHEL 9 has
#: 2.34).
TAGS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")


@dataclass(frozen=True)
class Way:
    """How the environment of a site comes about, and why."""

    kind: str  # overlay | modules | venv | wheelhouse
    why: str
    isa: str | None
    torch: str  # what provides torch
    folder: str
    index: str | None  # package index of torch wheels, where torch is installed by us


def way_of(system: System, request: LaunchRequest | None = None) -> Way:
    """The way that the profile names, in this order: container, modules with torch, then by the login nodes'
    internet.
    """
    request = request or LaunchRequest(recipe="env", site=system.id)
    isa = system.node.isa
    folder = env_folder(system)
    container = container_of(request, system)
    offline = system.internet.login == "none"
    if container is not None and container.image:
        whose = "your" if request.container or system.user.container_image else "the site's"
        return Way(
            "overlay",
            f"{whose} {container.runtime} image holds a torch",
            isa,
            f"image {container.image}",
            folder,
            None,
        )
    if system.software.provides_torch:
        return Way(
            "modules",
            "the site's modules bring torch",
            isa,
            f"modules {' '.join(system.software.modules)}",
            folder,
            None,
        )
    if system.software.needs_image:
        return Way(
            "modules",
            "the bare host lacks NCCL's plug-in: run this inside a uenv, or name an image (user.container_image)",
            isa,
            "the uenv that it is run in",
            folder,
            None,
        )
    index = torch_index(system)
    if offline:
        return Way(
            "wheelhouse",
            f"login nodes of {system.name} have no internet: wheels come by rsync",
            isa,
            "wheelhouse",
            folder,
            index,
        )
    return Way(
        "venv",
        "no image and no torch module are published; login nodes are not said to be offline",
        isa,
        "package index",
        folder,
        index,
    )


def torch_index(system: System) -> str | None:
    """The index of torch wheels for the site's GPUs; aarch64 wheels of PyPI were CPU-only before torch 2.9, so CUDA is
    named.
    """
    if system.gpu.vendor == "amd":
        return "https://download.pytorch.org/whl/rocm6.4"
    if system.gpu.vendor == "nvidia":
        return (
            "https://download.pytorch.org/whl/cu129"
            if system.node.isa == "aarch64"
            else "https://download.pytorch.org/whl/cu128"
        )
    return None


def python_version(system: System) -> str:
    """CPython of the environment: that of the launching interpreter, unless it is newer than wheels usually are."""
    return f"{sys.version_info.major}.{min(sys.version_info.minor, 13)}"


def script(system: System, way: Way, request: LaunchRequest | None = None, *, bundle: bool = False) -> str:
    """The build script, to be run at the site (on a compute node where login and compute nodes differ)."""
    request = request or LaunchRequest(recipe="env", site=system.id)
    container = container_of(request, system) if way.kind == "overlay" else None
    modules = list(system.user.modules if system.user.modules is not None else system.software.modules)
    if container is not None and container.module:
        modules.append(container.module)
    return (
        templates()
        .get_template("env.sh.j2")
        .render(
            system=system,
            way=way,
            version=__version__,
            modules=modules,
            image=container.image if container is not None else None,
            directory=container is not None and not str(container.image).endswith(IMAGE_SUFFIXES),
            pattern=container.pattern if container is not None else None,
            container=container,
            step=_step(system) if container is not None else "",
            ways=image_commands(system) if system.software.needs_image else None,
            python=python_version(system),
            imports=", ".join(IMPORTS),
            build_on_compute=bool(
                system.node.isa and system.node.login_isa and system.node.isa != system.node.login_isa
            ),
            offline_install=way.kind == "wheelhouse" or bundle,
            project=source_root(),
        )
    )


def _step(system: System) -> str:
    """``srun`` of one task, for runtimes that only a step of Slurm enters."""
    words = ["srun", "--nodes=1", "--ntasks=1", "--time=00:45:00"]
    short = [k for k, p in system.partitions.items() if p.purpose == "debug" and (p.max_time or 0) >= 2700]
    key = system.user.partition or next(iter(short), system.default_partition)
    partition = system.partitions.get(key) if key else None
    if partition is not None and not partition.implicit:
        words.append(f"--partition={key}")
    if system.user.account:
        words.append(f"--account={system.user.account}")
    return " ".join(quoted(word) for word in words)


def source_root() -> str | None:
    """The source tree that this program runs from, or None where it was installed from a wheel."""
    root = Path(__file__).resolve().parent.parent
    return str(root) if (root / "setup.py").is_file() else None


def requirements() -> list[str]:
    """Requirements of the extra ``train`` without torch, as installed metadata states them."""
    import importlib.metadata as metadata
    import re

    out = []
    for line in metadata.requires("aifactory-train") or []:
        text, _, marker = line.partition(";")
        if marker and not re.search(r"extra\s*==\s*['\"]train['\"]", marker):
            continue
        name = re.match(r"[A-Za-z0-9_.-]+", text.strip())
        if name and name.group().lower() not in ("torch", "aifactory-train"):
            out.append(text.strip())
    return sorted(set(out))


def wheelhouse_command(system: System, way: Way, target: Path) -> list[str]:
    """``pip download`` for the compute nodes' instruction set: binary wheels only, for another machine than this
    one.
    """
    isa = way.isa or platform.machine()
    version = python_version(system).replace(".", "")
    argv = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--dest",
        str(target),
        "--only-binary=:all:",
        "--implementation=cp",
        f"--python-version={version}",
    ]
    argv.extend(f"--platform={tag}_{isa}" for tag in TAGS)
    return [*argv, *requirements()]


def manifest(system: System, way: Way) -> dict[str, Any]:
    """What the environment consists of, and what could and could not be verified here."""
    here = platform.machine().lower()
    facts = {
        "site": system.id,
        "way": way.kind,
        "why": way.why,
        "isa": way.isa,
        "python": python_version(system),
        "torch_from": way.torch,
        "torch_index": way.index,
        "folder": way.folder,
        "requirements": requirements(),
        "imports": list(IMPORTS),
    }
    checked = ["the build script parses (bash -n)"]
    unchecked = ["that the imports work on a compute node: the script submits that as its last step"]
    if way.isa is None:
        unchecked.append("the instruction set of the compute nodes: it is not published")
    elif way.isa != here:
        unchecked.append(f"binaries for {way.isa}: this machine is {here}")
    if way.kind == "overlay":
        unchecked.append(f"the image {way.torch.removeprefix('image ')}: it lies at the site")
    if way.kind == "modules":
        unchecked.append(f"the modules: {way.torch.removeprefix('modules ')}")
    return {**facts, "checked_here": checked, "not_checked_here": unchecked}


def parses(text: str) -> None:
    """Refuse a script that bash does not parse (a fault of ours, found before anyone runs it)."""
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, timeout=30)
    if done.returncode != 0:
        raise RunFailed(f"the generated script does not parse: {done.stderr.strip()}")


def bundle(
    system: System,
    way: Way,
    target: Path,
    request: LaunchRequest | None = None,
    *,
    recipes: list[str],
    wheels: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """A folder for one rsync: code, build script, wheels for the site's instruction set, and the recipes' model and
    data.

    Returns its manifest (also written there): every file with its SHA-256 and size. Raises where a part cannot be had.
    """
    rq.path(target, "--bundle")
    if target.exists() and any(target.iterdir()):
        raise UserError("the folder is not empty", where=f"--bundle {target}", fix="name a new folder")
    (target / "wheels").mkdir(parents=True, exist_ok=True)
    say("code")
    code_archive(target / "code.tar.gz")
    text = script(system, way, request, bundle=True)
    parses(text)
    (target / "build-env.sh").write_text(text)
    os.chmod(target / "build-env.sh", 0o755)
    missing: list[str] = []
    if wheels:
        say(f"wheels for {way.isa or platform.machine()}, CPython {python_version(system)}")
        done = subprocess.run(
            wheelhouse_command(system, way, target / "wheels"), text=True, capture_output=True, timeout=1800
        )
        if done.returncode != 0:
            tail = "; ".join(done.stderr.strip().splitlines()[-2:])
            raise RunFailed(
                f"the wheels could not be had: {tail}",
                fix="--no-wheels packs the rest; 'pip download' on a machine with internet",
            )
        foreign = foreign_wheels(target / "wheels", way.isa)
        if foreign:
            raise RunFailed(f"wheels of another instruction set than {way.isa}: {', '.join(foreign)}")
        if way.index:
            missing.append(
                f"torch itself: pip download --index-url {way.index} --only-binary=:all: "
                f"--platform=manylinux_2_28_{way.isa or platform.machine()} --python-version={python_version(system)} "
                f"--dest {target / 'wheels'} torch"
            )
    else:
        missing.append("wheels (--no-wheels)")
    cached = staged(recipes, target / "cache", say)
    files = {}
    for path in sorted(p for p in target.rglob("*") if p.is_file()):
        files[str(path.relative_to(target))] = {"sha256": file_digest(path), "bytes": path.stat().st_size}
    facts = {**manifest(system, way), "recipes": recipes, "cache": cached, "missing": missing, "files": files}
    (target / "manifest.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return facts


def code_archive(target: Path) -> None:
    """The project's source, without caches, runs and repositories."""
    root = source_root()
    if root is None:
        raise UserError(
            "the bundle needs the source tree",
            fix="call it from a checkout, or carry the wheel of aifactory-train yourself",
        )
    skip = {"__pycache__", ".git", "runs", "build", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", "dist"}

    def wanted(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        parts = set(Path(info.name).parts)
        if parts & skip or info.name.endswith((".pyc", ".so")) or any(p.endswith(".egg-info") for p in parts):
            return None
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(target, "w:gz") as archive:
        for name in (
            "aifactory_train",
            "kernels",
            "launchers",
            "recipes",
            "sites",
            "setup.py",
            "pyproject.toml",
            "README.md",
            "LICENSE",
            "constraints.txt",
        ):
            if (Path(root) / name).exists():
                archive.add(Path(root) / name, arcname=f"aifactory-train/{name}", filter=wanted)


def staged(recipes: list[str], target: Path, say: Callable[[str], None]) -> list[str]:
    """Copy what ``aifactory fetch`` put into the cache for these recipes; refuses a recipe that was not fetched."""
    import shutil

    from aifactory_train.config.loading import cache_dir, load_recipe
    from aifactory_train.sources import resolve_data, resolve_model

    root, copied = cache_dir().resolve(), []
    for name in recipes:
        recipe = load_recipe(name)
        found = [resolve_model(recipe.model)]
        found += [resolve_data(source) for source in [*recipe.data.train, *(recipe.data.eval or [])]]
        for path in found:
            path = path.resolve()
            if not path.is_relative_to(root):
                raise UserError(
                    f"{path} is not in the cache",
                    where=name,
                    fix="carry local files yourself, or fetch the recipe first",
                )
            parts = path.relative_to(root).parts
            unit = Path(*parts[:2])  # packages/KEY, models/KEY, hub/KEY
            if str(unit) not in copied:
                say(str(unit))
                shutil.copytree(root / unit, target / unit, dirs_exist_ok=True)
                copied.append(str(unit))
        listing = root / "manifests" / f"{recipe.id.replace('/', '--')}.json"
        if listing.is_file():
            (target / "manifests").mkdir(parents=True, exist_ok=True)
            shutil.copy2(listing, target / "manifests" / listing.name)
    return copied


def foreign_wheels(folder: Path, isa: str | None) -> list[str]:
    """Names of binary wheels that are for another instruction set (by their tag, and for a sample by their ELF
    header).
    """
    import re
    import zipfile

    out = []
    for wheel in sorted(folder.glob("*.whl")):
        tag = wheel.stem.rpartition("-")[2]
        if isa and tag != "any" and isa not in tag:
            out.append(wheel.name)
            continue
        if isa and tag != "any":
            with zipfile.ZipFile(wheel) as archive:
                library = next((n for n in archive.namelist() if re.search(r"\.so(\.\d+)*$", n)), None)
                if library:
                    with archive.open(library) as file:
                        head = file.read(20)
                    machine = (
                        {62: "x86_64", 183: "aarch64"}.get(int.from_bytes(head[18:20], "little"))
                        if head[:4] == b"\x7fELF"
                        else None
                    )
                    if machine and machine != isa:
                        out.append(wheel.name)
    return out


def verify_here(python: str) -> dict[str, Any]:
    """Import everything in one interpreter of this machine: versions, or the first error of each package."""
    code = (
        "import importlib, json, platform, sys\n"
        "out = {}\n"
        f"for name in {list(IMPORTS)!r}:\n"
        "    try:\n"
        "        out[name] = str(getattr(importlib.import_module(name), '__version__', 'present'))\n"
        "    except Exception as error:\n"
        "        out[name] = 'FAILED: ' + type(error).__name__ + ': ' + str(error)[:200]\n"
        "print(json.dumps({'python': platform.python_version(), 'isa': platform.machine(), 'packages': out}))\n"
    )
    try:
        done = subprocess.run([python, "-c", code], text=True, capture_output=True, timeout=600)
    except OSError as error:
        raise UserError(f"{python} cannot be run: {error.strerror}", where="--verify") from None
    if done.returncode != 0:
        raise RunFailed(f"{python} ended with {done.returncode}: {' '.join(done.stderr.split())[-300:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    found["ok"] = not any(str(v).startswith("FAILED") for v in found["packages"].values())
    return found
