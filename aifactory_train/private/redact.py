"""Messages without values. Under a protected profile nothing that a row could have put into an exception, a warning or
another library's log reaches a terminal or a file; where it happened (file and line of code) always does. Standard
library only."""

from __future__ import annotations

import logging
import re
import sys
import threading
import traceback
import types
import warnings
from typing import Any

_active = False
_QUOTED = re.compile(r"'[^'\n]*'|\"[^\"\n]*\"|`[^`\n]*`|«[^»\n]*»")
#: From the first quotation mark to the last one: a value may hold apostrophes ("l'appendicite") and line ends itself.
_FROM_FIRST_TO_LAST = re.compile(r"['\"`«].*['\"`»]", re.DOTALL)
#: Names of the recipe or of this project that end a message.
_HINT = re.compile(r" \(did you mean '[^\n]*'\?\)\Z")


def is_active() -> bool:
    return _active


def message(error: BaseException) -> str:
    """What may be said of ``error``: under the profile ``open`` all but secrets; else our own messages without what
    they quote, and of others the type alone."""
    from aifactory_train.core.errors import UserError
    from aifactory_train.core.secrets import without_secrets

    if not _active:
        return without_secrets(str(error))
    if isinstance(error, UserError):
        what = _FROM_FIRST_TO_LAST.sub("[withheld]", _HINT.sub("", error.what))
        where, fix = (text and without_quotes(text) for text in (error.where, error.fix))
        return str(UserError(what, where=where, fix=fix))
    return f"[{len(str(error))} characters withheld by the privacy profile]"


def without_quotes(text: str) -> str:
    """``text`` with everything in quotation marks withheld: messages of this project put values, and only values,
    there.
    """
    return _QUOTED.sub("[withheld]", text) if _active else text


def activate() -> None:
    """From now on: tracebacks, warnings and records of other libraries' loggers without values."""
    global _active
    if _active:
        return
    _active = True
    sys.excepthook = _excepthook
    threading.excepthook = lambda args: _excepthook(args.exc_type, args.exc_value, args.exc_traceback)
    warnings.showwarning = _showwarning
    original = logging.getLogRecordFactory()

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = original(*args, **kwargs)
        if not record.name.startswith("aifactory_train"):
            record.msg, record.args = f"[message of {record.name} withheld by the privacy profile]", ()
        if record.exc_info and record.exc_info[1] is not None:
            record.exc_text = describe(record.exc_info[1])
            record.exc_info = None
        return record

    logging.setLogRecordFactory(factory)


def deactivate() -> None:
    """Undo what can be undone (tests)."""
    global _active
    _active = False
    sys.excepthook = sys.__excepthook__
    threading.excepthook = threading.__excepthook__
    logging.setLogRecordFactory(logging.LogRecord)


def describe(error: BaseException) -> str:
    """A traceback of places: files, lines and functions of the whole chain of causes, no values, no messages of
    others.
    """
    lines: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        lines.extend(
            f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}'
            for frame in traceback.extract_tb(current.__traceback__)
        )
        lines.append(f"{type(current).__name__}: {message(current)}")
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "\n".join(lines)


def _excepthook(kind: type[BaseException], error: BaseException | None, trace: types.TracebackType | None) -> None:
    if error is None or issubclass(kind, KeyboardInterrupt):
        print(kind.__name__, file=sys.stderr)
        return
    print(describe(error), file=sys.stderr, flush=True)


def _showwarning(
    message: Any, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    print(f"{filename}:{lineno}: {category.__name__} [message withheld by the privacy profile]", file=sys.stderr)
