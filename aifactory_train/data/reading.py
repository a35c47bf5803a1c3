"""The one pass over the rows: blocks of a file become arrays in the layout of the store, here or in other processes.

Main process: cut files into blocks, write what comes back, in order. Every process: parse, validate, render, mask,
tokenise.
"""

from __future__ import annotations

import collections
import inspect
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from aifactory_train.config.data_blocks import DataSource
from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.data import documents, readers, split
from aifactory_train.data.blocks import Block, in_blocks
from aifactory_train.data.cells import RowError, Unused, to_user_error
from aifactory_train.data.encode_block import Done, RowTally, Task, process
from aifactory_train.data.encoder import Encoder
from aifactory_train.data.encoder_spec import EncoderSpec
from aifactory_train.data.inputs import Input
from aifactory_train.data.read_json import parse_lines
from aifactory_train.data.rows import detect_format
from aifactory_train.data.store import StoreWriter
from aifactory_train.private import redact

#: Below this many bytes of input, starting processes takes longer than the work.
_PARALLEL_FROM = 8 << 20


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


# ---- all blocks of a source

#: Forms of rows that are no chat: they are taken as they stand.
_TEXTS = ("text", "label", "labels", "retrieval")


class _Source:
    """One source on its way into the store: its facts gather here, block by block."""

    def __init__(
        self,
        item: Input,
        number: int,
        writer: StoreWriter,
        files: list[str],
        places: list[str | None],
        *,
        as_text: bool,
    ):
        self.item, self.number, self.writer, self.files, self.places = item, number, writer, files, places
        self.before = writer.rows, writer.docs, writer.tokens
        self.counts: collections.Counter = collections.Counter()
        self.unused = Unused()
        self.lost, self.controls = RowTally(), RowTally()
        self.empty_at: str | None = None
        self.as_text = as_text

    def tasks(self, stream: Iterator[Block], fmt: str, rules: split.RowRules | None) -> Iterator[Task]:
        """What is to be done with each block; ``files`` and ``places`` grow by the files met."""
        numbers: dict[str, int] = {}  # of this source: another one may read the same file, and later another file
        for block in stream:
            if block.file not in numbers:
                numbers[block.file] = len(self.files)
                self.files.append(block.file)
                self.places.append(_inside(block.file, self.item.path))
            yield Task(block, fmt, self.item.source.columns, self.number, numbers[block.file], rules)

    def add(self, done: Done) -> None:
        """Write what a block became, behind what is there."""
        if done.error is not None:
            raise done.error
        base = self.writer.rows
        self.writer.append_rows(done.lines, done.rows)
        done.docs["docrow"] = done.docs["docrow"] + base
        self.writer.append_documents(done.tokens, done.flags, done.docs)
        self.counts.update(done.counts)
        self.unused.update(done.unused)
        self.lost.update(done.lost)
        self.controls.update(done.controls)
        if done.empty_at is not None and self.empty_at is None:
            self.empty_at = f"{self.files[int(done.rows['rowfile'][0])]}:{done.empty_at}"

    def check(self) -> None:
        """Refuse a source without rows, and one of whose answers the template writes nothing."""
        rows_here = self.writer.rows - self.before[0]
        if not rows_here:
            raise UserError("no rows: every line is blank", where=str(self.item.path))
        empty = self.counts["dropped: empty"]
        if 2 * empty > rows_here:
            raise UserError(
                f"the chat template writes nothing of the answers of {empty:,} of {rows_here:,} rows "
                f"({_worst(self.lost)}): "
                "the model would learn to say nothing",
                where=str(self.empty_at),
                fix="name a template that writes them: model.chat_template=FILE.jinja",
            )

    def facts(self, fmt: str, why: str, notes: documents.Notes) -> dict[str, Any]:
        """The source in the report."""
        item, source, writer = self.item, self.item.source, self.writer
        rows, docs, tokens = self.before
        remarks = self.unused.remarks
        remarks.update(notes.beside)
        for column in source.columns:
            if column not in self.unused.renamed:
                remarks[f"the column '{column}', which the recipe names, is in no row"] = writer.rows - rows
        if source.split is not None and not item.hub and (item.converter is not None or item.path.is_file()):
            remarks[f"split '{source.split}' chooses nothing: the source is no folder"] = writer.rows - rows
        if source.revision is not None and not item.hub:
            remarks["a revision chooses nothing: the source is no data set of the hub"] = writer.rows - rows
        if source.options and item.converter is None:
            remarks["options are for a converter, and the source names none"] = writer.rows - rows
        self.counts.update(notes.counts())
        self.counts.update(remarks)
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
            "rows": writer.rows - rows,
            "documents": writer.docs - docs,
            "tokens": writer.tokens - tokens,
            "counts": dict(sorted(self.counts.items())),
            "unused": self.unused.as_dict(),
            "remarks": dict(sorted(remarks.items())),
            **({"files": notes.as_dict()} if notes.any() else {}),
            "template": self.lost.as_dict(),
            "control_tokens": self.controls.as_dict(),
            # What is not a chat is taken as it stands.
            "control_tokens_read_as": "text" if self.as_text and fmt not in _TEXTS else "tokens",
        }


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
    """Read one source into the store; returns its facts for the report. ``files`` and ``places`` grow by the source's
    files: what they are called, and where below the source they lie (None where the name holds no path)."""
    source = item.source
    label = f"{item.name}:row"
    notes = documents.Notes(recipe.data.unreadable)
    if item.converter is not None:
        rows = _guarded(item.converter, item.path, source, label)
        stream = in_blocks(rows, label)
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
    as_text = encoder.spec.control_tokens == "as_text"
    gathered = _Source(item, number, writer, files, places, as_text=as_text)
    tasks = gathered.tasks(itertools.chain([head], stream), fmt, rules)
    for done in _run(tasks, encoder, _workers(recipe, item)):
        gathered.add(done)
        if progress is not None:
            progress(writer.rows, writer.tokens)
    gathered.check()
    return gathered.facts(fmt, why, notes)


def _inside(file: str, source: Path) -> str | None:
    """What follows the path of its source in the name of a file."""
    rest = file.removeprefix(str(source))
    return rest if rest != file and rest[:1] in ("", "/", ":") else None


def _worst(lost: RowTally) -> str:
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
    first = next(parse_lines(head), None) if head.lines is not None else (head.number(0), (head.rows or [None])[0])
    if first is None:
        raise UserError("no rows: every line is blank", where=head.file)
    number, row = first
    if not isinstance(row, dict):
        raise UserError("a row is an object of named columns", where=f"{head.file}:{number}")
    try:
        # A column that is null here is there for other rows, of another file perhaps.
        names = [c for c in row if row[c] is not None] or list(row)
        return detect_format([source.columns.get(str(c), str(c)) for c in names])
    except RowError as error:
        raise to_user_error(error, f"{head.file}:{number}") from None


def _workers(recipe: Recipe, item: Input) -> int:
    """Processes for one source: no more than asked for, and one where the rows are read before another process has
    started.
    """
    if item.converter is not None:
        return recipe.data.workers or 1
    files = [item.path] if item.path.is_file() else [p for p in item.path.rglob("*") if p.is_file()]
    if sum(f.stat().st_size for f in files) < _PARALLEL_FROM:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return recipe.data.workers or min(8, cores)


def _run(tasks: Iterator[Task], encoder: Encoder, workers: int) -> Iterator[Done]:
    """Results in the order of the tasks. ``workers`` processes work, this one among them: it begins at once, while the
    others still start. At most four blocks a process are under way, so memory stays flat."""
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
