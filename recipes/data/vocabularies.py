"""Vocabularies for describing data (Python files of package ``rdflib``) to rows: definition to term.

DCAT describes data sets, PROV where they come from, ODRL who may do what with them. rdflib keeps each term's definition
as a comment beside its name; the files are read as text, never imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import asked, choose, plain, read_text

VOCABULARIES = ("CSVW", "DCAT", "DCTERMS", "ODRL2", "ORG", "PROV", "QB", "SH", "SKOS", "SOSA", "SSN", "TIME", "VOID")

_TERM = re.compile(r"^    (\w+): URIRef  # (.+)$", re.MULTILINE)


@asked(
    "Vocabularies for data catalogues, provenance and permissions.",
    {
        "definition-to-term": ("Which term? {wording}", "{id}"),
        "term-to-definition": ("Define: {id}", "{wording}"),
    },
    held_out=0.2,
    what="vocabulary with definitions",
    words=(3, 60),
)
def rows(path: Path, *, vocabularies: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Terms with a definition in the package's ``namespace`` folder: ``{"id": "dcat:Dataset", "wording"}``.

    Args:
        vocabularies: default :data:`VOCABULARIES`.
    """
    for name in vocabularies or VOCABULARIES:
        file = path / f"_{choose(name, VOCABULARIES, 'vocabularies')}.py"
        prefix = name.lower().removesuffix("2")
        for term, comment in _TERM.findall(read_text(file)) if file.is_file() else []:
            yield {"id": f"{prefix}:{term}", "wording": plain(comment.replace("\\n", " "))}
