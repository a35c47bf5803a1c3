"""Reading profiles: YAML → validated, resolved :class:`System` with the provenance of each fact beside it.

Resolution, in this order: the profile's file; constants of its GPU from ``gpus.yaml`` (what the profile states itself wins);
corrections and values of the user's overlay. Nothing is guessed: what no layer states stays ``None``.
"""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aifactory_train.errors import UserError, did_you_mean
from aifactory_train.sites.catalogue import READINESS, gpu_catalogue, gpu_provenance
from aifactory_train.sites.finding import find_file, user_file
from aifactory_train.sites.paths import dig
from aifactory_train.sites.reading import place_of, read_yaml, refusal
from aifactory_train.sites.schema import FACT_SECTIONS, FactEntry, Overlay, Profile, Source
from aifactory_train.sites.system import System

__all__ = ["System", "dig", "gpu_catalogue", "load", "read_overlay", "readiness_of", "resolve"]


def resolve(raw: Any, path: Path | None = None, overlay: Overlay | None = None) -> System:
    """A raw profile (parsed YAML) → :class:`System`. ``path`` is only for messages.

    An overlay's correction of ``null`` removes the key (a partition that does not exist there).
    """
    if not isinstance(raw, dict):
        raise UserError("a profile is a mapping of keys to values", where=str(path or "profile"))
    for key in raw:
        if key not in _PROFILE_KEYS:
            close = did_you_mean(str(key), _PROFILE_KEYS)
            raise UserError(f"unknown key '{key}'{close}", where=place_of(path, (key,)))
    raw = copy.deepcopy(raw)
    if overlay is not None:
        for dotted, value in overlay.corrections.items():
            _correct(raw, dotted, value)
        raw["user"] = overlay.user
    gpu = raw.get("gpu") or {}
    own_gpu = frozenset(gpu) if isinstance(gpu, dict) else frozenset()
    sku = gpu.get("sku") if isinstance(gpu, dict) else None
    gpu_table: dict[str, FactEntry] = {}
    gpu_sources: dict[str, Source] = {}
    if sku is not None:
        catalogue = gpu_catalogue()
        if not isinstance(sku, str) or sku not in catalogue:
            raise UserError(
                f"unknown GPU '{sku}'{did_you_mean(str(sku), catalogue)}",
                where=place_of(path, ("gpu", "sku")),
                fix=f"one of {', '.join(catalogue)}; a new one goes into sites/gpus.yaml",
            )
        raw["gpu"] = {**copy.deepcopy(catalogue[sku]), **gpu}
        sources, tables = gpu_provenance()
        gpu_table, gpu_sources = tables[sku], sources
    try:
        system = System.model_validate(raw)
    except ValidationError as error:
        raise refusal(error, Profile, path) from None
    table = {p: entry for entry in system.facts for p in entry.at}
    for dotted, value in overlay.corrections.items() if overlay is not None else ():
        if value is not None:
            table[dotted] = FactEntry(at=[dotted], source="user", confidence="user")
    return system.attach(table, gpu_table, gpu_sources, own_gpu)


_PROFILE_KEYS = frozenset(f.alias or n for n, f in Profile.model_fields.items())


def _correct(raw: dict[str, Any], dotted: str, value: Any) -> None:
    keys = dotted.split(".")
    if keys[0] not in FACT_SECTIONS:
        raise UserError(
            f"'{dotted}' is not a fact of a system{did_you_mean(keys[0], FACT_SECTIONS)}",
            where=f"corrections: {dotted}",
        )
    target: Any = raw
    while len(keys) > 1:
        if isinstance(target, list):
            if not keys[0].isdigit() or int(keys[0]) >= len(target):
                raise UserError(f"'{dotted}' leads nowhere in the profile", where=f"corrections: {dotted}")
            target, keys = target[int(keys[0])], keys[1:]
        else:
            # A key with dots in it (gpu.a100) is taken whole where the profile has it.
            whole = next((n for n in range(len(keys), 0, -1) if ".".join(keys[:n]) in target), 1)
            if whole == len(keys):
                keys = [".".join(keys)]
                break
            key, keys = ".".join(keys[:whole]), keys[whole:]
            target = target.setdefault(key, {})
        if not isinstance(target, (dict, list)):
            raise UserError(f"'{dotted}' leads into a plain value", where=f"corrections: {dotted}")
    if isinstance(target, list):
        raise UserError(f"'{dotted}' names a list entry; correct a key inside it", where=f"corrections: {dotted}")
    if value is None:
        target.pop(keys[-1], None)
    else:
        target[keys[-1]] = value


