"""A launch that bears a token: made again after a cut, it goes on where it was, and submits nothing twice."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.core.files import object_or_nothing, put_whole
from aifactory_train.launchers.backends import Backend
from aifactory_train.launchers.request import Refusal

#: The file in ``submission/`` that is written last, and the folder beside the runs where tokens lie.
_WHOLE, _TOKENS = "token", ".tokens"


def check_token(token: str) -> None:
    """Refuse a token that could not be the name of a file."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{4,64}", token):
        fix = "4 to 64 letters, digits, '_' and '-'"
        raise Refusal("token-form", f"{token[:80]!r} is no token", where="--token", fix=fix)


def note_begun(run: Path, token: str) -> None:
    """From now on the token leads to this run folder."""
    (run.parent / _TOKENS).mkdir(exist_ok=True)
    put_whole(run.parent / _TOKENS / token, str(run))


def note_whole(run: Path, token: str) -> None:
    """All files of the submission are written."""
    put_whole(run / "submission" / _WHOLE, token)


def begun_with(root: Path, token: str) -> Path | None:
    """The run folder below ``root`` whose submission was written whole for this token. What was cut while it was
    written is taken away: no scheduler has seen it.
    """
    try:
        run = Path((root / _TOKENS / token).read_text(encoding="utf-8"))
    except OSError:
        return None
    if (run / "submission" / _WHOLE).is_file():
        return run
    shutil.rmtree(run / "submission", ignore_errors=True)
    return None


def submitted(run: Path, backend: Backend, remembered: list[str]) -> list[str]:
    """Jobs of a run that its launch remembered, that its attempts name and that the scheduler has, in this order.

    Raises UserError where it runs or ran here in the foreground, RunFailed where none is known and the scheduler cannot
    be asked for those of a folder.
    """
    jobs = list(remembered)
    for path in sorted(run.glob("attempts/*/attempt.json")):
        job = object_or_nothing(path).get("job")
        if isinstance(job, str) and job:
            jobs.append(job)
    if not backend.batch:
        if jobs:
            raise UserError("this launch was begun before", where="--token", fix=f"aifactory status {run}")
        return []
    waiting = backend.jobs_of(run)
    if waiting is None and not jobs:
        raise RunFailed(
            f"this launch was cut off while it submitted, and {backend.title} cannot tell whether it has the job",
            where=str(run),
            fix=f"look at your queue; if nothing of it is there: aifactory launch --resume {run}",
        )
    return list(dict.fromkeys([*jobs, *(waiting or [])]))
