"""GRPO on a toy: the reward before and after, on a model that answers one question in ten right.

    python benchmarks/grpo_toy.py --json [--steps 100] [--keep FOLDER]

A model of 100,000 parameters, built here, is first taught the form of an answer by a supervised run: each question has
every one of ten digits as its answer once, so that it answers with a digit, and one in ten is right. Then GRPO rewards
the digit that the question names (``exact_match``). ``reward_before`` is the mean reward of the first step, whose
answers are sampled before any update; ``reward_after`` that of the last three. ``seconds`` and ``steps`` are those of
the run with GRPO.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import helpers  # noqa: E402 - the tests' tiny model

DIGITS = "0123456789"
#: Of both runs: nothing is evaluated or exported, all weights are trained.
PLAIN: dict[str, Any] = {
    "adapter.kind": "none",
    "eval.before": False,
    "eval.after": False,
    "eval.forgetting": False,
    "record.pack": False,
    "export.dtype": "fp32",
    "export.verify": False,
    "train.schedule": "constant",
    "train.epochs": 1000,
}


def question(digit: str, number: int) -> str:
    """One of several ways to ask for a digit."""
    return f"{'abcdefgh'[number % 8]} {digit}?"


def rows(*, every_answer: bool) -> list[dict[str, Any]]:
    """80 questions with the right answer each, or each question with all ten digits."""
    return [
        {"id": f"{digit}-{number}-{answer}", "prompt": question(digit, number), "completion": answer}
        for digit in DIGITS
        for number in range(8)
        for answer in (DIGITS if every_answer else digit)
    ]


def run(folder: Path, model: Path, data: list[dict[str, Any]], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Train, and return the rows of its metrics."""
    from aifactory_train.config.loading import load_recipe
    from aifactory_train.training.start import train

    path = helpers.write_recipe(folder, model, settings={**PLAIN, **settings})
    helpers.write_jsonl(folder / "train.jsonl", data)
    helpers.write_jsonl(folder / "eval.jsonl", [{"prompt": "z 1?", "completion": "1"}])
    code = train(load_recipe(str(path)), folder / "run", quiet=True)
    if code:
        raise SystemExit(f"the run in {folder} ended with {code}")
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def measure(folder: Path, steps: int) -> dict[str, Any]:
    """``reward_before``, ``reward_after``, ``seconds``, ``steps``."""
    base = helpers.write_model(folder / "model")
    taught: dict[str, Any] = {"train.max_steps": 60, "train.batch_rows": 80, "train.learning_rate": 3e-3}
    run(folder / "taught", base, rows(every_answer=True), taught)
    grpo: dict[str, Any] = {
        "methods.grpo": {
            "reward": "exact_match",
            "group": 8,
            "max_new_tokens": 4,
            "rollout_prompts": 20,
            "rollout_steps": 1,
        },
        "model.start_from": str(folder / "taught" / "run"),
        "train.max_steps": steps,
        "train.batch_rows": 20,
        "train.learning_rate": 3e-3,
        "train.micro_batch_tokens": 8192,
        "export.automatic": False,
    }
    began = time.perf_counter()
    found = run(folder / "grpo", base, rows(every_answer=False), grpo)
    seconds = time.perf_counter() - began
    last = found[-3:]
    return {
        "reward_before": round(found[0]["reward"], 4),
        "reward_after": round(sum(row["reward"] for row in last) / len(last), 4),
        "seconds": round(seconds, 1),
        "steps": len(found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of GRPO")
    parser.add_argument("--keep", type=Path, help="folder for model and runs; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(args.keep or Path(scratch), args.steps)
    if args.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name:14} {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
