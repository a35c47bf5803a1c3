"""All cases of the failure lab (``failures.py``): five minutes on two cores."""

from __future__ import annotations

from typing import Any

import pytest
from failures import CASES
from test_failures import judge, seen_in

pytestmark = pytest.mark.slow


def test_the_lab_breaks_what_it_promises_to() -> None:
    assert len(CASES) >= 25 and len({(id(case.do), case.kind) for case in CASES.values()}) == len(CASES)
    assert {case.kind for case in CASES.values()} >= {
        *("exception", "exit", "signal", "lost", "hang", "node-failure", "out-of-memory", "gpu-fault", "gpu-error"),
        None,
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return seen_in(list(CASES), tmp_path_factory.mktemp("failures"), 1500)


@pytest.mark.parametrize("name", CASES)
def test_every_failure_ends_the_job_with_the_right_verdict(name: str, found: dict[str, Any]) -> None:
    judge(CASES[name], found[name])
