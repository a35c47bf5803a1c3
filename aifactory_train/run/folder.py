"""The run folder: where everything that a run writes lies, and who may write there."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aifactory_train.config.loading import read_run_config, to_tree
from aifactory_train.config.schema import Recipe
from aifactory_train.core import yaml_text
from aifactory_train.core.errors import UserError
from aifactory_train.core.files import read_json, write_atomic, write_json
from aifactory_train.run.ownership import (
    current,
    living,
    process_age,
    process_lives,
    process_start,
)

#: A heartbeat older than this belongs to a run that is no longer alive.
STALE_AFTER_S = 120
#: What ``state.json`` holds.
_STATE = {"state": str, "step?": int, "host?": str, "pid?": int, "time?": (int, float), "process_start?": str}


@dataclass(frozen=True)
class _Below:
    """A path below the run folder, as an attribute of it."""

    name: str

    def __get__(self, run: RunFolder, owner: type[RunFolder]) -> Path:
        return run.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run, and its state."""

    path: Path

    # ---- the layout that tools rely on
    config_file = _Below("run.yaml")
    metrics_file = _Below("metrics.jsonl")
    eval_file = _Below("eval.json")
    checkpoints = _Below("checkpoints")
    export = _Below("export")
    tensorboard = _Below("tensorboard")
    stop_file = _Below("stop")
    state_file = _Below("state.json")

    def attempt_dir(self, number: int) -> Path:
        return self.path / "attempts" / f"{number:03d}"

    def attempts(self) -> list[int]:
        return sorted(int(p.name) for p in (self.path / "attempts").glob("[0-9]*") if p.name.isdecimal())

    # ---- state
    def state(self) -> dict[str, Any]:
        """``{"state": "new"|"running"|"stopped"|"failed"|"finished", "step": ...}`` of the last attempt."""
        if not os.path.lexists(self.state_file):
            return {"state": "new", "step": 0}
        try:
            return read_json(self.state_file, _STATE)
        except UserError as error:
            fix = "move it away: where the run stands is read from its checkpoints"
            raise UserError(error.what, where=str(self.state_file), fix=fix) from None

    def set_state(self, state: str, **more: Any) -> None:
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "process_start": process_start(os.getpid())}
        write_json(self.state_file, {"state": state, **mine, "time": time.time(), **more})

    def is_live(self) -> bool:
        """Whether another process is training here now, as far as that can be said at once.

        ``starts/`` decides where there is one (:mod:`aifactory_train.run.ownership`). Folders of before there was: a
        process of this host must exist and be the one that wrote the state; another host must have written it within
        the last two minutes.
        """
        number = current(self.path)
        if number:
            return living(self.path, number) is not None
        if not self.state_file.is_file():
            return False
        state = self.state()
        if state.get("state") != "running":
            return False
        ago = time.time() - float(state.get("time") or 0)
        if state.get("host") != socket.gethostname():
            # A stamp from the future is a clock that goes wrong: it must not keep the folder closed until its time
            # comes.
            return 0 <= ago < STALE_AFTER_S
        pid = state.get("pid") or 0  # none: nobody can be told from
        if pid == os.getpid() or not process_lives(pid, state.get("process_start")):
            return False
        age = process_age(pid)
        return "process_start" in state or age is None or age > ago - 2  # a younger process has taken over the number

    def complete_checkpoints(self) -> list[int]:
        """Steps whose checkpoint carries its COMPLETE marker, ascending."""
        found = []
        for marker in self.checkpoints.glob("step-*/COMPLETE"):
            name = marker.parent.name.removeprefix("step-")
            if name.isdecimal():
                found.append(int(name))
        return sorted(found)

    # ---- the resolved configuration
    def save_config(self, recipe: Recipe) -> None:
        header = f"# Everything resolved. Repeat this run: aifactory train run.yaml --run-dir NEW. {yaml_text.ENDS}\n"
        write_atomic(self.config_file, header + yaml_text.dump(to_tree(recipe), explicit_end=True))

    def load_config(self) -> Recipe:
        if not self.config_file.is_file():
            raise UserError("is not a run folder: it has no run.yaml", where=str(self.path))
        return read_run_config(self.config_file)


def open_run(name_or_path: str) -> RunFolder:
    """An existing run, by path or by its name below ``runs/``."""
    for candidate in (Path(name_or_path), Path("runs") / name_or_path):
        if (candidate / "run.yaml").is_file():
            return RunFolder(candidate)
    known = sorted(p.parent.name for p in Path("runs").glob("*/run.yaml"))
    from aifactory_train.core.errors import did_you_mean

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
