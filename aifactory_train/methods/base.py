"""The protocol of a training method, and what a method may know of the run.

A method never sees the trainer. It is given a :class:`RunContext` once, before the first step, and a
:class:`StepContext` at every step; both are frozen. A step is its documents: which ones, and what they count, is known
before a rank is asked, so that ranks, packing, accumulation and engine do not change the curve. Documents that do not
exist before the step (rollouts) are made in
:meth:`TrainingMethod.before_step` as a pure function of seed, step and prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

    from aifactory_train.config.schema import Recipe
    from aifactory_train.data import PreparedData, Sampler
    from aifactory_train.model.precision import Precision
    from aifactory_train.parallel.engine import DeviceBatch, Engine
    from aifactory_train.parallel.world import World
    from aifactory_train.run.folder import RunFolder


@dataclass(frozen=True)
class RunContext:
    """What stays the same while a run trains. ``beat(phase)`` tells the watchdog that this rank is alive and what it
    does.
    """

    recipe: Recipe
    folder: RunFolder
    world: World
    data: PreparedData  # as the method's view gave it
    sampler: Sampler
    engine: Engine
    precision: Precision
    total_steps: int
    pad_id: int
    beat: Callable[[str], None]


@dataclass(frozen=True)
class StepContext:
    """One optimizer step: ``step`` are the steps done before it, ``documents`` int ``[K]`` the documents (or units) of
    all ranks.
    """

    run: RunContext
    step: int
    documents: np.ndarray


@dataclass(frozen=True)
class MadeDocuments:
    """Documents that a method made for a step in place of those that were dealt: int ``[K]``, the tokens of each and
    the supervised ones among them. They are numbered from 0, the same on all ranks.
    """

    lengths: np.ndarray
    supervised: np.ndarray


class TrainingMethod(Protocol):
    """What a method adds to data, batches and steps. :class:`~aifactory_train.methods.supervised.Supervised` is the
    plain form of each.
    """

    def view(self, data: PreparedData) -> PreparedData:
        """The prepared data as the loop sees it. Raises :class:`UserError` for rows that this method cannot use."""

    def begin(self, run: RunContext) -> None:
        """While the model is as it is before the first step, also in an attempt that goes on from a checkpoint;
        collective.
        """

    def prepare(self, run: RunContext, *, resumed: bool) -> list[tuple[str, str, str]]:
        """Before the first step of this attempt; collective. Returns ``(what, choice, why)`` lines for the start-up
        report.
        """

    def before_step(self, step: StepContext) -> None:
        """Once an optimizer step, on all ranks, before its batches are made; collective."""

    def made(self, step: StepContext) -> MadeDocuments | None:
        """What the step computes where :meth:`before_step` made its documents; None: those of ``step``."""

    def batch(self, step: StepContext, share: np.ndarray) -> DeviceBatch:
        """The documents ``share`` of one micro-batch as tensors on this rank's device, with the objective that their
        loss needs.
        """

    def units(self, supervised: int) -> int:
        """What the summed loss of the step is divided by, over all ranks; ``supervised`` are its supervised tokens."""

    def figures(self) -> dict[str, float]:
        """What the finished step adds to metrics.jsonl, summed over all ranks; collective."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides the step's number, as JSON values."""

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
