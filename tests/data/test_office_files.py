"""Files of office programs as rows: of each kind a good one and odd ones (empty, broken, of another encoding or kind).
Each gives rows or one clear message."""

from __future__ import annotations

import builtins
import datetime
import io
import json
import mailbox
import sqlite3
import zipfile
from collections.abc import Callable
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import helpers
import pytest

from aifactory_train.core.errors import UserError
from aifactory_train.data import readers
from aifactory_train.data.documents import Notes

HEADER = ["Frage", "Antwort", "Preis", "Datum"]
ROW = ["Wie groß ist „M“?", "5 €; pro Stück", 189, datetime.datetime(2026, 11, 30)]
AS_TEXT = {"Frage": ROW[0], "Antwort": ROW[1], "Preis": "189", "Datum": "2026-11-30"}
SAID = "Die Hütte wird größer. Στο τέλος."


def workbook(path: Path, *sheets: list[list[Any]]) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for number, rows in enumerate(sheets):
        sheet = book.create_sheet(f"Blatt{number + 1}")
        for row in rows:
            sheet.append(row)
    book.save(path)


def calc(path: Path, rows: list[list[Any]]) -> None:
    pytest.importorskip("odf")
    from odf.opendocument import OpenDocumentSpreadsheet
    from odf.table import Table, TableCell, TableRow
    from odf.text import P

    document = OpenDocumentSpreadsheet()
    table = Table(name="Blatt1")
    for row in rows:
        line = TableRow()
        for value in row:
            if isinstance(value, datetime.datetime):
                cell = TableCell(valuetype="date", datevalue=value.date().isoformat())
                cell.addElement(P(text=value.strftime("%d.%m.%Y")))
            elif isinstance(value, int):
                cell = TableCell(valuetype="currency", value=str(value))
                cell.addElement(P(text=f"{value},00 €"))
            else:
                cell = TableCell(valuetype="string")
                cell.addElement(P(text=value))
            line.addElement(cell)
        line.addElement(TableCell(numbercolumnsrepeated="16000"))
        table.addElement(line)
    empty = TableRow(numberrowsrepeated="1000000")
    empty.addElement(TableCell())
    table.addElement(empty)
    document.spreadsheet.addElement(table)
    document.save(str(path))


def database(path: Path, **tables: list[list[Any]]) -> None:
    with sqlite3.connect(path) as base:
        for name, rows in tables.items():
            base.execute(f'CREATE TABLE "{name}" ({", ".join(f"{c!r}" for c in HEADER)})')
            for row in rows:
                cells = [str(c.date()) if isinstance(c, datetime.datetime) else c for c in row]
                base.execute(f'INSERT INTO "{name}" VALUES (?, ?, ?, ?)', cells)
    base.close()


def mail(text: str = SAID, subject: str = "Über uns", **more: str) -> EmailMessage:
    message = EmailMessage()
    message["Subject"], message["From"] = subject, "a@example.org"
    for name, value in more.items():
        message[name.replace("_", "-")] = value
    message.set_content(text)
    return message


def book(path: Path, chapters: list[str], *, lost: bool = False) -> None:
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("mimetype", "application/epub+zip")
        out.writestr(
            "META-INF/container.xml",
            '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
            '<rootfile full-path="OEBPS/book.opf"/></rootfiles></container>',
        )
        items = "".join(f'<item id="c{i}" href="c{i}.xhtml"/>' for i in range(len(chapters)))
        order = "".join(f'<itemref idref="c{i}"/>' for i in range(len(chapters)))
        package = '<package xmlns="http://www.idpf.org/2007/opf"><manifest>{}</manifest><spine>{}</spine></package>'
        out.writestr("OEBPS/book.opf", package.format(items, order))
        for i, text in enumerate(chapters):
            if not (lost and i):
                out.writestr(f"OEBPS/c{i}.xhtml", f"<html><body><p>{text}</p></body></html>")


