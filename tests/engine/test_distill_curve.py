"""Distillation, and the preference losses without a reference, give one curve for any ranks, accumulation, packing and
engine, and go on to the bit.
"""

from __future__ import annotations

from pathlib import Path

import helpers
import pytest
from test_curve import differs, run
from test_methods import pair_rows

from aifactory_train.config.loading import load_recipe
from aifactory_train.evaluation.teaching import teach

STEPS = 3
SPLITS = {
    1: [("packed", []), ("padded, accumulated", ["data.batching=padded", "train.grad_accum=3"])],
    2: [("ddp", ["data.batching=padded", "train.grad_accum=2"]), ("fsdp2", ["parallel.engine=fsdp2"])],
}
METHODS = {
    "js": ["methods.distill.loss=js", "methods.distill.temperature=2"],
    "forward_kl": ["methods.distill.loss=forward_kl"],
    "simpo": ["methods.preference.kind=simpo"],
    "cpo": ["methods.preference.kind=cpo"],
}


def curves(folder: Path, model: Path, methods: list[str]) -> dict[str, list[dict[str, float]]]:
    """``{METHOD: SPLIT: curve}``; on two ranks fsdp2's last step is made again from its checkpoint."""
    cases: dict[int, list[dict]] = {ranks: [] for ranks in SPLITS}
    teacher = helpers.write_model(folder / "teacher", layers=3, seed=5)
    for name in methods:
        settings = {"train.batch_rows": 9, "eval.before": False, "adapter.kind": "none", "train.learning_rate": 3.0e-3}
        recipe = helpers.write_recipe(folder / name, model, rows=24, eval_rows=4, settings=settings)
        overrides = [*METHODS[name], "train.schedule=constant", "train.grad_accum=1"]
        if "distill" in METHODS[name][0]:
            block = {"teacher": teacher, "top_k": 8, "licence": "own", "stored": folder / f"stored-{name}"}
            overrides += [f"methods.distill.{key}={value}" for key, value in block.items()]
            teach(load_recipe(str(recipe), overrides))
        else:
            helpers.write_jsonl(folder / name / "train.jsonl", pair_rows(24))
            helpers.write_jsonl(folder / name / "eval.jsonl", pair_rows(4, start=500))
        for ranks, splits in SPLITS.items():
            for split, more in splits:
                case = {"name": f"{name}: {split}", "recipe": str(recipe), "steps": STEPS}
                again = {"again_from": 2} if split == "fsdp2" else {}
                cases[ranks].append({**case, "overrides": [*overrides, *more], **again})
    found: dict[str, list[dict[str, float]]] = {}
    for ranks, work in cases.items():
        found |= run(folder, f"ranks-{ranks}", ranks, work)
    return found


def judge(found: dict[str, list[dict[str, float]]], methods: list[str]) -> None:
    for name in methods:
        reference = found[f"{name}: packed"]
        assert len({record["loss"] for record in reference}) == STEPS
        for split, curve in found.items():
            if split.startswith(f"{name}:"):
                assert differs(curve[:STEPS], reference) is None, (split, differs(curve[:STEPS], reference))
        again = found[f"{name}: fsdp2"]
        assert len(again) == STEPS + 1 and again[-1]["loss"] == again[-2]["loss"], "a resumed step is another"
        assert again[-1]["grad_norm"] == again[-2]["grad_norm"]


@pytest.mark.slow
def test_distillation_on_one_and_two_ranks(tmp_path, tiny_model_dir):
    judge(curves(tmp_path, tiny_model_dir, ["js"]), ["js"])


@pytest.mark.slow
def test_every_other_loss_on_one_and_two_ranks(tmp_path, tiny_model_dir):
    others = [name for name in METHODS if name != "js"]
    judge(curves(tmp_path, tiny_model_dir, others), others)
