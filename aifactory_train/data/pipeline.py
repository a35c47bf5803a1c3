"""``prepare``: sources to a finished token cache, in one pass over the rows.

Main process: cut files into blocks, write what comes back, in order. Workers: parse, validate, render, mask, tokenise.
Afterwards, on arrays: duplicates, split by group, train/eval overlap. The result is written beside its final place and
renamed, so a cache is complete or absent.
"""

from __future__ import annotations

import collections
import gc
import hashlib
import importlib
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aifactory_train import config as _config
from aifactory_train.config import DataSource, Recipe
from aifactory_train.data import documents, near, readers, split
from aifactory_train.data import report as own_report
from aifactory_train.data.encoder import Encoder, EncoderSpec
from aifactory_train.data.overlap import LENGTH, SHARE, near_duplicates
from aifactory_train.data.readers import Block
from aifactory_train.data.rows import RowError, canonical, detect_format, to_user_error
from aifactory_train.data.sampler import hash_order, splitmix64
from aifactory_train.data.store import (
    CACHE_FIX,
    Store,
    StoreWriter,
    TokenDataset,
    content_digest,
    disk_full,
    pack_flags,
)
from aifactory_train.errors import UserError
from aifactory_train.private import profile, vault
from aifactory_train.private.permissions import folder_mode

#: Raised when the same input would give other files; older caches are then built again.
PREPARED_FORMAT = 3
#: Below this many bytes of input, starting processes takes longer than the work.
_PARALLEL_FROM = 8 << 20


@dataclass
class PreparedData:
    """What training needs: ``train``, at least one of ``evals`` (by name), the ``report`` of the preparation and
    ``tokenizer_info`` (digests, end-of-turn and pad ids, vocabulary). ``folder`` is the cache, ``reused`` tells whether it
    was there already."""

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
) -> PreparedData:
    """Build the token cache of ``recipe``, or reopen it when nothing that decides its content has changed.

    Args:
        tokenizer: a loaded fast tokenizer; default: the one of ``recipe.model`` (:func:`load_tokenizer`).
        cache_dir: default ``prepared`` in the program's cache.
        progress: called with (rows, tokens) so far, after each block.

    Raises :class:`UserError` for anything wrong with rows, splits, the template, or the disk; nothing stays behind then.
    """
    from aifactory_train.data.tokenizer import encoder_spec, load_tokenizer, tokenizer_info

    profile.enforce(recipe)
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(recipe)
    spec = encoder_spec(tokenizer, recipe)
    info = tokenizer_info(tokenizer, spec)
    inputs = _inputs(recipe)
    root = Path(cache_dir) if cache_dir is not None else _config.cache_dir() / "prepared"
    target = root / _key(recipe, spec, inputs)
    if (target / "prepared.json").is_file():
        return _open(target, info, reused=True)
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
        try:
            os.replace(scratch, target)
        except OSError:
            if not (target / "prepared.json").is_file():  # another process was faster with the same content: use that
                raise
    except OSError as error:
        full = disk_full(error, root)
        if full is None:
            raise
        raise full from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return _open(target, info, reused=False)


def _open(folder: Path, info: dict[str, Any], *, reused: bool) -> PreparedData:
    facts = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    store = Store(folder / "store")
    if (folder / "own.json").is_file():
        facts["report"] |= json.loads((folder / "own.json").read_text(encoding="utf-8"))

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


# ---- what decides the content


@dataclass
class _Input:
    """One source with its place; ``role`` is ``train`` or ``eval``."""

    source: DataSource
    role: str
    name: str
    path: Path
    hub: bool
    content: str
    converter: Callable[..., Iterator[dict[str, Any]]] | None = None
    converter_digest: str | None = None


