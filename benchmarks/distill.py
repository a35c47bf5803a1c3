"""Is a small model better with a teacher's stored log-probabilities than by supervised fine-tuning alone?

    python benchmarks/distill.py --steps 120
    python benchmarks/distill.py --recipe ./recipe.yaml --steps 4 --json

Of each recipe the model is fine-tuned in full (the teacher), its first half of layers becomes the student, and the
student is trained twice from there on the same rows, steps and rates: on the rows alone, and on the rows and the
teacher's log-probabilities (``aifactory teach``, ``methods.distill``). Reported are bits per byte of the same held-out
rows under all four models, and the paired 95 % bootstrap interval of distilled minus supervised alone: below zero the
teacher helped. All recipes are reported, whatever they show. With the 135M model a recipe takes hours on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from recipes import LEAVE_OUT, aifactory, import_libraries

RECIPES = ("health/phenotype-terms", "energy/grid-model", "media/drama-dialogue")
#: Of every run: whole weights, exported as they were trained, nothing generated.
COMMON = (
    *(setting for setting in LEAVE_OUT if not setting.startswith("export.")),
    "adapter.kind=none",
    "export.dtype=fp32",
    "export.verify=false",
    "eval.before=false",
    "eval.after=false",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", action="append", default=[], metavar="ID", help=f"default: {', '.join(RECIPES)}")
    parser.add_argument("--steps", type=int, default=120, metavar="N", help="steps of each of the three runs")
    parser.add_argument("--rows", type=int, default=100, metavar="N", help="at most N held-out rows")
    parser.add_argument("--rate", type=float, default=1e-4, help="peak learning rate of each run")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="of the distilled run; repeatable")
    parser.add_argument("--json", action="store_true", help="one line of JSON on standard output")
    args = parser.parse_args()
    names = args.recipe or list(RECIPES)
    if len(names) == 1:
        results = [measure(names[0], args)]
    else:  # each in a process of its own: runs are forked from one that has computed nothing yet
        results = [again(name) for name in names]
    if args.json:
        print(json.dumps({"versions": versions(), "results": results}))
        return 0
    print("  ".join(f"{name} {version}" for name, version in versions().items()))
    for one in results:
        print(reported(one))
    return 0


def again(name: str) -> dict[str, Any]:
    """:func:`measure` of one recipe by this script in a process of its own."""
    words = [word for word in sys.argv[1:] if word != "--json"]
    for place in reversed([i for i, word in enumerate(words) if word == "--recipe"]):
        del words[place : place + 2]
    command = [sys.executable, __file__, *words, "--recipe", name, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: failed, see above")
    found: dict[str, Any] = json.loads(done.stdout)["results"][0]
    return found


def versions() -> dict[str, str]:
    """Of what computed it, and of the machine."""
    found = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {"python": platform.python_version(), **found, "cores": str(os.cpu_count()), "machine": platform.machine()}


def command(*words: str) -> float:
    """Run the command line; seconds. Ends the program where it fails."""
    started = time.monotonic()
    done = aifactory(*words)
    if done.returncode:
        raise SystemExit(f"aifactory {' '.join(words)}\n{done.stderr}")
    return round(time.monotonic() - started, 1)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Teacher, student, both runs, and what they are worth on the held-out rows."""
    import_libraries()
    seconds: dict[str, float] = {}
    size = [f"train.max_steps={args.steps}", f"train.learning_rate={args.rate}", f"data.eval_rows={args.rows}"]
    common = [word for setting in (*COMMON, *size) for word in ("--set", setting)]
    with tempfile.TemporaryDirectory(prefix="distill-") as scratch:
        folder = Path(scratch)
        runs = {which: folder / which for which in ("teacher", "supervised", "distilled")}

        def train(which: str, *settings: str) -> None:
            more = [word for setting in settings for word in ("--set", setting)]
            print(f"{name}: {which}", file=sys.stderr, flush=True)
            seconds[which] = command("train", name, *common, *more, "--run-dir", str(runs[which]), "--quiet")

        command("fetch", name)
        train("teacher")
        teacher, student = runs["teacher"] / "export" / "model", folder / "student"
        layers = half(teacher, student)
        base = f"model.base={student}"
        train("supervised", base)
        block = [f"methods.distill.stored={folder / 'stored'}", "methods.distill.licence=own", *args.set]
        with_teacher = [base, f"methods.distill.teacher={teacher}", *block]
        more = [word for setting in with_teacher for word in ("--set", setting)]
        print(f"{name}: the teacher's pass", file=sys.stderr, flush=True)
        seconds["teach"] = command("teach", name, *common, *more)
        train("distilled", *with_teacher)
        return {"id": name, "steps": args.steps, "layers": layers, "settings": args.set, "seconds": seconds} | judged(
            runs, student
        )


