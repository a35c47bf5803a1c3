"""What the ranks run in: the container and what is mounted into it, or the Python environment of the host."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.launchers import backends
from aifactory_train.launchers import request as rq
from aifactory_train.launchers.caches import OURS, cache_root, hugging_face_folder
from aifactory_train.launchers.request import LaunchRequest, Refusal
from aifactory_train.launchers.shape import JobShape
from aifactory_train.launchers.submission import Submission, quoted
from aifactory_train.sites.profiles import System
from aifactory_train.sites.schema import Container

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe

#: Where images have software of their own: a Python named there is the image's, and the host's folder must not cover
#: it.
IMAGE_ROOTS = ("/usr/", "/opt/")
#: What a container has of its own beside them: a path of a variable there means the container's.
SYSTEM_ROOTS: tuple[str, ...] = (
    *IMAGE_ROOTS,
    "/bin/",
    "/boot/",
    "/dev/",
    "/etc/",
    "/lib/",
    "/lib64/",
    "/proc/",
    "/run/",
    "/sbin/",
    "/sys/",
    "/tmp/",
    "/var/",
)
#: What the file of an image, or of its description, ends in; another path is a folder.
IMAGE_SUFFIXES = (".sif", ".sqsh", ".img", ".toml")


def container_of(request: LaunchRequest, system: System) -> Container | None:
    """The container that ranks run in: yours, else the profile's first with an image; none where you name a venv."""
    own = request.container or system.user.container_image
    if own is not None:
        base = system.software.containers[0] if system.software.containers else Container(runtime="apptainer")
        return base.model_copy(
            update={
                "image": rq.image(own, "--container"),
                "pattern": "*.sif",  # the profile's pattern is for the site's own folder of images
                "binds": [*base.binds, *system.user.container_binds],
            }
        )
    if request.venv or system.user.venv or system.software.provides_torch:
        return None
    for container in system.software.containers:
        if container.image:
            return container.model_copy(update={"binds": [*container.binds, *system.user.container_binds]})
    return None


def python_of(sub: Submission, container: Container | None) -> str:
    """The interpreter of the ranks; where nothing names one, the environment that ``aifactory env`` builds."""
    request, system, shape = sub.request, sub.system, sub.shape
    venv = request.venv or system.user.venv
    if venv:
        return str(rq.path(venv, "--venv") / "bin" / "python")
    if container is not None:
        image = f" --container {request.container}" if request.container else ""
        sub.notes.append(
            f"Python of the ranks: {env_folder(system)}/bin/python inside the container, which `aifactory env --site "
            f"{system.id}{image}` builds"
        )
        return f"{env_folder(system)}/bin/python"
    software = backends.get(shape.backend).software
    if software == "image":
        return "python3"  # the pod's image is the environment
    if software == "here" or system.id in ("local", "lab", "generic-slurm") or _at(system):
        return sys.executable
    if system.software.provides_torch:
        return "python3"
    sub.notes.append(
        f"Python of the ranks: {env_folder(system)}/bin/python, which `aifactory env --site {system.id}` builds; "
        f"--venv or user.venv names another"
    )
    return f"{env_folder(system)}/bin/python"


#: From so many ranks on, a Python on a shared file system is worth a word.
MANY_RANKS = 256


def say_what_imports_cost(sub: Submission, container: Container | None, python: str) -> None:
    """Note where thousands of processes would open the same thousands of small files of a shared file system."""
    inside = container is not None and any(python.startswith(root) for root in IMAGE_ROOTS)
    if sub.shape.ranks < MANY_RANKS or inside or backends.get(sub.shape.backend).software == "image":
        return
    where = str(Path(python).parent.parent) if python.startswith("/") else "the site's modules"
    sub.notes.append(
        f"{sub.shape.ranks} ranks import Python from {where}, some 8,500 small files each: an image that holds it is "
        f"one file a node (docs/launching.md, 'Thousands of ranks')"
    )


def env_folder(system: System) -> str:
    """Where ``aifactory env`` builds the environment of a site: below your work folder, else below ``~/aifactory``."""
    root = system.user.work_dir or str(Path.home() / "aifactory")
    return str(rq.path(f"{root}/env-{system.id}", "user.work_dir"))


