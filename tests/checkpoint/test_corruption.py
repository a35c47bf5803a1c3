"""Damage of every kind is named, the newest good checkpoint is used or the run refuses, and nothing good is deleted."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from legs import run_legs

from aifactory_train.parallel.storage import MARKER, faults

LEG: dict[str, Any] = {"engine": "fsdp2", "adapter": "lora"}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Complete checkpoints of steps 2 and 4, written by two ranks."""
    folder = tmp_path_factory.mktemp("good")
    run_legs(2, [{**LEG, "folder": str(folder / "run"), "to": 4, "every": 2}], folder)
    assert not faults(folder / "run" / "step-2") and not faults(folder / "run" / "step-4")
    return folder / "run"


def flip(path: Path, at: float = 0.7) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 0x10
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped byte": (lambda step: flip(step / "state-00001.safetensors"), "state-00001.safetensors"),
    "truncated shard": (lambda step: cut(step / "state-00000.safetensors"), "state-00000.safetensors"),
    "no marker": (lambda step: (step / MARKER).unlink(), "no COMPLETE marker"),
    "changed marker": (lambda step: flip(step / MARKER, 0.3), MARKER),
    "truncated marker": (lambda step: cut(step / MARKER), MARKER),
    "missing values": (lambda step: (step / "trainer.json").unlink(), "trainer.json"),
    "missing shard": (lambda step: (step / "state-00001.safetensors").unlink(), "state-00001.safetensors"),
    "changed metadata": (lambda step: flip(step / "metadata.json", 0.5), "metadata.json"),
    "changed cursor": (lambda step: flip(step / "trainer.json", 0.9), "trainer.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(good: Path, tmp_path: Path, kind: str) -> None:
    damage, name = DAMAGE[kind]
    shutil.copytree(good / "step-4", tmp_path / "step-4")
    assert faults(tmp_path / "step-4") == []
    damage(tmp_path / "step-4")
    found = faults(tmp_path / "step-4")
    assert len(found) == 1 and name in found[0], found


def test_the_newest_good_checkpoint_is_used_and_nothing_good_is_deleted(good: Path, tmp_path: Path) -> None:
    legs = []
    for kind, (damage, _) in DAMAGE.items():
        run = tmp_path / kind.replace(" ", "-")
        shutil.copytree(good, run)
        damage(run / "step-4")
        legs.append({**LEG, "folder": str(run), "to": 3, "resume": True})
    for kind, leg, found in zip(DAMAGE, legs, run_legs(2, legs, tmp_path), strict=True):
        assert found["resumed"] == 2 and "error" not in found, (kind, found)
        run = Path(leg["folder"])
        assert not faults(run / "step-2") and not faults(run / "step-3"), kind
        assert (run / "damaged-step-4").is_dir(), kind  # set aside, not deleted


def test_without_a_good_checkpoint_the_run_refuses(good: Path, tmp_path: Path) -> None:
    run, empty = tmp_path / "run", tmp_path / "empty"
    shutil.copytree(good, run)
    flip(run / "step-2" / "state-00000.safetensors")
    cut(run / "step-4" / "state-00001.safetensors")
    legs = [
        {**LEG, "folder": str(run), "to": 6, "resume": True},
        {**LEG, "folder": str(empty), "to": 1, "resume": 7},
    ]
    all_bad, unknown = run_legs(2, legs, tmp_path)
    for name in ("state-00000.safetensors", "state-00001.safetensors", "no good checkpoint"):
        assert name in all_bad["error"]
    assert not all_bad["losses"]  # it did not start over
    assert "no checkpoint of step 7" in unknown["error"]


def test_another_model_is_refused_by_name(good: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(good, run)
    legs = [{**LEG, "adapter": "none", "folder": str(run), "to": 6, "resume": True}]
    assert "adapter.kind: lora -> none" in run_legs(1, legs, tmp_path)[0]["error"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of its own that tests may fill or remount."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", place], check=False).returncode
    ):
        pytest.skip("mounting needs privileges; the limits on file sizes are tested without")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(good: Path, small_disk: Path, tmp_path: Path) -> None:
    run = small_disk / "run"
    shutil.copytree(good / "step-2", run / "step-2")
    free = shutil.disk_usage(run).free
    (small_disk / "filler").write_bytes(b"x" * max(0, free - 40_000))
    found = run_legs(2, [{**LEG, "folder": str(run), "to": 4, "every": 1, "resume": True}], tmp_path)[0]
    assert "no space for the checkpoint of step 3" in found["error"] or "No space left on device" in found["error"]
    assert str(run) in found["error"]
    assert not faults(run / "step-2")
    assert [p.name for p in run.iterdir()] == ["step-2"]  # the torn one is gone


def test_a_write_that_fails_half_way_is_named_on_every_rank(good: Path, tmp_path: Path) -> None:
    """One rank may write no file larger than 8 KiB: the save fails in the middle, as on a full quota."""
    run = tmp_path / "run"
    shutil.copytree(good, run)
    leg = {**LEG, "folder": str(run), "to": 5, "resume": True, "file_limit": 8192}
    found = run_legs(2, [leg], tmp_path)[0]
    assert "could not be written" in found["error"] and "rank 1" in found["error"], found
    assert not faults(run / "step-2") and not faults(run / "step-4")
    assert sorted(p.name for p in run.iterdir()) == ["step-2", "step-4"]


def test_a_read_only_folder_is_refused_before_the_first_step(good: Path, small_disk: Path, tmp_path: Path) -> None:
    run = small_disk / "run"
    shutil.copytree(good / "step-2", run / "step-2")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    found = run_legs(2, [{**LEG, "folder": str(run), "to": 4, "resume": True}], tmp_path)[0]
    assert "Read-only file system" in found["error"] and str(run) in found["error"]
    assert not found["losses"]
    assert not faults(run / "step-2")
