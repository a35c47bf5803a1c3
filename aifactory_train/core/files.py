"""Files that appear whole: written beside, flushed, renamed. And the digest of a file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import RunFailed, UserError

_BREAKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE)


def put_whole(path: Path, text: str, mode: int | None = None, *, sync: bool = True) -> None:
    """Write a small file so that readers see the old or the new content, never a part. Raises OSError; nothing is left
    beside.

    Without ``sync`` a machine that loses power may leave the file empty. What is there and is no file (a pipe,
    ``/dev/stdout``) is written to, never replaced.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_text(text, encoding="utf-8")
        return
    # other nodes have this process id too
    beside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        if mode is not None:
            os.chmod(beside, mode)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, text: str, *, sync: bool = True, where: str = "") -> None:
    """:func:`put_whole`, refused by name where the disk does not take it; ``where`` names the option that asked."""
    try:
        put_whole(path, text, sync=sync)
    except OSError as error:
        # A disk that fills up or a file system that goes away is a failure of the work, not a wrong request.
        kind = RunFailed if error.errno in _BREAKS else UserError
        raise kind(f"cannot be written: {error.strerror}", where=where or str(path)) from None


def file_digest(path: Path) -> str:
    """SHA-256 of a file as hex, read in pieces of 8 MiB. Raises OSError."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(8 << 20):
            found.update(piece)
    return found.hexdigest()


def write_json(path: Path, value: Any, *, sync: bool = True) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False, default=str)
    write_atomic(path, text + "\n", sync=sync)


#: What a shell opened for this process: somebody writes into it.
_OPENED = re.compile(r"/dev/stdin|(/dev|/proc/self)/fd/\d+")


def check_regular(path: Path, where: object = None) -> None:
    """Refuse what is there and is neither a regular file nor a folder: a pipe or a device would be waited for without
    end, or give bytes without end. ``where``: what the message names in place of the path."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return  # whoever opens it says what is wrong
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or _OPENED.fullmatch(str(path))):
        raise UserError("is a pipe, a socket or a device, not a regular file", where=str(where or path))


def read_json(path: Path, shape: Any = None) -> Any:
    """The value of a JSON file that anybody may have written; whatever is wrong with it is one :class:`UserError` that
    names it.

    ``shape`` says what the value must be: a type, a tuple of types, or for an object a dictionary of its keys with the
    shape of each (``"key?"`` may be missing or null). ``{"weight_map": dict}`` wants an object with an object under
    that key.
    """
    try:
        check_regular(path)
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError("no such file", where=str(path)) from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
    return parse_json(raw, path, shape)


def object_or_nothing(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file is missing or anything else: one witness of several."""
    try:
        return read_json(path, dict)
    except UserError:
        return {}


def parse_json(raw: bytes, where: object, shape: Any = None) -> Any:
    """The JSON value in ``raw`` as :func:`read_json` gives it; ``where`` is what the message names."""
    try:
        value = json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise UserError("cannot be read: it is nested too deeply", where=str(where)) from None
    except ValueError as error:
        raise UserError(f"cannot be read: {error}", where=str(where)) from None
    wrong = misfit(value, shape)
    if wrong:
        raise UserError(f"is not what it should be, or damaged: {wrong}", where=str(where))
    return value


def misfit(value: Any, shape: Any, place: str = "the whole") -> str | None:
    """Why ``value`` is not what ``shape`` (see :func:`read_json`) wants, in words; None where it is."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{place} is {_kind(value)}, not an object"
        for key, below in shape.items():
            name, optional = key.removesuffix("?"), key.endswith("?")
            if value.get(name) is None and (optional or (name in value and below is object)):
                continue
            if name not in value:
                return f"'{name}' is missing"
            found = misfit(value[name], below, f"'{name}'")
            if found:
                return found
        return None
    if shape is None or shape is object:
        return None
    kinds = shape if isinstance(shape, tuple) else (shape,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        return f"{place} is {_kind(value)}, not {' or '.join(_KINDS.get(k, k.__name__) for k in kinds)}"
    return None


_KINDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def _kind(value: Any) -> str:
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


@contextlib.contextmanager
def foreign(where: object, what: str, fix: str | None = None, ours: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Around a library that is given files of others: whatever it raises becomes one :class:`UserError`, a panic of
    Rust code included.

    Not: a lack of memory, of space or of a package, a signal, and errors of ours. AIFACTORY_DEBUG=1 lets the traceback
    through.
    """
    passed: tuple[type[BaseException], ...] = (UserError, MemoryError, ModuleNotFoundError, *ours)
    try:
        yield
    except passed:
        raise
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        lack = "outofmemory" in type(error).__name__.lower() or "out of memory" in str(error)
        lack |= isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if lack or os.environ.get("AIFACTORY_DEBUG"):
            raise
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
        text = " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]  # a title is no reason
        raise UserError(f"{what}: {text}", where=str(where), fix=fix) from error


#: What reading a value of another shape than was expected raises.
ODD_SHAPES = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    AssertionError,
)


@contextlib.contextmanager
def reading(where: object, what: str, fix: str | None = None) -> Iterator[None]:
    """Around code that takes apart what others may have written or damaged: what odd shapes raise becomes one
    :class:`UserError`.

    AIFACTORY_DEBUG=1 lets the traceback through, for a fault that is ours.
    """
    try:
        yield
    except ODD_SHAPES as error:
        if os.environ.get("AIFACTORY_DEBUG"):
            raise
        text = (str(error).strip().splitlines() or [""])[0][:300]
        raise UserError(f"{what} ({type(error).__name__}: {text})", where=str(where), fix=fix) from error