@functools.lru_cache(maxsize=4)
def _at_id(system_id: str) -> bool:
    from aifactory_train.sites import identify

    return identify() == system_id


def _at(system: System) -> bool:
    return _at_id(system.id)


def uenv_of(request: LaunchRequest, system: System) -> str | None:
    """The uenv that the job's directives name (CSCS: a plug-in of Slurm mounts it), or None."""
    for flag in (*request.extra_flags, *system.request.flags):
        if flag.startswith("--uenv="):
            return flag.partition("=")[2]
    return None


def mounts_of(sub: Submission, recipe: Recipe | None, container: Container, python: str) -> list[str]:
    """Every folder of the host that the ranks use inside the container, ``PATH`` or ``SOURCE:TARGET``, whatever the
    runtime.

    Run folder, the environment that the ranks' Python lies in, your work folder, both caches, local data of the
    recipe, and folders that your variables name. A folder below another of the list is left out: it is there already.
    """
    folders = [str(sub.run_dir)]
    environment = str(Path(python).parent.parent)
    if python.startswith("/") and not any(f"{environment}/".startswith(root) for root in IMAGE_ROOTS):
        folders.append(environment)
    if sub.system.user.work_dir:
        folders.append(os.path.abspath(sub.system.user.work_dir))
    folders.append(cache_folder(sub.system, sub.shape))
    yours = {**sub.system.user.env, **dict(sub.request.env)}
    if "HF_HOME" not in yours:
        folders.append(hugging_face_folder(sub.system))
    folders += _folders_of_variables(sub, yours)
    if recipe is not None:
        folders += _folders_of(recipe)
    folders += [_folder_of(v) for _, values in sub.request.array for v in values if v.startswith("/")]
    kept: list[str] = []
    for folder in sorted(dict.fromkeys(folders), key=lambda f: len(Path(f).parts)):
        if rq.PATH_FORBIDDEN.search(folder) or folder == "/":
            sub.notes.append(f"{folder} is not mounted into the container: mounts cannot name it; use a plain path")
        elif not any(folder == k or folder.startswith(k.rstrip("/") + "/") for k in kept):
            kept.append(folder)
    return [*kept, *[b for b in container.binds if b and b not in kept]]


def _folders_of_variables(sub: Submission, variables: dict[str, str]) -> list[str]:
    """Folders that values of your variables name, lists with ``:`` too. One that is not here cannot be mounted (the
    container would not start): it is said.
    """
    folders, missing = [], []
    for name, value in variables.items():
        for path in value.split(":"):
            if not path.startswith("/") or "//" in path or f"{path}/".startswith(SYSTEM_ROOTS):
                continue
            if os.path.exists(path):
                folders.append(_folder_of(path))
            else:
                missing.append(f"{name}={path}")
    if missing:
        sub.notes.append(
            f"not mounted into the container, because it is not on this machine: {', '.join(missing)} "
            f"(user.container_binds mounts it all the same)"
        )
    return folders


def _folders_of(recipe: Recipe) -> list[str]:
    """The folders of a recipe's local model, data and other files."""
    from aifactory_train.config.loading import to_tree
    from aifactory_train.config.source_spec import parse

    folders = []
    for source in (recipe.model.base, *[d.source for d in (*recipe.data.train, *(recipe.data.eval or []))]):
        spec = parse(source)
        # A relative path is looked for where the job is submitted: nothing to mount where that is not here.
        if spec.kind == "local" and (spec.name.startswith("/") or os.path.exists(spec.name)):
            folders.append(_folder_of(spec.name))
    return folders + [
        _folder_of(text) for text in _strings(to_tree(recipe)) if text.startswith("/") and os.path.exists(text)
    ]


def _folder_of(name: str) -> str:
    """The folder to mount for a local path: itself, or the one that a file lies in."""
    path = Path(os.path.abspath(name))
    file = path.is_file() or (path.suffix != "" and not path.is_dir())
    return str(path.parent if file else path)


