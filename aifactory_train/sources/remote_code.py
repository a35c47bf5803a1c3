"""Code that a model's repository ships (``model.trust_remote_code``): which it is, said before any of it runs and kept
in the record.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe

#: Files whose ``auto_map`` names the classes that transformers takes from the repository.
_MAPS = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")


def code_of(folder: Path) -> list[dict[str, Any]]:
    """``{path, bytes, sha256}`` of the Python files in a model folder; ``{repository}`` of others that its classes are
    taken from.
    """
    from aifactory_train.core.files import file_digest

    files: list[dict[str, Any]] = [
        {"path": p.relative_to(folder).as_posix(), "bytes": p.stat().st_size, "sha256": file_digest(p)}
        for p in sorted(folder.rglob("*.py"))
        if p.is_file()
    ]
    return files + [{"repository": name} for name in sorted(_elsewhere(folder))]


def _elsewhere(folder: Path) -> set[str]:
    """Other repositories (``org/name--module.Class``) that the folder's ``auto_map`` points to."""
    found: set[str] = set()
    for name in _MAPS:
        try:
            tree = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # not there, or no JSON: whoever loads it says so
        classes = tree.get("auto_map") if isinstance(tree, dict) else None
        listed = classes.values() if isinstance(classes, dict) else [classes]
        flat = [text for entry in listed for text in (entry if isinstance(entry, list) else [entry])]
        found |= {text.partition("--")[0] for text in flat if isinstance(text, str) and "--" in text}
    return found


def recorded(recipe: Recipe) -> bool | list[dict[str, Any]]:
    """For the record: False, or what may have run beside this project."""
    if not recipe.model.trust_remote_code:
        return False
    from aifactory_train.sources import resolve_model

    return code_of(resolve_model(recipe.model))


def warn(recipe: Recipe, folder: Path) -> None:
    """Say once, on standard error of the first rank, whose code is going to run; nothing without
    ``model.trust_remote_code``.
    """
    if not recipe.model.trust_remote_code or not _first_rank():
        return
    from aifactory_train.core.output import note

    found = code_of(folder)
    if not found:
        note(f"warning: model.trust_remote_code is set, but '{recipe.model.base}' brings no code: take it out")
        return
    names = [entry.get("path") or f"files of {entry['repository']}" for entry in found]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    note(
        f"warning: model.trust_remote_code: code that comes with '{recipe.model.base}' runs here with all of your "
        f"rights, and nobody "
        f"of this project has read it: {shown}"
    )


def _first_rank() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return True
    return torch.distributed.get_rank() == 0
