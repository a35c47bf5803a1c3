"""``evidence/``: every document rendered from the record, the report beside it, and the manifest over all of it, signed
if there is a key. Rendering again after a change (``record fill``, ``export --merge``) replaces the pack as a whole."""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aifactory_train.core.missing import missing_places
from aifactory_train.record.chain import Chain, read_events
from aifactory_train.record.digests import describe, files_below, tree_digest
from aifactory_train.record.files import EVENTS, write_record
from aifactory_train.record.render import card, forms, machine
from aifactory_train.record.render.common import RECIPIENTS, footer, form_markdown, legal_basis, markdown
from aifactory_train.record.render.summary import public_summary
from aifactory_train.record.signing import default_key, write_manifest
from aifactory_train.run.folder import RunFolder

CRATE = "ro-crate-metadata.json"
_TOP = [
    "record.json",
    "events.jsonl",
    "data_manifest.json",
    "run.yaml",
    "plan.json",
    "metrics.jsonl",
    "eval.json",
    "report.html",
]


def write_pack(run: RunFolder, *, say: Callable[[str], None] | None = None, key: Path | None = None) -> dict[str, Any]:
    """Write report, documents, crate and manifest; returns ``{"documents": [...], "missing": [...], "manifest":
    {...}}``.
    """
    from aifactory_train.report import write_report

    folder = run.path
    events, _ = read_events(folder / EVENTS)
    Chain(folder / EVENTS).append("pack-written", {}, f"after event {len(events) - 1}")
    record = write_record(folder)
    write_report(run, record)
    target = folder / "evidence"
    target.mkdir(exist_ok=True)
    documents = render(record)
    for stale in target.iterdir():
        if stale.is_file() and stale.name not in documents:
            stale.unlink()
    for name, text in documents.items():
        (target / name).write_text(text, encoding="utf-8")
    files = [folder / name for name in _TOP if (folder / name).is_file()]
    files += files_below(folder / "export") + [p for p in files_below(target) if not p.name.startswith("manifest")]
    listed = [{**entry, "media": _media(entry["path"])} for entry in describe(files, folder)]
    (folder / CRATE).write_text(
        json.dumps(machine.crate(record, listed), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    signed = write_manifest(folder, record, key or signing_key(run))
    owed = missing_places(record)
    if say is not None:
        say(f"evidence pack: {target} ({len(documents)} documents, {len(owed)} entries MISSING)")
        say(
            "manifest: signed with key " + signed["keyid"][:16]
            if signed["signed"]
            else f"manifest: not signed ({signed['why']})"
        )
    return {"documents": sorted(documents), "missing": [{"place": p, "who": w} for p, w in owed], "manifest": signed}


def signing_key(run: RunFolder) -> Path | None:
    """``record.sign_with`` of the run, else the user's key if there is one and the package to use it."""
    named = run.load_config().record.sign_with
    if named:
        return Path(named).expanduser()
    key = default_key()
    if not key.is_file():
        return None
    try:
        import cryptography  # noqa: F401
    except ImportError:
        return None
    return key


def refresh_artefacts(run: RunFolder, result: dict[str, Any]) -> None:
    """After an export outside the training: its digests into the record, and a new pack."""
    from aifactory_train.record.files import exported_values

    if (run.path / EVENTS).is_file():
        Chain(run.path / EVENTS).append("exported", exported_values(run.path, run.load_config(), result))
        write_pack(run)


def render(record: dict[str, Any]) -> dict[str, str]:
    """File name -> content of every document."""
    form = forms.model_documentation(record)
    summary = public_summary(record)
    annexes, annex_iv = forms.annex_xi_xii(record), forms.annex_iv(record)
    basis = legal_basis()

    def as_json(value: Any) -> str:
        return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    documents: dict[str, str] = {"model-card.md": card.card(record)}
    for recipient, who in RECIPIENTS.items():
        fields = [f for f in form if recipient in f.recipients]
        name = f"model-documentation-{recipient.lower()}"
        intro = (
            f"View for {who}. Which fields downstream providers receive follows Annex XII; entries marked "
            f"MISSING are owed by the person named."
        )
        documents[f"{name}.md"] = form_markdown(
            f"Model Documentation Form ({recipient})", intro, fields, recipient
        ) + footer("mdf", record)
        documents[f"{name}.json"] = as_json(
            {
                "form": basis["rules"]["mdf"],
                "recipient": recipient,
                "fields": [f.as_dict(recipient) for f in fields],
                "notice": basis["footer"],
            }
        )
    documents["training-content-summary.md"] = form_markdown(
        "Public summary of training content",
        "Covers the content of this modification only; the base model's own summary is linked in 1.2b.",
        summary,
    ) + footer("summary", record)
    documents["training-content-summary.json"] = as_json(
        {"form": basis["rules"]["summary"], "fields": [f.as_dict() for f in summary], "notice": basis["footer"]}
    )
    documents["annex-xi.md"] = form_markdown(
        "Annex XI, section 1", "Technical documentation for authorities.", annexes
    ) + footer("annex_xi", record)
    documents["annex-xii.md"] = form_markdown(
        "Annex XII", "Information for downstream providers.", [f for f in annexes if "DP" in f.recipients], "DP"
    ) + footer("annex_xi", record)
    documents["annex-iv.md"] = form_markdown(
        "Annex IV, the parts that a training documents",
        "Fragments for the technical documentation of a high-risk system.",
        annex_iv,
    ) + footer("annex_iv", record)
    documents["one-third.md"] = markdown("one-third", found=record.get("aiact", {})) + footer("one_third", record)
    documents["bom.cdx.json"] = as_json(machine.bom(record))
    documents["croissant.json"] = as_json(machine.croissant(record))
    documents["README.md"] = markdown(
        "index",
        run=record.get("run", {}).get("id"),
        documents=documents,
        owed=missing_places(record),
        footer=basis["footer"],
    )
    return documents


def _media(name: str) -> str:
    known = {
        ".jsonl": "application/x-ndjson",
        ".md": "text/markdown",
        ".yaml": "application/yaml",
        ".safetensors": "application/octet-stream",
    }
    return known.get(Path(name).suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"


__all__ = ["refresh_artefacts", "render", "signing_key", "tree_digest", "write_pack"]
