"""How much a compressed file may become: real data shrinks by 3 to 20, a bomb by 1,000."""

from __future__ import annotations

import io
from typing import IO, Any

from aifactory_train.core.errors import UserError

#: More than this many times its size is refused, beyond what is small anyway.
MOST_TIMES, ALWAYS = 200, 256 << 20


class Growth:
    """Bytes that came out of a file of ``packed`` bytes. ``fix`` says how to use it all the same."""

    def __init__(self, packed: int, where: object, fix: str):
        self.most = max(ALWAYS, MOST_TIMES * packed)
        self.packed, self.where, self.fix = packed, where, fix
        self.bytes = 0

    def add(self, count: int) -> None:
        self.bytes += count
        if self.bytes > self.most:
            raise UserError(
                f"unpacks to more than {self.most:,} bytes, {self.most // max(1, self.packed):,} times its size of "
                f"{self.packed:,}",
                where=str(self.where),
                fix=self.fix,
            )


class _Counted(io.RawIOBase):
    def __init__(self, source: Any, growth: Growth):
        self.source, self.growth = source, growth

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self.source.read1(len(buffer))
        buffer[: len(piece)] = piece
        self.growth.add(len(piece))
        return len(piece)

    def close(self) -> None:
        self.source.close()
        super().close()


def counted(source: Any, growth: Growth) -> IO[bytes]:
    """``source`` (with ``read1``) for reading, watched by ``growth``."""
    return io.BufferedReader(_Counted(source, growth), 1 << 20)
