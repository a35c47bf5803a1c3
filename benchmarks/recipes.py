"""Train every recipe with embedded data for a few minutes on CPU, and write what it changed into docs/recipes.md.

    python benchmarks/recipes.py --only energy/grid-model --only media/drama-dialogue --json
    python benchmarks/recipes.py --write            # all of them, then the document

Each recipe is fetched and trained by the real command line with its own settings (``--steps`` shortens those that take
more steps). Scored is the metric that the recipe names, on answers generated for the held-out rows, and bits per byte
beside it, before and after, each with its 95 % bootstrap interval; *improved* says that the paired interval of the
change leaves out zero. Results are kept in benchmarks/recipes.json, one entry a recipe, so that a run of some recipes
leaves the others as they were; the document says of every recipe that has no entry that it was not run. Exit code 1 if
a recipe that ran failed or did not improve its metric. With --json one line of rows ``{id, metric, before, after, ci,
seconds}`` goes to standard output and nothing else.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "recipes.json"
DOCUMENT = ROOT / "docs" / "recipes.md"

#: Most steps of a run and most held-out rows, and what a run of figures leaves out: general text is not scored, nothing
#: is saved or exported, no evidence pack is written.
STEPS, ROWS = 120, 40
LEAVE_OUT = (
    "eval.forgetting=false",
    "checkpoint.at_end=false",
    "export.automatic=false",
    "record.pack=false",
    "logging.tensorboard=false",
)
#: Metrics that are better when they are smaller and need no answers.
SMALLER = {"bits_per_byte", "perplexity", "loss"}
BITS = "bits_per_byte"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", default=[], metavar="ID", help="this recipe; repeatable")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"at most N steps (default {STEPS})")
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N", help=f"at most N held-out rows (default {ROWS})")
    parser.add_argument("--note", default="", help="about the machine, e.g. 'shared with other jobs'")
    parser.add_argument("--keep", action="store_true", help="keep the results for the document")
    parser.add_argument("--write", action="store_true", help="keep the results and write docs/recipes.md")
    parser.add_argument("--document", action="store_true", help="run nothing, write docs/recipes.md from kept results")
    parser.add_argument("--json", action="store_true", help="one line of JSON on standard output")
    args = parser.parse_args()
    from aifactory_train.config.loading import load_recipe, recipe_ids

    embedded = [name for name in recipe_ids() if is_embedded(load_recipe(name))]
    if args.document:
        DOCUMENT.write_text(document(kept()), encoding="utf-8")
        return 0
    unknown = sorted(set(args.only) - set(embedded))
    if unknown:
        parser.error(f"not a recipe with embedded data: {', '.join(unknown)}")
    import_libraries()
    results = []
    for name in args.only or embedded:
        result = measure(name, args.steps, args.rows, args.note)
        results.append(result)
        print(reported(result), file=sys.stderr, flush=True)
        if args.keep or args.write:
            keep(result)
    if args.write:
        DOCUMENT.write_text(document(kept()), encoding="utf-8")
    if args.json:
        print(
            json.dumps([{k: r.get(k) for k in ("id", "metric", "before", "after", "ci", "seconds")} for r in results])
        )
    return 0 if all(r["improved"] for r in results) else 1


def is_embedded(recipe: Any) -> bool:
    """Whether model and rows come from packages, so that the recipe runs as it stands."""
    sources = [*recipe.data.train, *(recipe.data.eval or [])]
    return all(s.source.startswith(("pypi:", "npm:")) for s in sources)


def measure(name: str, steps: int, rows: int, note: str) -> dict[str, Any]:
    """Fetch and train one recipe in a folder of its own; figures before and after on its held-out rows."""
    from aifactory_train.config.loading import load_recipe

    recipe = load_recipe(name)
    settings = [f"train.max_steps={steps}"] if recipe.train.max_steps is None or recipe.train.max_steps > steps else []
    settings += [f"data.eval_rows={rows}"] if recipe.data.eval_rows > rows else []
    # every held-out row that is scored is answered as well, where the metric is one of answers
    writes = recipe.about.metric not in SMALLER and recipe.methods.head is None
    settings += [f"eval.generate_rows={min(rows, recipe.data.eval_rows) if writes else 0}"]
    command = ["aifactory", "train", name, *(word for s in settings for word in ("--set", s))]
    result: dict[str, Any] = {"id": name, "metric": recipe.about.metric, "command": " ".join(command)}
    result |= {"before": None, "after": None, "ci": None, "seconds": None, "improved": False}
    result["machine"] = {"cores": os.cpu_count(), "python": platform.python_version(), "note": note}
    with tempfile.TemporaryDirectory(prefix="recipe-") as scratch:
        run_dir = Path(scratch) / "run"
        done = aifactory("fetch", name)
        if done.returncode == 0:
            quiet = [word for s in LEAVE_OUT for word in ("--set", s)]
            start = time.monotonic()
            done = aifactory(*command[1:], *quiet, "--run-dir", str(run_dir), "--quiet")
            result["seconds"] = round(time.monotonic() - start, 1)
        if done.returncode != 0:
            result["failed"] = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return result
        figures = json.loads((run_dir / "eval.json").read_text(encoding="utf-8"))
        try:
            result |= judge(recipe.about.metric, figures)
        except ValueError as error:
            result["failed"] = str(error)
            return result
        result |= throughput(run_dir / "metrics.jsonl")
        result["repeated"] = repeated(load_recipe(name, settings))
        result["constant"] = constant(load_recipe(name, settings))
    return result


@dataclass
class Done:
    """How a command ended: its exit code and what it wrote to standard error."""

    returncode: int
    stderr: str


def aifactory(*words: str) -> Done:
    """The command line in a process of its own, forked from this one so that the libraries are imported only once."""
    with tempfile.TemporaryFile() as reported:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(reported.fileno(), 1)
                os.dup2(reported.fileno(), 2)
                from aifactory_train.cli import main as command_line

                code = command_line(list(words))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        reported.seek(0)
        return Done(os.waitstatus_to_exitcode(status), reported.read().decode("utf-8", "replace"))


def import_libraries() -> None:
    """What every run imports. No thread is started and no tensor made, so that a child may be forked safely."""
    for name in ("torch", "transformers", "peft", "aifactory_train.training.start", "aifactory_train.data"):
        importlib.import_module(name)


def judge(metric: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Before, after and change of the recipe's metric with their intervals, and under ``bits_per_byte`` the same of
    that.

    Improved: the paired interval of the change (the same rows before and after) leaves out zero on the better side;
    without one, that the intervals of before and after do not meet. A metric without a figure (no answers, one row) is
    an error: nothing stands in for it.
    """
    out = {"metric": metric, **verdict(metric, figures), "rows": figures["after"]["rows"]}
    if BITS not in figures["after"]:
        return out  # a head writes nothing: it is judged on all rows, and there are no bits
    if metric not in SMALLER:
        out["rows"] = figures["after"]["answered_rows"]
    if metric != BITS:
        out[BITS] = verdict(BITS, figures)
    return out


