"""Texts made of Jinja2 templates; jinja2 is imported when the first is filled in."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2


@functools.lru_cache(None)
def environment(folder: Path, autoescape: bool = False) -> jinja2.Environment:
    """The templates of a folder. A name that is not given is an error; tags leave no line of their own behind.
    ``autoescape``: what is filled in is text, not HTML."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=autoescape,
    )


def render(template: Path, autoescape: bool = False, **values: Any) -> str:
    """A template, filled in."""
    return environment(template.parent, autoescape).get_template(template.name).render(**values)
