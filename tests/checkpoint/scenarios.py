"""Runs that are stopped, broken or misled on purpose; started by ``test_stopping.py``, ``test_failing.py``,
``test_guard.py``.

python scenarios.py GROUP FOLDER      prints one JSON object: scenario -> what was seen

Every scenario is the real command line on two forked ranks with a tiny model. Scenarios of a group run at the same
time: they sleep most of the time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import forked
import helpers

RANKS = 2
Scenario = Callable[[Path, Path], dict[str, Any]]


def recipe(folder: Path, name: str, **settings: Any) -> Path:
    base: dict[str, Any] = {
        "train.max_steps": 400,
        "train.batch_rows": 4,
        "train.epochs": 100,
        "parallel.engine": "fsdp2",
        "parallel.threads": 1,
        "eval.before": False,
        "eval.after": False,
        "export.automatic": False,
        "logging.row_ids": True,
    }
    return helpers.write_recipe(folder / name, folder / "model", settings={**base, **settings})


def start(
    folder: Path, name: str, path: Path, *more: str, in_child: Any = None, env: dict[str, str] | None = None
) -> forked.Ranks:
    argv = ["train", str(path), "--run-dir", str(folder / name / "run"), "--attempt", "1", "--quiet", *more]
    return forked.Ranks(RANKS, argv, folder / name / "log", in_child=in_child, env=env)


def seen(folder: Path, name: str, ranks: forked.Ranks) -> dict[str, Any]:
    """What a parent can know afterwards."""
    from aifactory_train.launchers.programs.attempt import diagnose, ranked
    from aifactory_train.parallel.storage import faults, steps_in

    run = folder / name / "run"
    attempt = run / "attempts" / "001"
    state, cause = diagnose(str(attempt), RANKS)
    checkpoints = run / "checkpoints"
    metrics = run / "metrics.jsonl"
    log = (folder / name / "log" / "rank-0.log").read_text()
    return {
        "codes": {str(r): c for r, c in ranks.codes.items()},
        "outcomes": {str(rank): told for rank, told in ranked(str(attempt), "outcome").items()},
        "complete": [s for s in steps_in(checkpoints) if not faults(checkpoints / f"step-{s}")],
        "state": state,
        "cause": cause,
        "flight": sorted(p.name for p in attempt.glob("flight-*.txt")),
        "records": [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else [],
        "log": log[-1500:],
        "stop_file": (run / "stop").exists(),
    }


# ---- stopping


#: The step after which a stop is asked for, except by the deadline.
ASKED_AT = 4


def stopping(channel: str, save_s: float) -> Scenario:
    """Ask for a stop in the middle of a run whose saves take ``save_s`` seconds more."""

    def run(folder: Path, path: Path) -> dict[str, Any]:
        if channel == "deadline":
            return until_deadline(folder, path, save_s)
        name = path.parent.name

        def in_child(rank: int, tell: Any) -> None:
            forked.slow_saves(save_s)
            # The stop file is looked at every half second: within any step of this one.
            slow_steps(0.6 if channel == "stop file" else 0.15)

            def ask() -> None:
                tell({"asked": time.time()})
                if channel == "stop file":
                    (folder / name / "run" / "stop").touch()
                else:
                    os.kill(os.getpid(), getattr(signal, channel))

            # One rank alone hears it, at a known step: the others must learn of it.
            at_step(ASKED_AT, 1, ask)(rank, tell)

        with start(folder, name, path, in_child=in_child) as ranks:
            asked = ranks.until(lambda e: "asked" in e, 200)
            assert asked is not None, (folder / name / "log/rank-1.log").read_text()[-3000:]
            ranks.wait(90 + 5 * save_s)
            ended = time.time()
        return {**seen(folder, name, ranks), "asked_at_step": ASKED_AT, "seconds": ended - asked["asked"]}

    return run


def until_deadline(folder: Path, path: Path, save_s: float) -> dict[str, Any]:
    """A deadline in the middle of a run. On a machine that is too slow to have saved once well before it: again, with a
    later one.
    """
    name = path.parent.name

    def in_child(rank: int, tell: Any) -> None:
        forked.slow_saves(save_s)
        slow_steps(0.15)

    for patience in (60, 200):
        shutil.rmtree(folder / name / "run", ignore_errors=True)
        deadline = time.time() + patience + 5 * save_s
        with start(folder, name, path, "--stop-at", str(deadline), in_child=in_child) as ranks:
            # A save was measured by then: the estimate that the deadline needs.
            saved = ranks.until(lambda e: e.get("save") == "end", patience)
            asked, step = time.time(), max([e["step"] for e in ranks.events if "phase" in e], default=0)
            if saved is None or asked > deadline - 20 - 3 * save_s:
                continue
            ranks.wait(deadline - asked + 60)
            ended = time.time()
        markers = (folder / name / "run" / "checkpoints").glob("step-*/COMPLETE")
        return {
            **seen(folder, name, ranks),
            "asked_at_step": step,
            "seconds": ended - asked,
            "before_deadline": deadline - ended,
            "saved_before_deadline": deadline - max(marker.stat().st_mtime for marker in markers),
        }
    raise AssertionError((folder / name / "log/rank-0.log").read_text()[-3000:])


def slow_steps(seconds: float) -> None:
    """In a child: every micro-batch takes this much longer."""
    from aifactory_train.run.outcome import Attempt

    beat = Attempt.beat

    def slow(self, step, phase):
        beat(self, step, phase)
        if phase == "forward":
            time.sleep(seconds)

    Attempt.beat = slow


# ---- failing


def at_step(wanted: int, who: int, do: Callable[[], None], phase: str = "forward") -> Any:
    """``in_child`` that calls ``do`` on rank ``who`` when it begins ``phase`` of the step after ``wanted``.

    In the step itself, not in a listener of its events: what a listener raises ends no run.
    """

    def in_child(rank: int, tell: Any) -> None:
        from aifactory_train.training.trainer import Trainer

        began, done = Trainer._phase, []

        def striking(self, name):
            began(self, name)
            if rank == who and self.step == wanted and name == phase and not done:
                done.append(wanted)  # a step may have several micro-batches
                do()

        Trainer._phase = striking

    return in_child


def _raise() -> None:
    raise ValueError("row 17 cannot be computed")


def _memory() -> None:
    import torch

    torch.empty(2**60)


FAULTS: dict[str, Callable[[], None]] = {
    "raises": _raise,
    "exits": lambda: sys.exit(7),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda: time.sleep(3600),
    "frozen-saving": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "frozen-in-ddp": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}
#: Where a scenario strikes elsewhere than in the forward pass, and what its run needs besides.
PHASES = {"frozen-saving": "save"}
MORE: dict[str, dict[str, Any]] = {
    "frozen-saving": {"checkpoint.every_steps": 3, "checkpoint.asynchronous": False},
    "frozen-in-ddp": {"parallel.engine": "ddp"},
}


def failing(kind: str) -> Scenario:
    def run(folder: Path, path: Path) -> dict[str, Any]:
        name, began = path.parent.name, time.monotonic()
        with start(folder, name, path, in_child=at_step(3, 1, FAULTS[kind], PHASES.get(kind, "forward"))) as ranks:
            ranks.until(lambda e: e.get("step") == 3, 250)
            struck = time.monotonic()
            if kind.startswith("frozen"):  # it ends when a launcher kills it, after the others have ended
                while 0 in ranks.running and time.monotonic() < struck + 200:
                    ranks.poll()
            else:
                ranks.wait(200)
            ended = time.monotonic()
            left = [rank for rank in ranks.running if rank != 1 or not kind.startswith("frozen")]
        return {**seen(folder, name, ranks), "seconds": ended - struck, "left": left, "whole": ended - began}

    return run


# ---- the guard


def misled(wanted: int, value: float) -> Any:
    """``in_child``: the summed loss of the step after ``wanted`` is multiplied by ``value`` on every rank."""

    def in_child(rank: int, tell: Any) -> None:
        from aifactory_train.parallel.fsdp import FSDPEngine

        forward_backward, calls = FSDPEngine.forward_backward, []

        def bad(self, batch, scale, last):
            loss = forward_backward(self, batch, scale, last)
            if last:
                calls.append(1)
            return loss * value if len(calls) == wanted + 1 else loss

        FSDPEngine.forward_backward = bad

    return in_child


def guarded(value: float) -> Scenario:
    def run(folder: Path, path: Path) -> dict[str, Any]:
        name = path.parent.name
        with start(folder, name, path, in_child=misled(10, value)) as ranks:
            ranks.wait(200)
        return seen(folder, name, ranks)

    return run


# ---- groups


def group(name: str, folder: Path) -> dict[str, tuple[Scenario, Path]]:
    if name.startswith("stop-"):
        save_s = float(name.removeprefix("stop-"))
        channels = ["SIGUSR1", "SIGTERM", "stop file", "deadline"]
        saving = {"checkpoint.every_steps": 2, "train.max_steps": 4000, "train.epochs": 1000}
        return {
            c: (
                stopping(c, save_s),
                recipe(folder, c.replace(" ", "-"), **(saving if c == "deadline" else {})),
            )
            for c in channels
        }
    if name == "fail":
        more = {"parallel.timeout_s": 15}
        return {kind: (failing(kind), recipe(folder, kind, **more, **MORE.get(kind, {}))) for kind in FAULTS}
    assert name == "guard"
    nan, short = float("nan"), {"train.max_steps": 14, "checkpoint.every_steps": 4}
    return {
        "nan stop": (guarded(nan), recipe(folder, "nan-stop", **short)),
        "nan skip": (guarded(nan), recipe(folder, "nan-skip", **short, **{"guard.on_nonfinite": "skip"})),
        "spike rollback": (guarded(50.0), recipe(folder, "spike-rollback", **short, **{"guard.spike_factor": 3.0})),
    }


def main() -> None:
    import threading

    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["AIFACTORY_CACHE"] = str(folder / "cache")
    out = os.dup(1)
    os.dup2(2, 1)  # standard output carries the JSON alone
    helpers.write_model(folder / "model")
    forked.preload()
    wanted = group(sys.argv[1], folder)
    found: dict[str, Any] = {}
    # The token cache is made once, before the scenarios ask for it together.
    _, first = next(iter(wanted.values()))
    from aifactory_train.config.loading import load_recipe
    from aifactory_train.data import prepare

    prepare(load_recipe(str(first)))
    pids = {}
    for name, (scenario, path) in wanted.items():
        reader, writer = os.pipe()
        pid = os.fork()  # each scenario watches its own ranks
        if pid == 0:
            try:
                os.write(writer, json.dumps(scenario(folder, path)).encode())
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
            os._exit(1)
        os.close(writer)
        pids[name] = (pid, reader)

    def read(name: str, reader: int) -> None:
        with os.fdopen(reader, "rb") as pipe:
            found[name] = pipe.read()

    threads = [threading.Thread(target=read, args=(name, reader)) for name, (_, reader) in pids.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [name for name, (pid, _) in pids.items() if os.waitpid(pid, 0)[1]]
    assert not failed, failed
    os.write(out, json.dumps({name: json.loads(text) for name, text in found.items()}).encode())


if __name__ == "__main__":
    main()
