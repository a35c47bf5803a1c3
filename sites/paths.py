"""Dotted paths into a profile (``node.gpus``, ``partitions.standard-g.max_time``): listing, reading, and whose source
covers one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aifactory_train.sites.schema import FACT_SECTIONS, FactEntry


def leaves(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every stated leaf; a list of plain values is one leaf, ``None`` is none."""
    if isinstance(data, dict):
        if not data and prefix:
            return
        for key, value in data.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(data, list) and any(isinstance(v, dict) for v in data):
        for i, value in enumerate(data):
            yield from leaves(value, f"{prefix}.{i}")
    elif data is not None and data != []:
        yield prefix, data


def fact_leaves(raw: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The leaves of a raw profile that state facts (made-up example values are none, nor is where one would ask)."""
    for section in FACT_SECTIONS:
        if section in raw:
            for path, value in leaves(raw[section], section):
                if not path.startswith("access.example") and path.split(".")[1:2] != ["unknown"]:
                    yield path, value


_MISSING = object()


def dig(data: Any, path: str) -> Any:
    """The value under a dotted path in nested dicts, lists and models; raises KeyError where the path leads nowhere.

    Keys that hold dots themselves (a node label such as ``nvidia.com/gpu.product``) are found too.
    """
    value = _dig(data, path.split("."))
    if value is _MISSING:
        raise KeyError(path)
    return value


def _dig(data: Any, keys: list[str]) -> Any:
    if not keys:
        return data
    if isinstance(data, dict):
        for n in range(1, len(keys) + 1):
            key = ".".join(keys[:n])
            if key in data and (value := _dig(data[key], keys[n:])) is not _MISSING:
                return value
        return _MISSING
    if isinstance(data, list):
        return _dig(data[int(keys[0])], keys[1:]) if keys[0].isdigit() and int(keys[0]) < len(data) else _MISSING
    value = getattr(data, keys[0], _MISSING)
    return value if value is _MISSING else _dig(value, keys[1:])


def stated_paths(data: Any, spec: str) -> Iterator[str]:
    """The paths that ``spec`` names (alternatives after ``|``, ``*`` = any key) and that hold a value in ``data``."""
    for alternative in spec.split("|"):
        yield from _stated_paths(data, alternative.split("."), "")


def _stated_paths(data: Any, keys: list[str], prefix: str) -> Iterator[str]:
    if not keys:
        if data not in (None, [], {}, ""):
            yield prefix
        return
    children = (list(data) if isinstance(data, dict) else []) if keys[0] == "*" else [keys[0]]
    for child in children:
        try:
            value = dig(data, child)
        except (KeyError, TypeError, ValueError):
            continue
        yield from _stated_paths(value, keys[1:], f"{prefix}.{child}" if prefix else child)


def covering(path: str, table: dict[str, FactEntry]) -> FactEntry | None:
    """The entry of ``facts:`` that covers ``path``: the longest listed path that is it or a parent of it."""
    while path:
        if path in table:
            return table[path]
        path = path.rpartition(".")[0]
    return None
