"""Documents (text, Markdown, HTML, PDF) as plain text: one row a document, ``{"text", "group"}``, the group being its
file.

Markdown stays as it is written, without its front matter. HTML loses scripts, navigation and tags; its blocks become
paragraphs. PDF gives its text layer, page after page, with words that were divided at line ends joined and lines that
repeat on most pages taken out. What cannot be used (scanned or encrypted PDFs, empty files, unknown encodings) is left
out, named and counted, or refused (``data.unreadable``); so are links that lead out of the folder
(:mod:`aifactory_train.data.folders`). Nothing is guessed: a file whose encoding nobody states is UTF-8 or it is not
read.

Parsers come with the extra ``documents``: pypdf and beautifulsoup4. Word and others: :mod:`read_office`.
"""

from __future__ import annotations

import codecs
import collections
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aifactory_train.core.errors import UserError
from aifactory_train.private import vault

#: Suffix -> kind of document.
KINDS = {
    ".txt": "text",
    ".text": "text",
    ".md": "Markdown",
    ".markdown": "Markdown",
    ".html": "HTML",
    ".htm": "HTML",
    ".xhtml": "HTML",
    ".pdf": "PDF",
    ".docx": "Word",
    ".pptx": "PowerPoint",
    ".epub": "EPUB",
    ".eml": "e-mail",
}
#: Kinds that :mod:`read_office` reads.
OF_OFFICE = ("Word", "PowerPoint", "EPUB", "e-mail")
#: Files that come with a data set and are no part of it, when there are tables beside them.
_ABOUT = re.compile(r"^(readme|licen[cs]e|copying|notice|changelog|authors|citation|requirements)\b", re.IGNORECASE)
#: Files in which ``datasets``, Croissant and Frictionless describe a data set.
_DESCRIPTIONS = {
    *("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"),
    *("croissant.json", "croissant_metadata.json", "datapackage.json"),
}
#: A document on its own is longer than this (characters) before it is made into several rows, each of at most half of
#: it.
ALONE = 16_000
#: A page with fewer characters than this holds a stamp or a page number, not text.
_PAGE_LEAST = 10
EXTRA = "pip install 'aifactory-train[documents]'"


class Unusable(Exception):
    """A document without text that can be used. ``why`` is one of a few phrases, so that they can be counted."""

    def __init__(self, why: str, detail: str = ""):
        super().__init__(f"{why} ({detail})" if detail else why)
        self.why = why


@dataclass
class Notes:
    """What became of the files of a folder: read by kind, left out with the reason, of a kind that is not read; where
    only one split is read, which, and the files of the others; files that are about the data (READMEs, schemas)."""

    policy: Literal["skip", "refuse"] = "skip"
    read: collections.Counter = field(default_factory=collections.Counter)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    not_read: collections.Counter = field(default_factory=collections.Counter)
    split: str | None = None
    split_guessed: bool = False
    other_splits: dict[str, list[str]] = field(default_factory=dict)
    about: list[str] = field(default_factory=list)
    repeated_headers: int = 0
    pages_without_text: int = 0
    rows_of_one_document: int = 0
    beside: collections.Counter = field(default_factory=collections.Counter)  # what a file holds beside its rows

    def any(self) -> bool:
        """Whether there is anything to tell."""
        told = (self.read, self.left_out, self.not_read, self.other_splits, self.about, self.beside)
        return any(map(bool, told))

    def counts(self) -> dict[str, int]:
        """For the report of the preparation: how many of what, without names."""
        out = {f"read: {kind}": n for kind, n in sorted(self.read.items())}
        reasons = collections.Counter(why.partition(" (")[0] for _, why in self.left_out)
        out |= {f"left out: {why}": n for why, n in sorted(reasons.items())}
        out |= {f"not read: files of kind {suffix}": n for suffix, n in sorted(self.not_read.items())}
        out |= {f"not read: files of the split '{name}'": len(f) for name, f in sorted(self.other_splits.items())}
        if self.about:
            out["not read: files about the data"] = len(self.about)
        if self.repeated_headers:
            out["left out: repeated header lines"] = self.repeated_headers
        if self.pages_without_text:
            out["PDF pages without text"] = self.pages_without_text
        if self.rows_of_one_document:
            out["rows made of one document"] = self.rows_of_one_document
        return out

    def as_dict(self) -> dict[str, Any]:
        return {
            "files": dict(sorted(self.read.items())),
            "left_out": [{"file": file, "why": why} for file, why in self.left_out],
            "not_read": dict(sorted(self.not_read.items())),
            **({"split": self.split, "split_guessed": self.split_guessed} if self.split else {}),
            **({"other_splits": dict(sorted(self.other_splits.items()))} if self.other_splits else {}),
            **({"about": self.about} if self.about else {}),
            "pages_without_text": self.pages_without_text,
        }


