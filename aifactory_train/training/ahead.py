"""The next step's documents, dealt out, collated and copied to pinned memory by a thread while the device works on this
one.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from aifactory_train.data import Cursor, Shares
from aifactory_train.methods.base import RunContext, StepContext, TrainingMethod
from aifactory_train.methods.supervised import Supervised
from aifactory_train.parallel.batches import shares_of

if TYPE_CHECKING:
    from aifactory_train.parallel.engine import DeviceBatch


@dataclass(frozen=True)
class ReadyStep:
    """One step, a function of its number and the cursor before it alone.

    shares: ``[rank][micro] -> documents``; batches: this rank's, or None where the method makes them when the step
    begins; following: the cursor behind it; lengths: tokens of each document; supervised, tokens: of all ranks;
    epochs: how many are done after it.
    """

    context: StepContext
    shares: Shares
    batches: list[DeviceBatch] | None
    following: Cursor
    lengths: np.ndarray
    supervised: int
    tokens: int
    epochs: float
    #: tokens of each document that ``shares`` deal out, where the method made them; else they are the data set's
    made: np.ndarray | None = None


class StepsAhead:
    """Hands out steps one after the other, and makes the following one meanwhile.

    Only what is handed out counts: where the loop goes back to a checkpoint, what was made ahead is thrown away, and
    the cursor that a checkpoint keeps is the loop's own. A method that does something before a step
    (:meth:`TrainingMethod.before_step`) makes its batches after it, in the loop.
    """

    def __init__(self, run: RunContext, method: TrainingMethod):
        self.run, self.method = run, method
        self.batches_too = getattr(type(method), "before_step", None) is Supervised.before_step
        self._wanted: tuple[int, Cursor] | None = None
        self._made: ReadyStep | BaseException | None = None
        self._thread: threading.Thread | None = None

    def take(self, step: int, cursor: Cursor) -> ReadyStep:
        """The step after ``step`` steps, whose documents begin at ``cursor``; raises what went wrong with it."""
        self.close()
        made, self._made = self._made, None
        if self._wanted != (step, cursor) or made is None:
            made = self._make(step, cursor)
        if isinstance(made, BaseException):
            raise made
        if step + 1 < self.run.total_steps:
            self._wanted = (step + 1, made.following)
            self._thread = threading.Thread(target=self._prepare, args=self._wanted, name="next-step", daemon=True)
            self._thread.start()
        return made

    def begun(self, ready: ReadyStep) -> ReadyStep:
        """``ready`` once the method has done what comes before the step, with the documents that it made for it dealt
        out as others are. Collective."""
        self.method.before_step(ready.context)
        made = self.method.made(ready.context)
        if made is None:
            return ready
        documents = np.arange(len(made.lengths))
        return replace(
            ready,
            shares=self._deal(documents, made.lengths),
            lengths=made.lengths,
            supervised=int(made.supervised.sum()),
            tokens=int(made.lengths.sum()),
            made=made.lengths,
        )

    def close(self) -> None:
        """Until the thread has ended: nothing is made any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _prepare(self, step: int, cursor: Cursor) -> None:
        try:
            if self.run.world.device != "cpu":
                torch.cuda.set_device(
                    self.run.world.device
                )  # a thread begins with the first GPU, which is another rank's
            self._made = self._make(step, cursor)
        except BaseException as error:  # told to the loop when it wants the step
            self._made = error

    def shares(self, cursor: Cursor) -> tuple[np.ndarray, Cursor, Shares]:
        """(documents of the step at ``cursor``, the cursor behind it, ``[rank][micro] -> documents``)."""
        documents, following = self.run.sampler.step(cursor)
        return documents, following, self._deal(documents, self.run.data.train.lengths)

    def _deal(self, documents: np.ndarray, lengths: np.ndarray) -> Shares:
        run = self.run
        return shares_of(run.recipe, documents, lengths, run.engine.dims.data_ranks, run.world.device)

    def _make(self, step: int, cursor: Cursor) -> ReadyStep:
        run, train_set = self.run, self.run.data.train
        documents, following, shares = self.shares(cursor)
        context, lengths = StepContext(run, step, documents), train_set.lengths[documents]
        mine = shares[run.engine.dims.data_rank(run.world.rank)]
        return ReadyStep(
            context=context,
            shares=shares,
            batches=[self.method.batch(context, share) for share in mine] if self.batches_too else None,
            following=following,
            lengths=lengths,
            supervised=int(train_set.supervised[documents].sum()),
            tokens=int(lengths.sum()),
            epochs=following.epoch + following.position / len(run.sampler.order(following.epoch)),
        )