def word(path: Path) -> None:
    docx = pytest.importorskip("docx")
    document = docx.Document()
    document.add_heading("Titel", 1)
    document.add_paragraph("erstens", style="List Bullet")
    table = document.add_table(rows=1, cols=2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "Teil", "189 €"
    document.add_paragraph(SAID)
    document.save(str(path))


def slides(path: Path) -> None:
    pptx = pytest.importorskip("pptx")
    show = pptx.Presentation()
    slide = show.slides.add_slide(show.slide_layouts[1])
    slide.shapes.title.text, slide.placeholders[1].text = "Titel", SAID
    slide.notes_slide.notes_text_frame.text = "gesprochen"
    show.save(str(path))


def mails(path: Path) -> None:
    box = mailbox.mbox(path)
    box.add(mail(Message_ID="<1@x>"))
    box.add(mail("Antwort", "Re: Über uns", Message_ID="<2@x>", In_Reply_To="<1@x>", References="<1@x>"))
    box.close()


TABLES: dict[str, Callable[[Path], None]] = {
    "rows.xlsx": lambda path: workbook(path, [HEADER, ROW]),
    "rows.ods": lambda path: calc(path, [HEADER, ROW]),
    "rows.sqlite": lambda path: database(path, tickets=[ROW]),
    "rows.db": lambda path: database(path, tickets=[ROW]),
}
DOCUMENTS: dict[str, Callable[[Path], None]] = {
    "a.docx": word,
    "a.pptx": slides,
    "a.epub": lambda path: book(path, ["Kapitel 1", SAID]),
    "a.eml": lambda path: path.write_bytes(mail().as_bytes()) and None,
}
ALL = {**TABLES, **DOCUMENTS, "a.mbox": mails}


def read(path: Path, notes: Notes | None = None) -> list[dict[str, Any]]:
    return [row for block in readers.blocks(path, notes=notes) for row in block.rows or []]


# ---- good ones


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_the_same_rows_in_whatever_they_were_saved(name: str, tmp_path: Path) -> None:
    TABLES[name](tmp_path / name)
    assert [{k: str(v) for k, v in row.items()} for row in read(tmp_path / name)] == [AS_TEXT]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_give_their_text(name: str, tmp_path: Path) -> None:
    DOCUMENTS[name](tmp_path / name)
    notes = Notes()
    (row,) = read(tmp_path / name, notes)
    assert SAID in row["text"] and sum(notes.read.values()) == 1


def test_what_stands_in_documents_comes_in_its_order(tmp_path: Path) -> None:
    word(tmp_path / "a.docx")
    slides(tmp_path / "a.pptx")
    book(tmp_path / "a.epub", ["eins", "zwei"])
    assert read(tmp_path / "a.docx")[0]["text"] == f"Titel\n\n- erstens\n\nTeil | 189 €\n\n{SAID}"
    assert read(tmp_path / "a.pptx")[0]["text"] == f"Titel\n{SAID}\ngesprochen"
    assert read(tmp_path / "a.epub")[0]["text"] == "eins\n\nzwei"


def test_mails_of_a_thread_are_one_group(tmp_path: Path) -> None:
    mails(tmp_path / "a.mbox")
    notes = Notes()
    first, second = read(tmp_path / "a.mbox", notes)
    assert first == {"text": f"Über uns\n\n{SAID}", "group": "<1@x>"}
    assert second == {"text": "Re: Über uns\n\nAntwort", "group": "<1@x>"}
    assert notes.read["e-mails"] == 2


def test_attachments_are_counted_and_html_mails_read(tmp_path: Path) -> None:
    message = EmailMessage()
    message["Subject"] = "Hallo"
    message.set_content("<p>Größe</p><script>x</script>", subtype="html", charset="iso-8859-1")
    message.add_attachment(b"x", maintype="image", subtype="png", filename="a.png")
    (tmp_path / "a.eml").write_bytes(message.as_bytes())
    notes = Notes()
    assert read(tmp_path / "a.eml", notes) == [{"text": "Hallo\n\nGröße"}]
    assert notes.beside == {"attachments of e-mails: not read": 1}


def test_sheets_of_one_kind_are_joined_and_others_refused(tmp_path: Path) -> None:
    workbook(tmp_path / "a.xlsx", [HEADER, ROW], [], [HEADER, ROW, [None] * 4, ROW])
    notes = Notes()
    assert read(tmp_path / "a.xlsx", notes) == [AS_TEXT] * 3
    assert notes.beside == {"empty rows of a table: left out": 1}
    workbook(tmp_path / "b.xlsx", [HEADER, ROW], [["Land"], ["Irland"]])
    with pytest.raises(UserError, match="'Blatt2' has Land"):
        read(tmp_path / "b.xlsx")


def test_cells_of_a_workbook(tmp_path: Path) -> None:
    line = [1.5, True, datetime.datetime(2026, 1, 2, 3, 4), "#N/A"]
    workbook(tmp_path / "a.xlsx", [HEADER, line])
    notes = Notes()
    (row,) = read(tmp_path / "a.xlsx", notes)
    assert list(row.values()) == ["1.5", "true", "2026-01-02 03:04:00", ""]
    assert notes.beside == {"cells with an error of the spreadsheet: empty": 1}
    workbook(tmp_path / "b.xlsx", [HEADER, ["a", "b", "=1+1", ""]])
    with pytest.raises(UserError, match="Blatt1:2: a formula without its result: =1"):
        read(tmp_path / "b.xlsx")
    workbook(tmp_path / "c.xlsx", [HEADER, [*ROW, "beside"]])
    with pytest.raises(UserError, match="Blatt1:2: a cell beside the named columns"):
        read(tmp_path / "c.xlsx")


def test_a_view_says_which_table_of_a_database(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    database(path, tickets=[ROW], customers=[ROW, ROW])
    with pytest.raises(UserError, match="several tables: tickets, customers;"):
        read(path)
    with sqlite3.connect(path) as base:
        base.execute("CREATE VIEW rows AS SELECT Frage, x'00' AS Bild FROM customers")
    base.close()
    notes = Notes()
    assert read(path, notes) == [{"Frage": ROW[0], "Bild": None}] * 2
    assert notes.beside == {"cells of binary data: empty": 2}


# ---- odd ones


@pytest.mark.parametrize("name", ALL)
def test_empty_files_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="empty"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_broken_files_are_rows_or_one_message(name: str, kept: float, tmp_path: Path) -> None:
    ALL[name](tmp_path / name)
    raw = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(raw[: int(len(raw) * kept)])
    try:
        rows = read(tmp_path / name)
    except UserError as error:
        assert name in str(error) and error.fix
    else:
        assert name in ("a.eml", "a.mbox") and rows  # a mail may end anywhere


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("a.eml", "a.mbox")])
@pytest.mark.parametrize(
    "raw", ["Frage;Größe\n1;2\n".encode("cp1252"), b"PK\x03\x04" + b"x" * 200, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" * 9]
)
def test_files_of_another_kind_are_refused(name: str, raw: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=name) as refused:
        read(tmp_path / name)
    assert refused.value.fix


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    for name in ("a.docx", "a.pptx", "a.epub", "a.xlsx", "a.ods"):
        with zipfile.ZipFile(tmp_path / name, "w") as out:
            out.writestr("photo.jpg", b"x")
        with pytest.raises(UserError, match="damaged"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"Subject: x\nContent-Type: text/plain; charset=x-klingon\n\nabc\n", ["unknown encoding", "x-klingon"]),
        (b"Subject: x\nContent-Type: text/plain; charset=utf-8\n\nGr\xf6\xdfe\n", ["not UTF-8"]),
        (b"Subject: x\n\nGr\xf6\xdfe\n", ["not UTF-8"]),
        (b"\n\nno header\n", ["no header"]),
        (b"From: a@example.org\n\n\n", ["without text"]),
    ],
)
def test_mails_of_another_encoding_are_refused(raw: bytes, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.eml").write_bytes(raw)
    with pytest.raises(UserError) as refused:
        read(tmp_path / "a.eml")
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_one_mail_of_a_box_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.mbox"
    mails(path)
    with open(path, "ab") as file:
        file.write(
            b"From x Mon Nov 30 10:00:00 2026\nSubject: bad\nContent-Type: text/plain; charset=utf-8\n\nGr\xf6\xdfe\n\n"
        )
    notes = Notes()
    assert len(read(path, notes)) == 2
    ((name, why),) = notes.left_out
    assert name == "a.mbox:mail 3" and "UTF-8" in why
    with pytest.raises(UserError, match="mail 3: not UTF-8"):
        read(path, Notes(policy="refuse"))
    (tmp_path / "b.mbox").write_bytes("Größe\n".encode("cp1252"))
    with pytest.raises(UserError, match="no mailbox"):
        read(tmp_path / "b.mbox")


def test_other_odd_ones(tmp_path: Path) -> None:
    workbook(tmp_path / "a.xlsx", [])
    with pytest.raises(UserError, match="holds no rows"):
        read(tmp_path / "a.xlsx")
    workbook(tmp_path / "b.xlsx", [["Frage", "Frage"], ["a", "b"]])
    with pytest.raises(UserError, match="'Frage' is given twice"):
        read(tmp_path / "b.xlsx")
    book(tmp_path / "a.epub", ["eins", "zwei"], lost=True)
    with pytest.raises(UserError, match="xhtml is missing"):
        read(tmp_path / "a.epub")
    with sqlite3.connect(tmp_path / "a.sqlite") as base:
        base.execute("CREATE TABLE t (a)")
        base.execute("DROP TABLE t")
    base.close()
    with pytest.raises(UserError, match="holds no table"):
        read(tmp_path / "a.sqlite")
    with sqlite3.connect(tmp_path / "b.sqlite") as base:
        base.execute("CREATE TABLE t (a)")
        base.execute("INSERT INTO t VALUES (CAST(x'ff' AS TEXT))")
    base.close()
    with pytest.raises(UserError, match="UTF-8"):
        read(tmp_path / "b.sqlite")
    (tmp_path / "old.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    with pytest.raises(UserError, match="save it as"):
        read(tmp_path / "old.xls")


# ---- libraries, folders, commands


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("a.docx", "docx", "python-docx"),
        ("a.pptx", "pptx", "python-pptx"),
        ("rows.xlsx", "openpyxl", "openpyxl"),
        ("rows.ods", "odf", "odfpy"),
    ],
)
def test_without_its_library_a_file_is_refused_with_the_line_that_brings_it(
    name: str, module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ALL[name](tmp_path / name)
    real = builtins.__import__

    def without(wanted: str, *rest: Any, **more: Any) -> Any:
        if wanted.split(".")[0] == module:
            raise ImportError(wanted)
        return real(wanted, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=package) as refused:
        read(tmp_path / name)
    assert refused.value.fix == "pip install 'aifactory-train[office]'"
    if module in ("docx", "pptx"):  # beside documents that can be read it is left out by name
        (tmp_path / "plain.txt").write_text("ein Text")
        notes = Notes()
        assert [row["text"] for row in read(tmp_path, notes)] == ["ein Text"]
        assert notes.left_out[0][0] == name and package in notes.left_out[0][1]


def test_folders(tmp_path: Path) -> None:
    """Office documents are read beside others; beside tables, and workbooks beside anything, they are counted as
    before."""
    word(tmp_path / "a.docx")
    (tmp_path / "b.md").write_text("Text")
    workbook(tmp_path / "c.xlsx", [HEADER, ROW])
    notes = Notes()
    assert len(read(tmp_path, notes)) == 2 and notes.not_read == {".xlsx": 1}
    (tmp_path / "b.md").unlink()
    helpers.write_jsonl(tmp_path / "d.jsonl", [{"text": "x"}])
    notes = Notes()
    found = [block.lines for block in readers.blocks(tmp_path, notes=notes)]
    assert len(found) == 1 and notes.not_read == {".docx": 1, ".xlsx": 1}
    (tmp_path / "d.jsonl").unlink()
    (tmp_path / "a.docx").unlink()
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    notes = Notes()
    assert read(tmp_path, notes) == [AS_TEXT] and notes.not_read == {".db": 1}


def test_recipes_new_from_a_workbook(tmp_path: Path) -> None:
    rows = [[f"Frage {n}?", f"Antwort Nummer {n}, mit etwas mehr Text.", n, ROW[3]] for n in range(40)]
    workbook(tmp_path / "tickets.xlsx", [HEADER, *rows])
    (tmp_path / "model").mkdir()
    done = helpers.cli("recipes", "new", "acme/t", "--data", "tickets.xlsx", "--base", "model", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["columns"] == {"Frage": "prompt", "Antwort": "completion"}
    assert {"Preis": 40, "Datum": 40}.items() >= found["report"]["unused"]["columns"].items()


def test_pages_without_text_are_said(tmp_path: Path) -> None:
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter()
    for _ in range(3):
        writer.add_blank_page(width=200, height=200)
    out = io.BytesIO()
    writer.write(out)
    (tmp_path / "scan.pdf").write_bytes(out.getvalue())
    with pytest.raises(UserError, match="3 page"):
        read(tmp_path / "scan.pdf")
    from aifactory_train.commands.recipes_new import _of_files

    assert "12 PDF page(s) have no text" in "".join(_of_files(Notes(pages_without_text=12)))
