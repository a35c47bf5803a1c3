"""`sites probe` and `sites new` on a real Slurm (tests/slurm_lab)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from slurm_lab import lab

DATA = Path(__file__).parent / "data"
pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    lab.require()
    with lab.mini_cluster() as env:
        yield env


def aifactory(env: dict[str, str], *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aifactory_train", "sites", *args],
        env=env,
        text=True,
        capture_output=True,
        input=stdin,
        timeout=120,
    )


def test_a_true_profile_shows_no_difference(cluster: dict[str, str], own_config: Path) -> None:
    done = aifactory({**cluster, "AIFACTORY_CONFIG": str(own_config)}, "probe", str(DATA / "slurm-lab.yaml"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["differences"] == []


def test_three_planted_differences_are_found_and_the_patch_heals_them(
    cluster: dict[str, str], own_config: Path, tmp_path: Path
) -> None:
    env = {**cluster, "AIFACTORY_CONFIG": str(own_config)}
    text = (DATA / "slurm-lab.yaml").read_text()
    for old, new in (
        ("main: {max_time: 1h", "main: {max_time: 4h"),  # a limit
        ("node: {count: 2, gpus: 4", "node: {count: 2, gpus: 8"),  # the node's shape
        ("dev: {max_time: 10m, max_nodes: 1", "debug: {max_time: 10m, max_nodes: 1"),  # a partition that is not there
    ):
        assert old in text
        text = text.replace(old, new)
    text = text.replace("cpus_per_gpu: 8", "cpus_per_gpu: 4")
    wrong = tmp_path / "slurm-lab.yaml"
    wrong.write_text(text)
    patch = tmp_path / "patch.yaml"
    done = aifactory(env, "probe", str(wrong), "--json", "--patch", str(patch))
    assert done.returncode == 0, done.stderr
    found = {d["path"]: (d["kind"], d["profile"], d["observed"]) for d in json.loads(done.stdout)["differences"]}
    assert found == {
        "partitions.main.max_time": ("differs", 14400, 3600),
        "node.gpus": ("differs", 8, 4),
        "partitions.debug": ("gone", "defined", None),
    }
    printed = aifactory(env, "probe", str(wrong))
    body = yaml.safe_load(printed.stdout)
    assert body == yaml.safe_load(patch.read_text())
    assert body["corrections"] == {"partitions.debug": None, "partitions.main.max_time": "1h", "node.gpus": 4}
    healed = aifactory(env, "probe", str(wrong), "--site-file", str(patch), "--json")
    assert healed.returncode == 0, healed.stderr
    assert json.loads(healed.stdout)["differences"] == []


def test_new_reads_slurm_and_asks_the_rest(cluster: dict[str, str], own_config: Path) -> None:
    env = {**cluster, "AIFACTORY_CONFIG": str(own_config)}
    answers = "My Lab\nThe Lab\nFI\n\nJane Doe\nfirst-hand\na100-40\nnone\nnone\n"
    done = aifactory(env, "new", "my-lab", stdin=answers)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "check: passed" in done.stdout
    raw = yaml.safe_load((own_config / "sites" / "my-lab.yaml").read_text())
    assert raw["partitions"] == {
        "main": {"max_time": "1h", "nodes": 2},  # the default comes first
        "dev": {"max_time": "10m", "max_nodes": 1, "nodes": 2},
    }
    assert next(iter(raw["partitions"])) == "main"
    assert raw["node"]["gpus"] == 4 and raw["node"]["memory_usable_gib"] == 195.3
    assert raw["missing"] == []
    assert aifactory(env, "probe", "my-lab").stdout.startswith("my-lab: no difference")
    again = aifactory(env, "new", "my-lab", stdin=answers)
    assert again.returncode == 2 and "the file exists" in again.stderr