def _inputs(recipe: Recipe) -> list[_Input]:
    from aifactory_train import sources

    out: list[_Input] = []
    taken: set[tuple[str, str]] = set()
    for role, listed in (("train", recipe.data.train), ("eval", recipe.data.eval or [])):
        for number, source in enumerate(listed):
            key = f"data.{role}.{number}"
            try:
                path = sources.resolve_data(source)
            except UserError as error:
                raise UserError(
                    error.what, where=error.where if error.where != "data" else f"{key}.source", fix=error.fix
                ) from None
            name = source.name or _default_name(source.source)
            while (role, name) in taken:
                name += "+"
            taken.add((role, name))
            converter = _converter(source.converter, key) if source.converter else None
            digest = None
            if converter is not None:
                module = sys.modules[converter.__module__]
                digest = hashlib.sha256(inspect.getsource(module).encode()).hexdigest()
            hub = sources.parse(source.source).kind == "hub"
            out.append(_Input(source, role, name, path, hub, content_of(path), converter, digest))
    return out


def _default_name(text: str) -> str:
    return re.sub(
        r"(\.(jsonl|ndjson|json|csv|tsv|parquet|txt|md|html?|pdf|gz|obo))+$",
        "",
        text.rstrip("/").replace("#", "/").rpartition("/")[2],
    )


_CONVERTER = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")


def _converter(text: str, key: str) -> Callable[..., Iterator[dict[str, Any]]]:
    """The function named ``MODULE:FUNCTION`` below ``aifactory_train.recipes`` (and nowhere else)."""
    where = f"{key}.converter"
    if not _CONVERTER.match(text):
        raise UserError(
            f"'{text}' does not have the form MODULE:FUNCTION", where=where, fix="e.g. health.phenotype:rows"
        )
    module_name, _, function_name = text.partition(":")
    full = f"aifactory_train.recipes.{module_name}"
    try:
        module = importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name and full.startswith(error.name):
            raise UserError(f"there is no recipe module '{module_name}'", where=where) from None
        raise
    function = getattr(module, function_name, None)
    if not callable(function) or function_name.startswith("_"):
        raise UserError(f"the module '{module_name}' has no function '{function_name}'", where=where)
    return function


def content_of(path: Path) -> str:
    """sha256 of a file, or of names and contents of a folder's files. Remembered by size and time of change."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    memory = _config.cache_dir() / "digests.json"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    digest = hashlib.sha256()
    changed = False
    for file in files:
        stat = file.stat()
        stamp = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if stamp not in known:
            from aifactory_train.sources import sha256

            try:
                known[stamp] = sha256(file)
            except OSError as error:
                raise UserError(f"cannot be read: {error.strerror}", where=str(file)) from None
            # A file changed within the clock's resolution could change again unseen: do not remember it yet.
            changed = changed or time.time_ns() - stat.st_mtime_ns > 2_000_000_000
        digest.update(f"{file.relative_to(path) if path.is_dir() else ''}\0{known[stamp]}\n".encode())
    if changed:
        _remember(memory, known)
    return digest.hexdigest()


def _remember(memory: Path, known: dict[str, str]) -> None:
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=memory.parent, prefix=".digests-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(dict(list(known.items())[-5000:]), file)
        os.replace(name, memory)
    except OSError:
        return  # only a memory of digests: without it they are computed again


def _key(recipe: Recipe, spec: EncoderSpec, inputs: list[_Input]) -> str:
    data = recipe.data
    decides = {
        "format": PREPARED_FORMAT,
        **({"sealed": True} if vault.seals() else {}),
        "encoder": spec.digest(),
        "inputs": [
            [
                i.role,
                i.name,
                i.content,
                i.source.split,
                i.source.format,
                i.source.columns,
                i.source.options,
                i.source.max_rows,
                i.source.weight,
                *([{"share": i.source.share}] if i.source.share is not None else []),
                i.source.licence,
                i.source.converter,
                i.converter_digest,
            ]
            for i in inputs
        ],
        "rules": [data.eval_fraction, data.eval_rows, data.deduplicate, data.overlap, data.split_seed, data.unreadable],
        "row_rules": [data.split_by.model_dump() if data.split_by else None, data.labels],
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', recipe.id)}-{digest[:16]}"


# ---- the pass over the rows (runs in workers)


@dataclass
class _Task:
    block: Block
    format: str
    columns: dict[str, str]
    source: int
    file: int
    rules: split.RowRules | None = None


@dataclass
class _Done:
    """What a block became: arrays in the layout of the store. ``error`` ends the preparation."""

    lines: bytes = b""
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint32))
    flags: bytes = b""
    docs: dict[str, np.ndarray] = field(default_factory=dict)
    counts: collections.Counter = field(default_factory=collections.Counter)
    error: UserError | None = None


_encoder: Encoder | None = None


def _start_worker(spec: EncoderSpec) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(spec)


def _work(task: _Task) -> _Done:
    assert _encoder is not None
    return process(task, _encoder)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


#: JSON without spaces; one encoder for all rows, because ``json.dumps`` would build one for each.
_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def process(task: _Task, encoder: Encoder) -> _Done:
    """Parse, validate and encode the rows of one block.

    The collector of cyclic garbage pauses meanwhile: a block makes tens of thousands of objects that live to its end and hold
    no cycles, and looking through them again and again took a fifth of the whole preparation (measured).
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        return _process(task, encoder)
    finally:
        if collected:
            gc.enable()


