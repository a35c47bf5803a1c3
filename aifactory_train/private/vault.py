"""Encrypted files. Data and the token cache are never on disk in plain form: what is written is encrypted piece by
piece as it is produced, what is read is decrypted in memory.

``NAME.aft``: ``AFT1``, the length of a JSON header (4 bytes, big-endian), the header, then pieces of 1 MiB of plain
text, each AES-256-GCM with its own 16-byte tag. The key is random for every file and stands in the header, wrapped for
age (X25519) recipients. The nonce is the piece's number (11 bytes) and a byte that is 1 for the last piece (the STREAM
construction), the header's digest is authenticated with every piece: pieces cannot be swapped, dropped, moved to
another file or cut off at the end.

``NAME.age`` (whole files encrypted by any age tool) can be read as well.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.core.files import check_regular, foreign
from aifactory_train.private.sealed_file import (
    PIECE,
    SUFFIXES,
    SealedWriter,
    Sealer,
    nonce,
    piece_cipher,
    pyrage,
    read_header,
)


class Vault:
    """The identities that open files, and the recipients for whom new ones are written."""

    def __init__(self, identities: list[Any], recipients: list[str]):
        self.identities, self.recipients = identities, recipients

    # ---- keys

    @classmethod
    def from_identity(cls, path: Path) -> Vault:
        """From an age identity file (mode 600). New files are for its own recipient."""
        check_regular(path, f"privacy.identity: {path}")
        age = pyrage()
        try:
            mode = path.stat().st_mode
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"the identity cannot be read: {error.strerror}", where=f"privacy.identity: {path}"
            ) from None
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UserError("others can read this identity", where=str(path), fix=f"chmod 600 {path}")
        identities = []
        for line in text.splitlines():
            if line.startswith("AGE-SECRET-KEY-"):
                try:
                    identities.append(age.x25519.Identity.from_str(line.strip()))
                except Exception:  # pyrage raises its own kinds; all mean that this line is no key
                    raise UserError("holds a damaged age identity", where=str(path)) from None
        if not identities:
            raise UserError(
                "holds no age identity (AGE-SECRET-KEY-...)", where=str(path), fix="aifactory private key makes one"
            )
        return cls(identities, [str(i.to_public()) for i in identities])

    # ---- whole files in memory

    def read(self, path: Path) -> bytes:
        """The plain content, in memory. A wrong key, a changed or shortened file is a :class:`UserError`."""
        check_regular(path)
        if path.suffix == ".age":
            return self._unwrap(path.read_bytes(), path)
        return b"".join(self._pieces(path))

    def _pieces(self, path: Path) -> Iterator[bytes]:
        from cryptography.exceptions import InvalidTag

        with open(path, "rb") as file:
            header, bound = read_header(file, path)
            cipher = piece_cipher(self._unwrap(base64.b64decode(header["key"]), path))
            number = 0
            piece = file.read(PIECE + 16)
            while True:
                ahead = file.read(PIECE + 16)
                try:
                    yield cipher.decrypt(nonce(number, last=not ahead), piece, bound)
                except InvalidTag:
                    raise UserError(
                        f"piece {number} of the encrypted file was changed, or the file was cut off", where=str(path)
                    ) from None
                if not ahead:
                    return
                piece, number = ahead, number + 1

    def _unwrap(self, data: bytes, path: Path) -> bytes:
        age = pyrage()
        try:
            return age.decrypt(data, self.identities)
        except Exception:  # pyrage has one kind of error for a wrong key and for a damaged file
            raise UserError(
                "cannot be decrypted: it was encrypted for another key, or it is damaged",
                where=str(path),
                fix="name the right identity file with privacy.identity",
            ) from None

    def write(self, path: Path, data: bytes) -> None:
        with self.writer(path) as file:
            file.write(data)

    def writer(self, path: Path) -> SealedWriter:
        """A file object that encrypts what is written to it; the file appears when it is closed."""
        return SealedWriter(path, self.recipients)


class Window:
    """Any part of an encrypted file, decrypted in memory: only the pieces that hold it are read.

    Raises :class:`UserError` for a wrong key and for a piece that was changed; a file cut off at a piece's end is
    noticed when its last piece is read.
    """

    def __init__(self, vault: Vault, path: Path):
        self.path = path
        self._file = open(path, "rb")  # noqa: SIM115 - closed in close()
        try:
            header, self._bound = read_header(self._file, path)
            self._cipher = piece_cipher(vault._unwrap(base64.b64decode(header["key"]), path))
        except BaseException:
            self._file.close()
            raise
        self._begin = self._file.tell()
        self._count = max(1, -(-(path.stat().st_size - self._begin) // (PIECE + 16)))
        self._at, self._piece = -1, b""  # the piece read last: neighbouring reads often share one

    def read(self, start: int, size: int) -> bytearray:
        """``size`` bytes of plain text from ``start``."""
        out = bytearray()
        while len(out) < size:
            number, offset = divmod(start + len(out), PIECE)
            part = self._plain(number)[offset : offset + size - len(out)]
            if not part:
                raise UserError("the encrypted file is shorter than it says", where=str(self.path))
            out += part
        return out

    def _plain(self, number: int) -> bytes:
        from cryptography.exceptions import InvalidTag

        if number != self._at:
            if number >= self._count:
                return b""
            self._file.seek(self._begin + number * (PIECE + 16))
            try:
                self._piece = self._cipher.decrypt(
                    nonce(number, last=number == self._count - 1), self._file.read(PIECE + 16), self._bound
                )
            except InvalidTag:
                raise UserError(
                    f"piece {number} of the encrypted file was changed, or the file was cut off", where=str(self.path)
                ) from None
            self._at = number
        return self._piece

    def close(self) -> None:
        self._file.close()
        self._at, self._piece = -1, b""


def make_identity(path: Path) -> str:
    """A new age identity (mode 600); returns its recipient. Never overwrites one."""
    identity = pyrage().x25519.Identity.generate()
    recipient = str(identity.to_public())
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise UserError("there is an identity already", where=str(path), fix="choose another file") from None
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(f"# public key: {recipient}\n{identity}\n")
    return recipient


# ---- the vault in force

_active: Vault | None = None
_seals = False
_held: list[int] = []  # files in anonymous memory, see in_memory()


def activate(vault: Vault, *, seal: bool) -> None:
    """``vault`` opens encrypted files from now on; with ``seal`` the token cache and adapters are written encrypted
    too.
    """
    global _active, _seals
    _active, _seals = vault, seal


def deactivate() -> None:
    global _active, _seals
    _active, _seals = None, False


def seals() -> bool:
    """Whether what the program derives from the data must be written encrypted."""
    return _seals


def active() -> Vault:
    if _active is None:
        raise UserError(
            "this file is encrypted and no identity was named",
            where="privacy.identity",
            fix="name the age identity file that opens it",
        )
    return _active


def is_encrypted(path: Path) -> bool:
    return path.suffix in SUFFIXES


def plain_name(path: Path) -> Path:
    """The name without the suffix of encryption."""
    return path.with_suffix("") if is_encrypted(path) else path


def sealed(path: Path) -> Path:
    """Where the content of ``path`` lies when it is written encrypted."""
    return path.with_name(path.name + ".aft")


def create(path: Path) -> Any:
    """Open a file for writing in order: plain, or encrypted beside its name while the vault seals."""
    return active().writer(sealed(path)) if _seals else open(path, "wb")


def seal_chunks(chunks: Iterable[memoryview | bytes]) -> Iterator[bytes]:
    """The encrypted form of a file that comes in chunks."""
    sealer = Sealer(active().recipients)
    yield sealer.start
    for chunk in chunks:
        yield from sealer.add(chunk)
    yield sealer.end()


class SealedTensors:
    """An encrypted safetensors file, one tensor at a time in memory; used like ``safetensors.safe_open``."""

    _DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")

    def __init__(self, path: Path):
        self._window = Window(active(), path)
        self._read: tuple[str, Any] = ("", None)
        try:
            size = struct.unpack("<Q", self._window.read(0, 8))[0]
            header = json.loads(bytes(self._window.read(8, size))) if size < 1 << 30 else None
            if not isinstance(header, dict):
                raise ValueError
        except ValueError:
            self._window.close()
            raise UserError("does not hold tensors", where=str(path)) from None
        self._header: dict[str, Any] = header
        self._data = 8 + size

    def __enter__(self) -> SealedTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._read = ("", None)
        self._window.close()

    def keys(self) -> list[str]:
        return [k for k in self._header if k != "__metadata__"]

    def get_tensor(self, key: str) -> Any:
        """The tensor ``key`` in memory of its own, in the type and shape that the file says."""
        import torch

        if self._read[0] != key:
            types = dict(
                zip(
                    self._DTYPES,
                    (
                        torch.float64,
                        torch.float32,
                        torch.float16,
                        torch.bfloat16,
                        torch.int64,
                        torch.int32,
                        torch.int16,
                        torch.int8,
                        torch.uint8,
                        torch.bool,
                    ),
                    strict=True,
                )
            )
            entry = self._header[key]
            start, end = entry["data_offsets"]
            if start == end:
                tensor = torch.empty(entry["shape"], dtype=types[entry["dtype"]])
            else:
                raw = self._window.read(self._data + start, end - start)
                tensor = torch.frombuffer(raw, dtype=types[entry["dtype"]]).reshape(entry["shape"])
            self._read = (key, tensor)
        return self._read[1]

    get_slice = get_tensor  # indexed like a slice of safetensors: several boxes of one tensor are decrypted once


def open_tensors(path: Path) -> Any:
    """A safetensors file for reading tensor by tensor: as it is, or decrypted in memory if it lies here encrypted."""
    if sealed(path).is_file():
        return SealedTensors(sealed(path))
    from safetensors import safe_open

    with foreign(path, "is not a whole safetensors file", "copy or fetch it again"):
        return safe_open(path, framework="pt")


def content(path: Path) -> bytes | None:
    """The decrypted content if ``path`` lies here encrypted, else None (read it as usual)."""
    return active().read(sealed(path)) if sealed(path).is_file() else None


def open_source(path: Path) -> Any:
    """A data file for reading in binary: decrypted in memory if it is encrypted. Raises :class:`UserError` for a pipe
    or a device."""
    check_regular(path)
    return io.BytesIO(active().read(path)) if is_encrypted(path) else open(path, "rb")


def holds(path: Path) -> bool:
    """Whether ``path`` is here, plain or encrypted."""
    return path.is_file() or sealed(path).is_file()


def seal(path: Path) -> None:
    """Replace a plain file by its encrypted form, while the vault seals."""
    if _seals:
        active().write(sealed(path), path.read_bytes())
        path.unlink()


@contextlib.contextmanager
def in_memory(path: Path) -> Iterator[None]:
    """While the vault seals, what is written to ``path`` within the block goes to anonymous memory instead of the disk.

    ``path`` is then a link to a file without a name (``memfd_create``), which even SIGKILL leaves nowhere. This process
    sees it under ``path``; a child does if it gets :func:`held` as ``pass_fds``. :func:`seal` before the end writes the
    encrypted file; the link goes with the block. Does nothing while the vault does not seal.
    """
    if not _seals:
        yield
        return
    handle = os.memfd_create("sealed")
    _held.append(handle)
    try:
        path.symlink_to(f"/proc/self/fd/{handle}")
        yield
    finally:
        path.unlink(missing_ok=True)
        _held.remove(handle)
        os.close(handle)


def held() -> tuple[int, ...]:
    """File descriptors that a child process needs to read the files of :func:`in_memory`."""
    return tuple(_held)


def load_tensors(path: Path) -> dict[str, Any]:
    """Tensors of a safetensors file, decrypted in memory if it is encrypted."""
    from safetensors.torch import load, load_file

    decrypted = content(path)
    return load_file(path) if decrypted is None else load(decrypted)
