"""Which operators there are, and which implementation of one runs on which device, with which
launch parameters, and how that is known.

An operator is a folder with a ``space.py``; nothing else lists it.

Configurations are data: ``configs/<SKU>.json``, ``configs/<arch>.json``, ``configs/wave64.json`` (or 32) and
``configs/default.json`` are asked in that order, each kernel on its own. An entry that was recorded with another Triton
version or for another version of the kernel's source is skipped, and the selection says so. A kernel that no file names
takes the first moderate configuration of its own space. Imports no torch: planning on a login node uses the same
function.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import logging
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from aifactory_train.kernels import hardware
from aifactory_train.kernels.spec import PACKAGE, Config, Kernel, Operator, by_rule, folders

log = logging.getLogger(__name__)


def _find() -> tuple[str, ...]:
    """Names of the operators: every folder that has a ``space.py``, in alphabetical order. Nothing is imported."""
    found: dict[str, Path] = {}
    for folder in folders():
        if not folder.is_dir():
            raise ValueError(f"AIFACTORY_KERNELS names {folder}, which is no folder")
        for space in sorted(folder.glob("*/space.py")):
            name = space.parent.name
            if name in found:
                raise ValueError(f"two operators are named {name}: {found[name]} and {space.parent}; rename one")
            found[name] = space.parent
    return tuple(sorted(found))


OPERATORS = _find()

#: how a configuration came about, from least to most trustworthy
STATUSES = ("default", "static-pruned", "modelled", "measured")

CONFIGS = Path(__file__).resolve().parent / "configs"

_DTYPES = {
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "fp32": "fp32",
    "float32": "fp32",
}


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where one kernel's launch parameters come from. ``notes`` names every entry that matched but was not trusted, and
    why.
    """

    status: str
    level: str
    file: str
    triton: str | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Selection:
    """What runs: ``implementation`` is ``triton`` or ``torch``; ``config`` and ``provenance`` are keyed by kernel
    name.
    """

    op: str
    implementation: str
    config: dict[str, Config]
    provenance: dict[str, Provenance]
    reason: str

    def describe(self) -> str:
        """One line for a report."""
        if self.implementation == "torch":
            return f"{self.op}: torch ({self.reason})"
        levels = sorted({f"{p.status} from {p.level}" for p in self.provenance.values()})
        notes = sorted({n for p in self.provenance.values() for n in p.notes})
        return f"{self.op}: triton, {', '.join(levels)}" + (f" [{'; '.join(notes)}]" if notes else "")


@lru_cache(None)
def operator(name: str) -> Operator:
    """The description of an operator. Raises ``KeyError`` for a name that is not in ``OPERATORS``."""
    if name not in OPERATORS:
        raise KeyError(f"unknown operator '{name}': known are {', '.join(OPERATORS)}")
    found = importlib.import_module(f"{PACKAGE}.{name}.space").OPERATOR
    if found.name != name:
        raise ValueError(f"the operator in the folder {name}/ calls itself {found.name!r}: both must be one name")
    return found


def part(name: str, module: str) -> Any:
    """A module of an operator's folder (``op``, ``reference``; imports torch), or None where the folder has none of
    that name.
    """
    if name not in OPERATORS:
        raise KeyError(f"unknown operator '{name}': known are {', '.join(OPERATORS)}")
    package = importlib.import_module(f"{PACKAGE}.{name}")
    if not any((Path(p) / f"{module}.py").is_file() for p in package.__path__):
        return None
    return importlib.import_module(f"{PACKAGE}.{name}.{module}")


@lru_cache(None)
def triton_version() -> str | None:
    """Version of the installed Triton without importing it; None where there is none. ROCm wheels use other
    distribution names.
    """
    for name in ("triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton"):
        try:
            return metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return None


def select(
    op: str,
    arch: str,
    sku: str | None,
    dtype: str,
    shape: Mapping[str, int] | tuple[int, ...],
    *,
    configs: Path | None = None,
    triton: str | None = None,
) -> Selection:
    """Choose implementation and launch parameters of ``op``.

    ``arch`` is ``cpu`` or a key of :data:`hardware.TARGETS`; ``sku`` a name of :data:`hardware.SKUS` or None; ``dtype``
    that of the activations; ``shape`` the operator's named sizes or a tuple in their order. ``configs`` and ``triton``
    override the folder and the running Triton version (tests, and planning for another machine). Raises ``KeyError`` or
    ``ValueError`` for unknown names.
    """
    spec = operator(op)
    sizes = spec.shape(shape)
    if str(dtype).removeprefix("torch.") not in _DTYPES:
        raise ValueError(f"dtype '{dtype}' has no kernels: use bf16, fp16 or fp32")
    kind = _DTYPES[str(dtype).removeprefix("torch.")]
    if arch == "cpu":
        return Selection(op, "torch", {}, {}, "on a CPU the torch path is the fast one")
    target = hardware.TARGETS.get(arch)
    if target is None:
        known = ", ".join(hardware.TARGETS)
        return Selection(op, "torch", {}, {}, f"the kernels are proven for {known}, not for {arch}")
    running = triton or triton_version()
    device = known_device(sku, arch)
    levels = [f"wave{target.wave}", "default"]
    levels = ([device.name] if device else []) + [arch, *levels]
    config, provenance = {}, {}
    for kernel in spec.kernels:
        config[kernel.name], provenance[kernel.name] = _choose(
            kernel,
            target,
            levels,
            kind,
            sizes,
            running,
            [configs] if configs else config_folders(),
            [] if device or not sku else [f"unknown SKU '{sku}'"],
        )
    return Selection(op, "triton", config, provenance, f"{arch}{' ' + device.name if device else ''}")