def _process(task: _Task, encoder: Encoder) -> _Done:
    block, done = task.block, _Done()
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    moments: list[int | None] = []
    try:
        raw = (
            readers.parse_lines(block)
            if block.lines is not None
            else ((block.number(i), row) for i, row in enumerate(block.rows or []))
        )
        for number, value in raw:
            numbers.append(number)
            try:
                rows.append(canonical(value, task.format, task.columns))
                moments.append(task.rules.apply(value, rows[-1]) if task.rules is not None else None)
            except RowError as error:
                raise to_user_error(error, f"{block.file}:{number}") from None
    except UserError as error:
        done.error = error
        return done
    lines, digests, norms, groups, ids = [], [], [], [], []
    for row, moment in zip(rows, moments, strict=True):
        content = {k: v for k, v in row.items() if k not in ("id", "group", "language", "label")}
        line = _compact(row)
        lines.append(line.encode("utf-8", "surrogatepass") + b"\n")
        if "text" in row:
            whole = question = _normal(row["text"])
        else:
            normal = [(m["role"] != "assistant", _normal(m["content"])) for m in row["messages"]]
            whole = " ".join(text for _, text in normal if text)
            question = " ".join(text for asked, text in normal if asked and text)
            if any("tool_calls" in m for m in row["messages"]):
                whole += json.dumps([m.get("tool_calls") for m in row["messages"]])
        digests.append(_hash(_compact(content) if len(content) != len(row) else line))
        norms.append(_hash(whole))
        if moment is not None:
            groups.append(moment)
        else:
            groups.append(_hash(f"group:{row['group']}") if "group" in row else _hash(question or whole))
        ids.append(_hash(row["id"]) | 1 if "id" in row else 0)
    results = encoder.encode(rows)
    documents, docrow = [], []
    counts = done.counts
    for i, result in enumerate(results):
        if isinstance(result, RowError):
            done.error = to_user_error(result, f"{block.file}:{numbers[i]}")
            return done
        counts.update(result.flags)
        if (
            result.dropped == "masked"
            and not any(d.cut for d in result.documents)
            and encoder.spec.long_documents != "truncate"
        ):
            done.error = UserError(
                "all tokens of this row are masked: nothing to learn from it", where=f"{block.file}:{numbers[i]}"
            )
            return done
        if result.dropped:
            counts[f"dropped: {result.dropped}"] += 1
        if len(result.documents) > 1 and "rejected" not in rows[i]:
            counts["split"] += 1
        elif result.documents and result.documents[0].cut:
            counts["truncated"] += 1
        documents += result.documents
        docrow += [i] * len(result.documents)
    n = len(rows)
    done.lines = b"".join(lines)
    done.rows = {
        "rowlength": np.fromiter((len(line) for line in lines), dtype="<i4", count=n),
        "rowsource": np.full(n, task.source, dtype="<u2"),
        "rowline": np.asarray(numbers, dtype="<i4"),
        "rowfile": np.full(n, task.file, dtype="<i4"),
        "rowdigest": np.asarray(digests, dtype="<u8"),
        "rownorm": np.asarray(norms, dtype="<u8"),
        "rowgroup": np.asarray(groups, dtype="<u8"),
        "rowid": np.asarray(ids, dtype="<u8"),
    }
    if documents:
        done.tokens = np.concatenate([d.tokens for d in documents]).astype(np.uint32)
        done.flags = pack_flags([d.mask for d in documents], [d.text_mask for d in documents])
    done.docs = {
        "lengths": np.asarray([len(d.tokens) for d in documents], dtype="<i4"),
        "supervised": np.asarray([int(d.mask.sum()) for d in documents], dtype="<i4"),
        "textbytes": np.asarray([d.text_bytes for d in documents], dtype="<i4"),
        "docrow": np.asarray(docrow, dtype="<i8"),
    }
    return done


