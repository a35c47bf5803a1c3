"""The folder that the studio works in: what lies there, and that nothing else is reached."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from aifactory_train.config.loading import recipe_ids
from aifactory_train.core.errors import UserError
from aifactory_train.run.folder import RunFolder

#: Files of a folder that are looked at, and bytes that a file dropped into the page may have.
_ENTRIES, _LARGEST = 2000, 2 << 30
#: Where dropped files and the output of trainings go, as rows from Python's memory do.
OWN = "aifactory"
#: What rows may come in, by the end of the name; the reader decides, this only fills the list.
_ROWS = {
    *("csv", "tsv", "json", "jsonl", "ndjson", "parquet", "arrow", "xlsx", "xls", "ods", "sqlite", "db"),
    *("mbox", "eml", "txt", "md", "html", "htm", "pdf", "docx", "pptx", "epub", "gz", "zip", "zst"),
}
_NAME = re.compile(r"[^\w.() -]+")


@dataclass(frozen=True)
class Desk:
    """Paths below ``root``, which is resolved."""

    root: Path

    def inside(self, name: str, where: str) -> Path:
        """The path that ``name`` means, from ``root``. Raises :class:`UserError` for one that leads out of it, also by
        a link."""
        fix = f"a path below {self.root}, without '..'"
        if not name or "\0" in name or name.startswith("-"):
            raise UserError("is no path of this folder", where=where, fix=fix)
        try:
            path = (self.root / name).resolve()
        except (OSError, RuntimeError, ValueError):
            raise UserError("is no path of this folder", where=where, fix=fix) from None
        if not path.is_relative_to(self.root):
            raise UserError("leads out of the folder that the studio works in", where=where, fix=fix)
        return path

    def shown(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    # ---- what lies there

    def recipes(self) -> list[str]:
        """Recipe files, the one that changed last first."""
        found = [p for p in self._files() if p.suffix in (".yaml", ".yml") and _is_recipe(p)]
        return [self.shown(p) for p in sorted(found, key=_changed, reverse=True)]

    def rows(self) -> list[str]:
        """Files that may hold rows, the one that changed last first."""
        found = [p for p in self._files() if p.suffix[1:].lower() in _ROWS and not p.name.endswith(".report.json")]
        return [self.shown(p) for p in sorted(found, key=_changed, reverse=True)]

    def runs(self) -> list[str]:
        """Names of the runs below ``runs/``, the one that changed last first; also of those that only began."""
        found = [p for p in (self.root / "runs").glob("*") if p.is_dir() and not p.name.startswith((".", "-"))]
        known = {p.name for p in found if any((p / f).exists() for f in ("run.yaml", "attempts", "state.json"))}
        logs = {p.stem: p for p in (self.root / OWN).glob("*.log")}
        places = {**logs, **{name: self.root / "runs" / name for name in known}}
        return sorted(places, key=lambda name: _changed(places[name]), reverse=True)

    def _files(self) -> Iterator[Path]:
        """Files of the folder, of the folders in it and of theirs, without hidden ones and runs."""
        folders = [(self.root, 0)]
        left = _ENTRIES
        while folders:
            folder, depth = folders.pop(0)
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError:
                continue  # somebody else's
            for entry in entries:
                left -= 1
                if left < 0:
                    return
                if entry.name.startswith((".", "-")):
                    continue
                if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(self.root):
                    continue
                if entry.is_file():
                    yield Path(entry.path)
                elif entry.is_dir(follow_symlinks=False) and depth < 2 and entry.name not in ("runs", "node_modules"):
                    folders.append((Path(entry.path), depth + 1))

    # ---- what is asked for

    def recipe(self, name: str) -> str:
        """``name`` as commands take it: a recipe that is installed, or a recipe file of this folder."""
        if name in recipe_ids():
            return name
        path = self.inside(name, "recipe")
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            raise UserError("no such recipe file", where=f"recipe {name}", fix="choose one from the list")
        return self.shown(path)

    def run(self, name: str) -> RunFolder:
        """The folder of a run, which need not exist yet."""
        if not name or name.startswith((".", "-")) or any(c in name for c in "/\\\0\n\r"):
            raise UserError("is not a name for a run", where="run", fix="letters, digits, '.', '_' and '-'")
        return RunFolder(self.inside(f"runs/{name}", "run"))

    def log(self, name: str) -> Path:
        """Where the output of a training that the studio started goes."""
        self.run(name)
        return self.inside(f"{OWN}/{name}.log", "run")

    async def keep(self, name: str, pieces: AsyncIterator[bytes]) -> str:
        """Write a file that was dropped into the page below :data:`OWN`, and return its path. One of the same name is
        never overwritten: another content gets its digest into the name."""
        plain = _NAME.sub("_", os.path.basename(name.replace("\\", "/"))).strip(" .-")[-120:]
        if not plain or "." not in plain:
            raise UserError("the file's name has no ending that says its kind", where="file", fix="e.g. tickets.csv")
        folder = self.root / OWN
        folder.mkdir(exist_ok=True)
        beside = folder / f".{secrets.token_hex(8)}.tmp"
        digest, size = hashlib.sha256(), 0
        try:
            with open(beside, "xb") as file:
                async for piece in pieces:
                    size += len(piece)
                    if size > _LARGEST:
                        raise UserError(
                            f"has more than {_LARGEST >> 30} GiB", where=plain, fix="copy it into the folder"
                        )
                    digest.update(piece)
                    file.write(piece)
            if not size:
                raise UserError("is empty", where=plain)
            target = self.inside(f"{OWN}/{plain}", "file")
            if target.exists():
                target = target.with_name(f"{target.stem}-{digest.hexdigest()[:12]}{target.suffix}")
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
        return self.shown(target)


def _changed(path: Path) -> float:
    try:
        state = path / "state.json"
        return (state if state.exists() else path).stat().st_mtime
    except OSError:
        return 0.0


def _is_recipe(path: Path) -> bool:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read(1 << 20)
    except OSError:
        return False
    return all(re.search(rf"^{block}:", text, re.MULTILINE) for block in ("model", "data"))