def _choose(
    kernel: Kernel,
    target: hardware.Target,
    levels: list[str],
    dtype: str,
    shape: dict[str, int],
    running: str | None,
    folders: list[Path],
    notes: list[str],
) -> tuple[Config, Provenance]:
    for level, folder in itertools.product(levels, folders):
        path = folder / f"{level}.json"
        data = load(path)
        if data is None:
            continue
        for entry in data["entries"]:
            if entry["kernel"] != kernel.name or not matches(entry["match"], dtype, shape):
                continue
            recorded = (data.get("toolchain") or {}).get("triton")
            stale = None
            if recorded and running and recorded != running:
                stale = f"{path.name}: recorded with Triton {recorded}, running {running}"
            elif entry.get("kernel_sha256") and entry["kernel_sha256"] != kernel.digest:
                stale = f"{path.name}: recorded for another version of {kernel.name}"
            if stale:
                notes.append(stale)
                _warn(f"{stale}; not used")
                break
            if recorded and not running:
                notes.append(f"{path.name}: recorded with Triton {recorded}, none installed here")
            return dict(entry["config"]), Provenance(entry["status"], level, path.name, recorded, tuple(notes))
    config = by_rule(target, kernel, dtype, shape)
    if config is None:
        raise LookupError(f"{kernel.name} ({dtype}, {shape}): no file names it and its space is empty for every size")
    return config, Provenance("default", "space", "space.py", None, tuple(notes))


def config_folders() -> list[Path]:
    """Where configuration files are looked for: first ``configs`` in the folders of ``AIFACTORY_KERNELS``, then the
    shipped ones.
    """
    return [f / "configs" for f in folders()[1:] if (f / "configs").is_dir()] + [CONFIGS]


def known_device(name: str | None, arch: str | None = None) -> hardware.Sku | None:
    """The SKU of that name: a shipped one, or one that a configuration file describes."""
    found = hardware.sku(name, arch)
    if found is None and name:
        learn()
        found = hardware.sku(name, arch)
    return found


@lru_cache(None)
def learn() -> None:
    """Make the devices known that configuration files were written for and that are not shipped, by the figures in the
    files' heads.
    """
    for folder in config_folders():
        for path in sorted(folder.glob("*.json")):
            data = load(path) or {}
            head = data.get("sku") or {}
            if not {"name", "units", "hbm_TBps", "bf16_TFLOPs"} <= head.keys() or hardware.sku(head["name"]):
                continue
            hardware.add(
                hardware.Sku(
                    head["name"],
                    data["arch"],
                    head["units"],
                    head["hbm_TBps"] * 1e12,
                    head["bf16_TFLOPs"] * 1e12,
                    head.get("xcd", 1),
                    tuple(head.get("recalled", ())),
                    head.get("memory_GB"),
                )
            )


@lru_cache(None)
def _warn(text: str) -> None:
    """Each reason once a process: an operator is selected for every new shape."""
    log.warning(text)


def matches(match: Mapping[str, Any], dtype: str, shape: Mapping[str, int]) -> bool:
    """Whether an entry's ``match`` covers dtype and shape. Sizes are numbers or ``{"gt": a, "le": b}`` with either
    bound optional.
    """
    for key, wanted in match.items():
        if key == "dtype":
            if dtype not in wanted:
                return False
        elif isinstance(wanted, Mapping):
            if not wanted.get("gt", -1) < shape[key] <= wanted.get("le", shape[key]):
                return False
        elif shape[key] != wanted:
            return False
    return True


def load(path: Path) -> dict[str, Any] | None:
    """A configuration file, checked; None when there is none. Raises ``ValueError`` that names the file and the broken
    rule.
    """
    try:
        stamp = path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
    return _load(path, stamp)


@lru_cache(None)
def _load(path: Path, stamp: int) -> dict[str, Any]:
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.get("schema") != 1:
        raise ValueError(f"{path}: schema {data.get('schema')!r}, this version reads 1")
    for i, entry in enumerate(data["entries"]):
        missing = {"kernel", "match", "config", "status"} - entry.keys()
        if missing:
            raise ValueError(f"{path}: entry {i} lacks {', '.join(sorted(missing))}")
        if entry["status"] not in STATUSES:
            raise ValueError(f"{path}: entry {i} has status {entry['status']!r}, known are {', '.join(STATUSES)}")
        if (entry["status"] == "measured") != bool(entry.get("measured")):
            raise ValueError(f"{path}: entry {i}: status 'measured' and a 'measured' block go together")
        if entry["status"] != "default" and not (data.get("toolchain") or {}).get("triton"):
            raise ValueError(
                f"{path}: entry {i} is {entry['status']}, so the file must name the Triton version it was made with"
            )
    return data