# ---- the pass, driven from here


def _build(
    recipe: Recipe, spec: EncoderSpec, inputs: list[_Input], scratch: Path, progress: Callable[[int, int], None] | None
) -> None:
    started = time.monotonic()
    encoder = Encoder(spec)
    wide = encoder.tokenizer.get_vocab_size(with_added_tokens=True) > 1 << 16
    writer = StoreWriter(scratch / "store", wide=wide)
    facts: dict[str, Any] = {"sources": [], "files": []}
    try:
        for number, item in enumerate(inputs):
            facts["sources"].append(_pass(recipe, encoder, item, number, writer, facts["files"], progress))
        writer.close(facts)
    except BaseException:
        writer.abandon()
        raise
    store = Store(scratch / "store")
    selection = _select(recipe, store, inputs)
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
        "sets": {("train" if i == 0 else e["name"]): e["report"] for i, e in enumerate(entries)},
        "digests": {("train" if i == 0 else e["name"]): e["digest"] for i, e in enumerate(entries)},
        "seconds": round(time.monotonic() - started, 2),
    }
    report |= _own(recipe, store, selection, encoder, at_once=True)
    report["warnings"] = own_report.warnings_of(report)
    prepared = {"format": PREPARED_FORMAT, "train": entries[0], "evals": entries[1:], "report": report}
    with (scratch / "prepared.json").open("w", encoding="utf-8") as file_:
        json.dump(prepared, file_, ensure_ascii=False, indent=1)
        file_.flush()
        os.fsync(file_.fileno())


