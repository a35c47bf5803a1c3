"""A company's folder of documents, made up: text, Markdown, HTML and PDF about machines, each with facts of its own."""

from __future__ import annotations

import random
from pathlib import Path

PARTS = ["pump", "valve", "bearing", "motor", "filter", "sensor", "belt", "gearbox", "nozzle", "heater", "fan", "drive"]
FAULTS = ["leaks", "runs hot", "makes noise", "is blocked", "loses pressure", "shows no signal", "vibrates", "is worn"]
STEPS = [
    "Stop the line",
    "Close the supply",
    "Take off the cover",
    "Clean the seat",
    "Fit a new seal",
    "Check the torque",
]


def article(number: int) -> tuple[str, list[str]]:
    """Title and paragraphs of document ``number``; all documents differ in most sentences."""
    draw = random.Random(number)
    part, fault = draw.choice(PARTS), draw.choice(FAULTS)
    title = f"Work order {number}: {part} {draw.randint(100, 999)}"
    first = (
        f"The {part} in hall {draw.randint(1, 9)} {fault} since shift {draw.randint(1, 60)}. Pressure fell from "
        f"{draw.randint(50, 90)} to {draw.randint(10, 49)} bar within {draw.randint(2, 50)} minutes."
    )
    steps = draw.sample(STEPS, 3)
    second = (
        f"{steps[0]}, wait {draw.randint(2, 59)} minutes. {steps[1]} with tool {draw.randint(10, 99)}. {steps[2]}, "
        f"then "
        f"note {draw.randint(1000, 9999)} in the log."
    )
    third = (
        f"Colleague {draw.choice('ABCDEFGH')}{draw.randint(10, 99)} has a spare {draw.choice(PARTS)} in rack "
        f"{draw.randint(1, 80)}."
    )
    return title, [first, second, third]


def write_folder(folder: Path, count: int = 200) -> Path:
    """``count`` documents in equal parts of the four kinds, in sub-folders."""
    for number in range(count):
        title, paragraphs = article(number)
        kind = ("txt", "md", "html", "pdf")[number % 4]
        file = folder / f"hall-{number % 3}" / f"order-{number:03d}.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if kind == "txt":
            file.write_text("\n\n".join([title, *paragraphs]), encoding="utf-8")
        elif kind == "md":
            file.write_text(f"---\nauthor: x\n---\n# {title}\n\n" + "\n\n".join(paragraphs), encoding="utf-8")
        elif kind == "html":
            file.write_text(html(title, paragraphs), encoding="utf-8")
        else:
            file.write_bytes(pdf([[title, "", *paragraphs]]))
    return folder


def html(title: str, paragraphs: list[str], *, head: str = "") -> str:
    body = "".join(f"<p>{p}</p>\n" for p in paragraphs)
    return (
        f"<!doctype html><html><head>{head}<title>{title}</title><style>p {{color: red}}</style></head><body>"
        f"<nav><a href='/'>Menu</a></nav><h1>{title}</h1>{body}<script>track('you')</script></body></html>"
    )


def pdf(pages: list[list[str]], *, width: int = 90) -> bytes:
    """A PDF with one line of text for each ``width`` characters (none at all for an empty page)."""
    import textwrap

    objects: list[bytes] = [b"<< /Type /Catalog /Pages 2 0 R >>", b""]
    objects.append(b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>")
    kids = []
    for lines in pages:
        wrapped = [part for line in lines for part in (textwrap.wrap(line, width) or [""])]
        shown = b"".join(b"(" + _escape(line) + b") Tj T*\n" for line in wrapped)
        stream = b"BT /F1 10 Tf 12 TL 50 800 Td\n" + shown + b"ET" if wrapped else b"0 0 200 200 re f"
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
        page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents %d 0 R" % len(objects)
        objects.append(page + b" /Resources << /Font << /F1 3 0 R >> >> >>")
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<< /Type /Pages /Count %d /Kids [%s] >>" % (len(kids), b" ".join(kids))
    out = bytearray(b"%PDF-1.4\n")
    places = []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % place for place in places)
    out += b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start)
    return bytes(out)


def encrypted_pdf(lines: list[str], password: str) -> bytes:
    import io

    import pypdf

    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf([lines])))
    writer.encrypt(password, algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def _escape(text: str) -> bytes:
    return text.encode("cp1252", "replace").replace(b"\\", b"\\\\").replace(b"(", b"\\(").replace(b")", b"\\)")
