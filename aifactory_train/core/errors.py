"""The errors that a user can repair. They end the program with one message, never with a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: stopped on request, can be resumed


class UserError(Exception):
    """The request is wrong or cannot be carried out here (exit code 2).

    ``what`` is the rule that was broken, ``where`` the file:line or configuration key, ``fix`` how to fix it. ``rank``:
    whose work failed, where every rank raises it.
    """

    exit_code = EXIT_REFUSED
    rank: int | None = None

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        self.what, self.where, self.fix = what, where, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  fix: {self.fix}" if self.fix else text

    def of(self, rank: int | None) -> Self:
        """This error, as the one of ``rank``."""
        self.rank = rank
        return self

    def as_dict(self) -> dict[str, str | None]:
        return {"error": self.what, "where": self.where, "fix": self.fix}

    def __reduce__(self):
        return (_rebuild, (type(self), self.what, self.where, self.fix, self.rank))


def _rebuild(kind, what, where, fix, rank=None):
    return kind(what, where=where, fix=fix).of(rank)


class RunFailed(UserError):
    """The request was fine but the work failed for a reason that is named (exit code 1)."""

    exit_code = EXIT_FAILED


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""
