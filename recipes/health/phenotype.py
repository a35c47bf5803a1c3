"""Human Phenotype Ontology (OBO file) to chat rows: term to definition, definition to term, term to synonyms.

The ontology repeats itself: left and right, upper and lower limb share their wording. Rows are therefore grouped by the
wording of the definition with such words taken out, and whole groups go to training or to the held-out part.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.recipes.common import check_part, choose, read_text, share_of, unescaped

DIRECTIONS = ("term-to-definition", "definition-to-term", "term-to-synonyms")

#: Short on purpose: it stands in every row, and a template's own default would be three times as long.
SYSTEM = "Human Phenotype Ontology."

_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_SIDES = re.compile(
    r"\b(left|right|upper|lower|proximal|distal|middle|anterior|posterior|medial|lateral|first|second|third|fourth|fifth|"
    r"1st|2nd|3rd|4th|5th|increased|decreased|elevated|reduced|abnormal\w*|\d+)\b"
)


def rows(
    path: Path, *, part: str = "train", directions: list[str] | None = None, held_out: float = 0.1, max_words: int = 60
) -> Iterator[dict[str, Any]]:
    """Rows of an OBO file.

    Args:
        path: ``hp.obo``.
        part: ``train`` or ``held_out``; decided for each group of like definitions by a hash, so it never changes.
        directions: which questions are asked, of :data:`DIRECTIONS`; default all.
        held_out: share of the groups that is held out.
        max_words: longer definitions are left out (the tail of the ontology is a few encyclopaedic entries).
    """
    wanted = tuple(directions or DIRECTIONS)
    for name in wanted:
        choose(name, DIRECTIONS, "directions")
    check_part(part)
    for term in terms(path):
        definition = term["definition"]
        if not definition or len(definition.split()) > max_words:
            continue
        group = group_of(definition)
        if (share_of(group) < held_out) != (part == "held_out"):
            continue
        for direction in wanted:
            pair = _ask(direction, term)
            if pair is not None:
                row = {"id": f"{term['id']}/{direction}", "group": group, "prompt": pair[0], "completion": pair[1]}
                yield {**row, "system": SYSTEM}


def _ask(direction: str, term: dict[str, Any]) -> tuple[str, str] | None:
    if direction == "term-to-definition":
        return f"Define: {term['name']}", term["definition"]
    if direction == "definition-to-term":
        return f"Which term? {term['definition']}", term["name"]
    if not term["synonyms"]:
        return None
    return f"Synonyms: {term['name']}", "; ".join(term["synonyms"])


def group_of(definition: str) -> str:
    """What like definitions have in common, as a short key."""
    words = re.findall(r"[a-z]+", _SIDES.sub(" ", definition.lower()))
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def terms(path: Path) -> Iterator[dict[str, Any]]:
    """Live terms of an OBO file: ``{"id", "name", "definition", "synonyms"}`` (exact synonyms only)."""
    stanzas = read_text(path).split("\n[Term]\n")
    if len(stanzas) == 1:
        raise UserError("holds no [Term] stanza: not an OBO file", where=str(path))
    for stanza in stanzas[1:]:
        term: dict[str, Any] = {"id": "", "name": "", "definition": "", "synonyms": []}
        live = True
        for line in stanza.split("\n\n", 1)[0].splitlines():
            key, _, value = line.partition(": ")
            if key == "id":
                term["id"] = value.strip()
            elif key == "name":
                term["name"] = value.strip()
            elif key == "def" and (found := _QUOTED.match(value)):
                term["definition"] = unescaped(found[1])
            elif key == "synonym" and (found := _QUOTED.match(value)) and value[found.end() :].startswith(" EXACT"):
                synonym = unescaped(found[1])
                if synonym.lower() != term["name"].lower() and synonym not in term["synonyms"]:
                    term["synonyms"].append(synonym)
            elif key == "is_obsolete" and value.strip() == "true":
                live = False
        if live and term["name"]:
            yield term
