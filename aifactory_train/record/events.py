"""What the loop says while it runs: typed events, and the bus that hands them to listeners.

The trainer emits events and knows nobody who listens; record, metrics log, trackers, progress line and run state listen
and are never given the trainer. Listeners take no part in collectives, and one that fails never ends a run: its error
is said once, and it hears the next event all the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from aifactory_train.data import PreparedData, Shares
    from aifactory_train.model.report import ModelReport


@dataclass(frozen=True)
class PhaseBegan:
    """This rank begins ``phase`` of the step after ``step``; the watchdog's sign of life."""

    step: int
    phase: str


@dataclass(frozen=True)
class RunStarted:
    """Everything is built and nothing is trained yet. ``step`` is the step that the run goes on after, ``devices`` are
    ``(host, device)`` of every rank, ``protection`` is what the privacy profile put into force."""

    step: int
    total_steps: int
    data: PreparedData
    report: ModelReport
    model_config: dict[str, Any]
    engine: str
    precision: str
    devices: Sequence[tuple[str, dict[str, Any]]]
    protection: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepDone:
    """An optimizer step: its metrics, its documents (int ``[K]``), how they were shared out (rank, micro-batch), and
    the tokens of each (int ``[K]``) where they are at hand. ``made``: tokens of each document that ``shares`` deal out,
    where the method made them for this step."""

    metrics: dict[str, Any]
    documents: Any
    shares: Shares
    last: bool = False
    lengths: Any = None
    made: Any = None


@dataclass(frozen=True)
class Evaluated:
    """Held-out figures; ``when`` is before, during or after."""

    when: str
    figures: dict[str, Any]
    step: int


@dataclass(frozen=True)
class VerdictReached:
    """What the held-out figures come to, in words (:class:`aifactory_train.evaluation.verdict.Verdict` as plain
    values)."""

    verdict: dict[str, Any]


@dataclass(frozen=True)
class Incident:
    """The guard left a step out; ``metrics`` is the row of metrics.jsonl that stands for it."""

    action: str
    step: int
    why: str
    documents: Any
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """A checkpoint of ``step`` is complete (``whole``), or its background save has begun."""

    step: int
    whole: bool


@dataclass(frozen=True)
class Exported:
    """The export, with its paths and the verdict of the gate."""

    result: dict[str, Any]


@dataclass(frozen=True)
class RunEnded:
    """The last event of an attempt: ``state`` is finished, stopped or failed."""

    state: str
    reason: str | None = None


Event = PhaseBegan | RunStarted | StepDone | Evaluated | VerdictReached | Incident | Saved | Exported | RunEnded


class Listener(Protocol):
    """Hears every event of a run, on every rank that it was added on."""

    def hear(self, event: Event) -> None: ...


class EventBus:
    """Hands each event to its listeners, in the order in which they were added. ``over`` tells that the run folder
    belongs to another process by now: then nothing is said any more, for what listeners write would stand among its
    rows and events."""

    def __init__(self, *listeners: Listener, over: Callable[[], bool] = lambda: False):
        self.listeners, self.over = list(listeners), over
        self._failed: set[tuple[str, str]] = set()

    def add(self, listener: Listener) -> None:
        self.listeners.append(listener)

    def emit(self, event: Event) -> None:
        """Give ``event`` to every listener; an error of one is said once for each kind of event and ends nothing."""
        if not isinstance(event, PhaseBegan) and self.over():
            return
        for listener in self.listeners:
            try:
                listener.hear(event)
            except Exception as error:
                who, what = type(listener).__name__, type(event).__name__
                if (who, what) not in self._failed:
                    self._failed.add((who, what))
                    text = f"{who} failed at {what} and goes on: {type(error).__name__}: {redacted(error)}"
                    print(text, file=sys.stderr, flush=True)


def redacted(error: BaseException) -> str:
    """The error's text without values of rows, where the privacy profile withholds them."""
    from aifactory_train.private import redact

    return redact.message(error)
