"""Embeddings give one curve for any ranks, accumulation, packing and engine: negatives are those of the whole step."""

from __future__ import annotations

from pathlib import Path

import pytest
from embedding_rows import write_embedding
from test_curve import differs, run

STEPS = 3
SPLITS = {
    1: [("packed", []), ("padded, accumulated", ["data.batching=padded", "train.grad_accum=3"])],
    2: [("ddp", ["data.batching=padded", "train.grad_accum=2"]), ("fsdp2", ["parallel.engine=fsdp2"])],
    4: [("ddp of 4", []), ("fsdp2 of 4", ["parallel.engine=fsdp2"])],
}


def judge(folder: Path, model: Path, ranks: list[int], names: tuple[str, ...]) -> None:
    recipes = {
        "last token": write_embedding(folder / "a", model, **{"train.batch_rows": 9, "adapter.kind": "none"}),
        "mean": write_embedding(
            folder / "b",
            model,
            **{"train.batch_rows": 9, "methods.head.pooling": "mean", "methods.head.matryoshka": [8]},
        ),
    }
    recipes = {name: recipes[name] for name in names}
    found: dict[str, list[dict[str, float]]] = {}
    for number in ranks:
        cases = []
        for name, recipe in recipes.items():
            for split, more in SPLITS[number]:
                overrides = ["train.schedule=constant", "train.grad_accum=1", "train.learning_rate=0.001", *more]
                case = {"name": f"{name}: {split}", "recipe": str(recipe), "steps": STEPS, "overrides": overrides}
                cases.append({**case, **({"again_from": 2} if split == "fsdp2" else {})})
        found |= run(folder, f"ranks-{number}", number, cases)
    for name in recipes:
        reference = found[f"{name}: packed"]
        assert len({record["loss"] for record in reference}) == STEPS
        for split, curve in found.items():
            if split.startswith(name):
                assert differs(curve[:STEPS], reference) is None, (split, differs(curve[:STEPS], reference))
        if f"{name}: fsdp2" in found:
            again = found[f"{name}: fsdp2"]
            assert len(again) == STEPS + 1 and again[-1] == again[-2], "a resumed step is another"


def test_one_and_two_ranks(tmp_path, tiny_model_dir):
    judge(tmp_path, tiny_model_dir, [1, 2], ("mean",))


@pytest.mark.slow
def test_up_to_four_ranks(tmp_path, tiny_model_dir):
    judge(tmp_path, tiny_model_dir, [1, 2, 4], ("last token", "mean"))
