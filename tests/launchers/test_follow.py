"""What ``status`` makes of a run folder alone: no scheduler is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aifactory_train.launchers.follow import status_of


def unclosed(folder: Path, *, ranks: str, scheduler: str | None, world: int = 2) -> Path:
    """A run whose only attempt the batch shell could not close; the scheduler's last word was kept."""
    attempt = folder / "attempts" / "001"
    attempt.mkdir(parents=True)
    (folder / "submission").mkdir()
    (folder / "submission" / "manifest.json").write_text(json.dumps({"backend": "slurm", "site": "lab"}))
    record = {"number": 1, "job": "18", "world": world, "nodes": ["g1"], "started": 100.0, "gpus": 2}
    (attempt / "attempt.json").write_text(json.dumps(record))
    for rank in range(world):
        outcome = {"rank": rank, "status": ranks, "step": 3, "ended": 160.0, "message": "stopped by SIGTERM"}
        (attempt / f"outcome-{rank}.json").write_text(json.dumps(outcome))
    if scheduler:
        told = {"job": "18", "state": scheduler, "raw": scheduler.upper(), "nodes": ["g1"]}
        (attempt / "scheduler.json").write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize(
    ("ranks", "scheduler", "state"),
    [
        ("stopped", "cancelled", "cancelled"),  # quick ranks save between the cancellation and the kill
        ("stopped", "timeout", "stopped"),
        ("stopped", None, "stopped"),
        ("done", "cancelled", "done"),  # nothing was left to cancel
    ],
)
def test_an_attempt_that_nobody_closed(tmp_path, ranks, scheduler, state):
    found = status_of(unclosed(tmp_path / "run", ranks=ranks, scheduler=scheduler), ask=False)
    assert found["state"] == state, found
    if state == "cancelled":
        assert found["cause"]["kind"] == "cancelled" and found["cause"]["step"] == 3
        assert "had saved step 3" in found["cause"]["message"]
    elif state == "done":
        assert found["cause"] is None
