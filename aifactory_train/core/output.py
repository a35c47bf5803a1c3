"""How the program prints: JSON alone on standard output, notes on standard error, rich tables imported late."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

#: What takes lines on how work goes on.
Say = Callable[[str], None]

_json_stream: TextIO | None = None


@contextlib.contextmanager
def json_only() -> Iterator[None]:
    """Within the block only :func:`print_json` reaches standard output; what libraries print goes to standard error."""
    global _json_stream
    outer, real = _json_stream, sys.stdout
    _json_stream, sys.stdout = real, sys.stderr
    try:
        yield
    finally:
        _json_stream, sys.stdout = outer, real


def print_json(value: Any) -> None:
    """One line of JSON, alone, on standard output (numbers that JSON lacks, such as NaN, are refused)."""
    stream = _json_stream or sys.stdout
    stream.write(json.dumps(value, ensure_ascii=not _is_utf8(stream), allow_nan=False, default=str) + "\n")
    stream.flush()


def _is_utf8(stream: TextIO) -> bool:
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "") == "utf8"


def show_any_character() -> None:
    """From now on a character that a terminal cannot show becomes '?' in what people read, where Python would give
    up.
    """
    for stream in (sys.stdout, sys.stderr):
        if not _is_utf8(stream) and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def note(text: str) -> None:
    """A line for people, on standard error."""
    print(text, file=sys.stderr, flush=True)


#: Columns of a page where there is no terminal (pipes, batch logs), and the most that a table may take there.
PAGE, WIDEST = 110, 160


def console(stderr: bool = False):
    """A rich console; width follows the terminal, else COLUMNS, else :data:`PAGE`."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _asked_width() or PAGE
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=False)


def _asked_width() -> int | None:
    """COLUMNS, where it is a number that a table can be drawn in."""
    text = os.environ.get("COLUMNS", "")
    return max(40, int(text)) if text.isdecimal() and int(text) else None


def table(title: str | None, columns: list[str], rows: list[list[Any]], *, right: tuple[int, ...] = ()) -> None:
    """Print a plain table; ``right`` lists the columns that hold numbers.

    The first column names the row: it is not divided while it takes no more than three fifths of the width, so that
    names can be copied and searched for. In a pipe or a log a table may be wider than a page before anything else is
    divided.
    """
    from rich.table import Table
    from rich.text import Text

    page = console()
    names = max((len(str(row[0])) for row in rows if row), default=0)
    grid = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for i, name in enumerate(columns):
        whole = i == 0 and 5 * names <= 3 * page.width
        grid.add_column(name, justify="right" if i in right else "left", overflow="fold", no_wrap=whole)
    for row in rows:
        grid.add_row(*[cell if isinstance(cell, Text) else Text("" if cell is None else str(cell)) for cell in row])
    if not sys.stdout.isatty() and _asked_width() is None:
        wide = page.measure(grid, options=page.options.update(max_width=WIDEST)).maximum
        page.width = max(PAGE, wide)
    page.print(grid)


def plain_table(columns: list[str], rows: list[list[str]]) -> None:
    """Print a left-aligned table without rich, which takes a tenth of a second to import."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
