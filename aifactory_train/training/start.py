"""One rank of one attempt, from the command line to its exit code: protect, join the others, claim the folder, train,
end.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import EXIT_FAILED, RunFailed, UserError
from aifactory_train.core.output import note
from aifactory_train.parallel.world import World, from_main, join_world, leave_alone, leave_world, leaves_alone
from aifactory_train.private.profile import enforce
from aifactory_train.record import trackers
from aifactory_train.record.events import Listener
from aifactory_train.run.folder import RunFolder, default_run_dir
from aifactory_train.run.opening import open_for_training
from aifactory_train.run.outcome import Attempt, new_attempt
from aifactory_train.run.ownership import Owner, process_age
from aifactory_train.training.step_profile import StepProfiler
from aifactory_train.training.stopping import StopChannels
from aifactory_train.training.trainer import Trainer


def train(
    recipe: Recipe,
    folder: Path | None,
    *,
    resume: str | None = None,
    quiet: bool = False,
    attempt: int | None = None,
    stop_at: float | None = None,
    listeners: Sequence[Listener] = (),
    profile: str | None = None,
) -> int:
    """Train ``recipe`` in ``folder`` as one of the ranks that the launcher started; returns the exit code.

    ``attempt`` is the launcher's number of this attempt (default: the next one), ``stop_at`` the end of the allocation
    in seconds since the epoch. ``listeners`` hear the run's events (:mod:`aifactory_train.record.events`) on this rank,
    ``profile`` names the steps of which is recorded where their time goes.
    """
    trackers.check(recipe)
    protected = enforce(recipe, folder)  # before anything is read or written
    stop = StopChannels(stop_at)  # first: a signal that comes while things are loaded must not be lost
    world = join_world(recipe.parallel.timeout_s, recipe.parallel.threads)
    code = None
    try:
        code = _train_as(world, recipe, folder, stop, protected, resume, quiet, attempt, tuple(listeners), profile)
        return code
    except BaseException as error:
        if leaves_alone(world):  # the outcome is written
            _end_alone(world, error)
        raise
    finally:
        leave_world(code)


def _end_alone(world: World, error: BaseException) -> NoReturn:
    """End this failed rank without the others, saying what the command line would have said."""
    from aifactory_train.cli import report_fault

    if isinstance(error, UserError) and not isinstance(error, RunFailed) and not world.is_main:
        leave_alone(error.exit_code)  # every rank meets the same refusal, and rank 0 prints it
    if isinstance(error, SystemExit):
        leave_alone(error.code if isinstance(error.code, int) else EXIT_FAILED)
    code = EXIT_FAILED
    try:
        code = report_fault("train", error)
    except BaseException:  # what only a traceback explains
        sys.excepthook(type(error), error, error.__traceback__)
    leave_alone(code)


def _train_as(
    world: World,
    recipe: Recipe,
    folder: Path | None,
    stop: StopChannels,
    protected: Any,
    resume: str | None,
    quiet: bool,
    attempt: int | None,
    listeners: tuple[Listener, ...],
    profile: str | None,
) -> int:
    """One rank's attempt. A function of its own: on return nothing holds the process groups any more
    (`leave_world`).
    """
    # The default name holds the time: one rank decides.
    run = RunFolder(from_main(world, lambda: folder or default_run_dir(recipe, None)))
    device = world.device if world.size > 1 else "alone"
    owner = Owner(run.path, attempt)
    who: dict[str, Any] = {"timeout_s": recipe.parallel.timeout_s, "device": device}
    who |= {"ranks": world.size, "local_size": world.local_size}
    with owner, Attempt(run, world.rank, world.local_rank, attempt, **who) as record:
        resume_from = from_main(world, lambda: open_for_training(run, resume, recipe, owner))
        record.training = True
        if attempt is None:
            record.begin(from_main(world, lambda: new_attempt(run)))
        if world.is_main:
            # The launcher has dealt with earlier requests before it began this attempt. By hand, a later start is the
            # newer word.
            age = process_age(os.getpid())
            started = record.started if age is None else time.time() - age
            stop.watch_file(run.stop_file, None if record.closed_by_launcher else started, world.size)
        try:
            hears = [*listeners, *([StepProfiler(profile, run, world)] if profile is not None else [])]
            trainer = Trainer(recipe, run, world, stop, record, resume, resume_from, quiet, owner, protected, hears)
            record.code = trainer.run_to_end()
        finally:
            if world.is_main and not record.closed_by_launcher:
                _take_stop(run, record)
    return record.code


def _take_stop(run: RunFolder, record: Attempt) -> None:
    """Where no launcher closes the attempt: the request to stop is answered, and kept with the attempt. Under a
    launcher the file stays for what judges the attempt, or a stop would look like the end of the time and the run would
    go on."""
    try:
        if record.folder is not None and run.stop_file.exists():
            os.replace(run.stop_file, record.folder / "stop-request.txt")
    except OSError as error:
        note(f"{run.stop_file}: {error.strerror}")
