"""The real trainer between ``begin`` and ``close`` of the launcher's book-keeping, and several starts at once.

python launched.py FOLDER      prints one JSON object: scenario -> what was seen

What the batch script does around the ranks is done here by hand, so that neither Slurm nor mpirun is needed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import forked
import helpers
from scenarios import at_step, recipe, slow_steps

SHORT = {"train.max_steps": 24, "parallel.engine": "ddp", "checkpoint.every_steps": 4}
POLICY = {"resubmit": "chain", "unattended": True, "links": 0, "restarts": {"time": 3, "node": 2, "crash": 1}}


def book(command: str, run: Path, *more: str) -> list[str]:
    from aifactory_train.launchers.programs import attempt

    argv = [sys.executable, str(Path(attempt.__file__)), command, "--run", str(run), *more]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()


def begin(run: Path, job: str, world: int) -> list[str]:
    (run / "submission").mkdir(parents=True, exist_ok=True)
    (run / "submission" / "policy.json").write_text(json.dumps(POLICY))
    return book("begin", run, "--job", job, "--world", str(world), "--nodes", "a")


def close(run: Path, number: int) -> list[str]:
    return book("close", run, "--attempt", str(number), "--rc", "0")


def ranks(folder: Path, name: str, path: Path, size: int, *more: str, in_child: Any = None) -> forked.Ranks:
    argv = ["train", str(path), "--run-dir", str(folder / name / "run"), "--quiet", *more]
    return forked.Ranks(size, argv, folder / name / f"log{more[-1] if more else ''}", in_child=in_child)


def steps(run: Path) -> list[int]:
    """Steps in the order of ``metrics.jsonl``."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["kind"] == "train"]


def stopped_while_training(folder: Path) -> dict[str, Any]:
    """Somebody asks two ranks to stop, the time limit's warning comes in the same moment, and the run is resumed
    later.
    """
    from aifactory_train.launchers.stopping import ask_to_stop

    name = "training"
    run, path = folder / name / "run", recipe(folder, name, **SHORT)
    began = begin(run, "18", 2)

    def in_child(rank: int, tell: Any) -> None:
        slow_steps(0.6)

        def ask() -> None:
            ask_to_stop(run, "user")
            os.kill(os.getpid(), signal.SIGUSR1)

        at_step(4, 1, ask)(rank, tell)

    with ranks(folder, name, path, 2, "--resume", "auto", "--attempt", "1", in_child=in_child) as first:
        codes = first.wait(200)
    left = (run / "stop").exists()
    warning = 'set -o noclobber; printf "time-limit" > "$0"'  # what the batch script's trap does
    subprocess.run(["bash", "-c", warning, str(run / "stop")], capture_output=True, check=False)
    verdict, behind = close(run, 1), begin(run, "19", 2)
    record = json.loads((run / "attempts/001/attempt.json").read_text())
    (run / "submission" / "again").write_text("")  # aifactory launch --resume
    resumed = begin(run, "20", 2)
    with ranks(folder, name, path, 2, "--resume", "auto", "--attempt", "2") as second:
        again = second.wait(200)
    return {
        "begin": began,
        "codes": list(codes.values()),
        "left": left,
        "verdict": verdict,
        "why": record["decision"]["why"],
        "behind": behind,
        "resumed": resumed,
        "again": list(again.values()),
        "end": close(run, 2),
        "steps": steps(run),
        "log": (folder / name / "log1" / "rank-0.log").read_text()[-2000:],
    }


def stopped_by_file_alone(folder: Path) -> dict[str, Any]:
    """A stop that rank 0 finds between two steps of a run of one process."""
    from aifactory_train.launchers.stopping import ask_to_stop

    name = "file"
    run, path = folder / name / "run", recipe(folder, name, **SHORT)
    begin(run, "18", 1)

    def in_child(rank: int, tell: Any) -> None:
        slow_steps(0.6)
        at_step(3, 0, lambda: ask_to_stop(run, "user"))(rank, tell)

    with ranks(folder, name, path, 1, "--resume", "auto", "--attempt", "1", in_child=in_child) as first:
        codes = first.wait(200)
    outcome = json.loads((run / "attempts/001/outcome-0.json").read_text())
    left = (run / "stop").exists()
    (run / "stop").unlink()  # whatever happens to the file: the rank's own word stays
    return {"codes": list(codes.values()), "left": left, "outcome": outcome, "verdict": close(run, 1)}


