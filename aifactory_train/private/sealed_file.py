"""The format of a ``.aft`` file, and writing one piece by piece."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import secrets
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError

MAGIC = b"AFT1"
PIECE = 1 << 20
SUFFIXES = (".aft", ".age")
NEEDS = "pip install -c constraints.txt 'aifactory-train[private]'"


class Sealer:
    """Plain bytes in, the bytes of a ``.aft`` file out; holds at most one piece of plain text."""

    def __init__(self, recipients: Iterable[str]):
        age = pyrage()
        key = secrets.token_bytes(32)
        names = list(recipients)
        try:
            keys = [age.x25519.Recipient.from_str(r) for r in names]
        except Exception:
            raise UserError("is not an age recipient (age1...)", where=", ".join(names)) from None
        header = json.dumps(
            {
                "scheme": "AES-256-GCM, 1 MiB pieces",
                "wrap": "age X25519",
                "recipients": names,
                "key": base64.b64encode(age.encrypt(key, keys)).decode(),
            }
        ).encode()
        self.start = MAGIC + struct.pack(">I", len(header)) + header
        self._bound = hashlib.sha256(MAGIC + header).digest()
        self._cipher = piece_cipher(key)
        self._held, self._number = bytearray(), 0

    def add(self, data: memoryview | bytes) -> Iterator[bytes]:
        """Encrypted pieces that ``data`` completes."""
        view = memoryview(data).cast("B")
        for at in range(0, len(view), PIECE):
            self._held += view[at : at + PIECE]
            while len(self._held) > PIECE:
                yield self._piece(bytes(self._held[:PIECE]), last=False)
                del self._held[:PIECE]

    def end(self) -> bytes:
        return self._piece(bytes(self._held), last=True)

    def _piece(self, piece: bytes, *, last: bool) -> bytes:
        number, self._number = self._number, self._number + 1
        return self._cipher.encrypt(nonce(number, last=last), piece, self._bound)


class SealedWriter(io.RawIOBase):
    """A file that is encrypted as it is written; nothing plain reaches the disk."""

    def __init__(self, path: Path, recipients: Iterable[str]):
        super().__init__()
        self.path, self._beside = path, path.with_name(f".{path.name}.{os.getpid()}.part")
        self._sealer = Sealer(recipients)
        self._file = open(self._beside, "wb")  # noqa: SIM115 - closed in close()
        self._file.write(self._sealer.start)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        for piece in self._sealer.add(data):
            self._file.write(piece)
        return memoryview(data).nbytes

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        """Write the last piece and show the file under its name."""
        if self.closed:
            return
        try:
            self._file.write(self._sealer.end())
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._beside, self.path)
        finally:
            self._file.close()
            super().close()


def read_header(file: Any, path: Path) -> tuple[dict[str, Any], bytes]:
    """``(header, what every piece is bound to)``; refuses what is not such a file."""
    start = file.read(8)
    if len(start) < 8 or start[:4] != MAGIC:
        raise UserError("is not an encrypted file of this program", where=str(path))
    length = struct.unpack(">I", start[4:])[0]
    raw = file.read(length) if length < 1 << 20 else b""
    try:
        header = json.loads(raw)
        if not isinstance(header["recipients"], list):
            raise ValueError
        base64.b64decode(header["key"], validate=True)
    except (ValueError, KeyError, TypeError):
        raise UserError("the header of the encrypted file is damaged", where=str(path)) from None
    return header, hashlib.sha256(MAGIC + raw).digest()


def nonce(number: int, *, last: bool) -> bytes:
    return number.to_bytes(11, "big") + (b"\1" if last else b"\0")


def piece_cipher(key: bytes) -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        raise UserError("encrypted files need the package 'cryptography'", fix=NEEDS) from None
    return AESGCM(key)


def pyrage() -> Any:
    try:
        import pyrage
    except ImportError:
        raise UserError("encrypted files need the package 'pyrage' (age)", fix=NEEDS) from None
    return pyrage