def kind_of(path: Path) -> str | None:
    """``text``, ``Markdown``, ``HTML``, ``PDF``, ``Word`` and so on; None for a file that is no document. ``.gz`` and
    encryption are seen through.
    """
    plain = vault.plain_name(path)
    if plain.suffix.lower() == ".gz":
        plain = plain.with_suffix("")
    return KINDS.get(plain.suffix.lower())


def is_about(path: Path) -> bool:
    """A README, a licence text and the like, or a file in which a library describes the data set."""
    return bool(_ABOUT.match(path.name)) or path.name.lower() in _DESCRIPTIONS


def rows_of_folder(root: Path, files: list[Path], notes: Notes) -> Iterator[tuple[Path, dict[str, Any]]]:
    """``(file, row)`` of every usable document. Raises :class:`UserError` when none is, or at the first one that is not
    (``data.unreadable: refuse``)."""
    usable = 0
    for file in files:
        try:
            text = text_of(file, notes)
        except Unusable as unusable:
            if notes.policy == "refuse":
                raise UserError(
                    str(unusable),
                    where=str(file),
                    fix="repair or remove it, or leave such files out: data.unreadable=skip",
                ) from None
            notes.left_out.append((file.relative_to(root).as_posix(), str(unusable)))
            continue
        usable += 1
        notes.read[kind_of(file)] += 1
        yield file, {"text": text, "group": file.relative_to(root).as_posix()}
    if not usable:
        reasons = ", ".join(f"{n} x {what.removeprefix('left out: ')}" for what, n in notes.counts().items())
        raise UserError(
            f"none of the {len(files)} documents can be used: {reasons}",
            where=str(root),
            fix="scanned PDFs need a text layer first (an OCR program adds it); encrypted ones their password removed",
        )