def half(teacher: Path, student: Path) -> list[int]:
    """Write the first half of ``teacher``'s layers as a model folder; ``[layers of the teacher, of the student]``."""
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True)\n"
        "layers, config = model.model.layers, model.config\ncount = len(layers)\nkept = max(1, count // 2)\n"
        "model.model.layers = layers[:kept]\nconfig.num_hidden_layers = kept\n"
        "if getattr(config, 'layer_types', None):\n    config.layer_types = config.layer_types[:kept]\n"
        "model.save_pretrained(sys.argv[2])\n"
        "AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True).save_pretrained(sys.argv[2])\n"
        "print(count, kept)\n"
    )
    words = [sys.executable, "-c", code, str(teacher), str(student)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return [int(word) for word in done.stdout.split()[-2:]]


def judged(runs: dict[str, Path], student: Path) -> dict[str, Any]:
    """``bits_per_byte`` of the four models, and ``change`` with its paired interval."""
    from aifactory_train import metrics
    from aifactory_train.metrics.bootstrap import interval
    from aifactory_train.run.folder import open_run

    found: dict[str, Any] = {}
    drawn: dict[str, Any] = {}
    for which, path in {**runs, "student before": None}.items():
        scored = held_out_of(open_run(str(path or runs["supervised"])), student if path is None else None)
        figure = metrics.figure(*scored.statistics("bits_per_byte"))
        found[which], drawn[which] = figure.value, figure.replicates
        found["rows"] = scored.rows
    change = found["distilled"] - found["supervised"]
    return {"bits_per_byte": found, "change": change, "ci": interval(drawn["distilled"] - drawn["supervised"])}


def held_out_of(run: Any, weights: Path | None) -> Any:
    """The likelihood of a run's held-out rows under its model, or under the one in the folder ``weights``."""
    from aifactory_train.core import compat
    from aifactory_train.data import prepare
    from aifactory_train.evaluation.likelihood import held_out
    from aifactory_train.model.causal_lm import CausalLM
    from aifactory_train.model.loading import load_language_model
    from aifactory_train.model.precision import choose_precision
    from aifactory_train.model.report import ModelReport
    from aifactory_train.model.trained import load_trained

    device = compat.device_type()
    model, tokenizer, recipe = load_trained(run, device)
    if weights is not None:
        dtype = choose_precision(recipe, device)[0].compute
        plain = load_language_model(weights, recipe, device=device, dtype=dtype, report=ModelReport())
        model = CausalLM(plain, own=recipe.model.attention == "own").eval()
    prepared = prepare(recipe, tokenizer)
    return held_out(
        model,
        next(iter(prepared.evals.values())),
        max_rows=recipe.data.eval_rows,
        batching=recipe.data.batching,
        pad_id=prepared.tokenizer_info["pad_id"],
        device=device,
        micro_batch_tokens=recipe.train.micro_batch_tokens,
    )


def reported(one: dict[str, Any]) -> str:
    """One recipe in two lines."""
    bits, low_high = one["bits_per_byte"], one["ci"]
    between = "no interval" if low_high is None else f"{low_high[0]:+.4f} to {low_high[1]:+.4f}"
    figures = ", ".join(f"{name} {bits[name]:.4f}" for name in ("teacher", "student before", "supervised", "distilled"))
    return (
        f"{one['id']}: {one['layers'][0]} layers teach {one['layers'][1]}, {one['steps']} steps, {bits['rows']} "
        f"held-out rows; bits per byte: {figures}\n  distilled - supervised: {one['change']:+.4f} ({between}); "
        f"seconds: {one['seconds']}"
    )


if __name__ == "__main__":
    sys.exit(main())
