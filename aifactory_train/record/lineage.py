"""What changed from one run to the next: the lifecycle changes that Annex IV (6) asks for."""

from __future__ import annotations

from typing import Any

_SECTIONS = ("base", "method", "hparams", "data", "tokenizer")
_SKIPPED = ("choices", "files", "pipeline")


def changes(earlier: dict[str, Any], later: dict[str, Any]) -> list[dict[str, Any]]:
    """``[{place, earlier, later}]`` of everything that decides a training and differs between two records."""
    found: list[dict[str, Any]] = []
    for section in _SECTIONS:
        _compare(earlier.get(section), later.get(section), section, found)
    for name in ("version", "git"):
        _compare(_code(earlier, name), _code(later, name), f"run/code/{name}", found)
    return found


def _code(record: dict[str, Any], name: str) -> Any:
    return record.get("run", {}).get("code", {}).get(name)


def _compare(left: Any, right: Any, place: str, found: list[dict[str, Any]]) -> None:
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted({*left, *right}):
            if key not in _SKIPPED:
                _compare(left.get(key), right.get(key), f"{place}/{key}", found)
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            _compare(a, b, f"{place}/{i}", found)
    elif left != right:
        found.append({"place": place, "earlier": left, "later": right})
