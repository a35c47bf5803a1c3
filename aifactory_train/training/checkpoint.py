"""Checkpoints: what a run needs to go on exactly where it was, on any number of ranks and under any engine.

One folder a checkpoint, ``checkpoints/step-N``:

    state-00000.safetensors …  of one rank: the boxes of trained parameters and optimizer moments that it wrote, and its
                               random-number states
    metadata.json              global shape and type of every tensor, and which files hold it
    trainer.json               step, data cursor, counters, and the whole configuration
    COMPLETE                   written last: size and SHA-256 of every file above, and of itself

The folder is written beside (``.writing-step-N``) and renamed when COMPLETE is in it: a reader sees all of it or
nothing. The files are those of ``parallel/storage.py``; what may change between attempts is in ``parallel/changes.py``.
See docs/checkpoints.md.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from aifactory_train.config.loading import to_tree
from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.core.output import note
from aifactory_train.parallel.changes import check_changes, config_digest
from aifactory_train.parallel.state import Sharded, patience
from aifactory_train.parallel.storage import (
    DTYPES,
    FORMAT,
    MARKER,
    faults,
    gather_layout,
    json_bytes,
    read_marker,
    read_state,
    read_tree,
    self_digest,
    steps_in,
    sync_folder,
    write_file,
    write_state,
)
from aifactory_train.training.random_state import (
    RANDOM,
    packed_random_state,
    random_state,
    read_random_state,
    set_random_state,
)
from aifactory_train.training.staging import Staging

if TYPE_CHECKING:
    from aifactory_train.parallel.engine import Engine
    from aifactory_train.parallel.world import World


class SaveFailed(RunFailed):
    """A checkpoint could not be written; earlier ones are as they were."""


class Checkpointer:
    """Saves and loads the checkpoints of one run; every method is called by all ranks at the same place."""

    def __init__(
        self,
        checkpoints: Path,
        recipe: Recipe,
        engine: Engine,
        world: World,
        completed: Callable[[int], None] | None = None,
    ):
        """``completed``: called on rank 0 with the step of each checkpoint once it is complete."""
        self.path, self.engine, self.world = checkpoints, engine, world
        self.completed = completed
        self.settings = recipe.checkpoint
        self.seed = recipe.train.seed
        self.tree = to_tree(recipe)
        # A group of its own: the background save must not meet the training's collectives.
        self.group = dist.new_group(
            backend="gloo", timeout=patience(engine.state()["model"], recipe.parallel.timeout_s)
        )
        self.durations: list[float] = []  # seconds of finished saves, staging included
        self.saved: set[int] = set()  # steps saved by this process
        self._staging = Staging(world.device)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    # ---- agreement within the checkpoint group

    def _all(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _sum(self, value: int) -> int:
        total = torch.tensor(value)
        dist.all_reduce(total, group=self.group)
        return int(total)

    def _main(self, what: str, function: Callable[[], Any]) -> Any:
        """Run on rank 0; its failure is raised on every rank."""
        box: list[Any] = [None, None]
        if self.world.is_main:
            try:
                box[0] = function()
            except UserError as error:
                box[1] = error
            except OSError as error:
                box[1] = SaveFailed(f"{what}: {error.strerror or error}", where=str(error.filename or self.path))
        dist.broadcast_object_list(box, src=0, group=self.group)
        if box[1] is not None:
            raise box[1].of(0)
        return box[0]

    # ---- save

    def prepare(self) -> None:
        """Before the first step: the folder can be written, and what torn saves left is removed."""

        def check() -> None:
            self.path.mkdir(parents=True, exist_ok=True)
            for left in [*self.path.glob(".writing-step-*"), *self.path.glob(".deleting-step-*")]:
                note(f"removing {left}: a save or a deletion did not end")
                shutil.rmtree(left)
            probe = self.path / f".probe-{os.getpid()}"
            probe.write_bytes(b"writable")
            probe.unlink()

        try:
            self._main("checkpoints cannot be written", check)
        except SaveFailed as error:
            raise UserError(
                error.what, where=error.where, fix="free space, repair the permissions, or --run-dir ELSEWHERE"
            ) from None

    def save(self, step: int, trainer: dict[str, Any], *, wait: bool, best: int | None = None) -> None:
        """Save ``step``; returns when this rank's state is copied (``wait``: when the checkpoint is complete).

        ``trainer`` are JSON values (cursor, counters). An earlier save is waited for first. Raises :class:`SaveFailed`.
        """
        self.wait()
        if step in self.saved:
            return
        started = time.monotonic()
        staged = self._staging.copies(flat_state(self.engine))
        random = random_state(self.world.device)
        values = {"step": step, "updates": self.engine.updates, **trainer, "config": self.tree}

        def work() -> None:
            try:
                self._write(step, staged, random, values, best)
                self.saved.add(step)
                self.durations.append(time.monotonic() - started)
            except BaseException as error:
                self._error = error

        if wait or not self.settings.asynchronous:
            work()
            self._raise()
            return
        self._thread = threading.Thread(target=work, name=f"save-step-{step}", daemon=True)
        self._thread.start()

    def _write(
        self, step: int, staged: dict[str, Sharded], random: dict[str, Any], values: dict[str, Any], best: int | None
    ) -> None:
        beside, final = self.path / f".writing-step-{step}", self.path / f"step-{step}"
        packed = packed_random_state(random)
        needed = self._sum(sum(entry.nbytes() for entry in staged.values()) + packed.numel())

        def begin() -> None:
            self.path.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path).free
            if free < needed:
                raise SaveFailed(
                    f"no space for the checkpoint of step {step}: {needed:,} bytes needed, {free:,} free",
                    where=str(self.path),
                )
            if beside.exists():
                shutil.rmtree(beside)
            beside.mkdir()

        self._main("the checkpoint cannot be started", begin)
        files = self._write_files(step, beside, staged, packed, values)

        def finish() -> None:
            marker = {
                "format": FORMAT,
                "step": step,
                "engine": self.engine.name,
                "world_size": self.world.size,
                "config_digest": config_digest(self.tree),
                "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "torch": torch.__version__,
                "files": files,
            }
            marker["sha256"] = self_digest(marker)
            write_file(beside / MARKER, iter([json_bytes(marker)]))
            sync_folder(beside)
            if final.exists():  # an older one of the same step (damaged, or left behind by a roll-back)
                os.rename(final, self.path / f".deleting-step-{step}")
            os.rename(beside, final)
            sync_folder(self.path)
            if self.completed is not None:
                self.completed(step)
            self._prune(step, best)

        self._main("the checkpoint cannot be completed", finish)

    def _write_files(
        self, step: int, beside: Path, staged: dict[str, Sharded], packed: torch.Tensor, values: dict[str, Any]
    ) -> dict[str, Any]:
        """Every rank writes its file, rank 0 what describes them all. Returns on rank 0 ``files`` of the marker."""
        own: dict[str, Any] = {}
        trouble = None
        try:
            own |= write_state(beside, self.world.rank, staged, {RANDOM: packed})
        except OSError as error:
            trouble = self._describe(error)
        self._raise_any(trouble, step, beside)
        try:
            layout = gather_layout(staged, self.group)
            if self.world.is_main:
                own["metadata.json"] = write_file(beside / "metadata.json", iter([json.dumps(layout).encode()]))
                own["trainer.json"] = write_file(beside / "trainer.json", iter([json_bytes(values)]))
        except RunFailed as error:
            trouble = error.what
        except OSError as error:
            trouble = self._describe(error)
        self._raise_any(trouble, step, beside)
        parts: list[Any] | None = [None] * self.world.size if self.world.is_main else None
        dist.gather_object(own, parts, group_dst=0, group=self.group)
        return {name: entry for part in parts or () for name, entry in part.items()}

    def _describe(self, error: BaseException) -> str:
        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            text = error.strerror + (f": {error.filename}" if error.filename else "")
        return f"{text} (rank {self.world.rank} on {socket.gethostname()})"

    def _raise_any(self, trouble: str | None, step: int, beside: Path) -> None:
        """If any rank is in trouble, remove the torn folder and raise the same error on all."""
        if not self._sum(int(trouble is not None)):
            return
        troubles = {rank: t for rank, t in enumerate(self._all(trouble)) if t is not None}
        rank, first = min(troubles.items())
        if self.world.is_main:
            shutil.rmtree(beside, ignore_errors=True)  # its bytes may be all that is missing on a full disk
        raise SaveFailed(f"the checkpoint of step {step} could not be written: {first}", where=str(self.path)).of(rank)

    def _prune(self, newest: int, best: int | None) -> None:
        """Delete what is neither among the last ``keep`` complete checkpoints nor the best. Rank 0, after a good
        save.
        """
        for left in self.path.glob(".deleting-step-*"):
            shutil.rmtree(left)
        complete = [s for s in steps_in(self.path) if (self.path / f"step-{s}" / MARKER).is_file() and s <= newest]
        for step in complete[self.settings.keep :]:
            if step == best:
                continue
            # Renamed first: a deletion that is cut short leaves no folder that looks complete.
            doomed = self.path / f".deleting-step-{step}"
            os.rename(self.path / f"step-{step}", doomed)
            shutil.rmtree(doomed)

    def drain(self) -> None:
        """Until the background save has ended, well or not (see :meth:`failed`)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def failed(self) -> bool:
        """Whether the background save failed (on this rank; agree before acting on it)."""
        return self._error is not None

    def wait(self) -> None:
        """Until the background save has ended; raises its error."""
        self.drain()
        self._raise()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is None:
            return
        if isinstance(error, UserError):
            raise error
        raise SaveFailed(f"the checkpoint could not be written: {self._describe(error)}", where=str(self.path))

    def save_estimate(self) -> float:
        """Seconds that a save may take: the longest of the last five; 0 before the first."""
        return max(self.durations[-5:], default=0.0)

    # ---- load

    def choose(self, wanted: int | None = None) -> int | None:
        """The newest checkpoint without a fault (or ``wanted``); None where there is none at all.

        Damaged ones are named and, once an older good one is found, set aside under another name, never deleted. Raises
        :class:`UserError` where there are checkpoints but no good one (all stay where they are: the next attempt must
        find them too), or ``wanted`` is missing or damaged.
        """
        steps = self._main("checkpoints cannot be listed", lambda: steps_in(self.path))
        if wanted is not None:
            if wanted not in steps:
                known = ", ".join(map(str, sorted(steps))) or "none"
                raise UserError(f"no checkpoint of step {wanted} (there are: {known})", where=str(self.path))
            steps = [wanted]
        named: list[str] = []
        damaged: list[Path] = []
        for step in steps:
            folder = self.path / f"step-{step}"
            found = self._faults(folder)
            if not found:
                for worse in damaged if self.world.is_main else []:
                    self._set_aside(worse)
                return step
            named += found
            damaged.append(folder)
            if self.world.is_main:
                for fault in found:
                    note(f"damaged checkpoint: {fault}")
        if not steps:
            return None
        raise UserError(
            "no good checkpoint to go on from:\n    " + "\n    ".join(named),
            where=str(self.path),
            fix="the damaged checkpoints are left as they are: put good copies back; to start over use a new --name "
            "or --run-dir, "
            "or --resume never (keeps the old files in replaced/)",
        )

    def _faults(self, folder: Path) -> list[str]:
        """What is wrong with a checkpoint. One rank reads the marker, all share the files that it lists."""
        try:
            marker = self._main("the checkpoint cannot be read", lambda: read_marker(folder))
        except UserError as error:
            return [str(error)]
        mine = faults(folder, self.world.rank, self.world.size, marker)
        return [fault for part in self._all(mine) for fault in part] if self._sum(len(mine)) else []

    def leave_behind(self, step: int) -> None:
        """The run goes on from ``step``: later checkpoints, where there are any, are those of a continuation that was
        given up.

        Under their own names the next ``--resume auto`` would take them for the newest of this one. Nothing is deleted.
        """
        if self.world.is_main:
            for later in steps_in(self.path):
                if later > step:
                    self._set_aside(self.path / f"step-{later}", "left")

    def _set_aside(self, folder: Path, why: str = "damaged") -> None:
        for number in range(1000):
            target = folder.with_name(f"{why}-{folder.name}" + (f"-{number}" if number else ""))
            if not target.exists():
                try:
                    os.rename(folder, target)
                    note(f"set aside as {target}")
                except OSError as error:
                    note(f"{folder} cannot be set aside: {error.strerror}")
                return

    def values(self, step: int) -> dict[str, Any]:
        """What the trainer gave to :meth:`save` of ``step``, without touching the engine. Called by all ranks."""
        return self._main(
            "the checkpoint cannot be read", lambda: read_tree(self.path / f"step-{step}", "trainer.json")
        )

    def load(self, step: int, *, same_rates: Callable[[dict[str, Any]], bool] | None = None) -> dict[str, Any]:
        """Restore engine and random numbers from ``step``; returns the trainer's values (``cursor``, counters …).

        The configuration is compared first: a change of meaning is refused (``same_rates`` judges a prolonged run,
        given the old configuration tree). Another number of ranks or another engine is fine.
        """
        folder = self.path / f"step-{step}"
        # One rank reads: thousands would ask the file system for the same files.
        names = "trainer.json", "metadata.json"
        marker, trainer, layout = self._main(
            "the checkpoint cannot be read", lambda: (read_marker(folder), *(read_tree(folder, n) for n in names))
        )
        before = trainer.pop("config")  # kept out of what the trainer gets back
        lines = check_changes(before, self.tree, same_rates=same_rates is None or same_rates(before))
        if self.world.is_main:
            for line in lines:
                note(f"changed since the checkpoint: {line}")
        self.engine.prepare_state(trainer["updates"])
        state = flat_state(self.engine)
        self._check_shapes(state, layout, folder)
        random = self._read(folder, layout, state, marker)
        self.engine.finish_load(trainer["updates"])
        if random is not None:
            set_random_state(random, self.world.device)
        else:
            # Dropout masks depend on how documents are dealt to ranks: there is no exact continuation to restore.
            torch.manual_seed(self.seed + 1_000_003 * (step + 1) + self.world.rank)
            if self.world.is_main:
                note(f"{marker['world_size']} ranks wrote the checkpoint, {self.world.size} go on: new random numbers")
        if self.world.is_main and marker["engine"] != self.engine.name:
            note(f"engine {marker['engine']} wrote the checkpoint, {self.engine.name} goes on")
        return trainer

    def _read(
        self, folder: Path, layout: dict[str, Any], state: dict[str, Sharded], marker: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Fill ``state``; returns this rank's random numbers where as many ranks wrote them. What one rank cannot read
        is raised on all."""
        random, trouble = None, None
        try:
            read_state(folder, layout, state)
            if marker["world_size"] == self.world.size:
                random = read_random_state(folder, self.world.rank, marker["format"])
        except (UserError, OSError) as error:
            trouble = str(error) if isinstance(error, UserError) else self._describe(error)
        if self._sum(int(trouble is not None)):
            raise RunFailed(next(t for t in self._all(trouble) if t is not None), where=str(folder))
        return random

    def _check_shapes(self, state: dict[str, Sharded], saved: dict[str, Any], folder: Path) -> None:
        for name in sorted(state.keys() | saved.keys()):
            if name not in saved or name not in state:
                where = "the checkpoint" if name not in saved else "this model"
                raise UserError(f"{where} has no {name}", where=str(folder), fix="use the same model and adapter")
            shape, dtype = saved[name]["shape"], DTYPES[saved[name]["dtype"]]
            if tuple(shape) != state[name].shape:
                raise UserError(
                    f"{name} is {shape} in the checkpoint and {list(state[name].shape)} here",
                    where=str(folder),
                )
            if dtype != state[name].dtype:
                raise UserError(
                    f"{name} is {dtype} in the checkpoint and {state[name].dtype} here",
                    where="precision.parameters",
                )


def flat_state(engine: Engine) -> dict[str, Sharded]:
    """The engine's state under the names of a checkpoint: ``model/NAME`` and ``optimizer/MOMENT/NAME``."""
    state = engine.state()
    return {f"{kind}/{name}": entry for kind, entries in state.items() for name, entry in entries.items()}
