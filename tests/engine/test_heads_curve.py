"""Heads give one curve for any ranks, accumulation, packing and engine, and go on to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from head_rows import write_head
from test_curve import differs, run

STEPS = 3
SPLITS = {
    1: [("packed", []), ("padded, accumulated", ["data.batching=padded", "train.grad_accum=3"])],
    2: [("ddp", ["data.batching=padded", "train.grad_accum=2"]), ("fsdp2", ["parallel.engine=fsdp2"])],
    4: [("ddp of 4", []), ("fsdp2 of 4", ["parallel.engine=fsdp2"])],
}
METHODS = {"one label": ("classification", "none"), "labels": ("multi_label", "lora")}


def curves(folder: Path, model: Path, ranks: list[int], methods: list[str]) -> dict[str, list[dict[str, float]]]:
    """``{METHOD: SPLIT: curve}``; on two ranks fsdp2's last step is made again from its checkpoint."""
    recipes = {}
    for name in methods:
        kind, adapter = METHODS[name]
        settings = {"train.batch_rows": 9, "adapter.kind": adapter, "train.learning_rate": 3.0e-3}
        recipes[name] = write_head(folder / name, model, kind, rows=24, held=4, **settings)
    found: dict[str, list[dict[str, float]]] = {}
    for number in ranks:
        cases = []
        for name, recipe in recipes.items():
            for split, more in SPLITS[number]:
                overrides = ["train.schedule=constant", "train.grad_accum=1", *more]
                case = {"name": f"{name}: {split}", "recipe": str(recipe), "steps": STEPS, "overrides": overrides}
                cases.append({**case, **({"again_from": 2} if split == "fsdp2" else {})})
        found |= run(folder, f"ranks-{number}", number, cases)
    return found


def judge(found: dict[str, list[dict[str, float]]], methods: list[str]) -> None:
    for name in methods:
        reference = found[f"{name}: packed"]
        assert len({record["loss"] for record in reference}) == STEPS
        for split, curve in found.items():
            if split.startswith(name):
                assert differs(curve[:STEPS], reference) is None, (split, differs(curve[:STEPS], reference))
        if f"{name}: fsdp2" in found:
            again = found[f"{name}: fsdp2"]
            assert len(again) == STEPS + 1 and again[-1] == again[-2], "a resumed step is another"


def test_one_label_on_one_and_two_ranks(tmp_path, tiny_model_dir):
    judge(curves(tmp_path, tiny_model_dir, [1, 2], ["one label"]), ["one label"])


@pytest.mark.slow
def test_every_kind_on_up_to_four_ranks(tmp_path, tiny_model_dir):
    judge(curves(tmp_path, tiny_model_dir, [1, 2, 4], list(METHODS)), list(METHODS))
