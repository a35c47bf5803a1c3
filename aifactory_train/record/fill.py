"""What only people know: asked once per organisation, kept in one YAML file, taken into every later record."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from aifactory_train.core import yaml_text
from aifactory_train.core.errors import UserError, did_you_mean
from aifactory_train.record.people import PEOPLE


def organisation_file(given: str | None) -> Path:
    """``record.organisation``, or ``organisation.yaml`` in the user's configuration folder."""
    if given:
        return Path(given).expanduser()
    root = (
        os.environ.get("AIFACTORY_CONFIG")
        or Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "aifactory"
    )
    return Path(root) / "organisation.yaml"


def organisation_values(given: str | None) -> tuple[dict[str, Any], Path]:
    """The values that people gave, checked. A missing file gives none, unless it was named."""
    path = organisation_file(given)
    if not path.is_file():
        if given:
            raise UserError(
                "no such file", where=f"record.organisation: {given}", fix="aifactory record fill writes one"
            )
        return {}, path
    return check_values(read(path), str(path)), path


def read(path: Path) -> Any:
    document = yaml_text.read(path)
    if not isinstance(document.value, dict):
        return document.value
    # Numbers are text here too (a telephone number begins with a nought); yes and no may be said as true and false.
    return {
        k: v if isinstance(v, bool) or v is None else document.written((k,)) or v for k, v in document.value.items()
    }


def check_values(values: Any, where: str) -> dict[str, Any]:
    """Known keys with text; a key that nobody asks for is refused by name."""
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError("a mapping of answers is needed", where=where)
    for key, value in values.items():
        if key not in PEOPLE:
            raise UserError(f"unknown key '{key}'{did_you_mean(str(key), PEOPLE)}", where=where)
        if not isinstance(value, (str, int, float, bool)) or value == "":
            raise UserError(f"'{key}' needs a text", where=where, fix="leave the key out if the answer is not known")
    return {
        k: v if isinstance(v, str) else ("yes" if v is True else "no" if v is False else str(v))
        for k, v in values.items()
    }


def template() -> str:
    """The YAML file with every question, all of them commented out: an unanswered question stays MISSING."""
    lines = ["# What only people know about the models of this organisation. Unanswered questions stay MISSING."]
    for key, (who, question) in PEOPLE.items():
        lines += [f"# {question} [{who}]", f"#{key}: "]
    return "\n".join(lines) + "\n"


def save(path: Path, values: dict[str, Any]) -> None:
    """Write the answers, readable by the user alone (names and contacts are in it)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml_text.dump(values)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write("# What only people know; aifactory record fill asks, every record takes it over.\n" + text)
