"""The annotated YAML of a new recipe."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.core.templates import render
from aifactory_train.recipe_draft.guesses import Draft

if TYPE_CHECKING:
    from aifactory_train.config.schema import ModelConfig

_TASKS = {
    "chat": "chat as in the rows",
    "qa": "answer as in the rows",
    "labels": "classify: one of the labels",
    "text": "continued pre-training on plain text",
    "preference": "prefer the better of two answers",
    "feedback": "answer as in the rows that were rated good",
}


def recipe_text(
    args: argparse.Namespace,
    out: Path,
    data: Path,
    sector: str,
    draft: Draft,
    base: ModelConfig,
    licence_missing: bool,
    facts: dict[str, Any],
    texts: list[str],
    answers: list[str],
    recipes: Path,
) -> str:
    """The recipe: what the draft says, and for the rest what suits this many rows of this length.

    Args:
        args: the command line (id, licence, held-out rows).
        out: where the recipe will lie; rows beside it are named relative to it.
        data: the rows; facts: the report on the rows; ``characters`` and ``languages`` are read.
        texts: every row as text; ``answers``: the last turn of every chat row.
        recipes: folder of the recipes' schema.
    """
    small = "135M" in base.base or "135m" in base.base
    length = _length(draft, facts["characters"], base.base)
    parts = sum(1 + len(t) // (3 * length) for t in texts) if draft.form == "text" else len(texts)
    batch = 4 if parts < 400 else (16 if parts < 4000 else 32)
    if draft.preference == "kto":
        batch = max(batch, 16)  # its KL estimate is a mean over the step
    task = "labels" if draft.labels else draft.task
    epochs = {"text": 1, "labels": 3, "preference": 1, "feedback": 1}.get(task, 2)
    steps = max(1, -(-int(parts * 0.9) // batch)) * epochs
    return render(
        Path(__file__).with_name("recipe.yaml.j2"),
        args=args,
        base=base,
        batch=batch,
        beside=lambda path: _beside(path, out),
        data=data,
        draft=draft,
        epochs=epochs,
        held=Path(args.held).expanduser() if args.held else None,
        labels=[_quoted(label) for label in draft.labels or []],
        languages=[name for name in facts["languages"]["shares"] if name != "und"][:6],
        length=length,
        licence_missing=licence_missing,
        longest_row=facts["characters"].get("p99", 0),
        new_tokens=min(256, max(8, _power(max((len(a) for a in answers), default=64) // 3 + 4))),
        quoted=_quoted,
        rows=len(texts),
        recipes=recipes,
        sector=sector,
        small=small,
        steps=steps,
        task=_TASKS[task],
        thousands="{:,}".format,
    )


def _quoted(text: str) -> str:
    """A YAML scalar on one line."""
    return json.dumps(text, ensure_ascii=False)


def _beside(path: Path, out: Path) -> str:
    """``./...`` where the rows lie beside the recipe or below (both can move then), else the whole path."""
    whole, folder = path.resolve(), out.resolve().parent
    return f"./{whole.relative_to(folder).as_posix()}" if whole.is_relative_to(folder) else str(whole)


def _power(value: int) -> int:
    return 1 << max(0, (value - 1).bit_length())


def _length(draft: Draft, total: dict[str, int], base: str) -> int:
    """A power of two that holds 99 of 100 rows at three characters a token; text is cut anyway, so the median
    decides.
    """
    text = draft.form == "text"
    wanted = total.get("p50" if text else "p99", 0) // 3 + 32
    return min(max(256 if text else 128, _power(wanted)), 1024 if text else 2048, _context(base))


def _context(base: str) -> int:
    """Positions that the model has, where its configuration lies here."""
    file = Path(base) / "config.json"
    try:
        return int(json.loads(file.read_text(encoding="utf-8")).get("max_position_embeddings") or 1 << 20)
    except (OSError, ValueError):
        return 1 << 20
