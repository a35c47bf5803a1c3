"""What the program cannot know is ``MISSING (who must supply it)``, in the record and in everything rendered from it.
Never a filler.
"""

from __future__ import annotations

import re
from typing import Any

_MARKER = re.compile(r"MISSING \(([^()]*)\)")


def missing(who: str) -> str:
    """The marker for a value that only ``who`` (provider, data owner, site, base model's provider) can supply."""
    return f"MISSING ({who.replace('(', '[').replace(')', ']')})"


def is_missing(value: Any) -> bool:
    """Whether the whole value is a marker."""
    return isinstance(value, str) and _MARKER.fullmatch(value) is not None


def has_missing(value: Any) -> bool:
    """Whether a marker stands anywhere in it."""
    if isinstance(value, str):
        return _MARKER.search(value) is not None
    return bool(missing_places(value))


def missing_places(value: Any, place: str = "") -> list[tuple[str, str]]:
    """``(place, who)`` of everything that is still missing below ``value``."""
    if isinstance(value, str):
        return [(place, who) for who in _MARKER.findall(value)]
    found: list[tuple[str, str]] = []
    if isinstance(value, dict):
        for key, below in value.items():
            found += missing_places(below, f"{place}/{key}" if place else str(key))
    elif isinstance(value, list):
        for i, below in enumerate(value):
            found += missing_places(below, f"{place}/{i}")
    return found
