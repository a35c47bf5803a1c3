"""Vocabularies for describing data (Python files of package ``rdflib``) to rows: definition to term.

DCAT describes data sets, PROV where they come from, ODRL who may do what with them. rdflib keeps each term's definition as a
comment beside its name; the files are read as text, never imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import asked, choose, distinct, plain, read_text

DIRECTIONS = {
    "definition-to-term": ("Which term? {wording}", "{id}"),
    "term-to-definition": ("Define: {id}", "{wording}"),
}
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
    found = distinct(terms(path, vocabularies or VOCABULARIES), path, "vocabulary with definitions", 3, max_words)
    return asked(found, DIRECTIONS, direction, part=part, held_out=held_out, system=SYSTEM)


def terms(path: Path, vocabularies: Sequence[str]) -> Iterator[dict[str, Any]]:
    """``{"id": "dcat:Dataset", "wording"}`` of each term with a definition."""
    for name in vocabularies:
        file = path / f"_{choose(name, VOCABULARIES, 'vocabularies')}.py"
        prefix = name.lower().removesuffix("2")
        for term, comment in _TERM.findall(read_text(file)) if file.is_file() else []:
            yield {"id": f"{prefix}:{term}", "wording": plain(comment.replace("\\n", " "))}
