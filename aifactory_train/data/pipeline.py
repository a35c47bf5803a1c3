"""``prepare``: sources to a finished token cache.

One pass over the rows (:mod:`reading`), then duplicates, split and overlap on arrays (:mod:`selection`), then the
report. The result is written beside its final place and renamed, so a cache is complete or absent.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aifactory_train.config import loading
from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.core.output import note
from aifactory_train.data import inputs as _inputs
from aifactory_train.data import intact, language
from aifactory_train.data import report as own_report
from aifactory_train.data.encode_block import no_collection
from aifactory_train.data.encoder import Encoder
from aifactory_train.data.encoder_spec import EncoderSpec
from aifactory_train.data.end_of_turn import forget_spare
from aifactory_train.data.inputs import PREPARED_FORMAT, Input
from aifactory_train.data.reading import read_source
from aifactory_train.data.selection import RowSelection, Words, select
from aifactory_train.data.store import CACHE_FIX, Store, StoreWriter, TokenDataset, content_digest, disk_full
from aifactory_train.private import profile, vault
from aifactory_train.private.permissions import folder_mode


@dataclass
class PreparedData:
    """What training needs: ``train``, at least one of ``evals`` (by name), the ``report`` of the preparation and
    ``tokenizer_info`` (digests, end-of-turn and pad ids, vocabulary). ``folder`` is the cache, ``reused`` tells whether
    it was there already."""

    train: TokenDataset
    evals: dict[str, TokenDataset]
    report: dict[str, Any]
    tokenizer_info: dict[str, Any]
    folder: Path
    reused: bool = False


def prepare(
    recipe: Recipe,
    tokenizer: Any = None,
    *,
    cache_dir: Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    trusted: bool = False,
) -> PreparedData:
    """Build the token cache of ``recipe``, or reopen it when nothing that decides its content has changed.

    Args:
        tokenizer: a loaded fast tokenizer; default: the one of ``recipe.model`` (:func:`load_tokenizer`).
        cache_dir: default ``prepared`` in the program's cache.
        progress: called with (rows, tokens) so far, after each block.
        trusted: another process has just looked at the cache for this one; only the sizes of its files are compared
        again.

    A damaged cache is named and built again (:mod:`aifactory_train.data.intact`). Raises :class:`UserError` for
    anything wrong with rows, splits, the template, or the disk; nothing stays behind then.
    """
    profile.enforce(recipe)
    try:
        return _prepare(recipe, tokenizer, cache_dir, progress, trusted)
    finally:
        forget_spare()


def _prepare(
    recipe: Recipe,
    tokenizer: Any,
    cache_dir: Path | str | None,
    progress: Callable[[int, int], None] | None,
    trusted: bool,
) -> PreparedData:
    from aifactory_train.data.tokenizer import encoder_spec, load_tokenizer, tokenizer_info

    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(recipe)
    spec = encoder_spec(tokenizer, recipe)
    info = tokenizer_info(tokenizer, spec)
    inputs = _inputs.resolve(recipe)
    root = Path(cache_dir) if cache_dir is not None else loading.cache_dir() / "prepared"
    target = root / _inputs.cache_key(recipe, spec, inputs)
    if target.exists():
        found = intact.faults(target, content=not trusted)
        if not found:
            return _open(target, info, recipe, inputs, reused=True)
        if trusted:
            raise RunFailed(f"the token cache changed while it was opened: {found[0]}", where=str(target))
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        note(f"the token cache {target} is damaged and is built again: {found[0]}{more}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=root, prefix=f".{target.name}-"))
    except OSError as error:
        full = disk_full(error, root)
        raise full or UserError(
            f"the cache cannot be written: {error.strerror}", where=str(root), fix=CACHE_FIX
        ) from None
    try:
        _build(recipe, spec, inputs, scratch, progress)
        scratch.chmod(folder_mode())
        _put_in_place(scratch, target)
    except OSError as error:
        full = disk_full(error, root)
        if full is None:
            raise
        raise full from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return _open(target, info, recipe, inputs, reused=False)


def _put_in_place(scratch: Path, target: Path) -> None:
    """Rename a finished cache to its name. What lies there is another process' work, which is used, or damaged, and
    goes away.
    """
    try:
        os.replace(scratch, target)
        return
    except OSError:
        if not target.is_dir():
            raise
    if not intact.faults(target, content=True):
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-damaged-"))
    try:
        os.replace(target, aside)  # whoever has its files open keeps them
        os.replace(scratch, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _open(folder: Path, info: dict[str, Any], recipe: Recipe, inputs: list[Input], *, reused: bool) -> PreparedData:
    facts = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    store = Store(folder / "store")
    if (folder / "own.json").is_file():
        try:
            facts["report"] |= json.loads((folder / "own.json").read_text(encoding="utf-8"))
        except (ValueError, TypeError):
            note(f"{folder / 'own.json'} is damaged and left out: 'aifactory prepare --report' writes it again")
    if reused:
        # Content decides what is in a cache, not where it lay: the rows may have been read from another place.
        store = Store(folder / "store", _files_now(store.facts, inputs))
        for entry, item in zip(facts["report"]["sources"], inputs, strict=True):
            entry["source"] = item.source.source
        if facts["report"].get("own"):
            facts["report"]["own"]["licences"] = own_report.stated_licences(_licences(recipe))

    def view(entry: dict[str, Any]) -> TokenDataset:
        path = folder / entry["file"]
        decrypted = vault.content(path)
        if decrypted is not None:
            docs = np.frombuffer(decrypted, dtype="<i8")
            return TokenDataset(store, docs, entry["name"], entry["report"], entry["digest"])
        docs = np.memmap(path, dtype="<i8", mode="r") if path.stat().st_size else np.empty(0, dtype="<i8")
        return TokenDataset(store, docs, entry["name"], entry["report"], entry["digest"])

    evals = {entry["name"]: view(entry) for entry in facts["evals"]}
    return PreparedData(view(facts["train"]), evals, facts["report"], info, folder, reused)


def _files_now(facts: dict[str, Any], inputs: list[Input]) -> list[str]:
    """The names of a store's files, below the sources of this run."""
    places = facts["places"]
    return [
        name if place is None else f"{inputs[number].path}{place}"
        for name, (number, place) in zip(facts["files"], places, strict=True)
    ]