def rows_of_file(path: Path, notes: Notes) -> Iterator[dict[str, Any]]:
    """Rows of one document given by itself: the whole, or when it is long, parts that end at paragraphs (so that some
    can be held out)."""
    try:
        text = text_of(path, notes)
    except Unusable as unusable:
        if unusable.why in _FIXES:
            raise UserError(str(unusable), where=str(path), fix=_FIXES[unusable.why]) from None
        from aifactory_train.data import read_office

        raise read_office.refuse(unusable, path) from None
    notes.read[kind_of(path)] += 1
    if len(text) <= ALONE:
        yield {"text": text}
        return
    for part in paragraphs(text, ALONE // 2):
        notes.rows_of_one_document += 1
        yield {"text": part}


def paragraphs(text: str, most: int) -> Iterator[str]:
    """``text`` in parts of at most ``most`` characters that end at paragraphs (at lines, at words, where one is
    longer). Joined, the parts hold every word of ``text`` once, in order."""
    part = ""
    for piece in _pieces(text, most, (r"\n[ \t]*\n\s*", r"\n", r"\s+")):
        if part and len(part) + len(piece) > most:
            if part.strip():
                yield part.rstrip()
            part = ""
        part += piece
    if part.strip():
        yield part.rstrip()


def _pieces(text: str, most: int, separators: tuple[str, ...]) -> Iterator[str]:
    """Pieces that keep their separator at the end; one longer than ``most`` is taken apart by the next separator."""
    if not separators:
        for at in range(0, len(text), most):
            yield text[at : at + most]
        return
    at = 0
    ends = [m.end() for m in re.finditer(separators[0], text)]
    for end in [*ends, len(text)]:
        piece = text[at:end]
        at = end
        if len(piece) > most:
            yield from _pieces(piece, most, separators[1:])
        elif piece:
            yield piece


# ---- one file


_FIXES = {
    "not UTF-8": "save the file as UTF-8 (iconv -f windows-1252 -t utf-8 OLD > NEW converts what Windows wrote)",
    "PDF without a text layer": "the pages are pictures: let an OCR program add the text first",
    "encrypted PDF": "remove the password first",
    "empty": "give a file with text",
}


def text_of(path: Path, notes: Notes | None = None) -> str:
    """The plain text of a document, never blank. Raises :class:`Unusable`, or :class:`UserError` where the machine is
    at fault (a parser or a permission is missing)."""
    try:
        with vault.open_source(path) as file:
            raw = file.read()
        if vault.plain_name(path).suffix.lower() == ".gz":
            raw = gzip.decompress(raw)
    except PermissionError as error:
        raise UserError(
            f"cannot be read: {error.strerror}",
            where=str(path),
            fix=f"chmod u+r {path.name}, or take it out of the folder",
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise Unusable("damaged gzip file") from None
    if not raw.strip():
        raise Unusable("empty")
    kind = kind_of(path)
    if kind in OF_OFFICE:
        from aifactory_train.data import read_office

        text = read_office.text_of(kind, raw, path, notes if notes is not None else Notes())
    elif kind == "PDF":
        text = _pdf(raw, path, notes)
    elif kind == "HTML":
        text = html_text(raw, path)
    else:
        text = decode(raw)
        if kind == "Markdown":
            text = re.sub(r"\A---\r?\n.*?\r?\n(---|\.\.\.)[ \t]*(\r?\n|\Z)", "", text, count=1, flags=re.DOTALL)
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n\n").strip("\n \t\ufeff")
    if not text.strip():
        raise Unusable("empty")
    return text


_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode(raw: bytes, stated: str | None = None) -> str:
    """By byte-order mark, by what the file states, else UTF-8."""
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), None) or stated or "utf-8"
    try:
        text = raw.decode(encoding)
    except LookupError:
        raise Unusable("unknown encoding", encoding[:40]) from None
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        what = "not UTF-8" if encoding == "utf-8" else f"not {encoding}, as it says"
        raise Unusable(what, f"byte 0x{raw[error.start]:02x} in line {line}") from None
    if "\0" in text:
        raise Unusable("binary data, not text")
    return text


