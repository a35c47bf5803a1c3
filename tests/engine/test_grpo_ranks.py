"""GRPO on one and two ranks: the same answers, to the token, and one curve under every engine."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import helpers
import pytest
from test_curve import run

STEPS = 3
ONE_RANK = [("packed", []), ("padded, accumulated", ["data.batching=padded", "train.grad_accum=3"])]
TWO_RANKS = [
    ("ddp", []),
    ("fsdp2", ["parallel.engine=fsdp2"]),
    ("fsdp2, padded", ["parallel.engine=fsdp2", "data.batching=padded", "train.grad_accum=2"]),
]
VARIANTS: dict[str, dict[str, Any]] = {
    "dapo with kl": {"loss": "dapo", "kl": 0.1},
    "gspo, sampled ahead": {"loss": "grpo", "ratio": "sequence", "rollout_steps": 3, "truncated": "leave_out"},
}


@pytest.mark.slow
def test_ranks_engines_and_packing_change_neither_answers_nor_curve(tmp_path: Path, tiny_model_dir: Path) -> None:
    """The answers of a group of each step are compared as text, all of them by their tokens. The loss lies around 0, so
    it is compared absolutely too.
    """
    cases: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for variant, more in VARIANTS.items():
        grpo = {
            "reward": [{"pattern": "[a-m]"}],
            "group": 4,
            "max_new_tokens": 6,
            "temperature": 1.5,
            "rollout_prompts": 2,
            "keep": 4,
            "stop": [*string.ascii_letters, *string.digits],
            **more,
        }
        settings = {
            "methods.grpo": grpo,
            "adapter.kind": "none",
            "train.batch_rows": 5,
            "train.learning_rate": 3e-3,
            "train.schedule": "constant",
            "eval.before": False,
        }
        path = helpers.write_recipe(tmp_path / variant, tiny_model_dir, rows=15, settings=settings)
        for ranks, splits in ((1, ONE_RANK), (2, TWO_RANKS)):
            for name, overrides in splits:
                case = {"name": f"{variant}: {name}", "recipe": str(path), "steps": STEPS, "overrides": overrides}
                cases[ranks].append(case)
    found = {**run(tmp_path, "one", 1, cases[1]), **run(tmp_path, "two", 2, cases[2])}
    kept = {path.parent.name: path.read_text() for path in tmp_path.glob("runs-*/*/completions.jsonl")}
    for variant in VARIANTS:
        reference, answers = found[f"{variant}: packed"], kept[f"{variant}: packed"]
        assert len({json.loads(line)["completion"] for line in answers.splitlines()}) > 2 * STEPS
        assert max(abs(step["loss"]) for step in reference) > 1e-3
        for name, _ in [*ONE_RANK[1:], *TWO_RANKS]:
            assert kept[f"{variant}: {name}"] == answers, name
            for mine, theirs in zip(found[f"{variant}: {name}"], reference, strict=True):
                assert mine["tokens"] == theirs["tokens"] and mine["rows"] == theirs["rows"], name
                assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-6), name
                assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), name
