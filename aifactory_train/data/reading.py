"""The one pass over the rows: blocks of a file become arrays in the layout of the store, here or in other processes.

Main process: cut files into blocks, write what comes back, in order. Every process: parse, validate, render, mask, tokenise.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aifactory_train.config.schema import DataSource, Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.data import documents, readers, split
from aifactory_train.data.encoder import Encoder, EncoderSpec
from aifactory_train.data.inputs import Input
from aifactory_train.data.readers import Block
from aifactory_train.data.rows import RowError, Unused, canonical, detect_format, to_user_error
from aifactory_train.data.store import DROPPED, StoreWriter, pack_flags
from aifactory_train.private import redact

#: Below this many bytes of input, starting processes takes longer than the work.
_PARALLEL_FROM = 8 << 20


# ---- one block (runs in every process)


@dataclass
class Task:
    block: Block
    format: str
    columns: dict[str, str]
    source: int
    file: int
    rules: split.RowRules | None = None


class Found:
    """How often each thing was found, and in how many rows."""

    def __init__(self) -> None:
        self.rows: collections.Counter[str] = collections.Counter()
        self.times: collections.Counter[str] = collections.Counter()

    def in_row(self, things: tuple[str, ...]) -> None:
        self.rows.update(set(things))
        self.times.update(things)

    def update(self, other: Found) -> None:
        self.rows.update(other.rows)
        self.times.update(other.times)

    def as_dict(self) -> dict[str, dict[str, int]]:
        return {thing: {"rows": n, "times": self.times[thing]} for thing, n in sorted(self.rows.items())}


@dataclass
class Done:
    """What a block became: arrays in the layout of the store. ``error`` ends the preparation."""

    lines: bytes = b""
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint32))
    flags: bytes = b""
    docs: dict[str, np.ndarray] = field(default_factory=dict)
    counts: collections.Counter = field(default_factory=collections.Counter)
    unused: Unused = field(default_factory=Unused)
    lost: Found = field(default_factory=lambda: Found())
    controls: Found = field(default_factory=lambda: Found())
    empty_at: int | None = None  # line of the first row of whose answer nothing is left
    error: UserError | None = None


_encoder: Encoder | None = None


def _start_worker(spec: EncoderSpec, protected: bool) -> None:
    """``protected``: under a privacy profile this process, too, tells nothing of what it reads."""
    global _encoder
    if protected:
        redact.activate()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(spec)


def _ready() -> None:
    """Does nothing: when it is done, a process has started."""


def _work(task: Task) -> Done:
    assert _encoder is not None
    return process(task, _encoder)


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _hash(text: str) -> int:
    return _digest(text.encode("utf-8", "surrogatepass"))


#: JSON without spaces; one encoder for all rows, because ``json.dumps`` would build one for each.
_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
#: Columns of a canonical row that say something about it and are no part of what is learnt.
_BESIDE_CONTENT = frozenset({"id", "group", "language", "label"})


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """The collector of cyclic garbage pauses: rows make tens of thousands of objects that live until their block (or the report on
    them) is done and hold no cycles, and looking through them again and again took a fifth of the whole preparation (measured)."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


def process(task: Task, encoder: Encoder) -> Done:
    """Parse, validate and encode the rows of one block."""
    with no_collection():
        return _process(task, encoder)


