"""What a user waits for before anything happens: each command, each import, the first optimizer step.

    python benchmarks/startup.py --json [--repeat 5] [--no-step]

Each command is a process of its own, started as the shell would start it; the best and the median wall time of the
repetitions are reported, after one run that warms the page cache. ``launch --dry-run`` is for a site with Slurm and the
recipe given with ``--recipe``. The first step is ``aifactory train`` on a model of 100,000 parameters: from the start
of the process to the first line of ``metrics.jsonl``, data preparation included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measuring

#: What the commands that answer on a login node should take at most on an idle machine, in seconds.
GOALS = {"--help": 0.4, "launch --dry-run": 0.5}
IMPORTS = (
    "aifactory_train.cli",
    "aifactory_train.config.schema",
    "aifactory_train.data",
    "aifactory_train.training.start",
)


def commands(recipe: str) -> dict[str, list[str]]:
    """The commands by the name in the report."""
    there = ["--site", "lumi-g", "--nodes", "1", "--set", "train.batch_rows=64"]
    return {
        "--help": ["--help"],
        "sites": ["sites"],
        "recipes": ["recipes"],
        "config schema": ["config", "schema"],
        "plan": ["plan", recipe, *there],
        "launch --dry-run": ["launch", recipe, *there, "--account", "project_465000000", "--dry-run"],
        "doctor": ["doctor"],
    }


def timed(command: list[str], repeat: int, env: dict[str, str]) -> dict[str, Any]:
    """Wall seconds of a command: best and median; its exit code."""
    seconds, code, said = [], 0, ""
    for _ in range(repeat + 1):
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env={**measuring.alone(), **env}, timeout=120)
        seconds.append(time.perf_counter() - started)
        code, said = done.returncode, done.stderr
    kept = seconds[1:]
    result = {"best_s": round(min(kept), 3), "median_s": round(statistics.median(kept), 3), "exit_code": code}
    return result if code == 0 else {**result, "said": said.strip()[-300:]}


def first_step(scratch: Path, env: dict[str, str]) -> float:
    """Seconds from starting ``aifactory train`` to the first line of metrics.jsonl."""
    sys.path.insert(0, str(measuring.ROOT / "tests"))
    import helpers  # the tests' tiny model

    model = helpers.write_model(scratch / "model")
    recipe = helpers.write_recipe(scratch / "recipe", model, settings={"train.max_steps": 1, "eval.before": False})
    run = scratch / "run"
    started = time.perf_counter()
    command = [sys.executable, "-m", "aifactory_train", "train", str(recipe), "--run-dir", str(run), "--quiet"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**measuring.alone(), **env}
    ) as process:
        metrics = run / "metrics.jsonl"
        while not (metrics.is_file() and metrics.stat().st_size):
            if process.poll() not in (None, 0):
                raise SystemExit(f"the training ended with {process.returncode}: {process.stderr.read()[-2000:]}")
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        process.communicate()
    return seconds


def as_markdown(result: dict[str, Any]) -> str:
    rows = [
        [
            f"`aifactory {name}`",
            f"{c['best_s']:.2f}",
            f"{c['median_s']:.2f}",
            f"{GOALS[name]:.1f}" if name in GOALS else "–",
        ]
        for name, c in result["commands"].items()
    ]
    rows += [
        [f"`import {name}`", f"{c['best_s']:.2f}", f"{c['median_s']:.2f}", "–"] for name, c in result["imports"].items()
    ]
    if result["first_step_s"] is not None:
        rows.append(["first step of `aifactory train`", f"{result['first_step_s']:.2f}", "–", "–"])
    return (
        measuring.table(["what", "best, s", "median, s", "goal on an idle machine, s"], rows)
        + "\n"
        + measuring.facts_text(result["facts"])
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one line of JSON on standard output")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--recipe", default="health/phenotype-terms")
    parser.add_argument("--only", action="append", help="names of commands, repeatable")
    parser.add_argument("--no-step", action="store_true", help="leave the first training step out")
    parser.add_argument("--update-readme", action="store_true")
    options = parser.parse_args()
    found = measuring.facts()
    program = [sys.executable, "-m", "aifactory_train"]
    chosen = {n: c for n, c in commands(options.recipe).items() if not options.only or n in options.only}
    with tempfile.TemporaryDirectory(prefix="aifactory-bench-") as name:
        scratch = Path(name)
        env = {"PYTHONWARNINGS": "ignore"}
        result: dict[str, Any] = {
            "commands": {n: timed([*program, *c], options.repeat, env) for n, c in chosen.items()},
            "imports": {
                n: timed([sys.executable, "-c", f"import {n}"], options.repeat, env)
                for n in (() if options.only else IMPORTS)
            },
            "first_step_s": None
            if options.no_step or options.only
            else round(first_step(scratch, measuring.quiet_env(scratch)), 2),
            "facts": found,
        }
    if options.update_readme:
        measuring.update_readme("startup", as_markdown(result))
    print(json.dumps(result) if options.json else as_markdown(result))
    failed = {n: c for n, c in result["commands"].items() if c["exit_code"] != 0}
    for name, c in failed.items():
        print(f"aifactory {name} ended with {c['exit_code']}: {c.get('said', '')}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