def _own(recipe: Recipe, store: Store, selection: _Selection, encoder: Encoder, *, at_once: bool) -> dict[str, Any]:
    """Languages and their cost in tokens (from a sample), and with little data, or when asked, the whole report on the rows."""
    # By place, not by name: rows held out of train.jsonl are called "train" as well.
    train, *others = (np.unique(np.asarray(store.column("docrow"))[docs]) for _, docs, _ in selection.sets)
    sample = train[:: max(1, len(train) // own_report.LANGUAGE_TEXTS)][: own_report.LANGUAGE_TEXTS]
    said = [own_report.spoken(row) for row in _rows(store, sample)]
    texts, stated = [text for _, text in said], [name for name, _ in said]
    out: dict[str, Any] = {"fertility": own_report.fertility(encoder.tokenizer, texts, stated)}
    out["languages"] = own_report.languages(texts, stated)
    if at_once and int(np.asarray(store.column("rowlength")).sum(dtype=np.int64)) > own_report.AT_ONCE:
        return {**out, "own": None}
    held = np.unique(np.concatenate(others))
    licences = list(dict.fromkeys((s.source, s.licence) for s in [*recipe.data.train, *(recipe.data.eval or [])]))
    own = own_report.describe(_texts(store, train), _texts(store, held), licences=licences)
    own["languages"] = out["languages"]
    return {**out, "own": own}


def _rows(store: Store, rows: np.ndarray) -> Iterator[dict[str, Any]]:
    """Some rows, from one opened file."""
    path = store.folder / "rows.jsonl"
    if not path.is_file() or path.stat().st_size == 0:
        yield from (json.loads(store.row_line(int(row))) for row in rows)
        return
    raw, starts = np.memmap(path, dtype=np.uint8, mode="r"), store.row_starts
    yield from (json.loads(raw[starts[row] : starts[row + 1]].tobytes()) for row in rows)


def _texts(store: Store, rows: np.ndarray) -> list[str]:
    return [own_report.text_of(row) for row in _rows(store, rows)]


def look_at(recipe: Recipe, tokenizer: Any, prepared: PreparedData) -> dict[str, Any]:
    """The whole report on the rows of a preparation, however many; kept beside the cache for the record of later runs.

    Where :func:`prepare` has looked already (little data), that is returned at once.
    """
    from aifactory_train.data.tokenizer import encoder_spec

    if prepared.report.get("own") is not None:
        return prepared.report
    sets = {"train": prepared.train, **prepared.evals}
    selection = _Selection([(name, view._docs, {}) for name, view in sets.items()], {}, {}, {})
    encoder = Encoder(encoder_spec(tokenizer, recipe))
    prepared.report |= _own(recipe, prepared.train.store, selection, encoder, at_once=False)
    prepared.report["warnings"] = own_report.warnings_of(prepared.report)
    handle, name = tempfile.mkstemp(dir=prepared.folder, prefix=".own-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(
            {k: prepared.report[k] for k in ("own", "languages", "fertility", "warnings")}, file, ensure_ascii=False
        )
    os.replace(name, prepared.folder / "own.json")
    return prepared.report


def _pass(
    recipe: Recipe,
    encoder: Encoder,
    item: _Input,
    number: int,
    writer: StoreWriter,
    files: list[str],
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Read one source into the store; returns its facts for the report."""
    source = item.source
    label = f"{item.name}:row"
    notes = documents.Notes(recipe.data.unreadable)
    if item.converter is not None:
        rows = _guarded(item.converter, item.path, source, label)
        stream = readers.from_converter(rows, label)
    else:
        stream = readers.blocks(item.path, split=source.split, hub=item.hub, notes=notes)
    stream = readers.limit(stream, source.max_rows)
    head = next(stream, None)
    if head is None:
        raise UserError("no rows", where=str(item.path), fix="the source is empty")
    fmt, why = _format(head, source)
    rules = split.RowRules.of(recipe.data)
    counts: collections.Counter = collections.Counter()
    rows_before, docs_before, tokens_before = writer.rows, writer.docs, writer.tokens
    numbers: dict[str, int] = {name: i for i, name in enumerate(files)}

    def tasks() -> Iterator[_Task]:
        block: Block | None = head
        while block is not None:
            if block.file not in numbers:
                numbers[block.file] = len(files)
                files.append(block.file)
            yield _Task(block, fmt, source.columns, number, numbers[block.file], rules)
            block = next(stream, None)

    for done in _run(tasks(), encoder, _workers(recipe, item)):
        if done.error is not None:
            raise done.error
        base = writer.rows
        writer.append_rows(done.lines, done.rows)
        done.docs["docrow"] = done.docs["docrow"] + base
        writer.append_documents(done.tokens, done.flags, done.docs)
        counts.update(done.counts)
        if progress is not None:
            progress(writer.rows, writer.tokens)
    if writer.rows == rows_before:
        raise UserError("no rows: every line is blank", where=str(item.path))
    counts.update(notes.counts())
    return {
        "name": item.name,
        "role": item.role,
        "source": source.source,
        "weight": source.weight,
        **({"share": source.share} if source.share is not None else {}),
        "licence": source.licence,
        "format": fmt,
        "format_because": why,
        "sha256": item.content,
        "rows": writer.rows - rows_before,
        "documents": writer.docs - docs_before,
        "tokens": writer.tokens - tokens_before,
        "counts": dict(sorted(counts.items())),
        **({"files": notes.as_dict()} if notes.read or notes.left_out or notes.not_read else {}),
    }


def _guarded(
    converter: Callable[..., Iterator[dict[str, Any]]], path: Path, source: DataSource, label: str
) -> Iterator[dict[str, Any]]:
    try:
        inspect.signature(converter).bind(path, **source.options)
    except TypeError as error:
        raise UserError(
            f"{source.converter}: {error}",
            where=f"{label.removesuffix(':row')}: options",
            fix="see the converter's docstring",
        ) from None
    return converter(path, **source.options)


def _format(head: Block, source: DataSource) -> tuple[str, str]:
    if source.format != "auto":
        return source.format, "the recipe says so"
    if head.lines is not None:
        first = next(readers.parse_lines(head), None)
    else:
        first = (head.number(0), (head.rows or [None])[0])
    if first is None:
        raise UserError("no rows: every line is blank", where=head.file)
    number, row = first
    if not isinstance(row, dict):
        raise UserError("a row is an object of named columns", where=f"{head.file}:{number}")
    try:
        return detect_format([source.columns.get(str(c), str(c)) for c in row])
    except RowError as error:
        raise to_user_error(error, f"{head.file}:{number}") from None


def _workers(recipe: Recipe, item: _Input) -> int:
    if recipe.data.workers:
        return recipe.data.workers
    files = [item.path] if item.path.is_file() else [p for p in item.path.rglob("*") if p.is_file()]
    if item.converter is not None or sum(f.stat().st_size for f in files) < _PARALLEL_FROM:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(8, cores)


def _run(tasks: Iterator[_Task], encoder: Encoder, workers: int) -> Iterator[_Done]:
    """Results in the order of the tasks. At most ``2 * workers`` blocks are under way, so memory stays flat."""
    if workers == 1:
        for task in tasks:
            yield process(task, encoder)
        return
    import multiprocessing

    # Fresh processes: a fork would inherit the tokenizer's and torch's threads in an unknown state.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(encoder.spec,))
    waiting: collections.deque[Future[_Done]] = collections.deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(_work, task))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a tokenising process died (out of memory?)", where="data.workers", fix="try data.workers=1"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# ---- duplicates, split, overlap (on arrays)


@dataclass
class _Selection:
    sets: list[tuple[str, np.ndarray, dict[str, Any]]]  # the first one is the training set
    how: dict[str, Any]
    duplicates: dict[str, Any]
    overlap: dict[str, Any]


def _select(recipe: Recipe, store: Store, inputs: list[_Input]) -> _Selection:
    data = recipe.data
    source = np.asarray(store.column("rowsource"))
    _refuse_duplicate_ids(store, source)
    keep = np.ones(len(source), dtype=bool)
    duplicates = {"rows": 0, "by": "content"}
    if data.deduplicate:
        # The first of equal rows stays; train and eval are looked at apart (what they share is overlap, not repetition).
        roles = np.asarray([0 if i.role == "train" else 1 + n for n, i in enumerate(inputs)], dtype=np.uint64)
        keys = splitmix64(np.asarray(store.column("rowdigest")) + roles[source])
        _, first = np.unique(keys, return_index=True)
        keep = np.zeros(len(source), dtype=bool)
        keep[first] = True
        duplicates["rows"] = int((~keep).sum())
    train = keep & np.isin(source, [n for n, i in enumerate(inputs) if i.role == "train"])
    evals: list[tuple[str, np.ndarray]] = []
    if data.eval:
        how: dict[str, Any] = {"by": "given eval sources"}
        for n, item in enumerate(inputs):
            if item.role == "eval":
                rows = np.flatnonzero(keep & (source == n))
                if data.split_by is None or data.split_by.time is None:
                    split.refuse_leaks(store, np.flatnonzero(train), rows, "data.eval")
                evals.append((item.name, _sample(rows, data.eval_rows, data.split_seed)))
    else:
        how = {"by": "group", "fraction": data.eval_fraction, "seed": data.split_seed, "groups": {}}
        for n, item in enumerate(inputs):
            if item.source.share is not None:
                continue  # replayed against forgetting: the run is not judged by it
            held, left_out, facts = _hold_out(store, np.flatnonzero(train & (source == n)), recipe, item)
            how["groups"][item.name] = facts
            train[held] = train[left_out] = False
            evals.append((item.name, held))
        how["rows_of_held_out_groups_in_other_sources"] = _other_sources(store, train, evals)
    train_rows = np.flatnonzero(train)
    train_rows, evals, overlap = _overlap(recipe, store, train_rows, evals)
    sets = [_as_set("train", store, train_rows)]
    sets += [_as_set(name, store, rows) for name, rows in evals]
    for name, docs, _ in sets:
        if len(docs) == 0:
            key = "data.train" if name == "train" else "data.eval"
            raise UserError(
                f"the split '{name}' is empty: no document of it carries loss",
                where=key,
                fix="give more rows, a longer data.sequence_length, or another data.eval_fraction",
            )
    return _Selection(sets, how, duplicates, overlap)


def _refuse_duplicate_ids(store: Store, source: np.ndarray) -> None:
    ids = np.asarray(store.column("rowid"))
    given = np.flatnonzero(ids)
    if len(given) == 0:
        return
    keys = splitmix64(ids[given] + source[given].astype(np.uint64))
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if len(again) == 0:
        return
    pairs = sorted((int(given[order[j]]), int(given[order[j + 1]])) for j in again)
    first, second = min(pairs, key=lambda pair: pair[1])
    name = json.loads(store.row_line(second))["id"]
    raise UserError(
        f"the id '{name}' was already given at {store.place(first)}",
        where=store.place(second),
        fix="ids must be unique within a source; leave them out where rows have none",
    )


def _sample(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most ``most`` rows, chosen by hash, in their own order."""
    if len(rows) <= most:
        return rows
    return np.sort(rows[hash_order(len(rows), seed, 0)[:most]])


def _hold_out(
    store: Store, rows: np.ndarray, recipe: Recipe, item: _Input
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Rows of some groups: as many as ``eval_fraction`` says, but no more than ``eval_rows`` need. Returns the held-out rows,
    rows that belong to a held-out group and are not needed (no part of the training either), and what was done."""
    data = recipe.data
    by_time = data.split_by is not None and data.split_by.time is not None
    groups, member = np.unique(np.asarray(store.column("rowgroup"))[rows], return_inverse=True)
    note = {}
    if len(groups) < 2 and len(rows) >= 2 and data.split_by is None and not _named(store, rows[0]):
        # All rows ask the same: then each row is a group of its own.
        groups, member, note = rows.astype(np.uint64), np.arange(len(rows)), {"by": "row (all rows are of one group)"}
        groups = splitmix64(groups)
    if len(groups) < 2:
        what = "moment" if by_time else "group"
        raise UserError(
            f"{len(rows)} row(s) of one {what} cannot be split into training and held-out rows"
            if len(rows) > 1
            else f"{len(rows)} row(s) cannot be split into training and held-out rows",
            where=str(item.path),
            fix="give at least two different rows (or groups), or held-out rows with data.eval",
        )
    sizes = np.bincount(member, minlength=len(groups))
    chosen, facts = split.choose(
        groups, sizes, fraction=data.eval_fraction, most=data.eval_rows, seed=data.split_seed, by_time=by_time
    )
    all_held = rows[chosen[member]]
    held = _sample(all_held, data.eval_rows, data.split_seed)
    left_out = np.setdiff1d(all_held, held)
    facts |= {"groups": len(groups), "held_out_groups": int(chosen.sum()), "held_out_rows": len(held), **note}
    if len(left_out):
        facts["rows_not_needed"] = len(left_out)
    return held, left_out, facts


def _named(store: Store, row: int) -> bool:
    """Whether the row's group was given by a column (or is its file), not derived from its question."""
    return "group" in json.loads(store.row_line(int(row)))


def _other_sources(store: Store, train: np.ndarray, evals: list[tuple[str, np.ndarray]]) -> int:
    """Take rows out of ``train`` whose named group is held out in another source; returns how many. Changes ``train``."""
    if len(evals) < 2:
        return 0
    groups = np.asarray(store.column("rowgroup"))
    rows = np.flatnonzero(train)
    both, first, _ = np.intersect1d(
        groups[rows], groups[np.concatenate([held for _, held in evals])], return_indices=True
    )
    named = [g for g, at in zip(both, first, strict=True) if _named(store, rows[at])]
    out = rows[np.isin(groups[rows], named)]
    train[out] = False
    return len(out)


def _overlap(
    recipe: Recipe, store: Store, train: np.ndarray, evals: list[tuple[str, np.ndarray]]
) -> tuple[np.ndarray, list[tuple[str, np.ndarray]], dict[str, Any]]:
    """Find training rows that an evaluation row repeats, and do what ``data.overlap`` says."""
    norm = np.asarray(store.column("rownorm"))
    held = np.concatenate([rows for _, rows in evals])
    same = np.isin(norm[train], norm[held])
    train_docs, held_docs = _documents(store, train), _documents(store, held)
    repeats, partner = near_duplicates(store, train_docs, held_docs)
    docrow = np.asarray(store.column("docrow"))
    near_rows = np.isin(train, docrow[train_docs[repeats]])
    touched = np.isin(norm[held], norm[train]) | np.isin(held, docrow[held_docs[partner[repeats]]])
    worded, worded_held = _alike(store, train, held)
    near_rows |= worded
    touched |= worded_held
    found = same | near_rows
    facts: dict[str, Any] = {
        "policy": recipe.data.overlap,
        "same_text": int(same.sum()),
        "nearly_same": int((near_rows & ~same).sum()),
        "held_out_rows_repeated": int(touched.sum()),
        "share": round(int(touched.sum()) / max(1, len(held)), 4),
        "share_left": 0.0 if recipe.data.overlap == "drop" else round(int(touched.sum()) / max(1, len(held)), 4),
        "rule": f"one training document holds {SHARE:.0%} of a held-out document's telling {LENGTH}-token sequences"
        + (f"; or {near.RULE}" if _small(store) else ""),
    }
    if recipe.data.overlap == "refuse" and found.any():
        first = int(train[np.flatnonzero(found)[0]])
        if norm[first] in norm[held]:
            other = int(held[np.flatnonzero(norm[held] == norm[first])[0]])
        else:
            at = np.flatnonzero(repeats & (docrow[train_docs] == first))
            other = int(docrow[held_docs[partner[at[0]]]]) if len(at) else _twin(store, first, held)
        raise UserError(
            f"{int(found.sum())} training row(s) repeat held-out rows; the first one repeats {store.place(other)}",
            where=store.place(first),
            fix="remove them, or let data.overlap=drop take them out of the training rows",
        )
    if recipe.data.overlap == "drop":
        train = train[~found]
        facts["dropped_from_train"] = int(found.sum())
    return train, evals, facts


def _small(store: Store) -> bool:
    """Whether rows are compared word by word as well (:mod:`near`); with more data the token sequences alone decide."""
    return int(np.asarray(store.column("rowlength")).sum(dtype=np.int64)) <= own_report.AT_ONCE


def _alike(store: Store, train: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(bool [train], bool [held])``: rows of nearly the same words on both sides."""
    if not _small(store):
        return np.zeros(len(train), dtype=bool), np.zeros(len(held), dtype=bool)
    _, close, _, close_held = near.across(_texts(store, train), _texts(store, held))
    return close, close_held


def _twin(store: Store, row: int, held: np.ndarray) -> int:
    """The held-out row whose words are nearest to those of ``row``."""
    sets = near.shingle([*_texts(store, np.asarray([row])), *_texts(store, held)])
    return int(held[int(np.argmax([near.similarity(sets.of(0), sets.of(i + 1)) for i in range(len(held))]))])


def _documents(store: Store, rows: np.ndarray) -> np.ndarray:
    """Documents of some rows, in the order of the store."""
    wanted = np.zeros(store.facts["rows"], dtype=bool)
    wanted[rows] = True
    return np.flatnonzero(wanted[np.asarray(store.column("docrow"))]).astype(np.int64)


def _as_set(name: str, store: Store, rows: np.ndarray) -> tuple[str, np.ndarray, dict[str, Any]]:
    docs = _documents(store, rows)
    lengths = np.asarray(store.column("lengths"))[docs]
    report: dict[str, Any] = {
        "rows": len(rows),
        "documents": len(docs),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "supervised": int(np.asarray(store.column("supervised"))[docs].sum(dtype=np.int64)),
        "text_bytes": int(np.asarray(store.column("textbytes"))[docs].sum(dtype=np.int64)),
    }
    if len(docs):
        report["length"] = {f"p{q}": int(np.percentile(lengths, q)) for q in (0, 50, 90, 99, 100)}
    return name, docs, report
