"""The real trainer under the launcher's book-keeping: who answers a stop, what a lost node leaves, and many starts in
one folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aifactory_train.core.errors import EXIT_DONE, EXIT_REFUSED, EXIT_STOPPED

ALL = list(range(1, 25))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    script = Path(__file__).resolve().parent / "launched.py"
    folder = tmp_path_factory.mktemp("launched")
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_a_stop_of_a_running_attempt_ends_the_run_though_the_time_limits_warning_follows(found: dict[str, Any]) -> None:
    seen = found["training"]
    assert seen["begin"] == ["go", "001"] and seen["codes"] == [EXIT_STOPPED] * 2, seen
    assert seen["left"], "the trainer must leave the request to what judges the attempt"
    assert seen["verdict"][:2] == ["end", "stopped"] and "user" in seen["why"], seen
    assert seen["behind"][0] == "end", "a job that was queued behind it trains no more"
    # An explicit resumption is newer than the request that was answered.
    assert seen["resumed"] == ["go", "002"] and seen["again"] == [EXIT_DONE] * 2, seen
    assert seen["end"][:2] == ["end", "done"] and seen["steps"] == ALL


def test_the_outcome_says_who_asked(found: dict[str, Any]) -> None:
    seen = found["file"]
    assert seen["codes"] == [EXIT_STOPPED] and seen["left"], seen
    assert seen["outcome"]["message"].endswith("stop file") and seen["outcome"]["stop_request"].startswith("user "), (
        seen
    )
    assert seen["verdict"][:2] == ["end", "stopped"], "the file was gone when the attempt was judged"


def test_a_stop_while_the_trainer_starts_counts(found: dict[str, Any]) -> None:
    seen = found["starting"]
    assert seen["codes"] == [EXIT_STOPPED] and seen["steps"] == [1], seen
    assert seen["verdict"][:2] == ["end", "stopped"] and seen["behind"][0] == "end"


def test_a_job_that_is_put_back_goes_on_at_once_on_another_machine(found: dict[str, Any]) -> None:
    seen = found["elsewhere"]
    assert seen["codes"] == [-9] and seen["begin"] == ["go", "002"], seen
    assert seen["again"] == [EXIT_DONE] and seen["end"][:2] == ["end", "done"], seen
    assert seen["steps"] == ALL and seen["starts"] == ["00001.json", "00002.json"], seen
    assert "watching its heartbeat" not in seen["log"], "the launcher knows that the other one is gone"


@pytest.mark.parametrize("name", ["at once", "at once, resumed"])
def test_of_several_starts_at_once_one_trains_and_the_others_are_refused(found: dict[str, Any], name: str) -> None:
    seen = found[name]
    assert sorted(seen["codes"]) == [EXIT_DONE, *[EXIT_REFUSED] * 3], seen
    assert sum("a run is live here" in log for log in seen["logs"]) == 3, seen["logs"]
    assert not any("Traceback" in log for log in seen["logs"])
    assert seen["steps"] == ALL and seen["state"] == "finished", seen
    assert seen["attempts"] == ["001"] and seen["starts"] == ["00001.json"], seen
