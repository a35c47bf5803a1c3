"""``aifactory doctor``: what is here, and what would be chosen because of it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from typing import Any

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "deepspeed",
    "mpi4py",
    "bitsandbytes",
    "flash-attn",
    "pydantic",
)
LAUNCHERS = ("torchrun", "srun", "sbatch", "mpirun", "mpiexec", "flux", "qsub", "oarsub")
CONTAINERS = ("apptainer", "singularity", "podman", "docker")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one line of JSON on standard output")


def run(args: argparse.Namespace) -> int:
    from aifactory_train.core import output

    found = examine()
    if args.json:
        output.print_json(found)
        return 0
    host = found["host"]
    rows = [
        ["program", f"aifactory-train {found['version']}, Python {host['python']} on {host['platform']}"],
        ["cores", f"{host['cores']} usable, {host['memory_gib']} GiB memory"],
        *[["device", f"{d['name']}, {d['memory_gib']} GiB ({d['backend']})"] for d in found["devices"]],
        *(
            []
            if found["devices"]
            else [["device", "no GPU that torch can use" if found["torch"] else "torch is not installed"]]
        ),
        [
            "packages",
            ", ".join(f"{k} {v}" for k, v in found["packages"].items() if v) or "none of the training packages",
        ],
        ["missing", ", ".join(k for k, v in found["packages"].items() if not v) or "nothing"],
        ["launchers", ", ".join(k for k, v in found["launchers"].items() if v) or "none found"],
        ["containers", ", ".join(k for k, v in found["containers"].items() if v) or "none on PATH"],
        ["cache", f"{found['cache']['path']} ({found['cache']['state']}, {found['cache']['free_gib']} GiB free)"],
        *[[f"would choose: {k}", f"{v['choice']} ({v['why']})"] for k, v in found["choices"].items()],
    ]
    output.table(None, ["", "found"], rows)
    for problem in found["problems"]:
        print(f"problem: {problem}")
    for fault in found["known_faults"]:
        print(f"known fault: {fault['said']}")
    return 0


def examine() -> dict[str, Any]:
    """Everything that :func:`run` shows. Works without torch, as on a login node."""
    from aifactory_train import __version__
    from aifactory_train.config.loading import cache_dir

    packages = {name: _version(name) for name in PACKAGES}
    problems: list[str] = []
    devices: list[dict[str, Any]] = []
    choices: dict[str, dict[str, str]] = {}
    if packages["torch"]:
        try:
            devices, choices = _torch_view()
        except ImportError as error:
            problems.append(f"torch {packages['torch']} is installed but cannot be imported: {error}")
            packages["torch"] = None
    else:
        problems.append("torch is not installed: listing, planning and launching work, training here does not")
    if packages["torch"] and _older(packages["torch"], (2, 8)):
        problems.append(f"torch {packages['torch']} is older than 2.8, the oldest that is supported")
    cache = cache_dir()
    existing = next((p for p in (cache, *cache.parents) if p.exists()), cache)
    writable = os.access(existing, os.W_OK)
    if not writable:
        problems.append(f"the cache {cache} cannot be written: set AIFACTORY_CACHE")
    return {
        "version": __version__,
        "host": {
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            "executable": sys.executable,
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": _memory_gib(),
        },
        "torch": packages["torch"],
        "packages": packages,
        "devices": devices,
        "launchers": {name: shutil.which(name) or _beside_python(name) for name in LAUNCHERS},
        "containers": {name: shutil.which(name) for name in CONTAINERS},
        "cache": {
            "path": str(cache),
            "state": ("there" if cache.exists() else "not there yet") + ("" if writable else ", not writable"),
            "free_gib": round(shutil.disk_usage(existing).free / 2**30, 1),
        },
        "offline": os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"),
        "choices": choices,
        "problems": problems,
        "known_faults": _known_faults(),
    }


def _known_faults() -> list[dict[str, Any]]:
    """Faults that are known of this machine, the packages installed here and the variables that are set."""
    from aifactory_train import sites
    from aifactory_train.sites import known_faults

    here = sites.identify()
    system = sites.load(here) if here else sites.detect()
    found = known_faults.applicable(
        known_faults.Situation(system, packages=known_faults.installed(), variables=dict(os.environ))
    )
    return [{**fault.as_dict(), "said": fault.sentence()} for fault in found]


def _torch_view() -> tuple[list[dict[str, Any]], dict[str, dict[str, str]]]:
    """Devices as torch sees them (a GPU is what the framework counts: on MI250X one GCD), and what a run would
    choose.
    """
    import torch

    from aifactory_train.config.schema import Recipe
    from aifactory_train.core import compat
    from aifactory_train.model import attention_choice
    from aifactory_train.model.precision import choose_precision
    from aifactory_train.parallel.build import choose_engine
    from aifactory_train.parallel.world import World

    device = compat.device_type()
    devices = []
    if device == "cuda":
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            devices.append(
                {
                    "name": properties.name,
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                    "backend": f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}",
                    "bf16": compat.supports_bf16("cuda"),
                }
            )
    recipe = Recipe.model_validate({"model": {"base": "any"}, "data": {"train": "any.jsonl"}})
    precision, precision_why = choose_precision(recipe, device)
    name, why = attention_choice.choose("auto", device, precision.compute)
    ranks = max(1, len(devices))
    engine, engine_why = choose_engine(recipe, World(0, ranks, 0, ranks, device, "doctor", ""))
    return devices, {
        "attention": {"choice": name.removeprefix("aifactory_"), "why": why},
        "precision": {"choice": precision.describe(), "why": precision_why},
        "engine": {"choice": engine, "why": engine_why},
    }


def _beside_python(name: str) -> str | None:
    """A program of this environment, found also when the environment was not activated."""
    return shutil.which(name, path=os.path.dirname(sys.executable))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _older(version: str, floor: tuple[int, int]) -> bool:
    numbers = version.split("+")[0].split(".")[:2]
    return tuple(int("".join(c for c in n if c.isdigit()) or 0) for n in numbers) < floor


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
