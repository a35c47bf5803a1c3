"""The templates of this room."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.core.templates import environment
from aifactory_train.launchers.submission import quoted

if TYPE_CHECKING:
    import jinja2

FOLDER = Path(__file__).resolve().parent / "templates"


@functools.lru_cache(maxsize=1)
def templates() -> jinja2.Environment:
    """The templates of this room; an undefined name is an error, and ``q`` is the only way in for outside text."""
    made = environment(FOLDER)
    made.globals["q"] = quoted
    return made


def render(name: str, context: dict[str, Any]) -> str:
    """A template, filled in."""
    text = templates().get_template(name).render(**context)
    # Template branches leave blank lines; at most one in a row is for readers.
    out: list[str] = []
    for line in text.split("\n"):
        if line.strip() or (out and out[-1].strip()):
            out.append(line.rstrip())
    return "\n".join(out).rstrip("\n") + "\n"