_CHARSET = re.compile(
    rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([A-Za-z0-9_.:-]+)|<\?xml[^>]{0,100}?encoding\s*=\s*["']([A-Za-z0-9_.:-]+)"""
)
_BLOCKS = [
    *("address", "article", "aside", "blockquote", "body", "caption", "dd", "details", "dialog", "div", "dl", "dt"),
    *(
        "figcaption",
        "figure",
        "footer",
        "form",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "header",
        "hr",
        "li",
        "main",
        "ol",
        "p",
    ),
    *("pre", "section", "summary", "table", "tbody", "tfoot", "thead", "title", "tr", "ul"),
]
#: No part of the text: code, styling, menus, what is only there for the program that shows the page.
_NOT_TEXT = [
    *(
        "script",
        "style",
        "noscript",
        "template",
        "nav",
        "svg",
        "math",
        "iframe",
        "object",
        "button",
        "select",
        "textarea",
    ),
    "head",
]


def html_text(raw: bytes, path: Path, stated: str | None = None) -> str:
    """The text of a page; ``stated``: its encoding, where something else than the page says it."""
    try:
        import bs4
    except ImportError:
        raise UserError("HTML files need the package 'beautifulsoup4'", where=str(path), fix=EXTRA) from None
    found = _CHARSET.search(raw[:4096].lower()) if stated is None else None
    stated = (found[1] or found[2]).decode("ascii") if found else stated
    if stated is not None:
        try:
            # Browsers read "iso-8859-1" as Windows-1252, and pages are written for browsers (WHATWG Encoding Standard).
            # A statement that could be read byte by byte was not written in UTF-16: the standard takes UTF-8 then.
            known = codecs.lookup(stated).name
            stated = {"iso8859-1": "cp1252", "ascii": "utf-8"}.get(known, stated)
            stated = "utf-8" if known.startswith(("utf-16", "utf-32")) else stated
        except LookupError:
            raise Unusable("unknown encoding", stated) from None
    markup = decode(raw, stated)
    try:
        soup = bs4.BeautifulSoup(markup, "html.parser")
    except (bs4.ParserRejectedMarkup, RecursionError, AssertionError):
        raise Unusable("HTML that cannot be parsed") from None
    for tag in soup.find_all(_NOT_TEXT):
        tag.decompose()
    for string in soup.find_all(string=True):
        if isinstance(string, bs4.element.PreformattedString):  # comments, doctype, processing instructions
            string.extract()
        elif string.find_parent("pre") is None:
            string.replace_with(re.sub(r"\s+", " ", str(string)))
    for tag in soup.find_all("br"):
        tag.replace_with("\n")
    for tag in soup.find_all(["td", "th"]):
        tag.append(" ")
    for tag in soup.find_all("li"):
        tag.insert(0, "- ")
    for tag in soup.find_all(_BLOCKS):
        if tag.name in ("li", "tr", "dt", "dd"):
            tag.insert_before("\n")
        else:
            tag.insert_before("\n\n")
            tag.insert_after("\n\n")
    text = "\n".join(
        line.rstrip() if line.startswith(" " * 4) else line.strip() for line in soup.get_text().split("\n")
    )
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    if not text:
        raise Unusable("HTML without text")
    return text


def _pdf(raw: bytes, path: Path, notes: Notes | None) -> str:
    try:
        import pypdf
    except ImportError:
        raise UserError("PDF files need the package 'pypdf'", where=str(path), fix=EXTRA) from None
    import logging
    import warnings

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of every oddity of every file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader = pypdf.PdfReader(io.BytesIO(raw), strict=False)
            if reader.is_encrypted and not reader.decrypt(""):
                raise Unusable("encrypted PDF")
            pages = [page.extract_text() or "" for page in reader.pages]
    except Unusable:
        raise
    except pypdf.errors.DependencyError:
        raise Unusable("encrypted PDF", "its cipher needs the package 'cryptography'") from None
    except Exception as error:  # pypdf raises KeyError, ValueError, RecursionError and more for damaged files
        raise Unusable("damaged PDF", type(error).__name__) from None
    filled = [p for p in pages if len("".join(p.split())) >= _PAGE_LEAST]
    if not filled:
        raise Unusable("PDF without a text layer", f"{len(pages)} page(s)")
    if notes is not None:
        notes.pages_without_text += len(pages) - len(filled)
    return "\n\n".join(_page(lines) for lines in _without_running_heads([p.splitlines() for p in filled]))


def _without_running_heads(pages: list[list[str]]) -> list[list[str]]:
    """Without first and last lines that stand on more than half of at least four pages (page numbers apart)."""

    def key(line: str) -> str:
        return re.sub(r"\d+", "#", line.strip())

    if len(pages) < 4:
        return pages
    for end in (0, -1):
        seen = collections.Counter(key(lines[end]) for lines in pages if lines)
        common = {k for k, n in seen.items() if n > len(pages) / 2}
        pages = [
            (lines[1:] if end == 0 else lines[:-1]) if lines and key(lines[end]) in common else lines for lines in pages
        ]
    return pages


def _page(lines: list[str]) -> str:
    """Lines of a page as paragraphs: a word that goes on in the next line is joined, and so are lines of one
    sentence.
    """
    out = ""
    for line in (line.strip() for line in lines):
        if not line:
            out += "\n\n" if out and not out.endswith("\n") else ""
        elif out and re.search(r"\w-$", out) and line[0].islower():
            out = out[:-1] + line
        elif (
            out
            and not out.endswith("\n")
            and not re.search(r"[.!?:;…]$", out)
            and (line[0].islower() or out[-1] == ",")
        ):
            out += f" {line}"
        else:
            out += line if not out or out.endswith("\n") else f"\n{line}"
    return out
