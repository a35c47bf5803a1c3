"""What many ranks cost grows as it is meant to: bounds on counts and on how they grow, one on an idle wait."""

from __future__ import annotations

import sys
from pathlib import Path

import helpers
import pytest

sys.path.insert(0, str(helpers.ROOT / "benchmarks"))

import scale


@pytest.mark.parametrize(("ranks", "local"), [(1024, 4), (4096, 4), (4096, 8)])
def test_a_rank_costs_the_file_system_one_operation_a_minute_at_most(tmp_path: Path, ranks: int, local: int) -> None:
    found = scale.file_operations(ranks, local, tmp_path)
    assert 0.05 < found["operations_a_rank_minute"] <= 1, found


def test_checkpoint_metadata_grows_by_less_than_a_kilobyte_a_rank() -> None:
    small, large = scale.checkpoint_costs(8), scale.checkpoint_costs(512)
    assert (large["metadata_bytes"] - small["metadata_bytes"]) / (512 - 8) < 1024
    assert large["layout_bytes"]["rows"] - small["layout_bytes"]["rows"] < 60 * 873  # tensors, not ranks times tensors
    assert large["save_message_bytes"] == small["save_message_bytes"]


def test_the_loop_does_not_wait_for_the_next_step(tmp_path: Path) -> None:
    found = scale.step_costs(256, 8, 200.0, tmp_path)
    assert found["waited_best_ms"] <= 5, found


@pytest.mark.parametrize("failed", [False, True])
def test_a_verdict_reads_a_file_a_node_where_all_ended_well(tmp_path: Path, failed: bool) -> None:
    few, many = (scale.judged(ranks, 4, tmp_path / str(ranks), failed) for ranks in (8, 64))
    a_rank = (many["files"] - few["files"]) / (64 - 8)
    assert a_rank == 2 + (1 + 1 / 4 if failed else 2 / 4)  # place and exit of each rank; its own outcome, or the node's
    assert many["status_bytes"] < few["status_bytes"] + 100  # status tells of many ranks in as many words
