"""Vocabularies for describing data (Python files of package ``rdflib``) to rows: definition to term.

DCAT describes data sets, PROV where they come from, ODRL who may do what with them. rdflib keeps each term's definition as a
comment beside its name; the files are read as text, never imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import chat, choose, no_rows, parted, plain, read_text

DIRECTIONS = ("definition-to-term", "term-to-definition")
VOCABULARIES = ("CSVW", "DCAT", "DCTERMS", "ODRL2", "ORG", "PROV", "QB", "SH", "SKOS", "SOSA", "SSN", "TIME", "VOID")
SYSTEM = "Vocabularies for data catalogues, provenance and permissions."

_TERM = re.compile(r"^    (\w+): URIRef  # (.+)$", re.MULTILINE)


def rows(
    path: Path,
    *,
    part: str = "train",
    direction: str = "definition-to-term",
    vocabularies: list[str] | None = None,
    held_out: float = 0.2,
    max_words: int = 60,
) -> Iterator[dict[str, Any]]:
    """Rows of the namespace files.

    Args:
        path: the package's ``namespace`` folder.
        part: ``train`` or ``held_out``.
        direction: one of :data:`DIRECTIONS`.
        vocabularies: default :data:`VOCABULARIES`.
        held_out: share of the definitions that is held out.
        max_words: longer definitions are left out.
    """
    choose(direction, DIRECTIONS, "direction")
    for entry in parted(terms(path, vocabularies or list(VOCABULARIES), max_words), part, held_out):
        if direction == "definition-to-term":
            prompt, completion = f"Which term? {entry['wording']}", entry["id"]
        else:
            prompt, completion = f"Define: {entry['id']}", entry["wording"]
        yield chat(entry, f"{entry['id']}/{direction}", prompt, completion, SYSTEM)


def terms(path: Path, vocabularies: list[str], max_words: int) -> Iterator[dict[str, Any]]:
    """``{"id": "dcat:Dataset", "wording"}``; the same definition is yielded once."""
    seen: set[str] = set()
    for name in vocabularies:
        file = path / f"_{choose(name, VOCABULARIES, 'vocabularies')}.py"
        prefix = name.lower().removesuffix("2")
        for term, comment in _TERM.findall(read_text(file)) if file.is_file() else []:
            wording = plain(comment.replace("\\n", " "))
            if wording in seen or not 3 <= len(wording.split()) <= max_words:
                continue
            seen.add(wording)
            yield {"id": f"{prefix}:{term}", "wording": wording}
    if not seen:
        raise no_rows(path, "vocabulary with definitions")
