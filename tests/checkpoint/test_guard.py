"""Losses that are not finite, or jump: stop, leave the batch out, or go back to the last good checkpoint."""

from __future__ import annotations

import math
from typing import Any

import pytest
from test_stopping import scenarios

from aifactory_train.config.schema import GuardConfig
from aifactory_train.training.guard import ENOUGH, Guard


def guard(**settings: Any) -> Guard:
    return Guard(GuardConfig(**settings))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_an_incident_in_loss_and_norm(bad: float) -> None:
    assert guard().judge(bad, 1.0).action == "stop"
    assert guard(on_nonfinite="skip").judge(1.0, bad).action == "skip"
    assert guard(on_nonfinite="rollback").judge(bad, bad).action == "rollback"


def test_a_spike_is_a_multiple_of_the_running_median() -> None:
    watch = guard(spike_factor=2.0)
    assert watch.judge(100.0, 1.0).action == "go"  # too early to tell
    for _ in range(ENOUGH):
        assert watch.judge(1.0, 1.0).action == "go"
    assert watch.judge(1.9, 1.0).action == "go"
    verdict = watch.judge(2.1, 1.0)
    assert verdict.action == "rollback" and "2.1" in verdict.why
    assert 2.1 not in watch.losses  # a spike does not raise the bar
    assert guard().judge(1e9, 1.0).action == "go"  # no factor, no spikes


def test_too_many_incidents_stop_the_run() -> None:
    watch = guard(on_nonfinite="skip", max_incidents=2)
    assert [watch.judge(math.nan, 1.0).action for _ in range(3)] == ["skip", "skip", "stop"]


def test_the_state_goes_through_json() -> None:
    import json

    watch, other = guard(spike_factor=2.0), guard(spike_factor=2.0)
    for loss in range(40):
        watch.judge(1.0 + loss / 100, 1.0)
    other.load(json.loads(json.dumps(watch.state())))
    assert other.state() == watch.state() and len(watch.losses) == 32


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Real runs on two ranks whose 11th loss is replaced."""
    return scenarios("guard", tmp_path_factory.mktemp("guard"), 400)


def test_stop_ends_the_run_and_names_step_and_figure(found: dict[str, Any]) -> None:
    seen = found["nan stop"]
    assert set(seen["codes"].values()) == {1} and seen["state"] == "failed"
    assert "step 11: loss nan" in seen["outcomes"]["0"]["message"]
    assert seen["complete"] == [8, 4]


def test_skip_leaves_the_batch_out(found: dict[str, Any]) -> None:
    seen = found["nan skip"]
    assert set(seen["codes"].values()) == {0}
    assert [r["kind"] for r in seen["records"]] == ["train"] * 10 + ["skip"] + ["train"] * 3
    assert all(math.isfinite(r["loss"]) for r in seen["records"] if r["kind"] == "train")


def test_rollback_takes_the_last_good_weights_and_skips_the_batches(found: dict[str, Any]) -> None:
    seen = found["spike rollback"]
    assert set(seen["codes"].values()) == {0}
    kinds = {r["step"]: r["kind"] for r in seen["records"]}
    assert kinds[11] == "rollback" and kinds[12] == "train"
    assert "weights of step 8" in seen["records"][10]["why"]
    rows = [row for r in seen["records"] for row in r["row_ids"]]
    assert len(rows) == 14 * 4  # every step took its own rows, in order: none was drawn again
