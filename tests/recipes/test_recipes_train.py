"""Every recipe trains: two steps on a tiny random model, through the real command, on its own rows. What it learns is
for benchmarks/recipes.py; here rows, settings and metrics of a recipe are shown to fit together from the file to
eval.json."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers
import pytest

from aifactory_train.commands.recipes import listed
from aifactory_train.config.loading import load_recipe

EMBEDDED = [r["id"] for r in listed() if r["embedded"]]
BROUGHT = [r["id"] for r in listed() if not r["embedded"]]

#: One process trains one recipe after the other: what is imported is imported once.
LOOP = """
import json, sys
from aifactory_train.cli import main
folder, commands = sys.argv[1], json.loads(sys.argv[2])
json.dump({name: [main(words) for words in each] for name, each in commands.items()}, open(folder + "/codes.json", "w"))
"""


def commands(name: str, model: Path, run: Path, *, rows: int | None = None, fetch: bool = False) -> list[list[str]]:
    """The command lines of a user who trains ``name`` for two steps on another base."""
    settings: dict[str, Any] = {
        "model.base": model,
        "model.licence": "Apache-2.0",
        "data.sequence_length": 512,
        "data.eval_rows": 4,
        "data.workers": 1,
        "train.max_steps": 2,
        "train.batch_tokens" if load_recipe(name).train.batch_tokens else "train.batch_rows": 512 if rows else 4,
        "eval.generate_rows": 4,
        "eval.max_new_tokens": 3,
        "eval.forgetting": False,
        "checkpoint.at_end": False,
        "export.automatic": False,
        "record.pack": False,
        "logging.tensorboard": False,
    }
    if rows:
        settings |= {f"data.train.{i}.max_rows": rows for i in range(len(load_recipe(name).data.train))}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value, default=str)}")]
    start = [["fetch", name, *words]] if fetch else []
    return [*start, ["train", name, *words, "--run-dir", str(run), "--quiet"]]


def trained(folder: Path, asked: dict[str, list[list[str]]], timeout: float) -> tuple[dict[str, list[int]], str]:
    """Exit codes of the commands by recipe, and the end of what they told."""
    done = subprocess.run(
        [sys.executable, "-c", LOOP, str(folder), json.dumps(asked)],
        cwd=folder, env=helpers.environment(), capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "codes.json").read_text()), done.stderr[-3000:]


def check_run(name: str, run: Path) -> dict[str, Any]:
    """Two finite steps, and the metric of the recipe before and after; returns eval.json."""
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in log if "loss" in line and "tokens" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["tokens"] > 0 for line in steps)
    figures = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    likelihood = "bits_per_byte" if load_recipe(name).methods.head is None else "loss"
    for when in ("before", "after"):
        for metric in (likelihood, load_recipe(name).about.metric):
            assert isinstance(figures[when][metric], float) and math.isfinite(figures[when][metric]), (when, metric)
    assert figures["before"][likelihood] != figures["after"][likelihood], "nothing was trained"
    return figures


@pytest.fixture(scope="module")
def examples(tmp_path_factory, tiny_model_dir) -> tuple[Path, dict[str, list[int]], str]:
    folder = tmp_path_factory.mktemp("examples")
    asked = {name: commands(name, tiny_model_dir, folder / name) for name in BROUGHT}
    return folder, *trained(folder, asked, timeout=240)


def test_some_recipes_wait_for_rows_of_your_own():
    assert len(BROUGHT) >= 6


@pytest.mark.parametrize("name", BROUGHT)
def test_a_recipe_trains_on_its_ten_example_rows(name, examples):
    folder, codes, reported = examples
    assert codes[name] == [0], reported
    figures = check_run(name, folder / name)
    assert 1 <= figures["after"]["rows"] <= 4


@pytest.mark.network
@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_recipe_trains_on_its_real_rows(name, real_cache, monkeypatch, tmp_path, tiny_model_dir):
    monkeypatch.setenv("AIFACTORY_CACHE", str(real_cache))
    asked = {name: commands(name, tiny_model_dir, tmp_path / "run", rows=200, fetch=True)}
    codes, reported = trained(tmp_path, asked, timeout=280)
    assert codes[name] == [0, 0], reported
    check_run(name, tmp_path / "run")
