"""All usable systems at once: the built file gives what the profiles give."""

from __future__ import annotations

from pathlib import Path

import pytest

from aifactory_train import sites
from aifactory_train.sites import check, fleet


def test_the_built_file_is_fresh_and_gives_each_system_as_its_profile_does() -> None:
    """Values, provenance of every fact, readiness: nothing is lost on the way through the file."""
    assert fleet._rows(), "aifactory sites check --write-index"
    loaded = fleet.load_all()
    assert [s.id for s in loaded] == [name for name in sites.names(usable=True) if name != "generic-slurm"]
    for system in loaded:
        read = sites.load(system.id, overlay=False)
        assert system.as_dict() == read.as_dict()
        assert list(system.stated_facts()) == list(read.stated_facts()) and system.own_gpu == read.own_gpu


def test_a_file_built_from_others_is_not_used_and_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet._rows.cache_clear()
    monkeypatch.setattr(fleet, "digest", lambda: "other")
    assert fleet._rows() == {}
    assert [f.where for f in check.index_fresh()] == ["fleet.json"]
    fleet._rows.cache_clear()


def test_the_digest_covers_the_centres(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fleet.digest()
    (tmp_path / "centres").mkdir()
    monkeypatch.setattr(fleet, "ROOM", tmp_path)
    assert fleet.digest() != before


def test_your_overlay_holds_in_the_fleet_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / "vega.yaml").write_text(
        "overlay_for: vega\ncorrections: {accounting.unit: core-hours, accounting.per_gpu_hour: 32}\n"
    )
    monkeypatch.setenv("AIFACTORY_CONFIG", str(tmp_path))
    vega = next(s for s in fleet.load_all() if s.id == "vega")
    assert vega.accounting.per_gpu_hour == 32
