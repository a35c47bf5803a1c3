"""Where an export comes to lie, and what keeps it from there."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.private import vault
from aifactory_train.run.folder import RunFolder

if TYPE_CHECKING:
    pass


def remove_left(folder: Path) -> None:
    """Remove what exports that were killed on this host left unfinished; nobody else can tell that they are dead."""
    for path in folder.glob(f".*-{platform.node()}-*"):
        number = path.name.rpartition(f"-{platform.node()}-")[2].split("-")[0]
        if not number.isdecimal() or int(number) == os.getpid():
            continue
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue  # it lives and is somebody else's


def refuse_plain(run: RunFolder, kind: str) -> None:
    """Whole weights are never written plain under the profile restricted."""
    if vault.seals():
        raise UserError(
            f"{kind} weights would be written unencrypted, and the profile restricted refuses that",
            where="privacy.profile",
            fix=f"where they may be plain: set privacy.profile to sensitive in {run.path / 'run.yaml'} "
            "(privacy.identity stays, it opens the adapter) and export again",
        )


@contextlib.contextmanager
def named(place: Path, what: str) -> Iterator[None]:
    """A full disk or a missing permission becomes a :class:`RunFailed` that says what could not be done, and where."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space left on the disk (or quota)" if full else error.strerror or str(error)
        raise RunFailed(f"{what}: {reason}", where=str(place)) from None
