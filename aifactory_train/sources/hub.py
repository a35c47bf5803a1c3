"""Hugging Face repositories, in Hugging Face's own cache."""

from __future__ import annotations

import contextlib
import errno
import json
import re
from pathlib import Path
from typing import Any

from aifactory_train.config.source_spec import Spec
from aifactory_train.core import yaml_text
from aifactory_train.core.errors import UserError
from aifactory_train.core.files import file_digest
from aifactory_train.core.output import Say
from aifactory_train.sources.cache import (
    CACHE_FORMAT,
    MANIFEST,
    check_model_folder,
    disk_full,
    hub_manifest_folder,
    not_fetched,
    write_json,
)

_MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "LICEN[CS]E*", "NOTICE*", "README.md"]

_DATA_FILES = ["*.parquet", "*.json", "*.jsonl", "*.csv", "*.tsv", "*.txt", "*.arrow", "*.gz", "LICEN[CS]E*", "*.md"]


def _patterns(kind: str) -> dict[str, Any]:
    """Which files of a repository are wanted; the cache counts as complete when it holds these."""
    if kind == "model":
        return {"allow_patterns": _MODEL_FILES, "ignore_patterns": ["original/*", "consolidated*", "onnx/*"]}
    return {"allow_patterns": _DATA_FILES}


def cached(spec: Spec, revision: str | None, kind: str, where: str) -> Path:
    """The folder of a fetched repository in Hugging Face's cache: the commit that was fetched, or ``revision``."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if revision is None:
        # The commit that was fetched, so that a later fetch of another branch does not change what runs.
        file = hub_manifest_folder(spec, kind) / MANIFEST
        if file.is_file():
            known = json.loads(file.read_text(encoding="utf-8"))
            revision = known["resolved"] if known.get("asked_revision") is None else None
    try:
        path = Path(
            snapshot_download(spec.name, repo_type=kind, revision=revision, local_files_only=True, **_patterns(kind))
        )
    except LocalEntryNotFoundError:
        raise not_fetched(spec.text, where) from None
    if kind == "model":
        check_model_folder(path, spec.text)
    return path


def fetch(spec: Spec, revision: str | None, kind: str, say: Say) -> dict[str, Any]:
    """Fetch a repository (``kind``: model or dataset) and return its manifest; wrong ids, gates and lost networks are
    :class:`UserError`.
    """
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    say(f"{kind} {spec.text}: asking the hub")
    key = "model.base" if kind == "model" else "data"
    try:
        path = Path(
            snapshot_download(
                spec.name,
                repo_type=kind,
                revision=revision,
                **_patterns(kind),
            )
        )
    except hub.GatedRepoError:
        raise UserError(
            f"'{spec.name}' is gated: its owner wants you to accept the terms first",
            where=key,
            fix=f"open https://huggingface.co/{spec.name}, accept the terms, then set HF_TOKEN or run 'hf auth login'",
        ) from None
    except hub.RevisionNotFoundError:
        raise UserError(f"'{spec.name}' has no revision '{revision}'", where=key, fix="check the revision") from None
    except hub.RepositoryNotFoundError:
        raise UserError(
            f"the hub has no {kind} '{spec.name}' (or it is private and no token is set)",
            where=key,
            fix="check the id; for a private repository set HF_TOKEN or run 'hf auth login'",
        ) from None
    except hub.LocalEntryNotFoundError:
        raise UserError(
            f"'{spec.name}' is not in the cache and the hub cannot be reached",
            where=key,
            fix="fetch where there is a network (login node) and HF_HUB_OFFLINE is not set",
        ) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise disk_full(spec.text) from None
        raise UserError(f"the download failed: {error}", where=key, fix="check the network and try again") from None
    if kind == "model":
        check_model_folder(path, spec.text)
    licence, read_from = _card_licence(path)
    manifest = {
        "format": CACHE_FORMAT,
        "source": spec.text,
        "asked_revision": revision,
        "resolved": path.name,
        "path": str(path),
        "licence": licence,
        "licence_read_from": read_from,
        "files": [_hub_file(p, path) for p in sorted(path.rglob("*")) if p.is_file()],
    }
    folder = hub_manifest_folder(spec, kind)
    write_json(folder / MANIFEST, manifest)
    return manifest


def _hub_file(path: Path, root: Path) -> dict[str, Any]:
    # In the hub's cache a large file is a link to a blob that is named by its sha256.
    blob = path.resolve().name
    digest = blob if re.fullmatch(r"[0-9a-f]{64}", blob) else file_digest(path)
    return {"path": path.relative_to(root).as_posix(), "bytes": path.stat().st_size, "sha256": digest}


def _card_licence(path: Path) -> tuple[str | None, str | None]:
    card = path / "README.md"
    if card.is_file():
        parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
        if len(parts) == 3 and not parts[0].strip():
            with contextlib.suppress(UserError):
                head = yaml_text.parse(parts[1], str(card), doubled=True).value
                if isinstance(head, dict) and head.get("license"):
                    value = head["license"]
                    return ", ".join(map(str, value)) if isinstance(value, list) else str(value), "README.md: license"
    return None, None
