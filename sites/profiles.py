"""Reading profiles: YAML → validated, resolved :class:`System` with the provenance of each fact beside it.

Resolution, in this order: the profile's file; constants of its GPU from ``gpus.yaml`` (what the profile states itself
wins); corrections and values of the user's overlay. Nothing is guessed: what no layer states stays ``None``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aifactory_train.core.errors import UserError
from aifactory_train.sites.catalogue import gpu_catalogue
from aifactory_train.sites.finding import find_file, user_file
from aifactory_train.sites.paths import dig
from aifactory_train.sites.reading import place_of, read_yaml, refusal
from aifactory_train.sites.resolving import readiness_of, resolve
from aifactory_train.sites.schema import Overlay
from aifactory_train.sites.system import System

__all__ = ["System", "dig", "gpu_catalogue", "load", "read_overlay", "readiness_of", "resolve"]


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

    name:     an id or alias (``lumi-g``), ``local`` (detected now), ``generic-slurm``, or the path of a profile's YAML
              file.
              A profile of that name in ``~/.config/aifactory/sites/`` is found too; a shipped one wins.
    overlay:  a file or dict with the user's values (a file may also hold a whole profile of that name); ``None`` uses
              ``~/.config/aifactory/sites/<id>.yaml`` where it exists; ``False`` uses none.

    Raises UserError for an unknown name (with the nearest system, factory, host or country), for a factory's or
    antenna's name (with its systems), and for a wrong key in profile or overlay (with file and line).
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
    found, found_in = _overlay_for(system_id, overlay)
    system = resolve(raw, path, found, found_in)
    level, evidence = readiness_of(system)
    return system.model_copy(update={"readiness": level, "readiness_evidence": evidence})


def _is_profile(path: Path) -> bool:
    """Whether the file holds a profile rather than an overlay."""
    raw = read_yaml(path)
    return isinstance(raw, dict) and "schema" in raw and "overlay_for" not in raw


def _overlay_for(
    system_id: str, overlay: Path | str | dict[str, Any] | bool | None
) -> tuple[Overlay | None, Path | None]:
    """The overlay and its file, if it has one."""
    if isinstance(overlay, (str, Path, dict)):
        return read_overlay(overlay, system_id), None if isinstance(overlay, dict) else Path(overlay)
    found = user_file(system_id) if overlay is not False else None
    if found is None:
        return None, None
    raw = read_yaml(found)
    if isinstance(raw, dict) and "overlay_for" not in raw and "schema" in raw:
        return None, None  # a private profile of that name, not an overlay
    return read_overlay(found, system_id), found
