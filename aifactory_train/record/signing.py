"""The signed manifest: SHA-256 of every file that counts, as an in-toto statement in a DSSE envelope, signed with
Ed25519.

``manifest.json`` is the statement in readable form, ``manifest.dsse.json`` the envelope. Nothing goes to a transparency
log: compute nodes have no internet, and records of sensitive projects stay where they are. Formats: in-toto Statement
v1, DSSE v1 (its pre-authentication encoding is what is signed), keys as PEM.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.core.files import check_regular
from aifactory_train.record.chain import RecordFault, canonical, now, printable
from aifactory_train.record.digests import entries_below, file_digest, files_below, inside, is_regular

MANIFEST, ENVELOPE = "manifest.json", "manifest.dsse.json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
_NEEDS = "pip install -c constraints.txt 'aifactory-train[evidence]'"


#: Files that every manifest lists, if they are there.
_ALWAYS = ("record.json", "events.jsonl", "data_manifest.json", "run.yaml", "eval.json", "ro-crate-metadata.json")
#: Listed as well; manifests of the first version do not have them, which is said and is no fault.
_SINCE = ("report.html", "metrics.jsonl", "plan.json")
#: Folders of which all is listed, but for the manifest itself and its envelope.
_FOLDERS = ("export", "evidence")
_OWN = (f"evidence/{MANIFEST}", f"evidence/{ENVELOPE}")
#: Without these a manifest does not speak for a run.
_NEEDED = ("record.json", "events.jsonl", "run.yaml")


def subjects(folder: Path) -> list[Path]:
    """The files that the manifest speaks for: record, events, data manifest, plan, configuration, figures, report,
    export, evidence.
    """
    return _below(folder, (*_ALWAYS, *_SINCE))


def _below(folder: Path, names: tuple[str, ...]) -> list[Path]:
    found = [folder / name for name in names if (folder / name).is_file()]
    for below in _FOLDERS:
        if (folder / below).is_dir():
            found += [p for p in files_below(folder / below) if p.relative_to(folder).as_posix() not in _OWN]
    return found


def _unsigned(folder: Path, names: tuple[str, ...], listed: dict[str, str]) -> list[str]:
    """What the manifest should list and does not: files of these names, and whatever a reader meets below export and
    evidence. A link to a folder, a pipe and the like are never listed: nobody's digest speaks for what they lead to."""
    links = [p for below in _FOLDERS for p in entries_below(folder / below) if not p.is_file()]
    found = [p.relative_to(folder).as_posix() for p in [*_below(folder, names), *links]]
    return [name for name in found if name not in listed]


def statement(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """An in-toto statement about the run folder, with SLSA provenance built from the record."""
    run, base = record.get("run", {}), record.get("base", {})
    materials = [
        {"uri": str(base.get("id")), "digest": {"sha256": f["sha256"]}, "name": f["path"]}
        for f in base.get("files", [])
        if isinstance(f, dict)
    ]
    materials += [
        {"uri": str(d.get("source")), "digest": {"sha256": d["sha256"]}, "name": str(d.get("name"))}
        for d in record.get("data", [])
        if d.get("sha256")
    ]
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": p.relative_to(folder).as_posix(), "digest": {"sha256": file_digest(p)}}
            for p in sorted(subjects(folder))
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": "urn:aifactory-train:training-run:v1",
                "externalParameters": {"recipe": run.get("recipe"), "config_sha256": run.get("config_sha256")},
                "internalParameters": {"seed": run.get("seed")},
                "resolvedDependencies": materials,
            },
            "runDetails": {
                "builder": {
                    "id": "urn:aifactory-train",
                    "version": {"aifactory-train": run.get("code", {}).get("version", "")},
                },
                "metadata": {"invocationId": run.get("id"), "startedOn": run.get("created"), "finishedOn": now()},
            },
        },
    }


