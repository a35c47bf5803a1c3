"""Pieces of HTML: the frame of a page, tables, values in which what is missing stands out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from aifactory_train.core.missing import has_missing, is_missing
from aifactory_train.core.templates import render
from aifactory_train.record.render.common import text_of

HERE = Path(__file__).resolve().parent


def page(template: str, title: str, *, live: bool = False, **values: Any) -> str:
    """A page in the common frame: language, size, a policy that lets nothing be loaded, style and script inline.
    ``template`` fills its body from ``values``; what is not :class:`Markup` there is text."""
    style, *scripts = (
        (HERE / name).read_text(encoding="utf-8") for name in ("style.css", "script.js", *["live.js"] * live)
    )
    frame = {"title": title, "live": live, "style": Markup(style), "script": Markup("".join(scripts))}
    return render(HERE / "templates" / template, autoescape=True, **frame, **values)


def show(value: Any) -> Markup:
    """A value as HTML; what is missing stands out."""
    text = text_of(value)
    return Markup('<span class="missing">{}</span>').format(text) if has_missing(value) else Markup.escape(text)


def brief(value: Any) -> Markup:
    """As :func:`show`; of what is missing only who owes it (the whole question stands at the end of the page)."""
    if is_missing(value):
        return Markup('<span class="missing">MISSING ({})</span>').format(str(value)[9:-1].partition(":")[0])
    return show(value)


def table(
    caption: str, columns: list[str], rows: Sequence[Sequence[Any]], right: tuple[int, ...] = (), label: str = ""
) -> Markup:
    """Cells that are not :class:`Markup` are text; the first of a row is its heading. ``label``: what the table is
    called where it cannot be seen (default: its caption)."""
    values = {"caption": caption, "label": label or caption, "columns": columns, "rows": rows, "right": right}
    return Markup(render(HERE / "templates" / "table.html.j2", autoescape=True, **values))
