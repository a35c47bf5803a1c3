"""How the program prints: JSON alone on standard output, notes on standard error, rich tables imported late."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

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
    stream.write(json.dumps(value, ensure_ascii=False, allow_nan=False, default=str) + "\n")
    stream.flush()


def note(text: str) -> None:
    """A line for people, on standard error."""
    print(text, file=sys.stderr, flush=True)


def console(stderr: bool = False):
    """A rich console; width follows the terminal, or 110 columns where there is none (pipes, batch logs)."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else int(os.environ.get("COLUMNS", "110"))
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=False)


def table(title: str | None, columns: list[str], rows: list[list[Any]], *, right: tuple[int, ...] = ()) -> None:
    """Print a plain table; ``right`` lists the columns that hold numbers."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for i, name in enumerate(columns):
        grid.add_column(name, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*[cell if isinstance(cell, Text) else Text("" if cell is None else str(cell)) for cell in row])
    console().print(grid)