def _licences(recipe: Recipe) -> list[tuple[str, str]]:
    return list(dict.fromkeys((s.source, s.licence) for s in [*recipe.data.train, *(recipe.data.eval or [])]))


def _build(
    recipe: Recipe, spec: EncoderSpec, inputs: list[Input], scratch: Path, progress: Callable[[int, int], None] | None
) -> None:
    started = time.monotonic()
    encoder = Encoder(spec)
    wide = encoder.tokenizer.get_vocab_size(with_added_tokens=True) > 1 << 16
    writer = StoreWriter(scratch / "store", wide=wide)
    facts: dict[str, Any] = {"sources": [], "files": [], "places": []}
    try:
        for number, item in enumerate(inputs):
            places: list[str | None] = []
            facts["sources"].append(
                read_source(recipe, encoder, item, number, writer, facts["files"], places, progress)
            )
            facts["places"] += [(number, place) for place in places]
        writer.close(facts)
    except BaseException:
        writer.abandon()
        raise
    store = Store(scratch / "store")
    with no_collection():
        words = Words(store)
        selection = select(recipe, store, inputs, words)
        entries: list[dict[str, Any]] = []
        for name, docs, report in selection.sets:
            file = f"docs-{len(entries)}.bin"
            with vault.create(scratch / file) as out:
                out.write(docs.astype("<i8").tobytes())
            entries.append({"name": name, "file": file, "report": report, "digest": content_digest(store, docs)})
        report = {
            "recipe": recipe.id,
            "sources": facts["sources"],
            "split": selection.how,
            "duplicates": selection.duplicates,
            "overlap": selection.overlap,
            "unused": _unused(facts["sources"]),
            "rows": selection.rows,
            "sets": {("train" if i == 0 else e["name"]): e["report"] for i, e in enumerate(entries)},
            "digests": {("train" if i == 0 else e["name"]): e["digest"] for i, e in enumerate(entries)},
            "seconds": round(time.monotonic() - started, 2),
        }
        report |= _own(recipe, store, selection, encoder, words, at_once=True)
    report["warnings"] = own_report.warnings_of(report)
    prepared = intact.with_digests(
        scratch, {"format": PREPARED_FORMAT, "train": entries[0], "evals": entries[1:], "report": report}
    )
    with (scratch / "prepared.json").open("w", encoding="utf-8") as file_:
        json.dump(prepared, file_, ensure_ascii=False, indent=1)
        file_.flush()
        os.fsync(file_.fileno())


