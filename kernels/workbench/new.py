"""Writes the folder of a new operator: a small one that works, to be changed into the one that is wanted."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from aifactory_train.kernels.spec import folders

#: The files of an operator; ``NAME`` in them becomes its name.
FILES = {path.stem: path for path in sorted((Path(__file__).resolve().parent / "new_operator").glob("*.txt"))}


def refusal(name: str, into: Path) -> str:
    """Why no operator of that name can be written there, or nothing."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        return f"'{name}' is no name for an operator: small letters, digits and underscores, and no word of Python"
    if not into.is_dir():
        return f"{into} is no folder"
    for folder in (*folders(), into):
        if (folder / name).exists() or (folder / f"{name}.py").exists():
            return f"there is already a {name} in {folder}"
    return ""


def write(name: str, into: Path) -> list[Path]:
    """Write ``into/name``. Raises ``ValueError`` where the name or the folder will not do."""
    if why := refusal(name, into):
        raise ValueError(why)
    (into / name).mkdir()
    written = []
    for file, source in FILES.items():
        path = into / name / file
        path.write_text(source.read_text(encoding="utf-8").replace("NAME", name), encoding="utf-8")
        written.append(path)
    return written
