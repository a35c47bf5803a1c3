"""The run folder: where everything that a run writes lies, and who may write there."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aifactory_train.config import Recipe, from_tree, read_yaml, to_tree
from aifactory_train.errors import UserError
from aifactory_train.output import note
from aifactory_train.ownership import Owner, current, launcher_ended, living, process_age, process_lives, process_start

#: A heartbeat older than this belongs to a run that is no longer alive.
STALE_AFTER_S = 120


def write_atomic(path: Path, text: str) -> None:
    """Write a small file so that readers see the old or the new content, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"cannot be written: {error.strerror}", where=str(path)) from None


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    """A JSON file that this program wrote; a fault in it is named."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no such file", where=str(path)) from None
    except (ValueError, OSError) as error:
        raise UserError(f"cannot be read: {error}", where=str(path)) from None


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run, and its state."""

    path: Path

    # ---- the layout that tools rely on
    @property
    def config_file(self) -> Path:
        return self.path / "run.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def eval_file(self) -> Path:
        return self.path / "eval.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def stop_file(self) -> Path:
        return self.path / "stop"

    @property
    def state_file(self) -> Path:
        return self.path / "state.json"

    def attempt_dir(self, number: int) -> Path:
        return self.path / "attempts" / f"{number:03d}"

    def attempts(self) -> list[int]:
        return sorted(int(p.name) for p in (self.path / "attempts").glob("[0-9]*") if p.name.isdigit())

    # ---- state
    def state(self) -> dict[str, Any]:
        """``{"state": "new"|"running"|"stopped"|"failed"|"finished", "step": ...}`` of the last attempt."""
        if not self.state_file.is_file():
            return {"state": "new", "step": 0}
        return read_json(self.state_file)

    def set_state(self, state: str, **more: Any) -> None:
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "process_start": process_start(os.getpid())}
        write_json(self.state_file, {"state": state, **mine, "time": time.time(), **more})

    def is_live(self) -> bool:
        """Whether another process is training here now, as far as that can be said at once.

        ``starts/`` decides where there is one (:mod:`aifactory_train.ownership`). Folders of before there was: a process of this host
        must exist and be the one that wrote the state; another host must have written it within the last two minutes.
        """
        number = current(self.path)
        if number:
            return living(self.path, number) is not None
        if not self.state_file.is_file():
            return False
        state = self.state()
        if state.get("state") != "running":
            return False
        ago = time.time() - float(state.get("time", 0))
        if state.get("host") != socket.gethostname():
            # A stamp from the future is a clock that goes wrong: it must not keep the folder closed until its time comes.
            return 0 <= ago < STALE_AFTER_S
        pid = int(state["pid"])
        if pid == os.getpid() or not process_lives(pid, state.get("process_start")):
            return False
        age = process_age(pid)
        return "process_start" in state or age is None or age > ago - 2  # a younger process has taken over the number

    def complete_checkpoints(self) -> list[int]:
        """Steps whose checkpoint carries its COMPLETE marker, ascending."""
        found = []
        for marker in self.checkpoints.glob("step-*/COMPLETE"):
            name = marker.parent.name.removeprefix("step-")
            if name.isdigit():
                found.append(int(name))
        return sorted(found)

    # ---- the resolved configuration
    def save_config(self, recipe: Recipe) -> None:
        header = "# Everything resolved. Repeat this run: aifactory train run.yaml --run-dir NEW\n"
        write_atomic(self.config_file, header + yaml.safe_dump(to_tree(recipe), sort_keys=False, allow_unicode=True))

    def load_config(self) -> Recipe:
        if not self.config_file.is_file():
            raise UserError("is not a run folder: it has no run.yaml", where=str(self.path))
        tree, _ = read_yaml(self.config_file)
        return from_tree(tree, str(self.config_file))


def open_run(name_or_path: str) -> RunFolder:
    """An existing run, by path or by its name below ``runs/``."""
    for candidate in (Path(name_or_path), Path("runs") / name_or_path):
        if (candidate / "run.yaml").is_file():
            return RunFolder(candidate)
    known = sorted(p.parent.name for p in Path("runs").glob("*/run.yaml"))
    from aifactory_train.errors import did_you_mean

    raise UserError(
        f"no run '{name_or_path}'{did_you_mean(name_or_path, known)}",
        fix=f"runs here: {', '.join(known)}" if known else "runs lie in runs/ below the current folder, or give a path",
    )


