"""What all profiles share: the room's files, the sources that several name, and the constants of the GPUs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aifactory_train.core.errors import UserError
from aifactory_train.sites.reading import read_yaml
from aifactory_train.sites.schema import FactEntry, Source

ROOM = Path(__file__).resolve().parent
SYSTEMS = ROOM / "systems"
FACTORIES = ROOM / "factories.yaml"
GPUS = ROOM / "gpus.yaml"
READINESS = ROOM / "readiness.yaml"
SOURCES = ROOM / "sources.yaml"


def _shaped(path: Path, read: Callable[[], Any]) -> Any:
    """``read()``; a data file of another shape than its head describes is refused instead of crashing."""
    try:
        return read()
    except (ValidationError, TypeError, KeyError, AttributeError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"not of the shape that its first lines describe: {first}", where=str(path)) from None


@functools.lru_cache(maxsize=1)
def shared_sources() -> dict[str, Source]:
    """``sources.yaml``: what every profile may name without defining it."""
    own = {"user": Source(title="the user's overlay", date="n.d.", retrieved="2026-11-22")}
    return own | _shaped(SOURCES, lambda: {name: Source(**entry) for name, entry in read_yaml(SOURCES).items()})


@functools.lru_cache(maxsize=1)
def gpu_catalogue() -> dict[str, dict[str, Any]]:
    """``gpus.yaml``: SKU → constants; a SKU with ``like`` inherits from another."""
    return _shaped(GPUS, lambda: merge_catalogue(read_yaml(GPUS)))


def merge_catalogue(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The ``gpus:`` table with every ``like`` resolved (a parent stands above its heirs)."""
    skus: dict[str, dict[str, Any]] = {}
    for sku, entry in raw["gpus"].items():
        entry = dict(entry)
        parent = entry.pop("like", None)
        if parent is not None and parent not in skus:
            raise UserError(f"'{sku}' is like '{parent}', which is not above it", where=f"{GPUS.name}: gpus.{sku}")
        merged = copy.deepcopy(skus[parent]) if parent else {}
        merged.update(entry)
        skus[sku] = merged
    return skus


@functools.lru_cache(maxsize=1)
def gpu_provenance() -> tuple[dict[str, Source], dict[str, dict[str, FactEntry]]]:
    return _shaped(GPUS, _read_gpu_provenance)


def _read_gpu_provenance() -> tuple[dict[str, Source], dict[str, dict[str, FactEntry]]]:
    raw = read_yaml(GPUS)
    sources = {k: Source(**v) for k, v in raw["sources"].items()}
    tables: dict[str, dict[str, FactEntry]] = {sku: {} for sku in raw["gpus"]}
    default = FactEntry(at=["gpu"], source=raw["default"]["source"], confidence=raw["default"]["confidence"])
    for table in tables.values():
        table["gpu"] = default
        for field in ("arch", "vendor", "warp_size", "fp8_format", "model", "unified_memory", "device_names"):
            table[f"gpu.{field}"] = FactEntry(at=[f"gpu.{field}"], source=default.source, confidence="certain")
    for item in raw["facts"]:
        entry = FactEntry(**item)
        for path in entry.at:
            sku, _, field = path.partition(".")
            tables[sku][f"gpu.{field}" if field else "gpu"] = entry
    return sources, tables
