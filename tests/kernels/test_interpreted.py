"""Runs each file of ``interpreted/`` in a process of its own with Triton's interpreter switched on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "interpreted"


def run(name, expression="not slow"):
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", expression, str(HERE / name)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("name", sorted(p.name for p in HERE.glob("test_*.py")))
def test_file(name):
    run(name)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_everything_slow():
    run("test_traffic.py", "slow")
