"""Kill runs with SIGKILL, resume them, and compare what they end with, bit by bit, with a run that was left alone.

    python benchmarks/kill_resume.py --runs 30 --seed 1 --engine fsdp2 --json

Each run is the real command line on two ranks (gloo) with a tiny model, forked from one process so that a start costs a
second. The moment of each kill is drawn from the seed over *training progress*: at most a tenth before the first step,
at least a third inside a save (saves are slowed down so that they can be hit), the rest at any phase of any step. Half
of the kills hit all ranks at once, half one rank alone, whose peers then lose their connection.

A run passes if the second attempt goes on from the newest complete checkpoint (or from the start if there was none
yet), the final weights and optimizer moments are bitwise those of the undisturbed run, and the rows of the steps are
the same, in the same order. Exit code 1 if any run fails; the table goes to standard error with --json, which prints
one line on its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import forked  # noqa: E402
import helpers  # noqa: E402

RANKS, STEPS, EVERY = 2, 12, 3
#: How long a save is made to last, so that a kill can land inside it.
SAVE_S = 0.6


@dataclass
class Kill:
    """Where one run is killed."""

    kind: str  # "before step 1", "in save" or "in step"
    step: int  # the kill waits for this step (saves: for the save of this step)
    phase: str
    share: float  # how far into the save, or into a step's phase
    ranks: list[int]


def draw(count: int, seed: int) -> list[Kill]:
    """The kills of all runs: a tenth (rounded down) before step 1, two fifths inside saves, the rest inside steps."""
    dice = random.Random(seed)
    before, saves = count // 10, -(-2 * count // 5)
    kinds = ["before step 1"] * before + ["in save"] * saves + ["in step"] * (count - before - saves)
    dice.shuffle(kinds)
    kills = []
    for kind in kinds:
        if kind == "in save":
            step = EVERY * dice.randint(1, STEPS // EVERY)
        else:
            step = 0 if kind == "before step 1" else dice.randint(1, STEPS - 1)
        everyone = dice.random() < 0.5
        kills.append(
            Kill(
                kind,
                step,
                dice.choice(["forward", "reduce", "update"]),
                dice.random(),
                list(range(RANKS)) if everyone else [dice.randrange(RANKS)],
            )
        )
    return kills


def recipe_for(folder: Path, engine: str, adapter: str) -> Path:
    model = folder / "model"
    if not model.exists():
        helpers.write_model(model)
    more: dict[str, Any] = {"adapter": {"kind": adapter}} if adapter == "none" else {}
    settings = {
        "train.max_steps": STEPS,
        "train.batch_rows": 4,
        "train.epochs": 2,
        "parallel.engine": engine,
        "parallel.timeout_s": 30,
        "parallel.threads": 1,
        "checkpoint.every_steps": EVERY,
        "checkpoint.keep": 2,
        "logging.row_ids": True,
        "eval.before": False,
        "eval.after": False,
        "export.automatic": False,
        "adapter.dropout": 0.1 if adapter != "none" else 0.0,
        **more,
    }
    return helpers.write_recipe(folder / f"{engine}-{adapter}", model, settings=settings)


def start(recipe: Path, run: Path, attempt: int) -> forked.Ranks:
    def in_child(rank: int, tell: Any) -> None:
        forked.slow_saves(SAVE_S, tell)

    argv = ["train", str(recipe), "--run-dir", str(run), "--resume", "auto", "--quiet"]
    return forked.Ranks(RANKS, argv, run.parent / f"{run.name}-log-{attempt}", in_child=in_child)


def kill_once(ranks: forked.Ranks, kill: Kill, dice: random.Random) -> dict[str, Any]:
    """Wait for the drawn moment and kill; returns where it hit, or ``{"missed": True}`` if the run ended before."""
    if kill.kind == "before step 1":
        time.sleep(0.2 + kill.share)  # the phases before the first step last about this long
    elif kill.kind == "in save":
        if ranks.until(lambda e: e.get("save") == "begin" and e["step"] == kill.step, 120) is None:
            return {"missed": True}
        time.sleep(kill.share * SAVE_S)
    else:
        wanted = {"step": kill.step, "phase": kill.phase}
        if ranks.until(lambda e: {k: e.get(k) for k in wanted} == wanted, 120) is None:
            return {"missed": True}
        time.sleep(kill.share * 0.02)
    ranks.poll(0)
    if not ranks.running:
        return {"missed": True}
    ranks.kill(signal.SIGKILL, kill.ranks)
    ranks.poll(0.01)
    done = max((e["step"] for e in ranks.events if "phase" in e), default=0)
    begun = Counter(e["rank"] for e in ranks.events if e.get("save") == "begin")
    ended = Counter(e["rank"] for e in ranks.events if e.get("save") == "end")
    if len(kill.ranks) < RANKS:  # a launcher ends the others once one is gone
        time.sleep(dice.random() * 0.3)
        ranks.kill(signal.SIGKILL)
    ranks.wait(20)
    stepped = any(e.get("phase") == "update" and e["step"] == 0 for e in ranks.events)
    return {"step": done, "in_save": any(begun[r] > ended[r] for r in kill.ranks), "before_step1": not stepped}


def rows_of(run: Path) -> list[tuple[int, tuple[str, ...]]]:
    """``(step, row ids)`` of the records of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], tuple(r["row_ids"])) for r in records if r["kind"] == "train"]