def verdict(metric: str, figures: dict[str, Any]) -> dict[str, Any]:
    """``{before, after, ci: {before, after[, change]}, improved}`` of one metric."""
    before, after = figures["before"], figures["after"]
    missing = [k for k in ("before", "after") if figures[k].get(metric) is None or not figures[k]["ci"].get(metric)]
    if missing:
        raise ValueError(f"no {metric} with an interval {' and '.join(missing)} the training")
    ci = {"before": before["ci"][metric], "after": after["ci"][metric]}
    change = (figures.get("change") or {}).get(metric)
    if change and change["ci"]:
        ci["change"] = change["ci"]
        improved = change["better"] is True
    elif metric in SMALLER:
        improved = ci["after"][1] < ci["before"][0]
    else:
        improved = ci["after"][0] > ci["before"][1]
    return {"before": before[metric], "after": after[metric], "ci": ci, "improved": improved}


def throughput(metrics: Path) -> dict[str, Any]:
    """Steps and tokens of the run, from its log."""
    steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [s for s in steps if "tokens" in s and "step" in s]
    return {"steps": max((s["step"] for s in steps), default=0), "tokens": sum(s["tokens"] for s in steps)}


def repeated(recipe: Any) -> dict[str, int] | None:
    """Held-out rows that a training row repeats (data/overlap.py), as the preparation counted them before leaving such
    training rows out."""
    from aifactory_train.data import prepare

    prepared = prepare(recipe)
    overlap = prepared.report.get("overlap") or {}
    found = overlap.get("held_out_rows_repeated")
    return None if found is None else {"rows": int(found), "of": sum(len(e) for e in prepared.evals.values())}


