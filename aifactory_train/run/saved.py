"""Whether a run ever completed a checkpoint: what decides between starting at step 1 and refusing to. Standard library
only.

``saved.json`` in the run folder is written after each complete checkpoint. It outlives ``checkpoints/``: a run whose
checkpoints were damaged or lost must never look like one that was killed before its first save.
"""

from __future__ import annotations

import json
import os
import time

from aifactory_train.core.files import misfit, object_or_nothing, write_json
from aifactory_train.run.folder import RunFolder

SAVED = "saved.json"


def note_saved(run: RunFolder, step: int) -> None:
    """The checkpoint of ``step`` is complete."""
    write_json(run.path / SAVED, {"step": step, "time": time.time()})


def evidence(run: RunFolder) -> str | None:
    """What shows that the run had completed a checkpoint; None where nothing does.

    Runs of the first version have no ``saved.json``: folders of checkpoints, whole or not, and attempts that ended
    well, or began after a step, tell it as well.
    """
    path = run.path / SAVED
    if os.path.lexists(path):  # whatever it is by now: it was written
        step = object_or_nothing(path).get("step")
        return f"{SAVED}: the checkpoint of step {step} was complete" if step else f"{SAVED} is there, but damaged"
    # A folder gets its name when its checkpoint is complete; a save that was cut short lies in .writing-step-N.
    named = [p for kind in ("step-", "damaged-step-", "left-step-") for p in run.checkpoints.glob(f"{kind}*")]
    if named:
        return f"{run.checkpoints.name}/{sorted(p.name for p in named)[0]}"
    for number in run.attempts():
        for outcome in sorted(run.attempt_dir(number).glob("outcome-*.json")):
            told = object_or_nothing(outcome)
            ranks = told.get("ranks")  # of a file that one rank wrote for its node
            every = [told, *(ranks.values() if isinstance(ranks, dict) else ())]
            if any(isinstance(one, dict) and one.get("status") == "stopped" for one in every):
                return f"attempt {number} stopped with a checkpoint"
    record = object_or_nothing(run.path / "record.json")
    if misfit(record, {"compute": {"attempts": dict}}) is None:
        for name, attempt in record["compute"]["attempts"].items():
            if isinstance(attempt, dict) and attempt.get("first_step"):
                return f"attempt {name} went on after step {attempt['first_step']}"
    return _steps_beyond_a_save(run)


def missing_after(run: RunFolder, newest: int) -> str | None:
    """What became of a later checkpoint than ``newest`` that was complete once; None where there was none, or it was
    set aside.
    """
    step = object_or_nothing(run.path / SAVED).get("step")
    if not isinstance(step, int) or step <= newest or any(run.checkpoints.glob(f"*-step-{step}*")):
        return None
    return f"the checkpoint of step {step} was complete ({SAVED}) and is no longer in {run.checkpoints}"


def _steps_beyond_a_save(run: RunFolder) -> str | None:
    """Steps after the second save was due, which waits for the first and ends the run if that failed."""
    every = run.load_config().checkpoint.every_steps
    made = run.state().get("step") or 0
    if run.metrics_file.is_file():
        for line in run.metrics_file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                made = max(made, json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                continue  # the line that was being written when the run was killed
    if every and made > 2 * every:
        return f"{made} steps were made, and checkpoints were due every {every}"
    return None


def damage(run: RunFolder) -> list[str]:
    """What lies in ``checkpoints/`` that is no complete checkpoint, one line each."""
    found = []
    for path in sorted(run.checkpoints.glob("*step-*")):
        if path.name.startswith("step-"):
            found.append(f"{path}: has no COMPLETE marker")
        elif not path.name.startswith("."):
            found.append(f"{path}: was set aside")
    return found or [f"{run.checkpoints}: {'is empty' if run.checkpoints.is_dir() else 'is missing'}"]
