"""May a training use this folder: new, empty, resumed, or somebody's."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.core.output import note
from aifactory_train.run import saved
from aifactory_train.run.folder import RunFolder
from aifactory_train.run.ownership import (
    Owner,
    RunIsLive,
    current,
    launcher_ended,
)


def open_for_training(
    run: RunFolder, resume: str | None, recipe: Recipe | None = None, owner: Owner | None = None
) -> int | None:
    """Decide whether training may start in this folder; returns the checkpoint's step to go on from, or None.

    ``resume`` is ``auto`` (go on if there is something to go on from), a step, ``never`` (start over; what was there is
    moved to ``replaced/``), or None (an unfinished run is not touched without being asked). A finished run is opened
    only for a ``recipe`` of another length; whether it can be prolonged is seen when the checkpoint is read. ``owner``
    claims the folder for this process before anything in it is relied on or changed; it is given back where the start
    is refused.
    """
    if resume not in (None, "auto", "never") and not _is_step(resume):
        raise UserError(f"'{resume}' is neither auto, never nor a step", where="--resume")
    try:
        os.path.abspath(run.path).encode()
    except UnicodeEncodeError:  # record and event log hold it as text
        raise UserError("its path is not UTF-8", where=ascii(str(run.path)), fix="choose another --run-dir") from None
    if run.path.exists() and not run.path.is_dir():
        raise UserError("is a file, not a folder", where=str(run.path), fix="choose another --run-dir")
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        probe = run.path / f".writable.{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"the run folder cannot be written: {error.strerror}", where=str(run.path)) from None
    if os.path.lexists(run.config_file) and not run.config_file.is_file():
        fix = "put the file back; without it the folder holds no run"
        raise UserError("is no regular file", where=str(run.config_file), fix=fix)
    if not run.config_file.is_file():
        strangers = [p.name for p in run.path.iterdir() if not _may_exist(p, run)]
        if strangers and not run.config_file.is_file():  # else: a run that began this moment
            raise UserError(
                f"the folder is not empty and holds no run ({strangers[0]})",
                where=str(run.path),
                fix="choose an empty or new folder with --run-dir or --name",
            )
    if owner is None:
        return _open_claimed(run, resume, recipe)
    if not current(run.path):
        _refuse_live(run, owner.attempt)  # a folder of before there were starts
    owner.claim()
    try:
        return _open_claimed(run, resume, recipe)
    except UserError:
        owner.withdraw()
        raise


def _is_step(resume: str | None) -> bool:
    """Whether ``--resume`` names a step. Python reads no number of thousands of digits, and calls a superscript a
    digit.
    """
    return re.fullmatch("[0-9]{1,18}", str(resume)) is not None


def _refuse_live(run: RunFolder, attempt: int | None) -> None:
    if run.is_live():
        state = run.state()
        before = max((n for n in run.attempts() if attempt is not None and n < attempt), default=None)
        if (
            attempt is not None
            and state.get("host") != socket.gethostname()
            and launcher_ended(run.path, before, attempt)
        ):
            return
        raise RunIsLive(
            f"a run is live here (process {state.get('pid')} on {state.get('host')})",
            where=str(run.path),
            fix="follow it with 'aifactory status', end it with 'aifactory stop', or choose another --run-dir",
        )


def _is_probe(name: str) -> bool:
    """Whether a file is what another start tries out at this moment."""
    return name.startswith((".writable.", ".run.yaml.", ".state.json."))


def _open_claimed(run: RunFolder, resume: str | None, recipe: Recipe | None) -> int | None:
    """What :func:`open_for_training` says about a folder in which nobody else trains."""
    if not run.config_file.is_file():
        if _is_step(resume):
            raise UserError(f"there is no checkpoint of step {resume}", where=str(run.path))
        return None
    state = run.state()
    steps = run.complete_checkpoints()
    if resume == "never":
        _set_aside(run)
        return None
    if state["state"] == "finished" and not (resume is not None and steps and _other_length(run, recipe)):
        raise UserError(
            "holds a finished run",
            where=str(run.path),
            fix="choose another --run-dir or --name; --resume auto with a larger train.max_steps or train.epochs "
            "prolongs it; "
            "--resume never starts over and keeps the old files in replaced/",
        )
    if resume is None:
        newest = f"its newest checkpoint is step {steps[-1]}" if steps else "it has no checkpoint"
        raise UserError(
            f"holds an unfinished run ({newest})",
            where=str(run.path),
            fix="--resume auto goes on, --resume never starts over",
        )
    if steps:
        _look_at_config(run)
    if resume == "auto":
        if not steps:
            _may_start_over(run)
            return None
        if gone := saved.missing_after(run, steps[-1]):
            note(f"{gone}: the steps after step {steps[-1]} are made again")
        return steps[-1]
    if int(resume) not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise UserError(f"there is no checkpoint of step {resume}", where=str(run.path), fix=f"complete steps: {known}")
    return int(resume)


def _look_at_config(run: RunFolder) -> None:
    """Say where ``run.yaml`` is damaged. What the run goes on from stands in the checkpoint, and this start writes the
    file again."""
    try:
        run.load_config()
    except UserError as error:
        note(f"{error.where}: {error.what}; it is written again, the checkpoint says what the run was begun with")


def _may_start_over(run: RunFolder) -> None:
    """No complete checkpoint is there. Raises :class:`UserError` unless the run never completed one: then it starts at
    step 1.
    """
    found = saved.evidence(run)
    if found is None:
        note(f"{run.path}: the run ended before its first checkpoint was complete; it starts at step 1")
        return
    raise UserError(
        f"the run had checkpoints ({found}), and none is left to go on from:\n    " + "\n    ".join(saved.damage(run)),
        where=str(run.checkpoints),
        fix="put a checkpoint back; to start over use a new --name or --run-dir, or --resume never (keeps the old "
        "files in replaced/)",
    )


def _other_length(run: RunFolder, recipe: Recipe | None) -> bool:
    """Whether ``recipe`` asks for another number of steps than the run was started with."""
    if recipe is None:
        return False
    before, now = run.load_config().train, recipe.train
    return (before.max_steps, before.epochs) != (now.max_steps, now.epochs)


#: What launchers and tools may have put into a folder before the training starts in it.
_MAY_EXIST = {
    "attempts",
    "submission",
    "plan.json",
    "logs",
    "record.json",
    "events.jsonl",
    "stop",
    "replaced",
    "starts",
}


def _may_exist(path: Path, run: RunFolder) -> bool:
    """Whether a folder without a ``run.yaml`` may hold this: nothing was trained there, it is what an attempt that
    ended before its first step left, or what was put there for the run to come."""
    if path == run.state_file:
        return run.state().get("state") in ("new", "failed")
    if path == run.checkpoints:
        return path.is_dir() and not any(path.iterdir())
    return path.name in _MAY_EXIST or _is_probe(path.name)


def _set_aside(run: RunFolder) -> None:
    """Move what an earlier run wrote into ``replaced/TIME``; nothing is deleted."""
    aside = run.path / "replaced" / time.strftime("%Y%m%d-%H%M%S")
    aside.mkdir(parents=True, exist_ok=True)
    written = ("checkpoints", "metrics.jsonl", "eval.json", "export", "tensorboard", "state.json", "run.yaml")
    for name in (*written, "saved.json", "inputs.json"):
        if (run.path / name).exists():
            os.replace(run.path / name, aside / name)
