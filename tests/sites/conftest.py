"""Fixtures of the sites tests: a copy of the room to damage, and no profile of the user's own in the way."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aifactory_train.sites import catalogue
from aifactory_train.sites.reading import read_yaml
from aifactory_train.sites.resolving import resolve
from aifactory_train.sites.system import System


@pytest.fixture(autouse=True)
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's configuration folder of this test: empty."""
    folder = tmp_path / "config"
    monkeypatch.setenv("AIFACTORY_CONFIG", str(folder))
    yield folder


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A copy of the shipped data."""
    target = tmp_path / "room"
    (target / "systems").mkdir(parents=True)
    for path in catalogue.ROOM.glob("*.yaml"):
        shutil.copy(path, target)
    for folder in ("systems", "centres"):
        shutil.copytree(catalogue.ROOM / folder, target / folder, dirs_exist_ok=True)
    return target


@pytest.fixture(scope="session")
def all_systems() -> dict[str, System]:
    """Every shipped profile, loaded once."""
    return {path.stem: resolve(read_yaml(path), path) for path in sorted(catalogue.SYSTEMS.glob("*.yaml"))}


@pytest.fixture
def edit(room: Path) -> Callable[[str, str, str], Path]:
    """``edit(file, old, new)``: replace a text that occurs in a file of the copied room; the text must be there."""

    def change(name: str, old: str, new: str) -> Path:
        path = room / name
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{old!r} is not in {name}: the fault cannot be planted"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        return path

    return change