def read_overlay(source: Path | str | dict[str, Any], system_id: str | None = None) -> Overlay:
    """An overlay from a file or a dict; a wrong key is refused with the nearest right one."""
    path = None if isinstance(source, dict) else Path(source)
    data = source if isinstance(source, dict) else read_yaml(Path(source))
    if not isinstance(data, dict):
        raise UserError("an overlay is a mapping of keys to values", where=str(path or "overlay"))
    if system_id is not None and isinstance(source, dict):
        data = {"overlay_for": system_id, **data}
    try:
        overlay = Overlay.model_validate(data)
    except ValidationError as error:
        raise refusal(error, Overlay, path, "overlay") from None
    if system_id is not None and overlay.overlay_for != system_id:
        raise UserError(
            f"this overlay is for '{overlay.overlay_for}', not for '{system_id}'",
            where=place_of(path, ("overlay_for",), "overlay"),
            fix=f"--site {overlay.overlay_for}, or change overlay_for",
        )
    return overlay


def load(name: str, overlay: Path | str | dict[str, Any] | bool | None = None) -> System:
    """The resolved system called ``name``.

    name:     an id or alias (``lumi-g``), ``local`` (detected now), ``generic-slurm``, or the path of a profile's YAML file.
              A profile of that name in ``~/.config/aifactory/sites/`` is found too; a shipped one wins.
    overlay:  a file or dict with the user's values (a file may also hold a whole profile of that name); ``None`` uses ``~/.config/aifactory/sites/<id>.yaml`` where it exists;
              ``False`` uses none.

    Raises UserError for an unknown name (with the nearest system, factory, host or country), for a factory's or antenna's
    name (with its systems), and for a wrong key in profile or overlay (with file and line).
    """
    path: Path | None
    if isinstance(overlay, (str, Path)) and _is_profile(Path(overlay)):
        own = str(read_yaml(Path(overlay)).get("id"))
        if own != name:
            raise UserError(f"this profile is of '{own}', not of '{name}'", where=str(overlay), fix=f"--site {own}")
        return load(str(Path(overlay).resolve()))
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        path = Path(name)
        raw = read_yaml(path)
        if isinstance(raw, dict) and "overlay_for" in raw:
            if overlay is not None:
                raise UserError("an overlay was given where a system is needed", where=name)
            return load(str(raw["overlay_for"]), overlay=path)
    elif name == "local":
        from aifactory_train.sites.detection import local_profile

        path, raw = None, local_profile()
    else:
        path = find_file(name)
        raw = read_yaml(path)
    system_id = str(raw.get("id", name)) if isinstance(raw, dict) else name
    system = resolve(raw, path, _overlay_for(system_id, overlay))
    level, evidence = readiness_of(system)
    return system.model_copy(update={"readiness": level, "readiness_evidence": evidence})


def _is_profile(path: Path) -> bool:
    """Whether the file holds a profile rather than an overlay."""
    raw = read_yaml(path)
    return isinstance(raw, dict) and "schema" in raw and "overlay_for" not in raw


def _overlay_for(system_id: str, overlay: Path | str | dict[str, Any] | bool | None) -> Overlay | None:
    if overlay is False:
        return None
    if isinstance(overlay, (str, Path, dict)):
        return read_overlay(overlay, system_id)
    found = user_file(system_id)
    if found is None:
        return None
    raw = read_yaml(found)
    if isinstance(raw, dict) and "overlay_for" not in raw and "schema" in raw:
        return None  # a private profile of that name, not an overlay
    return read_overlay(found, system_id)


@functools.lru_cache(maxsize=1)
def _readiness_table() -> dict[str, dict[str, Any]]:
    return (read_yaml(READINESS) or {}).get("systems", {}) if READINESS.is_file() else {}


def readiness_of(system: Profile) -> tuple[str, str | None]:
    """(level, evidence) from ``readiness.yaml``; without an entry a usable profile is *documented*, others *announced*."""
    entry = _readiness_table().get(system.id)
    if entry:
        return entry["level"], f"{entry['evidence']} ({entry['date']})"
    return ("documented" if system.status != "announced" else "announced"), None
