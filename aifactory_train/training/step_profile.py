"""``aifactory train --profile``: where the time of some steps goes, by phase and operator, on every rank.

A listener: the phases that the loop announces are the profiler's own, and ``backward`` begins where torch's does. Only
while the asked steps run is anything recorded, and the host waits for the device where a phase ends, so that a phase is
what the device did in it. What was found lies in ``profile/`` of the run folder (:mod:`~.step_profile_page`).
"""

from __future__ import annotations

import math
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from aifactory_train.core.files import write_json
from aifactory_train.core.output import note
from aifactory_train.record.events import Event, PhaseBegan, RunEnded, RunStarted, StepDone
from aifactory_train.run.profiled_steps import steps_asked

if TYPE_CHECKING:
    from aifactory_train.parallel.world import World
    from aifactory_train.run.folder import RunFolder

#: Steps of an attempt before those that ``--profile COUNT`` records: they compile, and fill caches.
WARM_UP = 3
#: Before the names of phases in the trace.
MARK = "aifactory."
#: The phases of a step in the order in which they come; what is announced besides lies between steps.
PHASES = ("fetch", "forward", "backward", "reduce", "update")
#: In the names of what waits for other ranks.
COLLECTIVE = ("c10d", "nccl", "gloo", "record_param_comms")
OUTSIDE = "outside operators (Python, waiting)"


@dataclass
class Recorded:
    """What one rank recorded: seconds of each phase by step, and of the steps themselves."""

    phases: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    between: dict[str, float] = field(default_factory=dict)


