"""Licence texts (JSON, npm package ``spdx-license-list``) to rows of plain text: paragraphs of contract language.

Licences copy each other. A paragraph is held out with all paragraphs of its wording, and only if no training paragraph
shares half of its four-word sequences.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.recipes.common import no_rows, parted, plain, read_text


def rows(
    path: Path, *, part: str = "train", held_out: float = 0.2, min_words: int = 25, max_words: int = 120
) -> Iterator[dict[str, Any]]:
    """Rows ``{"text", "id", "group"}``, one a paragraph.

    Args:
        path: the package's ``licenses`` folder.
        part: ``train`` or ``held_out``.
        held_out: share of the paragraphs that is held out.
        min_words, max_words: shorter and longer paragraphs are left out.
    """
    for entry in parted(paragraphs(path, min_words, max_words), part, held_out):
        yield {"id": entry["id"], "group": entry["group"], "text": entry["wording"]}


def paragraphs(path: Path, min_words: int, max_words: int) -> Iterator[dict[str, Any]]:
    """``{"id", "wording"}`` of every different paragraph, in the order of the licences' names."""
    seen: set[str] = set()
    for file in sorted(path.glob("*.json")):
        try:
            text = json.loads(read_text(file)).get("licenseText") or ""
        except (ValueError, AttributeError):
            raise UserError("not a licence in JSON", where=str(file)) from None
        for number, block in enumerate(re.split(r"\n\s*\n", text)):
            wording = plain(block)
            key = wording.lower()
            if key in seen or not min_words <= len(wording.split()) <= max_words or wording.isupper():
                continue
            seen.add(key)
            yield {"id": f"{file.stem}/{number}", "wording": wording}
    if not seen:
        raise no_rows(path, "licence text (*.json)")
