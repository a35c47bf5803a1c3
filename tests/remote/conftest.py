"""A login node with a stand-in for Slurm's commands, which keeps what it was given in a folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sshd

STAND_INS = {
    # one file a job: its number is the next, its content the script
    "sbatch": 'for last in "$@"; do :; done\nn=1; while ! mkdir "$jobs/$n" 2>/dev/null; do n=$((n+1)); done\n'
    'printf "%s" "$last" > "$jobs/$n/script"; echo "$n"',
    "squeue": 'for job in "$jobs"/*/; do [ -f "$job/gone" ] || echo "$(basename "$job")|$(cat "$job/script")"; done',
    "scontrol": 'if [ "$1 $2" = "show job" ]; then [ -d "$jobs/$3" ] || { echo "Invalid job id" >&2; exit 1; }\n'
    's=PENDING; [ -f "$jobs/$3/cancelled" ] && s=CANCELLED\n'
    'echo "JobId=$3 JobName=x JobState=$s Reason=Priority NodeList=(null)"; fi',
    "scancel": 'touch "$jobs/$1/cancelled"',
    "sinfo": "exit 0",
    "sacct": "exit 1",
}


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Server]:
    sshd.require()
    base = tmp_path_factory.mktemp("node") / "s"
    with sshd.server(base, environment={"HF_HOME": f"{base}/home/hf"}) as server:
        (server.base / "jobs").mkdir()
        for name, text in STAND_INS.items():
            program = server.bin / name
            program.write_text(f"#!/bin/sh\njobs='{server.base}/jobs'\n{text}\n")
            program.chmod(0o755)
        yield server


def jobs(node: sshd.Server) -> list[str]:
    """Scripts that the stand-in was given, in order."""
    numbers = sorted((node.base / "jobs").iterdir(), key=lambda path: int(path.name))
    return [(number / "script").read_text() for number in numbers if (number / "script").exists()]


Here = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def here(node: sshd.Server, tmp_path_factory: pytest.TempPathFactory) -> Here:
    """``here("status", …)``: the command line as a user calls it, in a folder of its own, without a terminal."""
    import os

    base = tmp_path_factory.mktemp("laptop")
    (base / "config" / "sites").mkdir(parents=True)
    (base / "config" / "sites" / "vega.yaml").write_text(
        f"overlay_for: vega\nuser: {{account: a1, work_dir: {node.home}/work, venv: {sys.prefix}}}\n"
    )
    root = Path(__file__).resolve().parents[2]
    env = {
        **os.environ,
        "AIFACTORY_CONFIG": str(base / "config"),
        "PYTHONPATH": str(root),
        "XDG_RUNTIME_DIR": str(base),
    }

    def call(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "aifactory_train", *map(str, words)]
        return subprocess.run(
            argv, cwd=cwd or base, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=240
        )

    return call


@pytest.fixture(scope="session")
def lab(node: sshd.Server, here: Here) -> Iterator[str]:
    """The name of a remote that is installed."""
    words = [
        "--ssh-config",
        node.client("plain"),
        "--folder",
        node.home / "af",
        "--python",
        sshd.PYTHON,
        "--site",
        "vega",
    ]
    done = here("remote", "add", "lab", node.host, *words)
    assert done.returncode == 0, done.stderr + node.log()[-2000:]
    yield "lab"
    here("remote", "close", "lab")