class StepProfiler:
    """Records the steps that ``asked`` names (as ``metrics.jsonl`` counts them), and writes what it found."""

    def __init__(self, asked: str, run: RunFolder, world: World):
        self.asked, self.run, self.world = steps_asked(asked), run, world
        self.folder = run.path / "profile"
        self.first, self.last = 0, -1
        self.found = Recorded()
        self.plain: list[float] = []  # seconds of the steps that were not recorded
        self._profiler: Any = None
        self._mark: Any = None
        self._phase, self._since = "", 0.0
        self._now: dict[str, float] = {}
        self._starting = 0.0  # seconds that the profiler took to start, which are no part of the step
        self._backward: Callable[..., Any] | None = None

    # ---- what the loop says

    def hear(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._settle(event.step, event.total_steps)
        elif isinstance(event, PhaseBegan):
            if event.phase == PHASES[0] and event.step + 1 == self.first:
                self._start()
            if self._profiler is not None:
                self._enter(event.phase)
        elif isinstance(event, StepDone):
            self._step_done(int(event.metrics["step"]), float(event.metrics["seconds"]))
        elif isinstance(event, RunEnded):
            if self._profiler is not None:
                self._stop()
            if self.world.is_main and self.found.seconds:
                from aifactory_train.training.step_profile_page import write_page

                note(f"where the steps' time went: {write_page(self.folder, self.run, self.world.size)}")

    def _settle(self, done: int, total: int) -> None:
        if isinstance(self.asked, tuple):
            self.first, self.last = self.asked
        else:
            self.first = min(done + WARM_UP + 1, max(done + 1, total - self.asked + 1))
            self.last = self.first + self.asked - 1
        wanted, self.last = self.last, min(self.last, total)
        if not self.world.is_main:
            return
        if self.first > total or self.first <= done:
            note(f"--profile: nothing is recorded, this attempt makes the steps {done + 1} to {total}")
        elif self.last < wanted:
            note(f"--profile: the run has {total} steps, those from {self.first} on are recorded")

    def _step_done(self, step: int, seconds: float) -> None:
        if self._profiler is None:
            self.plain.append(seconds)
            return
        self._leave()
        self.found.seconds.append(seconds - self._starting)
        self._starting = 0.0
        self.found.phases.append({name: self._now.get(name, 0.0) for name in PHASES})
        for name in self._now.keys() - set(PHASES):
            self.found.between[name] = self.found.between.get(name, 0.0) + self._now[name]
        self._now = {}
        if step >= self.last:
            self._stop()

    # ---- recording

    def _start(self) -> None:
        began = time.perf_counter()
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU]
        if self.world.device != "cpu":
            kinds.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self.folder.mkdir(parents=True, exist_ok=True)
        before = torch.Tensor.backward

        def backward(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._enter("backward")
            return before(tensor, *args, **kwargs)

        self._backward = before
        torch.Tensor.backward = backward  # type: ignore[method-assign, assignment]
        self._profiler = profile(activities=kinds, with_flops=True, record_shapes=True)
        self._profiler.start()
        self._starting = time.perf_counter() - began

    def _enter(self, phase: str) -> None:
        self._leave()
        self._phase = phase
        self._mark = torch.profiler.record_function(MARK + phase)
        self._mark.__enter__()

    def _leave(self) -> None:
        if self.world.device != "cpu":
            torch.cuda.synchronize(self.world.device)
        now = time.perf_counter()
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None
            self._now[self._phase] = self._now.get(self._phase, 0.0) + now - self._since
        self._since = now

    def _stop(self) -> None:
        self._leave()
        profiler, self._profiler = self._profiler, None
        assert self._backward is not None
        torch.Tensor.backward = self._backward  # type: ignore[method-assign, assignment]
        profiler.stop()
        rank = self.world.rank
        if self.world.device != "cpu":
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory-rank-{rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        if not self.found.seconds:
            return  # the run ended within the first of them
        profiler.export_chrome_trace(str(self.folder / f"trace-rank-{rank}.json.gz"))
        write_json(self.folder / f"rank-{rank}.json", self._table(list(profiler.events())))

    def _table(self, events: list[Any]) -> dict[str, Any]:
        """What the page is made of, as JSON values; seconds are those of a mean step."""
        steps = len(self.found.seconds)
        items = by_phase(events, device=self.world.device != "cpu")
        phases = {name: sum(step[name] for step in self.found.phases) / steps for name in PHASES}
        busy = sum(i["seconds"] for i in items if not any(word in i["operator"] for word in COLLECTIVE)) / steps
        for item in items:
            for key in ("seconds", "flop", "calls"):
                item[key] /= steps
        for name, seconds in phases.items():
            rest = seconds - sum(item["seconds"] for item in items if item["phase"] == name)
            if rest > 0:
                items.append({"phase": name, "operator": OUTSIDE, "seconds": rest, "flop": 0.0, "calls": 0.0})
        items.sort(key=lambda item: -item["seconds"])
        return {
            "rank": self.world.rank,
            "host": socket.gethostname(),
            "device": self.world.device,
            "first": self.last - steps + 1,
            "last": self.last,
            "seconds": sum(self.found.seconds) / steps,
            "plain_seconds": statistics.median(self.plain) if self.plain else None,
            "phases": phases,
            "between": {name: seconds / steps for name, seconds in self.found.between.items()},
            "busy": busy,
            "product_flops": product_rate(self.world.device, items),
            "items": items[:40],
        }


def by_phase(events: list[Any], *, device: bool) -> list[dict[str, Any]]:
    """Seconds, FLOPs and calls of each operator in each phase, of all recorded steps together: what the operator did
    itself, on the device (``device``) or the host, in the phase in which it was called."""
    spans = sorted(
        (e.time_range.start, e.time_range.end, e.name.removeprefix(MARK))
        for e in events
        if e.name.startswith(MARK) and e.device_type == torch.autograd.DeviceType.CPU
    )
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for event, phase in _within(events, spans):
        own = event.self_device_time_total if device else event.self_cpu_time_total
        empty = {"phase": phase, "operator": event.name, "seconds": 0.0, "flop": 0.0, "calls": 0.0}
        row = found.setdefault((phase, event.name), empty)
        row["seconds"] += own * 1e-6
        row["flop"] += event.flops or _linear_flops(event)
        row["calls"] += 1
    return list(found.values())


def _linear_flops(event: Any) -> float:
    """Of oneDNN's linear layer, which torch does not count: input ``[..., K]``, weight ``[N, K]``."""
    if event.name != "mkldnn::_linear_pointwise" or len(event.input_shapes or ()) < 2:
        return 0.0
    given, weight = event.input_shapes[:2]
    return 2.0 * math.prod(given) * weight[0] if given and weight else 0.0


def _within(events: list[Any], spans: list[tuple[float, float, str]]) -> Iterator[tuple[Any, str]]:
    """Operators that were called in one of ``spans``, with its phase of a step."""
    calls = sorted(
        (e for e in events if e.device_type == torch.autograd.DeviceType.CPU and not e.name.startswith(MARK)),
        key=lambda e: e.time_range.start,
    )
    at = 0
    for event in calls:
        while at < len(spans) and spans[at][1] < event.time_range.start:
            at += 1
        if at < len(spans) and spans[at][0] <= event.time_range.start and spans[at][2] in PHASES:
            yield event, spans[at][2]


def product_rate(device: str, items: list[dict[str, Any]]) -> float | None:
    """FLOP/s of one square fp32 (CPU) or bf16 (GPU) product here and now, which is the floor of what multiplies
    matrices; None where nothing did."""
    if not any(item["flop"] for item in items):
        return None
    size, kind = (768, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    with _no_grad(device):
        a = torch.randn(size, size, dtype=kind, device=device)
        seconds = []
        for _ in range(5):
            if device != "cpu":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            a @ a
            if device != "cpu":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


@contextmanager
def _no_grad(device: str) -> Iterator[None]:
    """Without gradients, and without moving the run's random numbers."""
    with torch.no_grad(), torch.random.fork_rng([] if device == "cpu" else [device]):
        yield