def pre_authentication(payload_type: str, payload: bytes) -> bytes:
    """DSSE's encoding of type and payload with their lengths, which is what the signature is over."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


# ---- keys


def default_key() -> Path:
    root = (
        os.environ.get("AIFACTORY_CONFIG")
        or Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "aifactory"
    )
    return Path(root) / "signing.pem"


def make_key(path: Path) -> Path:
    """A new Ed25519 key pair: ``path`` (mode 600) and ``path`` with ``.pub``. Never overwrites one."""
    ed25519, serialization = _cryptography()
    if path.exists():
        raise UserError(
            "there is a key already", where=str(path), fix="choose another file; old signatures need the old key"
        )
    key = ed25519.Ed25519PrivateKey.generate()
    path.parent.mkdir(parents=True, exist_ok=True)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(private)
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return path.with_suffix(".pub")


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise UserError("signatures need the package 'cryptography'", fix=_NEEDS) from None
    return ed25519, serialization


def load_private(path: Path) -> Any:
    """An Ed25519 private key (``cryptography``'s object) from a PEM file that nobody else can read; :class:`UserError`
    otherwise.
    """
    ed25519, serialization = _cryptography()
    try:
        mode = path.stat().st_mode
    except OSError:
        raise UserError("no such key", where=str(path), fix="aifactory record key makes one") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError("others can read this private key", where=str(path), fix=f"chmod 600 {path}")
    return _ed25519(
        path,
        lambda pem: serialization.load_pem_private_key(pem, password=None),
        "an unencrypted PEM private key",
        ed25519.Ed25519PrivateKey,
    )


def load_public(path: Path) -> Any:
    """An Ed25519 public key from a PEM file; :class:`UserError` if it is none."""
    ed25519, serialization = _cryptography()
    return _ed25519(path, serialization.load_pem_public_key, "a PEM public key", ed25519.Ed25519PublicKey)


def _ed25519(path: Path, load: Callable[[bytes], Any], form: str, kind: type) -> Any:
    check_regular(path)
    try:
        with open(path, "rb") as file:
            key = load(file.read(1 << 16))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"is not {form}: {error}", where=str(path)) from None
    if not isinstance(key, kind):
        raise UserError("is not an Ed25519 key", where=str(path))
    return key


def key_id(public: Any) -> str:
    """sha256 of the raw public key, hex."""
    _, serialization = _cryptography()
    raw = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()


# ---- writing and checking


def write_manifest(folder: Path, record: dict[str, Any], key: Path | None) -> dict[str, Any]:
    """``evidence/manifest.json``, and with a key the signed envelope beside it. Returns what the pack's index says of
    it.
    """
    target = folder / "evidence"
    target.mkdir(exist_ok=True)
    content = statement(folder, record)
    (target / MANIFEST).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (target / ENVELOPE).unlink(missing_ok=True)
    if key is None:
        return {"signed": False, "why": "no signing key: aifactory record key, then aifactory record sign RUN"}
    private = load_private(key)
    payload = canonical(content)
    signature = private.sign(pre_authentication(PAYLOAD_TYPE, payload))
    public = private.public_key()
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"keyid": key_id(public), "sig": base64.b64encode(signature).decode()}],
    }
    (target / ENVELOPE).write_text(json.dumps(envelope, indent=1) + "\n", encoding="utf-8")
    return {"signed": True, "keyid": key_id(public)}


def check_manifest(
    folder: Path, public: Path | None, expected: Iterable[str] = ()
) -> tuple[list[RecordFault], list[str]]:
    """Faults of the manifest against the files, and of the envelope against ``public``; and notes.

    ``expected`` are further files that the manifest must list (those that the record speaks of). With a key there must
    be a manifest and a signature: their absence is a fault, because whoever forges a run can delete them.
    """
    key = load_public(public) if public is not None else None  # a wrong key is refused, whatever the folder holds
    place, envelope_file = folder / "evidence" / MANIFEST, folder / "evidence" / ENVELOPE
    if not is_regular(place):
        note = "there is no manifest: the evidence pack was not written"
        if key is None and not is_regular(envelope_file):
            return [], [note]
        why = (
            "a key was given, but there is no manifest that it could have signed"
            if key
            else "the signed manifest is gone"
        )
        return [RecordFault("manifest-missing", f"evidence/{MANIFEST}", why)], [] if key else [note]
    try:
        content, listed = _listed(place)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [RecordFault("manifest-unreadable", f"evidence/{MANIFEST}", "the manifest is damaged or was edited")], []
    faults: list[RecordFault] = []
    notes: list[str] = []
    for name, digest in listed.items():
        path = inside(folder, name)
        if path is None:
            what = f"'{printable(name, 200)}' is not a path inside the run folder"
            faults.append(RecordFault("manifest-unreadable", f"evidence/{MANIFEST}", what))
            continue
        fault = compare(path, digest, name, "the manifest")
        if fault is not None:
            faults.append(fault)
    names = (*_ALWAYS, *_SINCE) if any(name in listed for name in _SINCE) else _ALWAYS
    faults.extend(
        RecordFault("file-added", name, "the manifest does not list this file")
        for name in _unsigned(folder, names, listed)
    )
    added = {f.where for f in faults}
    faults.extend(
        RecordFault("manifest-incomplete", name, "the manifest does not list this file, which the run must have")
        for name in dict.fromkeys([*_NEEDED, *expected])
        if name not in listed and name not in added
    )
    if not is_regular(envelope_file):
        notes.append("the manifest is not signed")
        if key is not None:
            faults.append(
                RecordFault("signature-missing", f"evidence/{ENVELOPE}", "a key was given, but there is no signature")
            )
        return faults, notes
    faults += _check_envelope(envelope_file, content, key, notes)
    if key is not None:
        notes += not_covered(folder, set(listed))
    return faults, notes


def _listed(place: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The statement in ``place`` and the digests that it lists by name. Raises what is wrong with it."""
    content = json.loads(place.read_text(encoding="utf-8"), object_pairs_hook=_each_key_once)
    canonical(content)  # a statement that cannot be written for signing was never signed
    listed = {s["name"]: s["digest"]["sha256"] for s in content["subject"]}
    if not all(isinstance(text, str) for pair in listed.items() for text in pair):
        raise TypeError("a name or a digest is not text")
    return content, listed


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. A key that stands there twice shows people one value and programs the other."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def compare(path: Path, digest: str, name: str, by: str, size: int | None = None) -> RecordFault | None:
    """What is wrong with a file of which ``by`` (the manifest, the record) states the digest, and perhaps the size."""
    if not is_regular(path):
        return RecordFault("file-missing", name, f"{by} lists this file, but it is not here")
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            return RecordFault("file-changed", name, f"this file has {found} bytes, {by} says {size}")
        if file_digest(path) != digest:
            return RecordFault("file-changed", name, f"its SHA-256 differs from that of {by}")
    except OSError as error:
        return RecordFault("file-unreadable", name, f"this file cannot be read: {error.strerror}")
    return None


def not_covered(folder: Path, listed: set[str]) -> list[str]:
    """One note that names what lies in the run folder and no signature speaks for; nothing if there is nothing."""
    counts: dict[str, int] = {}
    for path in entries_below(folder):
        name = path.relative_to(folder).as_posix()
        if name in listed or name in _OWN:
            continue
        top, below, _ = name.partition("/")
        counts[f"{top}/" if below else top] = counts.get(f"{top}/" if below else top, 0) + 1
    if not counts:
        return []
    names = [f"{name} ({count} files)" if name.endswith("/") else name for name, count in sorted(counts.items())]
    return ["not covered by the signature, so anybody may have changed it: " + printable(", ".join(names), 2000)]


def _check_envelope(path: Path, content: dict[str, Any], key: Any, notes: list[str]) -> list[RecordFault]:
    where = f"evidence/{ENVELOPE}"
    try:
        envelope = json.loads(path.read_text(encoding="utf-8"))
        payload = base64.b64decode(envelope["payload"], validate=True)
        signatures = [(s["keyid"], base64.b64decode(s["sig"], validate=True)) for s in envelope["signatures"]]
        kind = envelope["payloadType"]
        if not all(isinstance(text, str) for text in (kind, *(keyid for keyid, _ in signatures))):
            raise TypeError("a type or a key id is not text")
        signed = pre_authentication(kind, payload)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [RecordFault("signature-unreadable", where, "the envelope is damaged or was edited")]
    faults = []
    if payload != canonical(content):
        faults.append(
            RecordFault("manifest-edited", f"evidence/{MANIFEST}", "the manifest is not the one that was signed")
        )
    if key is None:
        notes.append(
            f"signed with key {printable(signatures[0][0][:16]) if signatures else '?'}: give --key PUBLIC.pub to "
            f"check who signed"
        )
        return faults
    from cryptography.exceptions import InvalidSignature

    wanted = key_id(key)
    if all(keyid != wanted for keyid, _ in signatures):
        signed_by = ", ".join(keyid[:16] for keyid, _ in signatures) or "nobody"
        faults.append(
            RecordFault("wrong-key", where, f"signed with key {signed_by}, not with the given key {wanted[:16]}")
        )
        return faults
    for keyid, signature in signatures:
        if keyid == wanted:
            try:
                key.verify(signature, signed)
            except InvalidSignature:
                faults.append(RecordFault("bad-signature", where, "the signature does not belong to this content"))
    return faults
