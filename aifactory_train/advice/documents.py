"""An annex as Markdown and as DOCX: the same fields, each with its status and source beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.core.errors import UserError

if TYPE_CHECKING:
    from docx.document import Document


def counted(annex: dict[str, Any]) -> str:
    """How much of the technical part is filled, in words."""
    return f"{annex['filled']} of {annex['technical']} technical fields are filled"


def label(field: dict[str, Any]) -> str:
    """Status and source of a field, in one line."""
    return field["status"] + (f": {field['source']}" if field["value"] is not None and field["source"] else "")


def markdown(annex: dict[str, Any]) -> str:
    """The annex as Markdown."""
    form = annex["form"]
    lines = [f"# {annex['title']}", ""]
    lines += [f"> {annex['note']}", ""] if annex["note"] else []
    lines += [f"{counted(annex)}. Questions: {form['title']} ({form['date']}).", ""]
    section = None
    for field in annex["fields"]:
        if field["section"] != section:
            section = field["section"]
            lines += [f"## {section}", ""]
        lines += [f"**{field['asks']}**", ""]
        value = field["value"]
        if isinstance(value, dict):
            head = value["columns"]
            lines += [_row(head), _row(["---"] * len(head)), *map(_row, value["rows"]), ""]
        elif value is not None:
            lines += [value, ""]
        lines += [f"*{label(field)}*", ""]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def docx(annex: dict[str, Any]) -> Document:
    """The annex as a document of python-docx (extra ``access``); refuses by name where that is not installed."""
    try:
        from docx import Document as new
        from docx.shared import Pt
    except ModuleNotFoundError:
        raise UserError(
            "DOCX is written with python-docx, which is not installed here",
            where="--out",
            fix="pip install 'aifactory-train[access]' (or python-docx); or --out FILE.md",
        ) from None
    document = new()
    document.add_heading(annex["title"], level=0)
    if annex["note"]:
        document.add_paragraph(annex["note"], style="Intense Quote")
    form = annex["form"]
    document.add_paragraph(f"{counted(annex)}. Questions: {form['title']} ({form['date']}).")
    section = None
    for field in annex["fields"]:
        if field["section"] != section:
            section = field["section"]
            document.add_heading(section, level=1)
        document.add_heading(field["asks"], level=2)
        value = field["value"]
        if isinstance(value, dict):
            grid = document.add_table(rows=1, cols=len(value["columns"]), style="Light Grid Accent 1")
            for cell, text in zip(grid.rows[0].cells, value["columns"], strict=True):
                cell.text = text
            for row in value["rows"]:
                for cell, text in zip(grid.add_row().cells, row, strict=True):
                    cell.text = text
        elif value is not None:
            document.add_paragraph(value)
        small = document.add_paragraph().add_run(label(field))
        small.italic, small.font.size = True, Pt(8)
    return document


def write(annex: dict[str, Any], path: Path) -> None:
    """Write the annex in the format that the file's name ends with: .md, .docx or .json. An existing file is refused: a
    draft may have been worked on."""
    from aifactory_train.core.files import write_json

    if path.suffix not in (".md", ".docx", ".json"):
        raise UserError("a draft is written as .md, .docx or .json", where=f"--out {path}")
    if path.exists():
        raise UserError(
            "the file exists, and a draft may have been worked on", where=f"--out {path}", fix="another name"
        )
    try:
        if path.suffix == ".docx":
            docx(annex).save(str(path))
        elif path.suffix == ".md":
            path.write_text(markdown(annex), encoding="utf-8")
        else:
            write_json(path, annex)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=f"--out {path}") from None
