"""Real torchrun as the parent of ranks that break: it ends in time, and the files name rank, host and cause."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest
from scenarios import recipe
from test_failing import CAUSES

TIMEOUT_S = 15  # parallel.timeout_s of these runs
PATIENCE_S = 120  # for torchrun to end the others and itself, on busy cores


def broken(folder: Path, kinds: list[str]) -> None:
    """Run every kind under its own torchrun, at the same time: they sleep most of the time."""
    helpers.write_model(folder / "model")
    children, ended = {}, {}
    try:
        for kind in kinds:
            path = recipe(folder, kind, **{"parallel.timeout_s": TIMEOUT_S})
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            command += [str(Path(__file__).with_name("struck.py")), kind, str(folder / kind / "struck")]
            command += ["train", str(path), "--run-dir", str(folder / kind / "run"), "--quiet"]
            with open(folder / kind / "log", "w") as log:
                children[kind] = subprocess.Popen(
                    command, cwd=folder, env=helpers.environment(), stdout=log, stderr=log
                )
        end = time.time() + 400
        while len(ended) < len(kinds) and time.time() < end:
            time.sleep(0.2)
            for kind, child in children.items():
                if kind not in ended and child.poll() is not None:
                    ended[kind] = time.time()
    finally:
        for child in children.values():
            if child.poll() is None:
                child.terminate()
                child.wait(60)
    from aifactory_train.launchers.programs.attempt import diagnose

    for kind in kinds:
        log = (folder / kind / "log").read_text()[-3000:]
        assert kind in ended, (kind, "torchrun does not end", log)
        assert (folder / kind / "struck").is_file(), (kind, log)
        seconds = ended[kind] - (folder / kind / "struck").stat().st_mtime
        assert children[kind].returncode != 0, kind
        state, cause = diagnose(str(folder / kind / "run" / "attempts" / "001"), 2)
        print(f"{kind}: torchrun ended {seconds:.1f} s after the fault; rank {cause['rank']}: {cause['message'][:80]}")
        assert seconds <= TIMEOUT_S + PATIENCE_S, (kind, seconds)
        assert state == "failed"
        assert (cause["rank"], cause["node"]) == (1, socket.gethostname()), (kind, cause, log)
        assert cause["kind"] == CAUSES[kind][0] and CAUSES[kind][1] in cause["message"], (kind, cause)


def test_torchrun_ends_and_the_cause_is_known(tmp_path: Path) -> None:
    broken(tmp_path, ["killed", "hangs"])


@pytest.mark.slow
def test_torchrun_ends_after_a_rank_that_ends_by_itself(tmp_path: Path) -> None:
    broken(tmp_path, ["raises", "exits"])
