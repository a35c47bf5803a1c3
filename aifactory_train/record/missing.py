"""What the program cannot know is ``MISSING (who must supply it)``, in the record and in everything rendered from it. Never a filler."""

from __future__ import annotations

from typing import Any

PREFIX = "MISSING ("


def missing(who: str) -> str:
    """The marker for a value that only ``who`` (provider, data owner, site, base model's provider) can supply."""
    return f"{PREFIX}{who})"


def is_missing(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(PREFIX)


def missing_places(value: Any, place: str = "") -> list[tuple[str, str]]:
    """``(place, who)`` of everything that is still missing below ``value``."""
    if is_missing(value):
        return [(place, value[len(PREFIX) :].rstrip(")"))]
    found: list[tuple[str, str]] = []
    if isinstance(value, dict):
        for key, below in value.items():
            found += missing_places(below, f"{place}/{key}" if place else str(key))
    elif isinstance(value, list):
        for i, below in enumerate(value):
            found += missing_places(below, f"{place}/{i}")
    return found
