"""Documents of office programs as plain text: Word (.docx), PowerPoint (.pptx), EPUB, e-mails (.eml).

Paragraphs, cells of tables (a row is a line) and slides come in the order in which they stand. Pictures have no text:
they are counted, and so are attachments. python-docx and python-pptx come with the extra ``office``; EPUB and HTML
mails need beautifulsoup4 (extra ``documents``).
"""

from __future__ import annotations

import email
import email.message
import email.policy
import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

from aifactory_train.core.errors import UserError
from aifactory_train.core.unpacking import Growth
from aifactory_train.data.documents import Notes, Unusable, decode, html_text

EXTRA = "pip install 'aifactory-train[office]'"
#: How encrypted and old (.doc, .xls) files of Microsoft's programs begin.
OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
PICTURES, ATTACHMENTS = "pictures in documents: have no text", "attachments of e-mails: not read"


def text_of(kind: str, raw: bytes, path: Path, notes: Notes) -> str:
    """The text of a document of ``kind``. Raises :class:`Unusable` where there is none that can be read."""
    read = {"Word": _word, "PowerPoint": _slides, "EPUB": _epub, "e-mail": _mail}[kind]
    text = re.sub(r"\n{3,}", "\n\n", read(raw, path, notes)).strip()
    if not text:
        raise Unusable(f"{kind} file without text")
    return text


def archive(raw: bytes, path: Path, what: str) -> zipfile.ZipFile:
    """The ZIP archive that a file of ``what`` is. Raises :class:`Unusable` for another or a damaged one, and
    :class:`UserError` for one that unpacks beyond measure."""
    if raw.startswith(OLE):
        raise Unusable(f"an encrypted {what} file, or one of an old format")
    try:
        found = zipfile.ZipFile(io.BytesIO(raw))
        Growth(len(raw), path, "unpack it yourself, and save the part that holds the text").add(
            sum(entry.file_size for entry in found.infolist())
        )
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError):
        raise Unusable(f"no {what} file, or a damaged one") from None
    return found


def _word(raw: bytes, path: Path, notes: Notes) -> str:
    archive(raw, path, "Word")
    try:
        import docx
        from docx.table import Table
    except ImportError:
        raise Unusable("Word files need the package 'python-docx'", EXTRA) from None
    try:
        document = docx.Document(io.BytesIO(raw))
        lines = []
        for block in document.iter_inner_content():
            if isinstance(block, Table):
                lines.append("\n".join(" | ".join(_cells(row)) for row in block.rows))
            else:
                listed = (block.style.name or "").startswith("List") if block.style is not None else False
                lines.append(f"- {block.text}" if listed and block.text.strip() else block.text)
        notes.beside.update({PICTURES: len(document.inline_shapes)} if len(document.inline_shapes) else {})
    except Exception as error:  # lxml and docx raise KeyError, ValueError, XMLSyntaxError and more for damaged files
        raise Unusable("no Word file, or a damaged one", type(error).__name__) from None
    return "\n\n".join(line for line in lines if line.strip())


def _cells(row: Any) -> list[str]:
    """The texts of a row's cells; one that spans several columns once."""
    seen: list[Any] = []
    for cell in row.cells:
        if not seen or cell._tc is not seen[-1]._tc:
            seen.append(cell)
    return [" ".join(cell.text.split()) for cell in seen]


def _slides(raw: bytes, path: Path, notes: Notes) -> str:
    archive(raw, path, "PowerPoint")
    try:
        import pptx
    except ImportError:
        raise Unusable("PowerPoint files need the package 'python-pptx'", EXTRA) from None
    try:
        slides = []
        for slide in pptx.Presentation(io.BytesIO(raw)).slides:
            lines = [text for shape in slide.shapes for text in _shape(shape, notes)]
            if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
                lines.append(slide.notes_slide.notes_text_frame.text)
            slides.append("\n".join(line for line in lines if line.strip()))
    except Exception as error:  # as for Word
        raise Unusable("no PowerPoint file, or a damaged one", type(error).__name__) from None
    return "\n\n".join(slide for slide in slides if slide)