def _strings(tree: Any) -> Iterator[str]:
    """Every text in a tree of mappings and lists."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _strings(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _strings(value)


def _mount(bind: str) -> str:
    """A bind as ``SOURCE:TARGET``."""
    return bind if ":" in bind else f"{bind}:{bind}"


def container_context(sub: Submission, container: Container, binds: list[str]) -> dict[str, Any]:
    """Image and the command prefix that enters it (empty for runtimes that srun itself drives)."""
    image = container.image or ""
    prefix = ""
    if container.runtime in ("singularity", "apptainer"):
        words = [
            container.runtime,
            "exec",
            *([container.gpu_flag] if container.gpu_flag else []),
            *container.exec_flags,
        ]
        words += [f"--bind={b}" for b in binds]
        prefix = " ".join(quoted(w) for w in words) + ' "$AIFACTORY_IMAGE" '
    elif container.runtime == "sarus":
        words = [
            "sarus",
            "run",
            *container.exec_flags,
            *["--mount=type=bind,source={},destination={}".format(*_mount(b).split(":")[:2]) for b in binds],
        ]
        prefix = " ".join(quoted(w) for w in words) + ' "$AIFACTORY_IMAGE" '
    elif container.runtime == "docker":
        raise Refusal(
            "container-runtime",
            "docker cannot be started inside a batch job",
            where="software.containers",
            fix="convert the image for apptainer, or name a venv with --venv",
        )
    own = bool(sub.request.container or sub.system.user.container_image)
    sub.line(f"image={quoted(image)}", "the image that holds torch", None if own else "software.containers")
    if container.runtime == "cscs-ce" and image.endswith(".toml"):
        sub.notes.append(f"{image} is taken as it is: its mounts must cover {', '.join(binds)}")
    return {
        "image": image,
        # A registry's reference is no path of this machine: the runtime finds it.
        "file": image.startswith(("/", ".", "~")) or image.endswith(IMAGE_SUFFIXES),
        "directory": not image.endswith(IMAGE_SUFFIXES),
        "pattern": container.pattern,
        "own": own,
        "prefix": prefix,
        "runtime": container.runtime,
        "mounts": [_mount(b) for b in binds],
    }


def edf(container: dict[str, Any]) -> str:
    """The environment definition file of the CSCS Container Engine. Nothing of the host is inside but what it
    mounts.
    """
    mounts = ", ".join(json.dumps(m, ensure_ascii=False) for m in container["mounts"])
    return (
        f"image = {json.dumps(container['image'])}\nmounts = [{mounts}]\nwritable = true\n\n"
        '[annotations]\ncom.hooks.aws_ofi_nccl.enabled = "true"\ncom.hooks.aws_ofi_nccl.variant = "cuda-dl"\n'
    )


#: How an image is brought to a site, by runtime: from the registry's image that its vendor keeps for torch.
_MAKE = {
    "singularity": "singularity build {file}.sif docker://{registry}/{name}",
    "apptainer": "apptainer build {file}.sif docker://{registry}/{name}",
    "enroot-pyxis": "enroot import --output {file}.sqsh docker://{registry}#{name}",
    "cscs-ce": "enroot import --output {file}.sqsh docker://{registry}#{name}",
    "sarus": "sarus pull {registry}/{name}",
}
_TORCH = {"nvidia": ("nvcr.io", "nvidia/pytorch:25.06-py3"), "amd": ("docker.io", "rocm/pytorch:latest")}


def image_commands(system: System) -> tuple[str, str, str] | None:
    """(the image, the command that makes it, the one that writes what builds an environment over it) at a site.

    None where no runtime is published, or no image for its GPUs.
    """
    runtime = system.software.containers[0].runtime if system.software.containers else None
    if runtime not in _MAKE or system.gpu.vendor not in _TORCH:
        return None
    registry, name = _TORCH[system.gpu.vendor]
    file = f"{Path(env_folder(system)).parent}/torch"
    make = _MAKE[runtime].format(file=file, registry=registry, name=name)
    image = next((word for word in make.split() if word.startswith(file)), f"{registry}/{name}")
    return image, make, f"aifactory env --site {system.id} --container {image} --output build-env.sh"


def cache_folder(system: System, shape: JobShape) -> str:
    """Where the job finds what `aifactory fetch` brought."""
    from aifactory_train.config.loading import cache_dir

    root = cache_root(system)
    if os.environ.get("AIFACTORY_CACHE") or not backends.get(shape.backend).batch or not root:
        return str(cache_dir())
    return f"{root}/{OURS}"
