"""What ``aifactory prepare`` prints: the report as tables, and documents token by token.

Without colour the same is readable: supervised text stands in ``[[double brackets]]``, its end-of-turn token in
``{{braces}}``.
"""

from __future__ import annotations

from typing import Any

from aifactory_train.core.output import console, note, table
from aifactory_train.data.pipeline import PreparedData
from aifactory_train.data.report import rows_line
from aifactory_train.data.store import TokenDataset


def report_tables(prepared: PreparedData) -> None:
    """Print sources, sets and what was dropped or cut."""
    report = prepared.report
    table(
        f"data of {report['recipe']}",
        ["source", "role", "read as", "rows", "documents", "tokens", "weight", "licence"],
        [
            [
                s["name"],
                s["role"],
                f"{s['format']}: {s['format_because']}",
                f"{s['rows']:,}",
                f"{s['documents']:,}",
                f"{s['tokens']:,}",
                f"{s['weight']:g}",
                s["licence"],
            ]
            for s in report["sources"]
        ],
        right=(3, 4, 5, 6),
    )
    rows = []
    for name, s in report["sets"].items():
        lengths = s.get("length", {})
        share = 100 * s["supervised"] / max(1, s["tokens"])
        rows.append(
            [
                name,
                f"{s['rows']:,}",
                f"{s['documents']:,}",
                f"{s['tokens']:,}",
                f"{s['supervised']:,} ({share:.0f} %)",
                f"{s['text_bytes']:,}",
                " / ".join(str(lengths.get(q, "-")) for q in ("p50", "p90", "p100")),
            ]
        )
    table(
        "sets",
        ["set", "rows", "documents", "tokens", "supervised", "text bytes", "length p50/p90/max"],
        rows,
        right=(1, 2, 3, 4, 5, 6),
    )
    used, why = rows_line(report)
    noted = [f"rows for training: {used}" + (f" ({why})" if why else "")]
    noted += [f"{s['name']}: {count:,} x {what}" for s in report["sources"] for what, count in s["counts"].items()]
    for kind, unit in (("columns", "column"), ("turn_keys", "key of a turn")):
        noted += [
            f"not used: {unit} '{name}' ({count:,} {'rows' if kind == 'columns' else 'turns'})"
            for name, count in report["unused"][kind].items()
        ]
    noted.append(f"duplicates taken out: {report['duplicates']['rows']:,}")
    overlap = report["overlap"]
    noted.append(
        "train/eval overlap: " + ", ".join(f"{k} {v}" for k, v in overlap.items() if not isinstance(v, (list, dict)))
    )
    for line in noted:
        note(f"  {line}")
    info = prepared.tokenizer_info
    if info["end_of_turn"] is not None:
        note(
            f"  end-of-turn: {info['end_of_turn']} (id {info['end_of_turn_id']}), supervised; padding: id "
            f"{info['pad_id']}"
        )


def inspect_document(
    dataset: TokenDataset, i: int, tokenizer: Any, info: dict[str, Any], *, as_json: bool = False
) -> dict[str, Any] | None:
    """Print one document token by token, or return it as plain values."""
    tokens, mask, text = dataset.tokens(i).tolist(), dataset.mask(i), dataset.text_mask(i)
    stops = set(info["stop_ids"])
    head = {
        "id": dataset.row_id(i),
        "source": dataset.source(i),
        "place": dataset.place(i),
        "tokens": len(tokens),
        "supervised": int(dataset.supervised[i]),
        "end_of_turn_supervised": bool(any(m and t in stops for t, m in zip(tokens, mask, strict=True))),
        "text_bytes": dataset.text_bytes(i),
    }
    if as_json:
        pieces = [
            {
                "id": t,
                "text": tokenizer.decode([t], skip_special_tokens=False),
                "supervised": bool(m),
                "scored_text": bool(x),
            }
            for t, m, x in zip(tokens, mask, text, strict=True)
        ]
        return {**head, "document": pieces}
    from rich.text import Text

    out = Text()
    screen = console()
    plain = not screen.is_terminal or screen.no_color
    for kind, ids in _groups(tokens, mask, stops):
        shown = tokenizer.decode(ids, skip_special_tokens=False)
        if kind == "stop":
            out.append(f"{{{{{shown}}}}}" if plain else shown, style="bold black on yellow")
        elif kind == "supervised":
            out.append(f"[[{shown}]]" if plain else shown, style="bold white on green")
        else:
            out.append(shown, style="dim")
    eot = "supervised" if head["end_of_turn_supervised"] else "NOT SUPERVISED (the text was cut)"
    screen.print(
        f"\n{head['place']}  id {head['id']}  {head['tokens']} tokens, {head['supervised']} supervised, end-of-turn "
        f"{eot}",
        style="bold",
        markup=False,
    )
    screen.print(out)
    return None


def _groups(tokens: list[int], mask: Any, stops: set[int]) -> list[tuple[str, list[int]]]:
    """Neighbouring tokens of one kind: ``plain``, ``supervised`` or ``stop``."""
    out: list[tuple[str, list[int]]] = []
    for token, supervised in zip(tokens, mask, strict=True):
        kind = "plain" if not supervised else ("stop" if token in stops else "supervised")
        if out and out[-1][0] == kind:
            out[-1][1].append(token)
        else:
            out.append((kind, [token]))
    return out
