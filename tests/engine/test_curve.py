"""The loss curve depends on the rows alone: not on ranks, accumulation, packing or padding."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

STEPS = 20
FULL = ["adapter.kind=none"]
OPTIMIZERS = {
    "adamw": ["train.optimizer=adamw", "train.learning_rate=3e-3", "train.max_grad_norm=1.0"],
    "sgd": ["train.optimizer=sgd", "train.learning_rate=0.3", "train.max_grad_norm=null"],
}


def cases(recipe: Path, accumulations: list[int], *, bug: str | None = None, steps: int = STEPS) -> list[dict]:
    found = []
    for method, adapter in (("full", FULL), ("lora", [])):
        for optimizer, settings in OPTIMIZERS.items():
            for batching in ("packed", "padded"):
                for accumulation in accumulations:
                    found.append(
                        {
                            "name": f"{method}-{optimizer}-{batching}-{accumulation}",
                            "recipe": str(recipe),
                            "steps": steps,
                            "bug": bug,
                            "overrides": [
                                *adapter,
                                *settings,
                                f"data.batching={batching}",
                                f"train.grad_accum={accumulation}",
                                "train.max_steps=null",
                                "train.epochs=10",
                                "train.schedule=constant",
                            ],
                        }
                    )
    return found


def run(folder: Path, name: str, ranks: int, work: list[dict]) -> dict[str, list[dict[str, float]]]:
    """Curves of all cases, from one process group of ``ranks`` processes."""
    job, out = folder / f"{name}.job", folder / f"{name}.json"
    job.write_text(json.dumps(work))
    command = [sys.executable, str(Path(__file__).parent / "curve_worker.py"), str(job), str(out)]
    if ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    result = subprocess.run(command, env=helpers.environment(), capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(out.read_text())


def differs(curve: list[dict[str, float]], reference: list[dict[str, float]]) -> str | None:
    """Why two curves are not the same, or None. The tolerances are those that the project promises."""
    if len(curve) != len(reference):
        return f"{len(curve)} steps instead of {len(reference)}"
    for step, (mine, theirs) in enumerate(zip(curve, reference, strict=True), start=1):
        if mine["rows"] != theirs["rows"] or mine["tokens"] != theirs["tokens"]:
            return f"step {step}: other rows"
        loss = abs(mine["loss"] - theirs["loss"]) / abs(theirs["loss"])
        norm = abs(mine["grad_norm"] - theirs["grad_norm"]) / abs(theirs["grad_norm"])
        if not loss <= (1e-6 if step == 1 else 1e-5):
            return f"step {step}: loss off by {loss:.1e}"
        if not norm <= (1e-6 if step == 1 else 1e-4):
            return f"step {step}: gradient norm off by {norm:.1e}"
    return None


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    # 10 rows a step in 48 rows: epochs end inside a step's reach, and micro-batches hold unequal supervised counts
    return helpers.write_recipe(
        tmp_path_factory.mktemp("curve"), tiny_model_dir, settings={"train.batch_rows": 10, "eval.before": False}
    )


@pytest.fixture(scope="module")
def single(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run(tmp_path_factory.mktemp("single"), "single", 1, cases(recipe, [1, 2, 4]))


@pytest.fixture(scope="module")
def double(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run(tmp_path_factory.mktemp("double"), "double", 2, cases(recipe, [1, 2, 4]))


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_curve_is_the_same_for_any_split(method: str, optimizer: str, single: dict, double: dict) -> None:
    reference = single[f"{method}-{optimizer}-packed-1"]
    assert all(math.isfinite(r["loss"]) for r in reference)
    faults = {}
    for ranks, curves in ((1, single), (2, double)):
        for name, curve in curves.items():
            if name.startswith(f"{method}-{optimizer}-"):
                fault = differs(curve, reference)
                if fault:
                    faults[f"{ranks} ranks {name}"] = fault
    assert not faults


def test_accumulation_really_accumulates(single: dict, double: dict) -> None:
    for curves in (single, double):
        for accumulation in (1, 2, 4):
            assert {r["micro_batches"] for r in curves[f"full-adamw-packed-{accumulation}"]} == {accumulation}


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_full_fine_tuning_learns(optimizer: str, single: dict) -> None:
    curve = single[f"full-{optimizer}-packed-1"]
    assert curve[-1]["loss"] <= 0.8 * curve[0]["loss"]


@pytest.mark.parametrize("bug", ["times_world_size", "mean_of_means", "last_only"])
def test_known_mistakes_would_be_noticed(bug: str, recipe: Path, single: dict, tmp_path: Path) -> None:
    """Each mistake that other frameworks had must turn the comparison red (SGD unclipped shows the scale of
    gradients).
    """
    names = {f"full-{optimizer}-packed-2" for optimizer in OPTIMIZERS}
    work = [case for case in cases(recipe, [2], bug=bug, steps=5) if case["name"] in names]
    curves = run(tmp_path, "bug", 2, work)
    for name, curve in curves.items():
        assert differs(curve, single[name.replace("packed-2", "packed-1")][:5]) is not None, (bug, name)
