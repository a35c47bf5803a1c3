"""Every interleaving of what may end an attempt with what the attempt is doing, judged by the real book-keeping on real
files.

The trainer here is a few lines with the contract of the real one: the real channels (``StopChannels``) with a clock
that stands still until an event moves it, the real order of a step, and the files that ranks leave. The batch shell is
the rest of ``slurm.sh.j2``: what its traps write, when it leaves, and what it looks at before it hands over. The real
ones are struck at random by ``benchmarks/stops.py``.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aifactory_train.launchers.programs import attempt
from aifactory_train.launchers.stopping import ask_to_stop
from aifactory_train.training import stopping

PHASES = ("start-up", "step", "save", "close", "handover")
PERSON = ("stop", "cancel")
EVENTS = (*PERSON, "limit", "USR1", "crash", "preempt")
POLICIES = {
    "chain": {"resubmit": "chain", "links": 0},
    "requeue": {"resubmit": "requeue", "links": 0},
    "links": {"resubmit": "chain", "links": 3},
}
RESTARTS = {"time": 5, "node": 5, "crash": 5, "preempted": 5}
STEPS, EVERY = 4, 2


def book(command: Callable[[Any], int], run: Path, **more: Any) -> list[str]:
    """What ``begin`` or ``close`` prints, without a process and without parsing a command line."""
    args = {
        "restart": 0,
        "backend": "slurm",
        "gpus": 0,
        "deadline": None,
        "node_state": "",
        "shell": None,
        "reason": "",
    }
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert command(types.SimpleNamespace(run=str(run), **{**args, **more})) == 0
    return out.getvalue().split()


class Struck(Exception):
    """A rank was killed."""


class World:
    """One run folder, its jobs, and a clock."""

    def __init__(self, run: Path, policy: dict[str, Any]):
        self.run, self.now, self.job = run, 0.0, 1
        (run / "submission").mkdir(parents=True)
        (run / "submission" / "policy.json").write_text(
            json.dumps({**policy, "unattended": True, "restarts": RESTARTS})
        )
        self.asked = False
        self.saved: list[int] = []  # steps whose checkpoint was complete
        self.begun = 0
        self.seen: list[tuple[str, str]] = []  # (state, counted as) of every attempt that was judged
        self.reached = 0

    # ---- one job

    def one_job(self, events: dict[str, list[str]]) -> str:
        """Run the batch script once. Returns how the next job comes about: end, chain, next-link, requeue, or killed
        (nobody decided).
        """
        self.deadline, self.terminated, self.killed = self.now + 1000, False, False
        self.ranks: list[stopping.StopChannels] = []
        verdict, number, *_ = book(attempt.begin, self.run, job=str(self.job), world=2, nodes="a,b")
        if verdict != "go":
            return "end"
        self.begun += 1
        self.dir = self.run / "attempts" / number
        try:
            self.happens("start-up", events)
            if not (self.run / "stop").exists():
                self.train(events)
        except Struck:
            self.put("exit-1", exit_code=137, signal=9, terminated=False, ended=1.0)
            lost = {"exception": "RuntimeError", "message": "[gloo] Connection closed by peer", "ended": 2.0}
            self.put("outcome-0", status="failed", exit_code=1, step=self.reached, **lost)
        self.ranks = []
        self.happens("close", events)
        if self.killed or self.taken():
            return "killed"
        action = book(attempt.close, self.run, attempt=int(number), rc=0)[0]
        self.happens("handover", events)
        if self.killed or self.taken():
            return "killed"
        pending = attempt.pending_stop(str(self.run))
        return "end" if action != "end" and attempt.by_a_person(pending) else action

    def taken(self) -> bool:
        return self.terminated and self.now < self.deadline - 45

    def put(self, name: str, **value: Any) -> None:
        (self.dir / f"{name}.json").write_text(json.dumps(value))

    def train(self, events: dict[str, list[str]]) -> None:
        """The loop of the trainer: look in every micro-batch, agree at the boundary, save, end."""
        self.reached = attempt.latest_checkpoint(str(self.run))
        self.ranks = [stopping.StopChannels(self.deadline) for _ in range(2)]
        self.ranks[0].watch_file(self.run / "stop")
        for rank in range(2):
            self.put(f"alive-{rank}", rank=rank, step=self.reached, time=0)
        first = True
        while self.reached < STEPS:
            if first:
                self.happens("step", events)
            self.reached += 1
            self.now += 1
            reason = max((c.look(0.1) for c in self.ranks), key=stopping._REASONS.index)
            if reason and self.reached < STEPS:
                self.save(events)
                self.end("stopped", message=f"stopped after step {self.reached}: {reason}")
                return
            if self.reached % EVERY == 0 and self.reached < STEPS:
                self.save(events)
            first = False
        self.save(events)
        self.end("done")

    def save(self, events: dict[str, list[str]]) -> None:
        self.happens("save", events)
        folder = self.run / "checkpoints" / f"step-{self.reached}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "COMPLETE").write_text("{}")
        self.saved.append(self.reached)

    def end(self, status: str, **more: Any) -> None:
        for rank, channels in enumerate(self.ranks):
            asked = {"stop_request": channels.request} if status == "stopped" else {}
            self.put(
                f"outcome-{rank}", rank=rank, status=status, exit_code=0, step=self.reached, ended=1.0, **asked, **more
            )

    # ---- what happens to it

    def happens(self, phase: str, events: dict[str, list[str]]) -> None:
        happening = events.pop(phase, [])
        for event in happening:
            if event != "crash":
                getattr(self, event)()
        if "crash" in happening:  # in the same moment as the others
            if phase in PHASES[:3]:
                raise Struck
            self.killed = True  # the batch shell

    def shell_asks(self, why: str) -> None:
        with contextlib.suppress(FileExistsError), open(self.run / "stop", "x") as file:  # as with noclobber
            file.write(why + "\n")

    def to_ranks(self, number: int) -> None:
        for channels in self.ranks:
            channels._on_signal(number, None)

    def stop(self) -> None:
        self.asked = True
        ask_to_stop(self.run, "user")

    def limit(self) -> None:
        self.now = max(self.now, self.deadline - 5)

    def USR1(self) -> None:
        self.shell_asks("time-limit")
        self.to_ranks(signal.SIGUSR1)

    def preempt(self) -> None:
        self.terminated = True
        (self.dir / "signal.txt").write_text("TERM 1\n")
        self.shell_asks("terminated")
        self.to_ranks(signal.SIGTERM)

    def cancel(self) -> None:
        self.stop()
        (self.run / "cancelled").write_text("cancelled by its user\n")
        self.preempt()


def reported(case: tuple[tuple[str, str], ...]) -> dict[str, list[str]]:
    events: dict[str, list[str]] = {}
    for event, phase in case:
        events.setdefault(phase, []).append(event)
    return events


def verdict(world: World, case: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """Let a case happen to the first job, and everything that follows by itself happen undisturbed."""
    events = reported(case)
    how = world.one_job(events)
    late = bool(events)  # the attempt was over before: nothing was there to be struck
    numbers = attempt.attempt_numbers(str(world.run))
    checkpoint = attempt.latest_checkpoint(str(world.run))
    first = {"whole": world.reached, "kept": checkpoint, "saved": list(world.saved), "late": late}
    for _ in range(4):
        same_job = how in ("requeue", "killed") and not (world.run / "cancelled").exists()
        world.job += 0 if same_job else 1
        how = world.one_job({})  # also behind an end: a link that was queued, or a job that somebody submits again
        if how == "end":
            break
    record = json.loads((world.run / "attempts" / "001" / "attempt.json").read_text())
    return {
        **first,
        "attempts": world.begun,
        "state": record["state"],
        "counted": record["decision"]["counted_as"],
        "final": record["decision"]["final"],
        "end": attempt.latest_checkpoint(str(world.run)),
        "numbers": numbers,
    }


def cases(policy: str) -> list[tuple[tuple[str, str], ...]]:
    """One event, and every ordered pair of events, in every phase or pair of phases in their order; where only the way
    to go on differs, pairs of one phase."""
    one = [((event, phase),) for event in EVENTS for phase in PHASES]
    when = [(p, q) for i, p in enumerate(PHASES) for q in (PHASES[i:] if policy == "chain" else [p])]
    return one + [((a, p), (b, q)) for a, b in itertools.product(EVENTS, repeat=2) for p, q in when]


@pytest.fixture
def still_clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, World]:
    holder: dict[str, World] = {}
    clock = types.SimpleNamespace(time=lambda: holder["world"].now, monotonic=lambda: holder["world"].now + 1e6)
    monkeypatch.setattr(stopping, "time", clock)
    handlers = types.SimpleNamespace(signal=lambda *a: None, Signals=signal.Signals, SIGINT=signal.SIGINT)
    monkeypatch.setattr(stopping, "signal", handlers)
    monkeypatch.delenv("AIFACTORY_STOP_AT", raising=False)
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    return holder


@pytest.mark.parametrize("policy", POLICIES)
def test_every_interleaving_keeps_every_promise(tmp_path: Path, still_clock: dict[str, World], policy: str) -> None:
    found: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
    broken = []
    for number, case in enumerate(cases(policy)):
        world = still_clock["world"] = World(tmp_path / str(number), POLICIES[policy])
        seen = found[case] = verdict(world, case)
        names = {event for event, _ in case}
        if world.asked and seen["attempts"] != 1:
            broken.append((case, "a stop that was asked for was followed by another attempt", seen))
        if set(seen["saved"]) - {int(p.name[5:]) for p in (world.run / "checkpoints").glob("step-*")}:
            broken.append((case, "a checkpoint was lost", seen))
        if "crash" not in names and seen["kept"] != seen["whole"]:
            broken.append((case, "steps were made that no checkpoint holds", seen))
        if not world.asked and seen["end"] != STEPS:
            broken.append((case, "nobody asked for a stop, and the run did not go on to its end", seen))
        where = {p for e, p in case if e == "crash"}
        if where and where <= set(PHASES[:3]) and not names & {*PERSON, "preempt"}:
            expected = ("failed", "crash") if seen["state"] == "failed" else ("stopped", "time")
            if (seen["state"], seen["counted"]) != expected:
                broken.append((case, "a crash is to be counted as one", seen))
    for case, seen in found.items():
        if len(case) == 2 and case[0][1] == case[1][1]:
            other = found[case[1], case[0]]
            if any(seen[k] != other[k] for k in ("attempts", "state", "counted", "final", "end")):
                broken.append((case, f"the other order gives another verdict: {other}", seen))
    assert not broken, f"{len(broken)} of {len(found)}:\n" + "\n".join(map(str, broken[:12]))


def test_the_model_of_the_script_is_the_script() -> None:
    """What :class:`World` copies of the batch script stands there: if that changes, so must this."""
    text = (Path(attempt.__file__).resolve().parents[1] / "templates" / "slurm.sh.j2").read_text()
    order = [
        'ask_to_stop() { (set -o noclobber; printf \'%s\\n\' "$1" > "$run/stop")',
        "ask_to_stop time-limit",
        "ask_to_stop terminated",
        'if [ "$rc" = 0 ] && [ ! -e "$run/stop" ]; then',
        '"$terminated" = 1 ] && [ "$(date +%s)" -lt $((deadline - 45))',
        "\nleave_if_taken\n",
        '"$submission/attempt.py" close',
        "\nleave_if_taken #",
        f"grep -qE '^({'|'.join(attempt.AUTOMATIC_STOPS)})( |$)'",
        "case $action in",
    ]
    places = [text.index(line) for line in order]
    assert places == sorted(places)
