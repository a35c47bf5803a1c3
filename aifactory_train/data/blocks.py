"""What readers hand on: some neighbouring rows of one file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

BLOCK_BYTES = 1 << 18
BLOCK_ROWS = 1000


@dataclass
class Block:
    """Some neighbouring rows of one file. Either ``lines`` (raw JSON Lines) or ``rows`` is set; ``first`` is the line
    (or row number) of the first one, from 1; ``numbers`` the lines of ``rows`` where they do not simply follow one
    another."""

    file: str
    first: int
    lines: bytes | None = None
    rows: list[Any] | None = None
    numbers: list[int] | None = None

    def number(self, i: int) -> int:
        return self.numbers[i] if self.numbers is not None else self.first + i


def in_blocks(rows: Iterable[Any], label: str) -> Iterator[Block]:
    """Rows of a converter or a library, numbered from 1, in blocks."""
    rows, first = iter(rows), 1
    while held := list(islice(rows, BLOCK_ROWS)):
        yield Block(label, first, rows=held)
        first += len(held)