def constant(recipe: Any) -> float | None:
    """What the most frequent answer of the training rows scores when it is given to every held-out row: the least that
    a classifier must beat. None where the metric is not one of labels."""
    from aifactory_train.data import prepare
    from aifactory_train.metrics import ANSWER_METRICS

    if recipe.about.metric not in ("accuracy", "micro_f1", "macro_f1"):
        return None
    prepared = prepare(recipe)
    between = recipe.eval.label_separator or ""

    def label(row: dict[str, Any]) -> str:
        return between.join(row["labels"]) if "labels" in row else row["messages"][-1]["content"]

    wanted = [label(rows.row(i)) for rows in prepared.evals.values() for i in range(len(rows))]
    seen = collections.Counter(label(prepared.train.row(i)) for i in range(len(prepared.train)))
    metric, (answer, _) = ANSWER_METRICS[recipe.about.metric], seen.most_common(1)[0]
    sums = metric.statistics([answer] * len(wanted), wanted, recipe.eval.label_separator).sum(0)
    return float(metric.value(sums))


def reported(result: dict[str, Any]) -> str:
    if result.get("failed"):
        return f"{result['id']}: failed: {result['failed']}"
    change = f"{result['metric']} {result['before']:.3f} -> {result['after']:.3f}"
    if result.get(BITS):
        change += f", bits per byte {result[BITS]['before']:.3f} -> {result[BITS]['after']:.3f}"
    return f"{result['id']}: {change} {'improved' if result['improved'] else 'NOT IMPROVED'}, {result['seconds']:.0f} s"


# ---- the document


