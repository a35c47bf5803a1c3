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
    ("fsdp2", ["parallel.engine=fsdp2", "data.batching=padded", "train.grad_accum=2"]),
]
VARIANTS: dict[str, dict[str, Any]] = {
    "dapo with kl": {"loss": "dapo", "kl": 0.1},
    "gspo, sampled ahead": {"loss": "grpo", "ratio": "sequence", "rollout_steps": 3, "truncated": "leave_out"},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_engines_and_packing_change_neither_answers_nor_curve(
    tmp_path: Path, tiny_model_dir: Path, variant: str
) -> None:
    """The answers of a group of each step are compared as text, all of them by their tokens. The loss lies around 0, so
    it is compared absolutely too.
    """
    grpo = {
        "reward": [{"pattern": "[a-m]"}],
        "group": 4,
        "max_new_tokens": 6,
        "temperature": 1.5,
        "rollout_prompts": 2,
        "keep": 4,
        "stop": [*string.ascii_letters, *string.digits],
        **VARIANTS[variant],
    }
    settings = {
        "methods.grpo": grpo,
        "adapter.kind": "none",
        "train.batch_rows": 5,
        "train.learning_rate": 3e-3,
        "train.schedule": "constant",
        "eval.before": False,
    }
    path = helpers.write_recipe(tmp_path / "recipe", tiny_model_dir, rows=15, settings=settings)

    def cases(splits: list[tuple[str, list[str]]]) -> list[dict[str, Any]]:
        return [{"name": name, "recipe": str(path), "steps": STEPS, "overrides": more} for name, more in splits]

    found = {**run(tmp_path, "one", 1, cases(ONE_RANK)), **run(tmp_path, "two", 2, cases(TWO_RANKS))}
    kept = {path.parent.name: path.read_text() for path in tmp_path.glob("runs-*/*/completions.jsonl")}
    reference, answers = found["packed"], kept["packed"]
    assert len({json.loads(line)["completion"] for line in answers.splitlines()}) > 2 * STEPS
    assert max(abs(step["loss"]) for step in reference) > 1e-3
    for name, _ in [*ONE_RANK[1:], *TWO_RANKS]:
        assert _told(kept[name]) == _told(answers), name
        for mine, theirs in zip(found[name], reference, strict=True):
            assert mine["tokens"] == theirs["tokens"] and mine["rows"] == theirs["rows"], name
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-6), name
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), name


def _told(rows: str) -> list[tuple[Any, ...]]:
    """What was answered, and what it was worth."""
    found = [json.loads(line) for line in rows.splitlines()]
    return [(row["step"], row["row_id"], row["completion"], row["tokens"], row["reward"]) for row in found]