def _process(task: Task, encoder: Encoder) -> Done:
    block, done = task.block, Done()
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    moments: list[int | None] = []
    ruled = [c for c in (task.rules.group, task.rules.time) if c is not None] if task.rules is not None else []
    try:
        raw = (
            readers.parse_lines(block)
            if block.lines is not None
            else ((block.number(i), row) for i, row in enumerate(block.rows or []))
        )
        for number, value in raw:
            numbers.append(number)
            try:
                rows.append(canonical(value, task.format, task.columns, done.unused, ruled))
                moments.append(task.rules.apply(value, rows[-1]) if task.rules is not None else None)
            except RowError as error:
                raise to_user_error(error, f"{block.file}:{number}") from None
    except UserError as error:
        done.error = error
        return done
    lines, digests, norms, groups, ids = [], [], [], [], []
    for row, moment in zip(rows, moments, strict=True):
        line = _compact(row).encode("utf-8", "surrogatepass")
        lines.append(line + b"\n")
        if "text" in row:
            whole = question = _normal(row["text"])
        else:
            normal = [(m["role"] != "assistant", _normal(m["content"])) for m in row["messages"]]
            whole = " ".join(text for _, text in normal if text)
            question = " ".join(text for asked, text in normal if asked and text)
            if any("tool_calls" in m for m in row["messages"]):
                whole += json.dumps([m.get("tool_calls") for m in row["messages"]])
        if _BESIDE_CONTENT.isdisjoint(row):
            digests.append(_digest(line))
        else:
            digests.append(_hash(_compact({k: v for k, v in row.items() if k not in _BESIDE_CONTENT})))
        norms.append(_hash(whole))
        if moment is not None:
            groups.append(moment)
        else:
            groups.append(_hash(f"group:{row['group']}") if "group" in row else _hash(question or whole))
        ids.append(_hash(row["id"]) | 1 if "id" in row else 0)
    results = encoder.encode(rows)
    documents, docrow = [], []
    dropped = np.zeros(len(rows), dtype="<u1")
    counts = done.counts
    for i, result in enumerate(results):
        if isinstance(result, RowError):
            done.error = to_user_error(result, f"{block.file}:{numbers[i]}")
            return done
        if result.flags:
            counts.update(result.flags)
        if result.lost:
            done.lost.in_row(result.lost)
        if result.controls:
            done.controls.in_row(result.controls)
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
            dropped[i] = DROPPED.index(result.dropped)
            if result.dropped == "empty" and done.empty_at is None:
                done.empty_at = numbers[i]
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
        "rowdropped": dropped,
    }
    lengths = np.fromiter((len(d.tokens) for d in documents), dtype=np.int64, count=len(documents))
    supervised = np.zeros(0)
    if documents:
        done.tokens = np.concatenate([d.tokens for d in documents]).astype(np.uint32)
        mask = np.concatenate([d.mask for d in documents])
        supervised = np.add.reduceat(mask, np.cumsum(lengths) - lengths, dtype=np.int64)  # no document is empty
        done.flags = pack_flags(mask, np.concatenate([d.text_mask for d in documents]), lengths)
    done.docs = {
        "lengths": lengths.astype("<i4"),
        "supervised": supervised.astype("<i4"),
        "textbytes": np.asarray([d.text_bytes for d in documents], dtype="<i4"),
        "docrow": np.asarray(docrow, dtype="<i8"),
    }
    return done


# ---- all blocks of a source


