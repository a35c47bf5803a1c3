"""The annotated YAML of a new recipe."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.recipe_draft.guesses import Draft

if TYPE_CHECKING:
    from aifactory_train.config.schema import ModelConfig


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
        data: the rows.
        facts: the report on the rows; ``characters`` and ``languages`` are read.
        texts: every row as text; ``answers``: the last turn of every chat row.
        recipes: folder of the recipes' schema.
    """
    small = "135M" in base.base or "135m" in base.base
    total = facts["characters"]
    length = _length(draft, total, base.base)
    rows = len(texts)
    parts = sum(1 + len(t) // (3 * length) for t in texts) if draft.form == "text" else rows
    batch = 4 if parts < 400 else (16 if parts < 4000 else 32)
    if draft.preference == "kto":
        batch = max(batch, 16)  # its KL estimate is a mean over the step
    epochs = {"text": 1, "labels": 3, "preference": 1, "feedback": 1}.get("labels" if draft.labels else draft.task, 2)
    lines = _about(args, data, sector, draft, base, licence_missing, facts, rows, recipes)
    lines += _adapter(draft)
    lines += _data(args, out, data, draft, length, total)
    lines += _method(draft)
    lines += _training(
        draft, small, max(1, -(-int(parts * 0.9) // batch)) * epochs, epochs, batch, _rate(draft, small), answers
    )
    return "\n".join(lines) + "\n"


def _about(
    args: argparse.Namespace,
    data: Path,
    sector: str,
    draft: Draft,
    base: ModelConfig,
    licence_missing: bool,
    facts: dict[str, Any],
    rows: int,
    recipes: Path,
) -> list[str]:
    """What the recipe is for, and its model."""
    shares = [name for name in facts["languages"]["shares"] if name != "und"][:6]
    reported = {
        "chat": "chat as in the rows",
        "qa": "answer as in the rows",
        "text": "continued pre-training on plain text",
        "preference": "prefer the better of two answers",
        "feedback": "answer as in the rows that were rated good",
    }
    task = "classify: one of the labels" if draft.labels else reported[draft.task]
    metric = "preference_loss" if draft.preference else draft.metrics[0]
    lines = [
        f"# yaml-language-server: $schema={recipes / 'recipe.schema.json'}",
        f"# Written by 'aifactory recipes new' from {rows:,} rows of {data.name}; change what you like, docs/data.md "
        f"explains the keys.",
        f"id: {args.id}",
        "",
        "about:",
        f"  title: {_quoted(args.id.rpartition('/')[2].replace('-', ' ').replace('_', ' '))}",
        f"  sector: {sector}",
        f"  task: {_quoted(task)}",
        f"  metric: {metric}",
        f"  languages: [{', '.join(shares)}]   # found in the rows"
        if shares
        else "  languages: []   # none was recognised: say it",
        "",
        "model:",
        f"  base: {_quoted(base.base)}",
        f"  licence: {base.licence}" + ("   # MISSING: read it where the model comes from" if licence_missing else ""),
    ]
    if base.options:
        lines.append("  options:          # larger ones, for a factory: --set model.base=ID")
        for option in base.options[:3]:
            lines.append(
                f"    - {{base: {_quoted(option.base)}, parameters: {_quoted(option.parameters)}, licence: "
                f"{option.licence}}}"
            )
    if draft.preference:
        lines.append(
            "  # start_from: runs/FIRST   # best after a supervised run on good answers, with the same adapter block"
        )
    return lines


def _adapter(draft: Draft) -> list[str]:
    rank = 64 if draft.form == "text" else 16
    why_rank = "plain text has more to learn than a style of answers" if draft.form == "text" else "enough for a task"
    return [
        "",
        "adapter:            # LoRA on every linear layer",
        "  kind: lora",
        f"  rank: {rank}          # {why_rank}",
        f"  alpha: {2 * rank}",
    ]


def _data(
    args: argparse.Namespace, out: Path, data: Path, draft: Draft, length: int, total: dict[str, int]
) -> list[str]:
    """Where the rows lie, how they are read and which are held out."""
    lines = [
        "",
        "data:",
        "  train:",
        f"    source: {_quoted(_beside(data, out))}",
    ]
    if draft.columns:
        pairs = ", ".join(f"{_quoted(k)}: {v}" for k, v in draft.columns.items())
        lines.append(f"    columns: {{{pairs}}}   # yours: what it is read as")
    lines.append(f"    format: {draft.form}")
    if args.licence:
        lines.append(f"    licence: {_quoted(args.licence)}")
    else:
        lines.append(
            "    licence: unknown   # MISSING: own, or the SPDX id of the licence under which you have the rows"
        )
    lines.append(
        "    # facts: {origin: own, personal_data: none, obtained: ...}   # for the record; unset is written down as "
        "MISSING"
    )
    if args.held:
        lines.append(
            f"  eval: {{source: {_quoted(_beside(Path(args.held).expanduser(), out))}, licence: "
            f"{_quoted(args.licence or 'unknown')}}}"
        )
    elif draft.split:
        kind, column = draft.split
        why = "rows of one value are never divided" if kind == "group" else "the newest rows are held out, as in use"
        lines.append(f"  split_by: {{{kind}: {_quoted(column)}}}   # {why}")
    if not args.held:
        lines.append(
            "  eval_fraction: 0.1  # held out and never trained on; rows that repeat them are taken out of the training"
        )
    if draft.labels:
        lines.append(f"  labels: [{', '.join(map(_quoted, draft.labels))}]   # any other answer is refused")
    lines.append(
        f"  sequence_length: {length}   # tokens; 99 % of your rows have at most {total.get('p99', 0):,} characters"
    )
    if draft.form == "text":
        lines.append("  long_documents: paragraphs   # longer texts are cut between paragraphs; nothing is lost")
    return lines


def _training(
    draft: Draft,
    small: bool,
    steps: int,
    epochs: int,
    batch: int,
    rate: tuple[str, str],
    answers: list[str],
) -> list[str]:
    """The optimisation and what is evaluated; ``rate`` with the reason for it."""
    lines = ["", "train:"]
    if small and steps > 120:
        lines.append("  max_steps: 120    # a first look on a laptop; on a GPU: --set train.max_steps=null")
    lines += [
        f"  epochs: {epochs}         # about {steps:,} steps",
        f"  batch_rows: {batch}",
        f"  learning_rate: {rate[0]}   # {rate[1]}",
        "  schedule: cosine",
        "  warmup_ratio: 0.05",
        "",
        "eval:",
        f"  metrics: [{', '.join(draft.metrics)}]",
    ]
    if draft.form != "text":
        longest = max((len(a) for a in answers), default=64)
        lines.append(f"  max_new_tokens: {min(256, max(8, _power(longest // 3 + 4)))}")
    return lines


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


def _method(draft: Draft) -> list[str]:
    """The block that makes the rows be judged in place of imitated; none for rows to imitate."""
    if draft.preference == "dpo":
        return [
            "",
            "methods:            # docs/methods.md",
            "  preference:",
            "    kind: dpo       # or orpo: needs no supervised run before it",
            "    beta: 0.1       # larger: stays closer to the model before training",
        ]
    if draft.preference == "kto":
        lines = ["", "methods:            # docs/methods.md", "  preference:", "    kind: kto"]
        lines.append("    beta: 0.1       # larger: stays closer to the model before training")
        for name, weight in zip(("desirable_weight", "undesirable_weight"), draft.weights, strict=True):
            if weight != 1.0:
                lines.append(f"    {name}: {weight:g}   # good and bad answers weigh alike, whatever their numbers")
        return lines
    return []


def _rate(draft: Draft, small: bool) -> tuple[str, str]:
    if draft.preference:
        rate = "5e-5" if small else "2e-5"
        return rate, "a tenth of what imitation takes, or the model forgets more than it learns"
    if small:
        return "5e-4", "high, for a short run of a small model; 2e-4 for models of 1 to 8 billion parameters"
    if draft.form == "text":
        return "1e-4", "half of what questions and answers take: the model keeps more of what it knows"
    return (
        ("1e-4", "few labels are soon learnt by heart")
        if draft.labels
        else ("2e-4", "LoRA on up to 8 billion parameters")
    )
