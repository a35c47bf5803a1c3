"""The failure lab: whatever breaks in a job of several ranks, it ends within half a minute, and what the launcher
decides is right: which rank and node, of what kind, and whether it goes on, elsewhere or not at all.

The cases are in ``failures.py``; here are those that run with every change, ``test_all_failures.py`` has all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from failures import CASES, Case

FAST = [name for name, case in CASES.items() if case.fast]
#: From the moment in which something breaks to the verdict.
MOST_S = 30


def seen_in(names: list[str], folder: Path, timeout: float) -> dict[str, Any]:
    script = Path(__file__).resolve().parent / "failures.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder), *names], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def judge(case: Case, seen: dict[str, Any]) -> None:
    print({key: seen[key] for key in ("seconds", "codes", "cause", "verdict")})
    assert seen["struck"] and seen["left"] == [], seen
    assert seen["seconds"] < MOST_S, seen
    assert seen["state"] == case.state, seen
    assert seen["verdict"][:2] == [case.action, case.state], seen
    if case.kind is None:
        assert seen["cause"] is None and set(seen["codes"].values()) == {0}, seen
        return
    cause, allowed = seen["cause"], case.rank if isinstance(case.rank, tuple) else (case.rank,)
    assert cause["kind"] == case.kind and cause["rank"] in allowed, seen
    assert cause["node"] == ("a" if cause["rank"] < case.ranks / 2 else "b"), seen
    assert case.words in cause["message"], seen
    assert seen["decision"]["exclude"] == ([cause["node"]] if case.excludes else []), seen
    assert seen["verdict"][2] == (cause["node"] if case.excludes else "-"), seen


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return seen_in(FAST, tmp_path_factory.mktemp("failures"), 400)


@pytest.mark.parametrize("name", FAST)
def test_a_failure_ends_the_job_with_the_right_verdict(name: str, found: dict[str, Any]) -> None:
    judge(CASES[name], found[name])
