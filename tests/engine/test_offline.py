"""What was fetched prepares, trains on two ranks, evaluates and exports in a network namespace that has only ``lo``."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

#: Brings the loopback interface up (gloo needs it) without iproute2: SIOCSIFFLAGS with IFF_UP | IFF_RUNNING.
LOOPBACK = (
    "import socket, fcntl, struct; s = socket.socket(); "
    "fcntl.ioctl(s, 0x8914, struct.pack('16sH14x', b'lo', 0x41)); "
    "print([n for _, n in socket.if_nameindex()])"
)


def without_network(commands: list[list[str]], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    script = " && ".join(shlex.join(c) for c in [[sys.executable, "-c", LOOPBACK], *commands])
    return subprocess.run(
        ["unshare", "--net", "--map-root-user", "sh", "-c", script],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
    )


def can_cut_the_network() -> bool:
    try:
        done = subprocess.run(
            ["unshare", "--net", "--map-root-user", sys.executable, "-c", LOOPBACK], capture_output=True
        )
    except FileNotFoundError:
        return False
    return done.returncode == 0 and done.stdout.strip() == b"['lo']"


needs_namespace = pytest.mark.skipif(
    not can_cut_the_network(), reason="this host allows no network namespace (unshare --net)"
)


def pipeline(recipe: str, settings: list[str]) -> list[list[str]]:
    aifactory = [sys.executable, "-m", "aifactory_train"]
    two_ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *aifactory[1:]]
    overrides = [part for setting in settings for part in ("--set", setting)]
    return [
        [*aifactory, "prepare", recipe, *overrides],
        [*two_ranks, "train", recipe, "--name", "offline", *overrides],
        [*aifactory, "export", "offline", "--merge"],
        [*aifactory, "chat", "offline", "--prompt", "What colour is the door number 3?"],
    ]


@needs_namespace
def test_local_files_need_no_network(tiny_recipe: Path, tmp_path: Path) -> None:
    result = without_network(pipeline(str(tiny_recipe), []), tmp_path, helpers.environment())
    assert result.returncode == 0, result.stderr[-3000:]
    figures = json.loads((tmp_path / "runs/offline/eval.json").read_text())
    assert figures["after"]["bits_per_byte"] < figures["before"]["bits_per_byte"]
    assert (tmp_path / "runs/offline/export/adapter/adapter_model.safetensors").is_file()


@needs_namespace
@pytest.mark.slow
@pytest.mark.real_model
def test_fetched_recipe_needs_no_network(tmp_path: Path, real_cache: Path) -> None:
    if not list(real_cache.glob("manifests/health--phenotype-terms.json")):
        pytest.skip("run 'aifactory fetch health/phenotype-terms' first")
    env = {**helpers.environment(), "AIFACTORY_CACHE": str(real_cache)}
    small = ["train.max_steps=2", "data.eval_rows=4", "eval.generate_rows=2"]
    result = without_network(pipeline("health/phenotype-terms", small), tmp_path, env)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "runs/offline/export/merged/model.safetensors").is_file()
