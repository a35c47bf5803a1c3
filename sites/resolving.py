"""From the tree of one YAML file to a checked system."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aifactory_train.core.errors import UserError, did_you_mean
from aifactory_train.sites.catalogue import READINESS, gpu_catalogue, gpu_provenance
from aifactory_train.sites.centres import with_centre
from aifactory_train.sites.reading import place_of, read_yaml, refusal
from aifactory_train.sites.schema import FACT_SECTIONS, FactEntry, Overlay, Profile, Source
from aifactory_train.sites.services import SECTIONS
from aifactory_train.sites.system import System


def _refuse_unknown_keys(raw: Any, path: Path | None) -> None:
    if not isinstance(raw, dict):
        raise UserError("a profile is a mapping of keys to values", where=str(path or "profile"))
    for key in raw:
        if key not in _PROFILE_KEYS:
            close = did_you_mean(str(key), _PROFILE_KEYS)
            raise UserError(f"unknown key '{key}'{close}", where=place_of(path, (key,)))


def resolve(
    raw: Any, path: Path | None = None, overlay: Overlay | None = None, overlay_path: Path | None = None
) -> System:
    """A raw profile (parsed YAML) → :class:`System`. ``path`` and ``overlay_path`` are only for messages.

    An overlay's correction of ``null`` removes the key (a partition that does not exist there). A GPU of the profile's
    own is written as in ``gpus.yaml``: ``id`` is its name, ``like`` the known one whose constants it has where the
    profile says nothing else.
    """
    _refuse_unknown_keys(raw, path)
    raw = with_centre(copy.deepcopy(raw))
    if overlay is not None:
        for dotted, value in overlay.corrections.items():
            try:
                _correct(raw, dotted, value)
                section, _, key = dotted.partition(".")
                if section in SECTIONS and value is not None:
                    raw[section].get("unknown", {}).pop(key, None)  # what is corrected is known
            except UserError as error:
                where = place_of(overlay_path, ("corrections", dotted), "overlay")
                raise UserError(error.what, where=where, fix=error.fix) from None
        raw["user"] = overlay.user
    like = name_gpu(raw)
    gpu = raw.get("gpu") or {}
    own_gpu = frozenset(gpu) if isinstance(gpu, dict) else frozenset()
    sku = gpu.get("sku") if isinstance(gpu, dict) else None
    gpu_table: dict[str, FactEntry] = {}
    gpu_sources: dict[str, Source] = {}
    if sku is not None or like is not None:
        base, key = (sku, "sku") if like is None else (like, "like")
        catalogue = gpu_catalogue()
        if not isinstance(base, str) or base not in catalogue:
            raise UserError(
                f"unknown GPU '{base}'{did_you_mean(str(base), catalogue)}",
                where=place_of(path, ("gpu", key)),
                fix=f"one of {', '.join(catalogue)}; one of your own: gpu: {{id: NAME, like: one of these, and what "
                f"differs}}",
            )
        inherited = copy.deepcopy(catalogue[base])
        if like is not None:
            inherited.pop("device_names", None)  # another device answers to another name
            if "memory_gib" in gpu:
                inherited.pop("memory_visible_mib", None)
        raw["gpu"] = {**inherited, **gpu}
        sources, tables = gpu_provenance()
        gpu_table, gpu_sources = tables[base], sources
    try:
        system = System.model_validate(raw)
    except ValidationError as error:
        refused = refusal(error, Profile, path)
        at = ".".join(str(key) for key in error.errors()[0]["loc"])
        for dotted in overlay.corrections if overlay is not None else ():
            if f"{at}.".startswith(f"{dotted}.") or f"{dotted}.".startswith(f"{at}."):
                refused.where = place_of(overlay_path, ("corrections", dotted), "overlay")
        raise refused from None
    table = {p: entry for entry in system.facts for p in entry.at}
    for dotted, value in overlay.corrections.items() if overlay is not None else ():
        if value is not None:
            table[dotted] = FactEntry(at=[dotted], source="user", confidence="user")
    return system.attach(table, gpu_table, gpu_sources, own_gpu)


def name_gpu(raw: dict[str, Any]) -> Any:
    """Write a GPU's ``id`` as its ``model`` (as ``sku`` where the catalogue has it), in place, and take ``like`` out,
    which is returned.
    """
    gpu = raw.get("gpu")
    if not isinstance(gpu, dict):
        return None
    if "id" in gpu:
        known = isinstance(gpu["id"], str) and gpu["id"] in gpu_catalogue()
        raw["gpu"] = gpu = {"sku" if known else "model": gpu["id"], **{k: v for k, v in gpu.items() if k != "id"}}
    return gpu.pop("like", None)


_PROFILE_KEYS = frozenset(f.alias or n for n, f in Profile.model_fields.items())


def _correct(raw: dict[str, Any], dotted: str, value: Any) -> None:
    keys = dotted.split(".")
    if keys[0] not in FACT_SECTIONS:
        raise UserError(
            f"'{dotted}' is not a fact of a system{did_you_mean(keys[0], FACT_SECTIONS)}",
        )
    target: Any = raw
    while len(keys) > 1:
        if isinstance(target, list):
            if not keys[0].isdigit() or int(keys[0]) >= len(target):
                raise UserError(f"'{dotted}' leads nowhere in the profile")
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
            raise UserError(f"'{dotted}' leads into a plain value")
    if isinstance(target, list):
        raise UserError(f"'{dotted}' names a list entry; correct a key inside it")
    if value is None:
        target.pop(keys[-1], None)
    else:
        target[keys[-1]] = value


@functools.lru_cache(maxsize=1)
def _readiness_table() -> dict[str, dict[str, Any]]:
    return (read_yaml(READINESS) or {}).get("systems", {}) if READINESS.is_file() else {}


def readiness_of(system: Profile) -> tuple[str, str | None]:
    """(level, evidence) from ``readiness.yaml``; without an entry a usable profile is *documented*, others
    *announced*.
    """
    entry = _readiness_table().get(system.id)
    if entry:
        return entry["level"], f"{entry['evidence']} ({entry['date']})"
    return ("documented" if system.status != "announced" else "announced"), None