def kept() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def keep(result: dict[str, Any]) -> None:
    RESULTS.write_text(
        json.dumps(dict(sorted({**kept(), result["id"]: result}.items())), indent=1, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )


def document(results: dict[str, Any]) -> str:
    """docs/recipes.md: what is measured first, then every recipe by sector with what it is made of."""
    from aifactory_train.commands.recipes import summary
    from aifactory_train.config.loading import load_recipe, recipe_ids

    recipes = {name: load_recipe(name) for name in recipe_ids()}
    measured = [n for n in recipes if n in results and not results[n].get("failed")]
    waiting = [n for n in recipes if is_embedded(recipes[n]) and n not in measured]
    lines = [(ROOT / "benchmarks" / "recipes-head.md").read_text(encoding="utf-8").rstrip(), ""]
    lines += ["## Measured on CPU", ""]
    lines += [
        "SmolLM2-135M on held-out rows, before and after a run of a few minutes; 95 % bootstrap intervals over rows "
        "in brackets.",
        "Scored is the metric by which the sector's users judge, on answers generated for these rows, and bits per "
        "byte of the expected",
        "answers beside it. *Improved* means that the paired interval of the change leaves out zero (without one: "
        "that the two",
        "intervals do not meet); *no* means that so short a run did not raise it beyond chance. Exact names out of a "
        "thousand take longer than",
        "this; chrF counts recall twice, so an untrained model that writes until it is cut can score above answers of "
        "the right length.",
        "Seconds are from the start of the command to its end, with preparing, loading the model and both "
        "evaluations, libraries imported before. *Repeated*: held-out rows that a",
        "training row repeats, counted before such training rows are left out. Nothing here was measured on a GPU. "
        "The runs leave",
        f"out what these figures do not need: `{' '.join(LEAVE_OUT)}`.",
        "",
        f"{sum(results[n]['improved'] for n in measured)} of {len(measured)} measured recipes improved their metric, "
        f"{sum(bits_of(results[n]).get('improved', False) for n in measured)} bits per byte; the longest run took "
        f"{max((results[n]['seconds'] for n in measured), default=0):.0f} seconds.",
        "",
        "| recipe | metric | before | after | improved | bits per byte before | after | improved | rows | repeated | "
        "tokens | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in measured:
        r = results[name]
        again = r.get("repeated")
        shown = f"{again['rows']} of {again['of']}" if again else "not counted"
        own = "| | | " if r["metric"] == BITS or BITS not in r else columns(bits_of(r))
        lines.append(
            f"| `{name}` | {r['metric'].replace('_', ' ')} {columns(r)}{own}"
            f"| {r['rows']} | {shown} | {r['tokens']:,} | {r['seconds']:.0f} |"
        )
    constants = [f"`{n}` {results[n]['constant']:.3f}" for n in measured if results[n].get("constant") is not None]
    if constants:
        lines += [
            "",
            f"For comparison, the most frequent training answer given to every held-out row scores: "
            f"{', '.join(constants)}.",
            "A classifier that is not above it after so short a run has learnt the form of the answer and the "
            "commonest label, no more.",
        ]
    lines += side_by_side(list(recipes), results)
    lines += ["", "| recipe | command | machine |", "|---|---|---|"]
    for name in measured:
        machine = results[name]["machine"]
        about = f"{machine['cores']} cores, Python {machine['python']}" + (
            f"; {machine['note']}" if machine["note"] else ""
        )
        lines.append(f"| `{name}` | `{results[name]['command']}` | {about} |")
    lines += [
        "",
        "Not run yet: " + (", ".join(f"`{n}`" for n in waiting) if waiting else "none of the embedded ones") + ".",
    ]
    brought = [n for n in recipes if not is_embedded(recipes[n])]
    lines += [
        "",
        "Not run, because they wait for your data (their ten example rows only show the form): "
        + ", ".join(f"`{n}`" for n in brought)
        + ".",
        "",
        "## All recipes",
    ]
    for name, recipe in recipes.items():
        row = summary(recipe)
        lines += [
            "",
            f"### {name}",
            "",
            f"{recipe.about.title}: {recipe.about.task}. {recipe.about.summary.strip()}",
            "",
        ]
        lines.append(
            f"- rows: {'embedded, ' if is_embedded(recipe) else 'bring your data, '}"
            + "; ".join(
                sorted(
                    {
                        f"`{s.source if is_embedded(recipe) else Path(s.source).name}` ({s.licence})"
                        for s in recipe.data.train
                    }
                )
            )
        )
        lines.append(f"- metric: {recipe.about.metric.replace('_', ' ')}")
        lines.append("- bases: " + "; ".join(f"`{b['base'].partition('#')[0]}` ({b['licence']})" for b in row["bases"]))
        if recipe.about.public_data:
            lines.append(
                "- public data: "
                + "; ".join(f"`{p.source}` @ {p.revision} ({p.licence})" for p in recipe.about.public_data)
            )
    return "\n".join(lines) + "\n"


def side_by_side(names: list[str], results: dict[str, Any]) -> list[str]:
    """The recipes that classify by a head beside those that write the label of the same rows."""
    lines = [
        "",
        "### Classifiers beside the generative form",
        "",
        "The same rows and metric. The head is judged on all held-out rows that are scored, the generative form on "
        "those that it answered.",
        "",
        "| rows | metric | generative form | seconds | head | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name in (n for n in names if n.endswith("-classifier")):
        both = [results.get(n) or {} for n in (name.removesuffix("-classifier"), name)]
        shown = [
            (figure(r["after"], r["ci"]["after"]), f"{r['seconds']:.0f}") if r.get("ci") else ("not measured", "")
            for r in both
        ]
        metric = next((r["metric"].replace("_", " ") for r in both if r.get("metric")), "")
        cells = " | ".join(cell for pair in shown for cell in pair)
        lines.append(f"| `{name.removesuffix('-classifier')}` | {metric} | {cells} |")
    return lines


def bits_of(result: dict[str, Any]) -> dict[str, Any]:
    """The verdict on bits per byte, which is the recipe's own where that is its metric; a head has none."""
    return result if result["metric"] == BITS else result.get(BITS, {})


def columns(found: dict[str, Any]) -> str:
    """Before, after and improved of a verdict, as columns of a table."""
    shown = [figure(found["before"], found["ci"]["before"]), figure(found["after"], found["ci"]["after"])]
    return f"| {shown[0]} | {shown[1]} | {'yes' if found['improved'] else 'no'} "


def figure(value: float, ci: list[float]) -> str:
    return f"{value:.3f} [{ci[0]:.3f}, {ci[1]:.3f}]"


if __name__ == "__main__":
    raise SystemExit(main())