def default_run_dir(recipe: Recipe, name: str | None) -> Path:
    """``runs/NAME``; without a name the recipe's id and the time."""
    if name is None:
        return Path("runs") / f"{recipe.id.replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not name or name.startswith((".", "-")) or any(c in name for c in "/\\\0\n"):
        raise UserError(f"'{name}' is not a name for a run", where="--name", fix="letters, digits, '.', '_' and '-'")
    return Path("runs") / name


def open_for_training(
    run: RunFolder, resume: str | None, recipe: Recipe | None = None, owner: Owner | None = None
) -> int | None:
    """Decide whether training may start in this folder; returns the checkpoint's step to go on from, or None.

    ``resume`` is ``auto`` (go on if there is something to go on from), a step, ``never`` (start over; what was there is
    moved to ``replaced/``), or None (an unfinished run is not touched without being asked). A finished run is opened only for
    a ``recipe`` of another length; whether it can be prolonged is seen when the checkpoint is read. ``owner`` claims the folder for
    this process before anything in it is relied on or changed; it is given back where the start is refused.
    """
    if resume not in (None, "auto", "never") and not str(resume).isdigit():
        raise UserError(f"'{resume}' is neither auto, never nor a step", where="--resume")
    if run.path.exists() and not run.path.is_dir():
        raise UserError("is a file, not a folder", where=str(run.path), fix="choose another --run-dir")
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        probe = run.path / f".writable.{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"the run folder cannot be written: {error.strerror}", where=str(run.path)) from None
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


def _refuse_live(run: RunFolder, attempt: int | None) -> None:
    if run.is_live():
        state = run.state()
        before = max((n for n in run.attempts() if attempt is not None and n < attempt), default=None)
        if attempt is not None and state["host"] != socket.gethostname() and launcher_ended(run.path, before, attempt):
            return
        raise UserError(
            f"a run is live here (process {state['pid']} on {state['host']})",
            where=str(run.path),
            fix="follow it with 'aifactory status', end it with 'aifactory stop', or choose another --run-dir",
        )


def _is_probe(name: str) -> bool:
    """Whether a file is what another start tries out at this moment."""
    return name.startswith((".writable.", ".run.yaml.", ".state.json."))


def _open_claimed(run: RunFolder, resume: str | None, recipe: Recipe | None) -> int | None:
    """What :func:`open_for_training` says about a folder in which nobody else trains."""
    if not run.config_file.is_file():
        if str(resume).isdigit():
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
            fix="choose another --run-dir or --name; --resume auto with a larger train.max_steps or train.epochs prolongs it; "
            "--resume never starts over and keeps the old files in replaced/",
        )
    if resume is None:
        newest = f"its newest checkpoint is step {steps[-1]}" if steps else "it has no checkpoint"
        raise UserError(
            f"holds an unfinished run ({newest})",
            where=str(run.path),
            fix="--resume auto goes on, --resume never starts over",
        )
    if resume == "auto":
        if not steps:
            _may_start_over(run)
        return steps[-1] if steps else None
    if int(resume) not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise UserError(f"there is no checkpoint of step {resume}", where=str(run.path), fix=f"complete steps: {known}")
    return int(resume)


def _may_start_over(run: RunFolder) -> None:
    """No complete checkpoint is there. Raises :class:`UserError` unless the run never completed one: then it starts at step 1."""
    from aifactory_train import saved

    found = saved.evidence(run)
    if found is None:
        note(f"{run.path}: the run ended before its first checkpoint was complete; it starts at step 1")
        return
    raise UserError(
        f"the run had checkpoints ({found}), and none is left to go on from:\n    " + "\n    ".join(saved.damage(run)),
        where=str(run.checkpoints),
        fix="put a checkpoint back; to start over use a new --name or --run-dir, or --resume never (keeps the old files in replaced/)",
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
    """Whether a folder without a ``run.yaml`` may hold this: nothing was trained there, it is what an attempt that ended before
    its first step left, or what was put there for the run to come."""
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