def _shape(shape: Any, notes: Notes) -> Iterator[str]:
    """Texts of a shape, of the shapes of a group, and of the cells of a table."""
    if hasattr(shape, "shapes"):
        for inner in shape.shapes:
            yield from _shape(inner, notes)
    elif getattr(shape, "has_table", False):
        for row in shape.table.rows:
            yield " | ".join(" ".join(cell.text.split()) for cell in row.cells)
    elif shape.has_text_frame:
        yield shape.text_frame.text
    elif hasattr(shape, "image"):
        notes.beside[PICTURES] += 1


# ---- EPUB

_CONTAINER, _PACKAGE = "{urn:oasis:names:tc:opendocument:xmlns:container}", "{http://www.idpf.org/2007/opf}"


def _epub(raw: bytes, path: Path, notes: Notes) -> str:
    book = archive(raw, path, "EPUB")
    names = set(book.namelist())
    try:
        container = ElementTree.fromstring(book.read("META-INF/container.xml"))
        place = next(container.iter(f"{_CONTAINER}rootfile")).attrib["full-path"]
        package = ElementTree.fromstring(book.read(place))
        items = {item.attrib["id"]: item.attrib["href"] for item in package.iter(f"{_PACKAGE}item")}
        order = [items[ref.attrib["idref"]] for ref in package.iter(f"{_PACKAGE}itemref")]
    except (KeyError, StopIteration, ElementTree.ParseError, zipfile.BadZipFile, RuntimeError):
        raise Unusable("no EPUB file, or a damaged one") from None
    if "META-INF/rights.xml" in names:
        raise Unusable("encrypted EPUB")
    chapters = []
    for href in order:
        name = (PurePosixPath(place).parent / href.partition("#")[0]).as_posix()
        if name not in names:
            raise Unusable("no EPUB file, or a damaged one", f"{name} is missing")
        try:
            chapters.append(html_text(book.read(name), path))
        except Unusable as unusable:
            if unusable.why != "HTML without text":  # a cover
                raise
        except (zipfile.BadZipFile, RuntimeError):
            raise Unusable("no EPUB file, or a damaged one") from None
    return "\n\n".join(chapters)


# ---- e-mail


def _mail(raw: bytes, path: Path, notes: Notes) -> str:
    message = email.message_from_bytes(raw, policy=email.policy.default)
    if not message.keys():
        raise Unusable("no e-mail: it has no header")
    return mail_text(message, path, notes)


def mail_text(message: email.message.EmailMessage | Any, path: Path, notes: Notes) -> str:
    """Subject and body of an e-mail: the plain text where it has one, else that of its HTML. Raises :class:`Unusable`
    for an encoding that is not known, or another than the mail says."""
    body = message.get_body(preferencelist=("plain", "html"))
    attached = sum(1 for _ in message.iter_attachments()) if message.is_multipart() else 0
    notes.beside.update({ATTACHMENTS: attached} if attached else {})
    subject = " ".join(str(message.get("subject") or "").split())
    if body is None:
        return subject
    payload = body.get_payload(decode=True)  # bytes of a part that is no multipart
    raw = payload if isinstance(payload, bytes) else b""
    charset = body.get_content_charset() or "utf-8"
    if body.get_content_subtype() == "html":
        text = html_text(raw, path, None if charset == "us-ascii" else charset)
    else:
        text = decode(raw, {"us-ascii": "utf-8"}.get(charset, charset)) if raw.strip() else ""
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    return "\n\n".join(part for part in (subject, text) if part)


def refuse(unusable: Unusable, path: Path) -> UserError:
    """A file given by itself that cannot be used, as one message."""
    fix = "give another file"
    if "need the package" in unusable.why:
        fix = EXTRA
    elif "encrypted" in unusable.why:
        fix = "remove the password, and save it in today's format (.docx, .xlsx, .pptx)"
    elif "damaged" in unusable.why:
        fix = "open it in its program and save it again"
    return UserError(str(unusable), where=str(path), fix=fix)
