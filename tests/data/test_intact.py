"""A token cache that is not what was written is named and built again; one of the first version is checked by what it
has.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_families import byte_tokenizer

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import RunFailed
from aifactory_train.data import intact, prepare

ROWS = [{"prompt": f"question number {i}?", "completion": f"answer {i * 7}"} for i in range(40)]


def run(folder: Path, **more: Any):
    recipe = Recipe.model_validate({"model": {"base": "x/y"}, "data": {"train": str(folder / "rows.jsonl")}})
    return prepare(recipe, byte_tokenizer(), cache_dir=folder / "cache", **more)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert not run(folder).reused
    return folder


@pytest.fixture
def place(built: Path, tmp_path: Path) -> Path:
    """Rows with their finished cache, to be damaged."""
    shutil.copytree(built, tmp_path / "copy")
    return tmp_path / "copy"


def cache(place: Path) -> Path:
    (folder,) = [p for p in (place / "cache").iterdir() if not p.name.startswith(".")]
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """What was written, but for the time that it took and the place where the rows lie."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "prepared.json")
    here = re.compile(rb'"[^"]*/rows\.jsonl"')
    return {str(p.relative_to(folder)): here.sub(b"", p.read_bytes()) for p in files}


def older(folder: Path) -> None:
    """As the first version wrote it."""
    path = folder / "prepared.json"
    tree = json.loads(path.read_text())
    del tree["files"], tree["sha256"]
    path.write_text(json.dumps(tree))


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def ones(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0\0\0\0\0\0\0\0")


def nothing(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (zero, "store/tokens.bin"),
    (ones, "store/flags.bin"),
    (flip, "store/lengths.bin"),
    (flip, "store/supervised.bin"),
    (flip, "store/docrow.bin"),
    (flip, "store/rows.jsonl"),
    (cut, "store/tokens.bin"),
    (longer, "store/textbytes.bin"),
    (cut, "store/store.json"),
    (flip, "docs-0.bin"),
    (Path.unlink, "store/rowsource.bin"),
    (nothing, "prepared.json"),
    (cut, "prepared.json"),
    (flip, "prepared.json"),
    (Path.unlink, "prepared.json"),
]


@pytest.mark.parametrize(("damage", "name"), DAMAGE, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_damage_is_named_and_the_cache_is_built_again(place: Path, capfd, damage, name: str) -> None:
    whole = contents(cache(place))
    damage(cache(place) / name)
    found = intact.faults(cache(place), content=True)
    assert len(found) == 1 and name in found[0], found
    again = run(place)
    said = capfd.readouterr().err
    assert not again.reused and name in said and "built again" in said
    assert contents(again.folder) == whole and not intact.faults(again.folder, content=True)
    assert [p.name for p in (place / "cache").iterdir()] == [again.folder.name]  # nothing is left beside it
    assert run(place).reused and capfd.readouterr().err == ""


def test_sizes_are_looked_at_even_where_another_process_has_read_the_files(place: Path) -> None:
    flip(cache(place) / "store/tokens.bin")
    assert run(place, trusted=True).reused  # rank 0 has read it: not every rank reads it again
    cut(cache(place) / "store/tokens.bin")
    with pytest.raises(RunFailed, match=r"tokens\.bin"):
        run(place, trusted=True)


def test_a_cache_of_the_first_version_is_used(place: Path, capfd) -> None:
    older(cache(place))
    again = run(place)
    assert again.reused and capfd.readouterr().err == ""


OLDER = [DAMAGE[i] for i in (0, 1, 2, 6, 8, 11)]  # contents of the sets, sizes, facts


@pytest.mark.parametrize(("damage", "name"), OLDER, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_damage_in_a_cache_of_the_first_version(place: Path, capfd, damage, name: str) -> None:
    whole = contents(cache(place))
    older(cache(place))
    damage(cache(place) / name)
    again = run(place)
    said = capfd.readouterr().err
    assert not again.reused and Path(name).name in said and "built again" in said, said
    assert contents(again.folder) == whole


def test_a_damaged_report_beside_the_cache_is_left_out_by_name(place: Path, capfd) -> None:
    (cache(place) / "own.json").write_text("{")
    assert run(place).reused and "own.json" in capfd.readouterr().err


def test_a_digest_is_remembered_only_while_the_file_is_untouched(tmp_path: Path, monkeypatch) -> None:
    import os

    from aifactory_train.sources import digests

    read: list[Path] = []
    true = digests.file_digest
    monkeypatch.setattr(digests, "file_digest", lambda path: (read.append(path), true(path))[1])
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 1000)
    first = digests.sha256_of([file])[file]
    assert digests.sha256_of([file])[file] == first and len(read) == 1
    stat = file.stat()
    file.write_bytes(b"b" + b"a" * 999)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as if nothing had happened
    assert digests.sha256_of([file])[file] != first and len(read) == 2
    digests.sha256_of([file], fresh=True)
    assert len(read) == 3
    monkeypatch.setattr(digests, "SETTLED_NS", 10**15)
    other = tmp_path / "new"
    other.write_bytes(b"x")
    digests.sha256_of([other])
    digests.sha256_of([other])
    assert read.count(other) == 2  # written a moment ago: it may be written once more within the clock's resolution
