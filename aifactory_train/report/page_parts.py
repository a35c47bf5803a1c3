"""Pieces of HTML: the frame of a page, tables, values in which what is missing stands out."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from aifactory_train.core.missing import has_missing, is_missing
from aifactory_train.record.render.common import text_of

HERE = Path(__file__).resolve().parent


def page(title: str, body: str, *, live: bool = False) -> str:
    """The frame of every page: language, size, a policy that lets nothing be loaded, style and script inline."""
    style = (HERE / "style.css").read_text(encoding="utf-8")
    script = (HERE / "script.js").read_text(encoding="utf-8")
    connect = ""
    if live:
        connect = "connect-src 'self'; "
        script += (HERE / "live.js").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; {connect}style-src '
        f"'unsafe-inline'; "
        "script-src 'unsafe-inline'; img-src data:\">\n"
        f'<link rel="icon" href="data:,">\n<title>{html.escape(title)} · '
        f"aifactory-train</title>\n<style>{style}</style>\n</head>\n"
        f'<body>\n<a class="skip" href="#main">Skip to the '
        f"content</a>\n{body}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def show(value: Any) -> str:
    """A value as HTML; what is missing stands out."""
    text = html.escape(text_of(value))
    if has_missing(value):
        return f'<span class="missing">{text}</span>'
    return text


def brief(value: Any) -> str:
    """As :func:`show`; of what is missing only who owes it (the whole question stands at the end of the page)."""
    if is_missing(value):
        who = str(value)[9:-1].partition(":")[0]
        return f'<span class="missing">MISSING ({html.escape(who)})</span>'
    return show(value)


def table(
    caption: str, columns: list[str], rows: list[list[str]], right: tuple[int, ...] = (), stack: bool = True
) -> str:
    """``rows`` are HTML already; the first cell of a row is its heading."""
    head = "".join(
        f'<th scope="col"{" class=n" if i in right else ""}>{html.escape(c)}</th>' for i, c in enumerate(columns)
    )
    lines = []
    for row in rows:
        cells = [f'<th scope="row">{row[0]}</th>']
        for i, text in enumerate(row[1:], 1):
            cells.append(
                f'<td{" class=n" if i in right else ""} data-label="{html.escape(columns[i], quote=True)}">{text}</td>'
            )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    kind = ' class="stack"' if stack else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{html.escape(caption, quote=True)}"><table{kind}><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
