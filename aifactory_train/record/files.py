"""Files of the record: where they lie, how they are computed and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.core.files import read_json, write_atomic
from aifactory_train.record.chain import fold, now, read_events
from aifactory_train.record.digests import describe, files_below, tree_digest

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe


RECORD, EVENTS, DATA_MANIFEST = "record.json", "events.jsonl", "data_manifest.json"


def write_record(folder: Path) -> dict[str, Any]:
    """Compute ``record.json`` from the events and write it; returns the record."""
    events, _ = read_events(folder / EVENTS)
    record = fold(events)
    write_atomic(folder / RECORD, json.dumps(record, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    return record


def load_record(folder: Path) -> dict[str, Any]:
    """The record of a run. Raises :class:`UserError` when there is none."""
    from aifactory_train.core.errors import UserError

    if not (folder / RECORD).is_file():
        raise UserError(
            "this run has no record.json", where=str(folder), fix="records are kept by runs of this version onwards"
        )
    return read_json(folder / RECORD, dict)


def exported_values(folder: Path, recipe: Recipe, result: dict[str, Any]) -> dict[str, Any]:
    """The record's ``artefact`` section from what lies below ``export/``."""
    below = files_below(folder / "export")
    files = describe(below, folder)
    formats = {p.suffix.removeprefix(".") for p in below} & {"safetensors", "gguf"}
    whole = {p.relative_to(folder / "export").parts[0] for p in below} - {"adapter"}
    return {
        "artefact": {
            "files": files,
            "tree_sha256": tree_digest(files),
            "format": ", ".join(sorted(formats, reverse=True)) or "safetensors",
            "adapter_only": recipe.adapter.kind != "none" and not whole,
            "paths": {
                k: Path(v).resolve().relative_to(folder.resolve()).as_posix()
                for k, v in result.get("paths", {}).items()
            },
            "gate": result.get("gate"),
            "created": now(),
        }
    }


def without_samples(figures: Any) -> Any:
    """Figures without prompts and answers, and without the bootstrap's replicates."""
    if isinstance(figures, dict):
        return {k: without_samples(v) for k, v in figures.items() if k not in ("samples", "replicates")}
    return figures