def stopped_while_starting(folder: Path) -> dict[str, Any]:
    """The request is made after the attempt was begun and before the trainer looks for it."""
    from aifactory_train.launchers.stopping import ask_to_stop

    name = "starting"
    run, path = folder / name / "run", recipe(folder, name, **SHORT)
    begin(run, "18", 1)
    ask_to_stop(run, "user")
    with ranks(folder, name, path, 1, "--resume", "auto", "--attempt", "1") as first:
        codes = first.wait(200)
    return {"codes": list(codes.values()), "verdict": close(run, 1), "behind": begin(run, "19", 1), "steps": steps(run)}


def queued_again_elsewhere(folder: Path) -> dict[str, Any]:
    """Rank 0 is killed, and the job goes on at once on another machine, whose clock is an hour behind."""
    name = "elsewhere"
    run, path = folder / name / "run", recipe(folder, name, **SHORT)
    begin(run, "18", 1)
    struck = at_step(9, 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with ranks(folder, name, path, 1, "--resume", "auto", "--attempt", "1", in_child=struck) as first:
        codes = first.wait(200)
    start = run / "starts" / "00001.json"
    there = {"host": "othernode", "machine": "othernode", "time": time.time() + 3600}
    start.write_text(json.dumps({**json.loads(start.read_text()), **there}))
    state = run / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "host": "othernode", "time": time.time() + 3600}))
    began = begin(run, "18", 1)  # the same job: the scheduler put it back
    with ranks(folder, name, path, 1, "--resume", "auto", "--attempt", "2") as second:
        again = second.wait(200)
    return {
        "codes": list(codes.values()),
        "begin": began,
        "again": list(again.values()),
        "end": close(run, 2),
        "steps": steps(run),
        "starts": sorted(p.name for p in (run / "starts").iterdir()),
        "log": (folder / name / "log2" / "rank-0.log").read_text()[-2000:],
    }


def starts_at_once(folder: Path, resume: list[str]) -> dict[str, Any]:
    """Four processes start in one folder at the same instant."""
    name = "at-once" + "-".join(resume).replace("--", "-")
    run, path = folder / name / "run", recipe(folder, name, **SHORT)
    begun = time.time() + 8

    def in_child(rank: int, tell: Any) -> None:
        slow_steps(0.2)
        time.sleep(max(0.0, begun - time.time()))

    started = []
    for i in range(4):
        argv = ["train", str(path), "--run-dir", str(run), "--quiet", *resume]
        started.append(forked.Ranks(1, argv, folder / name / f"log-{i}", in_child=in_child))
    codes = []
    for one in started:
        with one:
            codes += list(one.wait(240).values())
    logs = [(folder / name / f"log-{i}" / "rank-0.log").read_text() for i in range(4)]
    return {
        "codes": codes,
        "logs": [log[-1500:] for log in logs],
        "steps": steps(run),
        "attempts": sorted(p.name for p in (run / "attempts").iterdir()),
        "starts": sorted(p.name for p in (run / "starts").iterdir()),
        "state": json.loads((run / "state.json").read_text())["state"],
    }


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["AIFACTORY_CACHE"] = str(folder / "cache")
    out = os.dup(1)
    os.dup2(2, 1)  # standard output carries the JSON alone
    helpers.write_model(folder / "model")
    forked.preload()
    found = {
        "training": stopped_while_training(folder),
        "file": stopped_by_file_alone(folder),
        "starting": stopped_while_starting(folder),
        "elsewhere": queued_again_elsewhere(folder),
        "at once": starts_at_once(folder, []),
        "at once, resumed": starts_at_once(folder, ["--resume", "auto"]),
    }
    os.write(out, json.dumps(found).encode())


if __name__ == "__main__":
    main()
