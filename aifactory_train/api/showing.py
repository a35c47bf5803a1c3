"""HTML for notebooks: a fragment with a style of its own, every text escaped, nothing loaded, no script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

_STYLE = Path(__file__).with_name("notebook.css")


def fragment(title: str, parts: Sequence[Markup]) -> str:
    """A result of the API as a notebook shows it."""
    style = Markup(_STYLE.read_text(encoding="utf-8"))
    head = Markup('<div class="aifactory-result"><style>{}</style><p class="aifactory-title">{}</p>')
    return str(head.format(style, title) + Markup("").join(parts) + Markup("</div>"))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Markup:
    """A table; the first cell of a row names it. Cells that are not :class:`Markup` are text."""
    head = Markup("").join(Markup("<th>{}</th>").format(name) for name in columns)
    body = Markup("").join(
        Markup("<tr>{}</tr>").format(
            Markup("").join(
                Markup("<th>{}</th>" if i == 0 else "<td>{}</td>").format(cell) for i, cell in enumerate(row)
            )
        )
        for row in rows
    )
    return Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(head, body)


def paragraph(text: str) -> Markup:
    return Markup("<p>{}</p>").format(text)


def samples(found: Sequence[dict[str, object]], earlier: dict[object, object]) -> Markup:
    """Questions with their expected and given answers; ``earlier``: prompt to the answer before the training."""
    rows = []
    for sample in found:
        cells = [sample.get("prompt"), sample.get("expected"), earlier.get(sample.get("prompt"), ""), sample["answer"]]
        rows.append(["" if cell is None else str(cell) for cell in cells])
    return table(["prompt", "expected", "before", "after"], rows) if rows else Markup("")
