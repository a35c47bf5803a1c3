"""A profile's text: what is read, and refusals that name file, line and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from aifactory_train.core import yaml_text
from aifactory_train.core.errors import UserError, did_you_mean


def read_yaml(path: Path) -> Any:
    """The file's content; what cannot be read is refused with file and line. Numbers know how they were written, for
    text.
    """
    return yaml_text.read(path, keep_written=True).value


def line_of(path: Path, keys: tuple[Any, ...]) -> int | None:
    """The line of the value under ``keys`` (names and list indices), or of its nearest parent's."""
    try:
        return yaml_text.read(path).line(keys)
    except UserError:
        return None


def place_of(path: Path | None, keys: tuple[Any, ...], label: str = "profile") -> str:
    dotted = ".".join(str(k) for k in keys)
    if path is None:
        return f"{label}: {dotted}" if dotted else label
    line = line_of(path, keys)
    return f"{path}:{line}: {dotted}" if line else f"{path}: {dotted}"


def refusal(error: ValidationError, model: type, path: Path | None, label: str = "profile") -> UserError:
    """The first fault of a pydantic error as a message with file, line, key and fix; the others by key and kind, so
    that one reading repairs all."""
    faults = error.errors(include_url=False)
    fault = faults[0]
    keys = tuple(k for k in fault["loc"] if not (isinstance(k, str) and k.startswith("function-")))
    fix = None
    what = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        known = _known_keys(model, keys[:-1])
        what = f"unknown key '{keys[-1]}'{did_you_mean(str(keys[-1]), known)}"
        fix = f"known keys here: {', '.join(sorted(known))}" if known else None
    elif fault["type"] == "missing":
        what, fix = f"the key '{keys[-1]}' is missing", "add it; docs/add-a-site.md explains each key"
        keys = keys[:-1] or keys
    elif keys and keys[-1] == "arch":
        what = f"'{fault.get('input')}' is not an architecture name"
        fix = "NVIDIA: sm_80, sm_90, sm_100; AMD: gfx90a, gfx942"
    elif fault["type"] == "literal_error":
        expected = fault["ctx"]["expected"]
        what = f"'{fault['input']}' is not one of {expected}"
    if len(faults) > 1:
        kinds = {"missing": "missing", "extra_forbidden": "unknown"}
        others = [f"{'.'.join(map(str, f['loc']))} {kinds.get(f['type'], 'not valid')}" for f in faults[1:]]
        shown = ", ".join(others[:12]) + (" …" if len(others) > 12 else "")
        what += f" (and {len(others)} more: {shown})"
    return UserError(what, where=place_of(path, keys, label), fix=fix)


def _known_keys(model: Any, keys: tuple[Any, ...]) -> list[str]:
    """Field names of the model that ``keys`` lead to (through optional, dict and list annotations)."""

    def models(annotation: Any) -> list[Any]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return [annotation]
        return [m for a in getattr(annotation, "__args__", ()) for m in models(a)]

    current = model
    for key in keys:
        field = current.model_fields.get(key) if isinstance(key, str) else None
        if field is None:
            continue  # an index, or the free key of a dict: the model is already the value's
        found = models(field.annotation)
        if not found:
            return []
        current = found[0]
    return [f.alias or name for name, f in current.model_fields.items()]