def _unused(sources: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """What rows held and training does not use, over all sources: ``{"columns": {name: rows}, "turn_keys": {name:
    turns}}``.
    """
    out: dict[str, dict[str, int]] = {"columns": {}, "turn_keys": {}}
    for kind, counts in out.items():
        for source in sources:
            for name, count in source["unused"][kind].items():
                counts[name] = counts.get(name, 0) + count
    return out


def _own(
    recipe: Recipe, store: Store, selection: RowSelection, encoder: Encoder, words: Words, *, at_once: bool
) -> dict[str, Any]:
    """Languages and their cost in tokens (from a sample), and with little data, or when asked, the whole report on the
    rows.
    """
    # By place, not by name: rows held out of train.jsonl are called "train" as well.
    train, *others = (np.unique(np.asarray(store.column("docrow"))[docs]) for _, docs, _ in selection.sets)
    sample = train[:: max(1, len(train) // own_report.LANGUAGE_TEXTS)][: own_report.LANGUAGE_TEXTS]
    said = [own_report.spoken(row) for row in store.rows(sample)]
    texts, names = [text for _, text in said], [name or language.detect(text) for name, text in said]
    out: dict[str, Any] = {"fertility": own_report.fertility(encoder.tokenizer, texts, names, count=encoder.count)}
    out["languages"] = own_report.languages(texts, names)
    if at_once and int(np.asarray(store.column("rowlength")).sum(dtype=np.int64)) > own_report.AT_ONCE:
        return {**out, "own": None}
    held = np.unique(np.concatenate(others))
    own = own_report.describe(
        [words.texts[row] for row in train],
        [words.texts[row] for row in held],
        licences=_licences(recipe),
        spoken_in=out["languages"],
        words=(words.shingles, train, held),
    )
    return {**out, "own": own}


def look_at(recipe: Recipe, tokenizer: Any, prepared: PreparedData) -> dict[str, Any]:
    """The whole report on the rows of a preparation, however many; kept beside the cache for the record of later runs.

    Where :func:`prepare` has looked already (little data), that is returned at once.
    """
    from aifactory_train.data.tokenizer import encoder_spec

    if prepared.report.get("own") is not None:
        return prepared.report
    sets = {"train": prepared.train, **prepared.evals}
    selection = RowSelection([(name, view._docs, {}) for name, view in sets.items()], {}, {}, {}, {})
    encoder = Encoder(encoder_spec(tokenizer, recipe))
    store = prepared.train.store
    prepared.report |= _own(recipe, store, selection, encoder, Words(store), at_once=False)
    prepared.report["warnings"] = own_report.warnings_of(prepared.report)
    handle, name = tempfile.mkstemp(dir=prepared.folder, prefix=".own-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(
            {k: prepared.report[k] for k in ("own", "languages", "fertility", "warnings")}, file, ensure_ascii=False
        )
    os.replace(name, prepared.folder / "own.json")
    return prepared.report
