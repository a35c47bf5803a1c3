"""What Muon, schedule-free AdamW, Adafactor and a mean of the weights keep is in the checkpoint: runs go on bit by bit,
under another engine and on other numbers of ranks, and an export of a checkpoint is what an evaluation then saw.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from legs import run_legs

from aifactory_train.exporting.trained_tensors import judged
from aifactory_train.parallel.storage import read_parameters, same_tensors

STEPS, CUT = 6, 3
CASES: dict[str, dict[str, Any]] = {
    "muon": {"optimizer": "muon"},
    "schedule-free": {"optimizer": "schedule_free_adamw", "train": {"schedule": "constant", "warmup_steps": 2}},
    "adafactor": {"optimizer": "adafactor"},
    "mean": {"optimizer": "sgd", "train": {"average": {"kind": "mean", "start_step": 1}}},
    "ema": {"optimizer": "adamw8bit", "train": {"average": {"decay": 0.5}}},
}


def leg(name: str, folder: Path, **more: Any) -> dict[str, Any]:
    fixed = {"engine": "ddp", "adapter": "none", "folder": str(folder), "to": STEPS, "every": CUT}
    return {**fixed, **CASES[name], **more}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("optimizers")
    legs = []
    for name in CASES:
        legs += [
            leg(name, folder / name / "whole"),
            leg(name, folder / name / "cut", to=CUT),
            leg(name, folder / name / "cut", resume=True),
        ]
    legs += [leg("mean", folder / "each", every=1), leg("muon", folder / "plain", optimizer="adamw", to=1)]
    return folder, run_legs(1, legs, folder)


@pytest.mark.parametrize("name", CASES)
def test_it_resumes_bit_by_bit(name: str, alone: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = alone
    whole, _, resumed = found[3 * list(CASES).index(name) :][:3]
    assert resumed["resumed"] == CUT
    assert not same_tensors(folder / name / "whole" / f"step-{STEPS}", folder / name / "cut" / f"step-{STEPS}")
    assert all(resumed["losses"][str(s)] == whole["losses"][str(s)] for s in range(CUT, STEPS))


@pytest.mark.parametrize("name", ["schedule-free", "mean", "ema"])
def test_an_export_of_a_checkpoint_is_the_mean(name: str, alone: tuple[Path, list[dict[str, Any]]]) -> None:
    folder = alone[0] / name / "whole"
    ends = [dict(read_parameters(folder / f"step-{step}")) for step in (CUT, STEPS)]
    means = [judged(folder / f"step-{step}") for step in (CUT, STEPS)]
    for parameter, weights in ends[1].items():
        assert means[1][parameter].dtype == weights.dtype and means[1][parameter].shape == weights.shape
    moved = sum(float((ends[1][n] - ends[0][n]).square().sum()) for n in ends[0]) ** 0.5
    away = sum(float((means[1][n] - ends[1][n]).square().sum()) for n in ends[0]) ** 0.5
    assert 0.05 * moved < away < 2 * moved, "the mean lags behind the weights"


def test_a_mean_of_all_steps_is_their_mean(alone: tuple[Path, list[dict[str, Any]]]) -> None:
    folder = alone[0] / "each"
    each = [dict(read_parameters(folder / f"step-{step}")) for step in range(2, STEPS + 1)]
    for name, mean in judged(folder / f"step-{STEPS}").items():
        torch.testing.assert_close(mean, torch.stack([weights[name] for weights in each]).mean(0))


def test_a_plain_runs_weights_are_as_they_are(alone: tuple[Path, list[dict[str, Any]]]) -> None:
    folder = alone[0] / "plain" / "step-1"
    weights = dict(read_parameters(folder))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in judged(folder).items())


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CASES if n != "ema"])  # 8-bit moments: engine ddp alone
def test_shards_resume_bit_by_bit_and_read_what_copies_wrote(
    name: str, alone: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    shards = {"engine": "fsdp2"}
    legs = [
        leg(name, tmp_path / "whole", **shards),
        leg(name, tmp_path / "cut", to=CUT, **shards),
        leg(name, tmp_path / "cut", resume=True, **shards),
        leg(name, alone[0] / name / "whole", resume=CUT, every=99, **shards),
    ]
    _, _, resumed, other = run_legs(2, legs, tmp_path)
    assert resumed["resumed"] == other["resumed"] == CUT
    assert not same_tensors(tmp_path / "whole" / f"step-{STEPS}", tmp_path / "cut" / f"step-{STEPS}")
    whole = alone[1][3 * list(CASES).index(name)]
    for step in range(CUT, STEPS):
        assert other["losses"][str(step)] == pytest.approx(whole["losses"][str(step)], rel=1e-5)
