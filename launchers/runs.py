"""Writing a submission into its run folder, and remembering its jobs."""

from __future__ import annotations

import os
from pathlib import Path

from aifactory_train.core.errors import UserError
from aifactory_train.launchers import backends, tokens
from aifactory_train.launchers.files import finish
from aifactory_train.launchers.request import Refusal
from aifactory_train.launchers.submission import File, Submission


def write(sub: Submission, token: str | None = None) -> Path:
    """All files of the submission below ``sub.run_dir``; returns the script's path. Refuses a folder that holds another
    run. With ``token`` a launch that bears the same finds the folder (:mod:`tokens`).
    """
    run = sub.run_dir
    taken = Refusal(
        "run-folder-new",
        f"{run} already holds a run",
        where="--run-dir",
        fix="choose another --name or --run-dir, or go on with that run: aifactory launch --resume RUN",
    )
    if (run / "submission").exists() or (run / "run.yaml").exists():
        raise taken
    try:
        (run / "logs").mkdir(parents=True, exist_ok=True)
        try:
            (run / "submission").mkdir()  # of several launches at the same instant one makes it
        except FileExistsError:
            raise taken from None
        if token is not None:
            tokens.note_begun(run, token)
        for file in finish(sub):
            put(run, file)
        if token is not None:
            tokens.note_whole(run, token)
    except OSError as error:
        raise UserError(
            f"cannot be written: {error.strerror}", where=str(error.filename or run), fix="choose another --run-dir"
        ) from None
    return run / "submission" / backends.get(sub.shape.backend).script_file


def put(run: Path, file: File) -> None:
    path = run / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file.content)
    os.chmod(path, file.mode)


def remember_jobs(run: Path, jobs: list[str]) -> None:
    with open(run / "submission" / "jobs", "a", encoding="utf-8") as file:
        file.write("".join(f"{job}\n" for job in jobs))


def jobs_of(run: Path) -> list[str]:
    """Job ids of a run in the order of submission."""
    path = run / "submission" / "jobs"
    if not path.is_file():
        return []
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
