"""A finished run can be prolonged where the steps already made would have been the same, and only there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

from aifactory_train.parallel.storage import same_tensors

#: Several command lines in one process: each ends with its exit code; messages go to standard error.
SEVERAL = """
import json, sys
from aifactory_train.cli import main
codes = []
for arguments in json.loads(sys.argv[1]):
    print(f"=== {len(codes)}", file=sys.stderr, flush=True)
    codes.append(main(arguments))
print("codes", json.dumps(codes))
"""


def several(folder: Path, *commands: list[str]) -> tuple[list[int], list[str]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SEVERAL, json.dumps(commands)],
        cwd=folder,
        env=helpers.environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    messages = [part.partition("\n")[2] for part in done.stderr.split("=== ")[1:]]
    return json.loads(done.stdout.rpartition("codes ")[2]), messages


@pytest.mark.slow
def test_a_finished_run_goes_on_as_if_it_had_been_longer(tmp_path: Path, tiny_model_dir: Path) -> None:
    settings = {
        "train.max_steps": 3,
        "train.schedule": "constant",
        "train.warmup_steps": 1,
        "train.epochs": 9,
        "eval.before": False,
        "eval.after": False,
        "export.automatic": False,
        "parallel.threads": 1,
    }
    recipe = str(helpers.write_recipe(tmp_path, tiny_model_dir, settings=settings))

    def train(run: str, *more: str) -> list[str]:
        return ["train", recipe, "--run-dir", run, "--quiet", *more]

    def steps(count: int) -> list[str]:
        return ["--set", f"train.max_steps={count}"]

    codes, messages = several(
        tmp_path,
        train("whole", *steps(6)),
        train("cut"),
        train("cut", "--resume", "auto"),
        train("cut", "--resume", "auto", *steps(2)),
        train("cut", "--resume", "auto", *steps(6), "--set", "train.schedule=cosine"),
        train("cut", "--resume", "auto", *steps(6), "--set", "train.learning_rate=0.5"),
        train("cut", *steps(6)),
        train("cut", "--resume", "auto", *steps(6)),
    )
    assert codes == [0, 0, 2, 2, 2, 2, 2, 0], messages
    assert "finished run" in messages[2] and "larger train.max_steps" in messages[2]
    assert "finished after 3 steps, and 2 are asked for" in messages[3]
    assert "train.schedule" in messages[4] and "train.learning_rate" in messages[5]
    assert "finished run" in messages[6]  # nobody asked to go on
    assert "train.max_steps: 3 -> 6" in messages[7]
    losses = {}
    for run in ("whole", "cut"):
        lines = map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
        losses[run] = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
    assert losses["cut"] == losses["whole"] and len(losses["whole"]) == 6
    assert not same_tensors(*(tmp_path / run / "checkpoints" / "step-6" for run in ("whole", "cut")))
    assert json.loads((tmp_path / "cut" / "state.json").read_text())["state"] == "finished"
