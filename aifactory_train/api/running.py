"""Training from Python: in this process, or in several ranks that are started for the caller."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aifactory_train.api.preparing import AnyRecipe, as_recipe, recipe_file
from aifactory_train.api.results import TrainedRun
from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import EXIT_DONE, EXIT_STOPPED, RunFailed, UserError
from aifactory_train.core.output import note
from aifactory_train.record.events import Event
from aifactory_train.run.folder import RunFolder, default_run_dir
from aifactory_train.sources import licences

#: Lines of several ranks that are kept for the message where they fail.
_LAST_LINES = 12


def train(
    recipe: AnyRecipe,
    *,
    name: str | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: str | int | None = None,
    ranks: int = 1,
    callbacks: Sequence[Callable[[Event], None]] = (),
    quiet: bool = False,
) -> TrainedRun:
    """Train a recipe, and wait for the end. An interrupt saves a checkpoint; ``resume="auto"`` goes on from it.

    Args:
        recipe: id or file of a recipe, or what :func:`aifactory_train.recipe` gave.
        name: the run folder is ``runs/NAME``; ``run_dir``: any other folder; default: recipe and time.
        settings: values of the recipe by dotted key, e.g. ``{"train.epochs": 2}``.
        resume: ``auto``, a step, or ``never`` (start over), for a folder that holds a stopped run.
        ranks: processes; more than one are started through torchrun on this machine, one for each GPU.
        callbacks: called with every event of the run (:data:`aifactory_train.Event`) in this process. One that raises
            is named once and ends nothing. Only with one rank: the events of others happen in other processes.
        quiet: no progress and no tables.

    Raises:
        UserError: the request is wrong, or a licence does not allow the use.
        RunFailed: the training failed; the message says why.

    >>> import aifactory_train as af
    >>> losses = []
    >>> def heard(event: af.Event) -> None:
    ...     if isinstance(event, af.StepDone):
    ...         losses.append(event.metrics["loss"])
    >>> run = af.train("recipe.yaml", name="first", callbacks=[heard], quiet=True)
    >>> run.state, len(losses)
    ('finished', 4)
    """
    found = as_recipe(recipe, settings)
    licences.gate(found)
    if ranks < 1:
        raise UserError("at least one", where="ranks")
    if ranks > 1 and callbacks:
        fix = "ranks=1, or read run.metrics while or after it trains"
        raise UserError("events of several ranks happen in other processes", where="callbacks", fix=fix)
    if name is not None and run_dir is not None:
        raise UserError("a run has one folder", where="run_dir", fix="give name or run_dir")
    folder = Path(run_dir) if run_dir is not None else default_run_dir(found, name)
    if ranks > 1:
        _in_ranks(found, folder, ranks, resume, quiet)
    else:
        _here(found, folder, resume, callbacks, quiet, name is not None or run_dir is not None)
    return TrainedRun.open(folder)


class _Callback:
    """A function as a listener of the run's events."""

    def __init__(self, function: Callable[[Event], None]):
        self.hear = function


def _here(
    recipe: Recipe,
    folder: Path,
    resume: str | int | None,
    callbacks: Sequence[Callable[[Event], None]],
    quiet: bool,
    named: bool,
) -> None:
    from aifactory_train.parallel.world import discover
    from aifactory_train.training.start import train as train_rank

    if threading.current_thread() is not threading.main_thread():
        fix = "call it there, or start a process: aifactory train, or ranks=2"
        raise UserError("signals reach the main thread alone, so training runs in it", where="train", fix=fix)
    if not named and discover()[1] > 1:
        fix = "name='…': every rank has to mean the same folder"
        raise UserError("several ranks were started from outside, and the run has no name", where="name", fix=fix)
    again = None if resume is None else str(resume)
    with _signals_put_back():
        code = train_rank(recipe, folder, resume=again, quiet=quiet, listeners=[_Callback(f) for f in callbacks])
    if code not in (EXIT_DONE, EXIT_STOPPED):
        raise RunFailed(f"the training ended with exit code {code}", where=str(folder))


@contextlib.contextmanager
def _signals_put_back() -> Iterator[None]:
    """What a training listens for is the caller's again afterwards."""
    from aifactory_train.training.stopping import SIGNALS

    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # one that Python did not install cannot be put back
                signal.signal(number, handler)


def _in_ranks(recipe: Recipe, folder: Path, ranks: int, resume: str | int | None, quiet: bool) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "aifactory_train", "train", recipe_file(recipe), "--run-dir", str(folder)]
    command += [] if resume is None else ["--resume", str(resume)]
    command += ["--quiet"] if quiet else []
    last: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
    # One thread a rank, as torchrun would set it with a line on standard error.
    env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line.rstrip())
            if not quiet:
                note(line.rstrip())
        code = process.wait()
    except BaseException:
        process.send_signal(signal.SIGINT)  # torchrun hands it on, and the ranks save
        process.wait()
        raise
    if code != 0 and RunFolder(folder).state()["state"] != "stopped":
        raise RunFailed(f"{ranks} ranks failed:\n" + "\n".join(last), where=str(folder))
