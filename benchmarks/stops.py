"""Stop runs at random moments, by every channel and together with what else ends runs, and look whether a stop stays a
stop.

    python benchmarks/stops.py --local 100 --standins 60 --starts 50 --seed 1 --json

``--local``: the real trainer on the CPU (one rank, a tiny model, forked from one process so that a start costs a
second) between ``begin`` and ``close`` of the launcher's book-keeping. ``--standins``: the generated batch scripts of
the other schedulers, with stand-ins for ``qsub`` and for the trainer. ``--starts``: so many real starts in one folder
at the same instant.

A stop passes if nothing trains after it: the attempt is the last one, a job that was queued behind it ends at once, at
most the step in progress and the next one are made, and every step that was made is in the newest checkpoint unless the
rank was killed. Every tenth local run is resumed explicitly and must make the remaining steps, each once. Of the starts
one trains and the others are refused. Exit code 1 if anything fails. Slurm's part is ``tests/launchers/test_stops.py -m
"slurm and slow"``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "checkpoint"), str(ROOT / "tests" / "launchers")]

import forked  # noqa: E402
import helpers  # noqa: E402
import launched  # noqa: E402
import scenarios  # noqa: E402

STEPS, STEP_S = 24, 0.08
#: Seconds within which a rank ends, on any machine.
PATIENCE_S = 900
#: What happens beside the stop, and in which order.
CHANNELS = ("stop", "stop, USR1", "USR1, stop", "stop, TERM", "TERM, stop", "stop, KILL")
BACKENDS = ("local", "mpi", "pbspro", "torque", "kubernetes")


# ---- the real trainer


class Stopped:
    """One run of the real trainer and the moment of its stop."""

    def __init__(self, folder: Path, number: int, dice: random.Random, longest: float):
        self.folder, self.name = folder, f"run-{number:03d}"
        self.run = folder / self.name / "run"
        self.channel, self.after = dice.choice(CHANNELS), dice.uniform(0, longest)
        self.gap = dice.uniform(0, 0.1)
        self.resume = number % 10 == 0
        self.faults: list[str] = []
        settings = {**launched.SHORT, "train.max_steps": STEPS, "logging.row_ids": False, "logging.tensorboard": False}
        self.recipe = scenarios.recipe(folder, self.name, **settings)
        launched.begin(self.run, "1", 1)
        self.began = time.monotonic()
        self.ranks = self.start("1")

    def start(self, attempt: str) -> forked.Ranks:
        def in_child(rank: int, tell: Any) -> None:
            scenarios.slow_steps(STEP_S)

        more = ("--resume", "auto", "--attempt", attempt)
        return launched.ranks(self.folder, self.name, self.recipe, 1, *more, in_child=in_child)

    def strike(self) -> None:
        """Ask, and let the other thing happen just before or after it."""
        from aifactory_train.launchers.stopping import ask_to_stop

        time.sleep(max(0.0, self.began + self.after - time.monotonic()))
        self.ranks.poll(0)
        self.at = max((e["step"] for e in self.ranks.events if "phase" in e), default=-1)
        phases = [e["phase"] for e in self.ranks.events if "phase" in e]
        self.phase = "ended" if not self.ranks.running else "start-up" if not phases else phases[-1]
        for number, what in enumerate(self.channel.split(", ")):
            time.sleep(self.gap * number)
            if what == "stop":
                ask_to_stop(self.run, "user")
            elif self.ranks.running and (what == "KILL" or phases):  # before it listens a signal just ends the process
                self.ranks.kill(getattr(signal, f"SIG{what}"))

    def judge(self) -> None:
        with self.ranks as ranks:
            codes = dict(ranks.wait(PATIENCE_S))
        verdict, behind = launched.close(self.run, 1), launched.begin(self.run, "2", 1)
        from aifactory_train.launchers.programs import attempt as book

        made = launched.steps(self.run) if (self.run / "metrics.jsonl").exists() else []
        kept = book.latest_checkpoint(str(self.run))
        self.check(bool(codes), f"the rank did not end within {PATIENCE_S} s: {self.channel}")
        self.check(verdict[:1] == ["end"], f"something follows: {verdict}")
        self.check(behind[:1] == ["end"], f"a queued job goes on: {behind}")
        self.check(len(book.attempt_numbers(str(self.run))) == 1, "another attempt was begun")
        self.check(not (self.run / "stop").exists(), "the request was not answered")
        if "KILL" not in self.channel and codes.get(0, -9) >= 0:
            self.check(kept == max(made, default=0), f"step {max(made, default=0)} was made, {kept} is kept")
            # The file is looked at every half second, and a step takes STEP_S: more on a machine with other work.
            self.check(max(made, default=0) <= max(self.at, 0) + 1 + 10 * 0.5 / STEP_S, f"asked at {self.at}, {made}")
        if self.resume:
            (self.run / "submission" / "again").write_text("")
            again = launched.begin(self.run, "3", 1)
            with self.start("2") as ranks:
                codes = dict(ranks.wait(PATIENCE_S))
            finished = kept == STEPS
            self.check(again == ["go", "002"] and codes == {0: 2 if finished else 0}, f"resumed: {again} {codes}")
            self.check(launched.steps(self.run) == list(range(1, STEPS + 1)), "a step was lost or made twice")

    def check(self, good: bool, why: str) -> None:
        if not good:
            self.faults.append(why)


def local(count: int, dice: random.Random, folder: Path, beside: int) -> dict[str, Any]:
    """``count`` stops of the real trainer, ``beside`` at a time."""
    first = Stopped(folder, 0, dice, 0.0)  # undisturbed: how long a run takes here, and the token cache of the others
    with first.ranks as ranks:
        codes = ranks.wait(300)
    if codes != {0: 0}:
        raise SystemExit((folder / "run-000" / "log1" / "rank-0.log").read_text()[-3000:])
    longest = 1.1 * (time.monotonic() - first.began) * (1 + (beside - 1) / (os.cpu_count() or 1) / 2)
    phases: Counter[str] = Counter()
    channels: Counter[str] = Counter()
    faults = []
    for begin in range(1, count + 1, beside):
        runs = [Stopped(folder, n, dice, longest) for n in range(begin, min(begin + beside, count + 1))]
        for one in sorted(runs, key=lambda r: r.began + r.after):
            one.strike()
        for one in runs:
            one.judge()
            phases[one.phase] += 1
            channels[one.channel] += 1
            found = [f"{one.name} ({one.channel}, {one.phase}, step {one.at}): {f}" for f in one.faults]
            print("".join(f"FAULT {f}\n" for f in found), end="", file=sys.stderr)
            faults += found
        print(f"{begin + len(runs) - 1} of {count} stops, {len(faults)} faults", file=sys.stderr, flush=True)
    return {"stops": count, "faults": faults, "phases": dict(phases), "channels": dict(channels)}


def starts(count: int, folder: Path) -> dict[str, Any]:
    """``count`` real processes that want to train in one folder at the same instant."""
    settings = {**launched.SHORT, "train.max_steps": 3}
    recipe, run = scenarios.recipe(folder, "starts", **settings), folder / "starts" / "run"
    at = time.time() + 3 + count / 10

    def in_child(rank: int, tell: Any) -> None:
        scenarios.slow_steps(0.3 * max(10, count) / 10)  # as long as the slowest start may take to ask
        time.sleep(max(0.0, at - time.time()))

    started = []
    for i in range(count):
        argv = ["train", str(recipe), "--run-dir", str(run), "--quiet"]
        started.append(forked.Ranks(1, argv, folder / "starts" / f"log-{i}", in_child=in_child))
    codes: Counter[int] = Counter()
    for one in started:
        with one:
            codes[one.wait(400).get(0, -9)] += 1
    logs = [(folder / "starts" / f"log-{i}" / "rank-0.log").read_text() for i in range(count)]
    reported = sum("a run is live here" in log or "holds a finished run" in log for log in logs)
    faults = []
    if codes != {0: 1, 2: count - 1} or reported != count - 1:
        faults.append(f"exit codes {dict(codes)}, {reported} refusals")
    if launched.steps(run) != [1, 2, 3] or any("Traceback" in log for log in logs):
        faults.append(f"steps {launched.steps(run)}")
    return {"starts": count, "faults": faults, "codes": {str(k): v for k, v in codes.items()}}


# ---- the scripts of other schedulers


def stand_in(folder: Path, number: int, backend: str, after: float, gap: float, term: bool) -> list[str]:
    """One generated script with a stand-in trainer, stopped after so many seconds; returns what is wrong with what
    followed.
    """
    from launcher_bench import FAKE, prepared

    from aifactory_train.launchers import follow
    from aifactory_train.launchers.here import this_machine
    from aifactory_train.launchers.request import LaunchRequest
    from aifactory_train.launchers.stopping import ask_to_stop

    where = folder / f"{backend}-{number:03d}"
    where.mkdir(parents=True)
    recipe = where / "plain.yaml"
    recipe.write_text(
        "model: {base: some/model, licence: MIT}\ndata: {train: {source: some/data, licence: MIT}}\n"
        "train: {max_steps: 4, batch_rows: 4096}\n"
    )
    run = where / "run"
    fake = (("FAKE_STEPS", "60"), ("FAKE_PACE", "0.05"))
    request: dict[str, Any] = {
        "recipe": str(recipe),
        "run_dir": str(run),
        "program": (str(FAKE),),
        "hang_s": 0,
        "env": fake,
    }
    system: Any = this_machine()
    if backend in ("pbspro", "torque", "kubernetes"):
        kind = {"kind": backend}
        system = system.model_copy(update={"scheduler": system.scheduler.model_copy(update=kind)})
        request |= {"nodes": 1, "gpus_per_node": 1, "time_s": 600, "account": "a"}
    request |= {"backend": backend, "nproc": 1} if backend in ("local", "mpi") else {"backend": backend}
    prepared(LaunchRequest(**request), system)
    script = run / "submission" / "job.sh"
    text = script.read_text().replace('"$submission/node.sh"', '"$submission/rank.sh"')  # one rank, without torchrun
    begin = text.index("\nstart=(") + 1
    end = text.index(")\n", begin) + 2
    once = where / "start-rank.sh"
    names = "RANK LOCAL_RANK OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_LOCAL_RANK"
    once.write_text(
        f'#!/bin/bash\nfor w in {names}; do export $w=0; done\nexport WORLD_SIZE=1 OMPI_COMM_WORLD_SIZE=1\nexec "$@"\n'
    )
    once.chmod(0o755)
    script.write_text(text[:begin] + f"start=({once})\n" + text[end:])
    (where / "nodes").write_text("localhost\n")
    bin_dir = where / "bin"
    bin_dir.mkdir()
    (bin_dir / "qsub").write_text(f"#!/bin/sh\necho submitted >> {where}/submitted\necho next.1\n")
    (bin_dir / "qsub").chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
        "PBS_JOBID": "7.server",
        "PBS_NODEFILE": f"{where}/nodes",
    }
    env |= {"JOB_COMPLETION_INDEX": "0", "MASTER_ADDR": "127.0.0.1"}
    with open(where / "job.out", "wb") as log:
        job = subprocess.Popen(["bash", str(script)], env=env, stdout=log, stderr=log, start_new_session=True)
        time.sleep(after)
        ended = job.poll() is not None
        if not ended:
            ask_to_stop(run, "user")
            if term:
                time.sleep(gap)
                job.terminate()
        try:
            code = job.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            return [f"the script did not end; {(where / 'job.out').read_text()[-500:]}"]
    wrong = []
    book = follow.status_of(run, ask=False)
    if not ended:
        if (where / "submitted").exists():
            wrong.append("another job was submitted")
        if len(book["attempts"]) > 1 or book["state"] not in ("stopped", "done", "new"):
            wrong.append(f"{book['state']} {book['cause']} with {len(book['attempts'])} attempts, exit code {code}")
        if (run / "stop").exists() and book["attempts"]:
            wrong.append("the request was not answered")
    elif code != 0:
        wrong.append(f"exit code {code} though nobody stopped it: {(where / 'job.out').read_text()[-500:]}")
    again = subprocess.run(
        ["bash", str(script)], env=env, capture_output=True, text=True, timeout=60
    )  # queued behind it
    if (
        len(follow.status_of(run, ask=False)["attempts"]) > max(1, len(book["attempts"]))
        or "nothing to do" not in again.stderr
    ):
        wrong.append(f"a job that was queued behind it went on: {again.stderr[-300:]}")
    return wrong


def standins(count: int, dice: random.Random, folder: Path, beside: int) -> dict[str, Any]:
    """``count`` stops of generated scripts, over all backends but Slurm."""
    cases = [
        (n, BACKENDS[n % len(BACKENDS)], dice.uniform(0, 4), dice.uniform(0, 0.2), dice.random() < 0.4)
        for n in range(count)
    ]

    def one(case: tuple[int, str, float, float, bool]) -> list[str]:
        number, backend, after, gap, term = case
        found = stand_in(folder, number, backend, after, gap, term)
        return [f"{backend} {number} after {after:.2f} s{' and TERM' if term else ''}: {f}" for f in found]

    with ThreadPoolExecutor(beside) as pool:
        faults = [f for found in pool.map(one, cases) for f in found]
    return {"stops": count, "faults": faults, "backends": dict(Counter(c[1] for c in cases))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--local", type=int, default=0, metavar="N", help="stops of the real trainer")
    parser.add_argument("--standins", type=int, default=0, metavar="N", help="stops of the other schedulers' scripts")
    parser.add_argument("--starts", type=int, default=0, metavar="N", help="real starts in one folder at once")
    parser.add_argument(
        "--beside", type=int, default=5, metavar="N", help="runs at the same time (they sleep most of it)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one line of JSON on standard output")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it there")
    args = parser.parse_args()
    out = os.dup(1)
    os.dup2(2, 1)  # standard output carries the JSON alone
    result: dict[str, Any] = {"seed": args.seed}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["AIFACTORY_CACHE"] = str(folder / "cache")
        if (
            args.standins
        ):  # first: nothing may be forked once threads were started, so these have a process of their own
            pid = os.fork()
            if pid == 0:
                found = standins(args.standins, random.Random(args.seed), folder / "scripts", args.beside)
                (folder / "standins.json").write_text(json.dumps(found))
                os._exit(0)
            os.waitpid(pid, 0)
            result["standins"] = json.loads((folder / "standins.json").read_text())
        if args.local or args.starts:
            helpers.write_model(folder / "model")
            forked.preload()
        if args.local:
            result["local"] = local(args.local, random.Random(args.seed), folder, args.beside)
        if args.starts:
            result["starts"] = starts(args.starts, folder)
    faults = [f for part in result.values() if isinstance(part, dict) for f in part["faults"]]
    os.write(out, (json.dumps(result) + "\n").encode())
    if not args.json:
        print("\n".join(faults) or "no faults", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
