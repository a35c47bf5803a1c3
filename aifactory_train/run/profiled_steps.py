"""The steps that ``--profile`` names; without torch, for ``launch`` too."""

from __future__ import annotations

import re

from aifactory_train.core.errors import UserError


def steps_asked(text: str) -> tuple[int, int] | int:
    """``A-B`` as the pair, or a number of steps. Raises :class:`UserError` for anything else."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    first, last = (int(found[1]), int(found[2] or 0)) if found else (0, 0)
    if not first or (found and found[2] is not None and last < first):
        raise UserError(
            f"'{text}' names no steps",
            where="--profile",
            fix="a number of steps (--profile 4), or the first and last of them (--profile 5-8)",
        )
    return (first, last) if last else first
