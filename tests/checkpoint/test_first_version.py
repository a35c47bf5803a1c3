"""Folders that the first version wrote (0.1.0, before the rooms): they resume, are read and verify today.

``first_version.tar.gz`` holds a tiny model, rows, a recipe and two runs of 5 steps by the same recipe: ``whole`` went
to its end, ``stopped`` got a stop file in its fourth step. Nothing in it is written by today's code, so nothing here
may be made anew.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from aifactory_train.cli import main

ARCHIVE = Path(__file__).with_name("first_version.tar.gz")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def folder(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(unpacked, tmp_path / "first")
    monkeypatch.chdir(tmp_path / "first")
    return tmp_path / "first"


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_a_stopped_run_goes_on_to_the_same_end(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert len(losses(folder / "runs/stopped")) == 4
    quick = ["--set", "parallel.threads=1", "--set", "eval.before=false", "--set", "eval.after=false"]
    assert main(["train", "recipe.yaml", "--name", "stopped", "--resume", "auto", "--quiet", *quick]) == 0, (
        capfd.readouterr()
    )
    assert losses(folder / "runs/stopped") == pytest.approx(losses(folder / "runs/whole"), rel=1e-6)
    assert (folder / "runs/stopped/export/adapter/adapter_model.safetensors").is_file()
    assert main(["verify", "runs/stopped"]) == 0, capfd.readouterr()


def test_a_finished_run_is_read_and_verified(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "runs/whole"]) == 0
    assert "7 events" in capfd.readouterr().out
    assert main(["report", "runs/whole"]) == 0
    assert "5.9956 at first, 5.8885 at last" in capfd.readouterr().out
    assert main(["runs", "--json"]) == 0
    assert {row["state"] for row in json.loads(capfd.readouterr().out)} == {"finished", "stopped"}
    assert main(["train", "recipe.yaml", "--name", "whole", "--resume", "auto", "--quiet"]) == 2  # it is finished


def test_a_changed_file_of_a_first_run_is_found(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record = folder / "runs/whole/record.json"
    record.write_text(record.read_text().replace('"Apache-2.0"', '"MIT"', 1))
    assert main(["verify", "runs/whole"]) == 1
    assert "record.json" in capfd.readouterr().out