def read_source(
    recipe: Recipe,
    encoder: Encoder,
    item: Input,
    number: int,
    writer: StoreWriter,
    files: list[str],
    places: list[str | None],
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Read one source into the store; returns its facts for the report. ``files`` and ``places`` grow by the source's files:
    what they are called, and where below the source they lie (None where the name holds no path)."""
    source = item.source
    label = f"{item.name}:row"
    notes = documents.Notes(recipe.data.unreadable)
    if item.converter is not None:
        rows = _guarded(item.converter, item.path, source, label)
        stream = readers.from_converter(rows, label)
    else:
        stream = readers.blocks(item.path, split=source.split, hub=item.hub, notes=notes, role=item.role)
    stream = readers.limit(stream, source.max_rows)
    head = next(stream, None)
    if head is None:
        raise UserError("no rows", where=str(item.path), fix="the source is empty")
    try:
        fmt, why = _format(head, source)
    except UserError as error:
        if not item.path.is_dir():
            raise
        fix = f"{error.fix}; a file of the folder that holds no rows: move it out"
        raise UserError(error.what, where=error.where, fix=fix) from None
    rules = split.RowRules.of(recipe.data, recipe.eval.label_separator)
    counts: collections.Counter = collections.Counter()
    unused = Unused()
    rows_before, docs_before, tokens_before = writer.rows, writer.docs, writer.tokens
    numbers: dict[str, int] = {}  # of this source: another one may read the same file, and later another file
    lost, controls = Found(), Found()
    empty_at: str | None = None

    def tasks() -> Iterator[Task]:
        block: Block | None = head
        while block is not None:
            if block.file not in numbers:
                numbers[block.file] = len(files)
                files.append(block.file)
                places.append(_inside(block.file, item.path))
            yield Task(block, fmt, source.columns, number, numbers[block.file], rules)
            block = next(stream, None)

    for done in _run(tasks(), encoder, _workers(recipe, item)):
        if done.error is not None:
            raise done.error
        base = writer.rows
        writer.append_rows(done.lines, done.rows)
        done.docs["docrow"] = done.docs["docrow"] + base
        writer.append_documents(done.tokens, done.flags, done.docs)
        counts.update(done.counts)
        unused.update(done.unused)
        lost.update(done.lost)
        controls.update(done.controls)
        if done.empty_at is not None and empty_at is None:
            empty_at = f"{files[int(done.rows['rowfile'][0])]}:{done.empty_at}"
        if progress is not None:
            progress(writer.rows, writer.tokens)
    if writer.rows == rows_before:
        raise UserError("no rows: every line is blank", where=str(item.path))
    empty, rows_here = counts["dropped: empty"], writer.rows - rows_before
    if 2 * empty > rows_here:
        raise UserError(
            f"the chat template writes nothing of the answers of {empty:,} of {rows_here:,} rows ({_worst(lost)}): "
            "the model would learn to say nothing",
            where=str(empty_at),
            fix="name a template that writes them: model.chat_template=FILE.jinja",
        )
    counts.update(notes.counts())
    counts.update(unused.remarks)
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
        "unused": unused.as_dict(),
        **({"files": notes.as_dict()} if notes.any() else {}),
        "template": lost.as_dict(),
        "control_tokens": controls.as_dict(),
    }


def _inside(file: str, source: Path) -> str | None:
    """What follows the path of its source in the name of a file."""
    rest = file.removeprefix(str(source))
    return rest if rest != file and rest[:1] in ("", "/", ":") else None


def _worst(lost: Found) -> str:
    """What of the answers a template leaves out most often."""
    named = (what for what, _ in lost.rows.most_common() if what.startswith(("tool call", "answer text", "reasoning")))
    return next(named, "no text of theirs is in it")


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


def _workers(recipe: Recipe, item: Input) -> int:
    """Processes for one source: no more than asked for, and one where the rows are read before another process has started."""
    if item.converter is not None:
        return recipe.data.workers or 1
    files = [item.path] if item.path.is_file() else [p for p in item.path.rglob("*") if p.is_file()]
    if sum(f.stat().st_size for f in files) < _PARALLEL_FROM:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return recipe.data.workers or min(8, cores)


def _run(tasks: Iterator[Task], encoder: Encoder, workers: int) -> Iterator[Done]:
    """Results in the order of the tasks. ``workers`` processes work, this one among them: it begins at once, while the others still
    start. At most four blocks a process are under way, so memory stays flat."""
    if workers == 1:
        for task in tasks:
            yield process(task, encoder)
        return
    import multiprocessing

    # Fresh processes: a fork would inherit the tokenizer's and torch's threads in an unknown state.
    context = multiprocessing.get_context("spawn")
    others = workers - 1
    arguments = (encoder.spec, redact.is_active())
    pool = ProcessPoolExecutor(others, mp_context=context, initializer=_start_worker, initargs=arguments)
    started = pool.submit(_ready)
    waiting: collections.deque[Future[Done] | Done] = collections.deque()
    away: list[Future[Done]] = []
    try:
        for task in tasks:
            away = [future for future in away if not future.done()]
            if started.done() and len(away) < 2 * others:
                away.append(pool.submit(_work, task))
                waiting.append(away[-1])
            else:
                waiting.append(process(task, encoder))
            while waiting and (len(waiting) > 4 * workers or isinstance(waiting[0], Done) or waiting[0].done()):
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    except BrokenProcessPool:
        raise UserError(
            "a tokenising process died (out of memory?)", where="data.workers", fix="try data.workers=1"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result(one: Future[Done] | Done) -> Done:
    return one if isinstance(one, Done) else one.result()