def compare_rows(reference: list, found: list) -> tuple[int, int]:
    """Rows trained on more and less often than in the reference; a different order counts as both."""
    want = Counter((step, row) for step, rows in reference for row in rows)
    have = Counter((step, row) for step, rows in found for row in rows)
    return sum((have - want).values()), sum((want - have).values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", default="fsdp2", choices=["ddp", "fsdp2", "zero1", "zero2", "zero3"])
    parser.add_argument(
        "--adapter", default="none", choices=["none", "lora"], help="full fine-tuning or LoRA with dropout"
    )
    parser.add_argument(
        "--json", action="store_true", help="one line of JSON on standard output, the table on standard error"
    )
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it there")
    args = parser.parse_args()
    table = sys.stderr if args.json else sys.stdout
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["AIFACTORY_CACHE"] = str(folder / "cache")
        result = measure(args, folder, table)
    print(json.dumps(result), flush=True)
    good = result["resumed"] == result["bitwise_equal"] == args.runs
    return 0 if good and not result["rows_repeated"] and not result["rows_missed"] else 1


def measure(args: argparse.Namespace, folder: Path, table: Any) -> dict[str, Any]:
    """All runs; prints one row per run and returns the summary."""
    from aifactory_train.parallel.storage import faults, same_tensors, steps_in
    from aifactory_train.parallel.traits import traits_of

    forked.preload(deepspeed=traits_of(args.engine).package == "deepspeed")

    recipe = recipe_for(folder, args.engine, args.adapter)
    with start(recipe, folder / "undisturbed", 1) as ranks:
        codes = ranks.wait(300)
    if set(codes.values()) != {0}:
        sys.stderr.write((folder / "undisturbed-log-1" / "rank-0.log").read_text()[-3000:])
        raise SystemExit("the undisturbed run failed")
    reference = rows_of(folder / "undisturbed")
    total = {"resumed": 0, "bitwise_equal": 0, "rows_repeated": 0, "rows_missed": 0}
    total |= {"killed_before_step1": 0, "killed_in_save": 0}
    dice = random.Random(args.seed + 1)
    print(
        "run  drawn           at step  in save  ranks  went on from  bitwise  rows +/-  seconds", file=table, flush=True
    )
    for number, kill in enumerate(draw(args.runs, args.seed), 1):
        began, run = time.monotonic(), folder / f"run-{number:03d}"
        with start(recipe, run, 1) as ranks:
            hit = kill_once(ranks, kill, dice)
        if hit.get("missed"):
            raise SystemExit(f"run {number}: ended before the kill ({kill})")
        complete = [s for s in steps_in(run / "checkpoints") if not faults(run / "checkpoints" / f"step-{s}")]
        with start(recipe, run, 2) as ranks:
            codes = ranks.wait(300)
        log = (run.parent / f"{run.name}-log-2" / "rank-0.log").read_text()
        went = next((int(line.split()[4]) for line in log.splitlines() if line.startswith("going on after step")), 0)
        fine = set(codes.values()) == {0} and went == max(complete, default=0)
        different, more, less = ["not finished"], 0, 0
        if fine:
            final = f"checkpoints/step-{STEPS}"
            different = same_tensors(folder / "undisturbed" / final, run / final)
            more, less = compare_rows(reference, rows_of(run))
        else:
            sys.stderr.write(f"run {number}: codes {codes}, went on from {went}, complete {complete}\n{log[-2000:]}\n")
        total["resumed"] += fine
        total["bitwise_equal"] += not different
        total["rows_repeated"] += more
        total["rows_missed"] += less
        total["killed_before_step1"] += hit["before_step1"]
        total["killed_in_save"] += hit["in_save"]
        print(
            f"{number:3d}  {kill.kind:14s}  {hit['step']:7d}  {'yes' if hit['in_save'] else 'no':>7s}  "
            f"{'all' if len(kill.ranks) == RANKS else 'one':>5s}  {went:12d}  {'yes' if not different else 'NO':>7s}  "
            f"{more:3d}/{less:<3d}  {time.monotonic() - began:9.1f}",
            file=table,
            flush=True,
        )
    return {"runs": args.runs, **total, "engine": args.engine, "adapter": args.adapter, "seed": args.seed}


if __name__ == "__main__":
    sys.exit(main())
