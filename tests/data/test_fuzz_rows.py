"""Rows of every form, with everything that may go wrong: each text is in what is encoded, or its loss is named, or the
row is refused by file and line. Never a traceback, never less data without a word.

Some hundred rows here; the test that is marked ``slow`` tries 20,000 and more (``AIFACTORY_FUZZ_FILES``: how many
files). Faults that are put in on purpose are found.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_families import byte_tokenizer
from hypothesis import HealthCheck, Phase, given, seed, settings
from row_grammar import CONTROLS, Piece, Rows, files, save

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.data import (
    cells,
    control_text,
    masks,
    questions,
    read_arrow,
    read_json,
    readers,
    rendering,
    rows,
    tool_calls,
    turns,
)
from aifactory_train.data.blocks import Block
from aifactory_train.data.encode_block import Done, Task, process
from aifactory_train.data.encoder import Encoder
from aifactory_train.data.tokenizer import encoder_spec


@functools.lru_cache(maxsize=256)
def encoder_of(template: str) -> tuple[Encoder, Any]:
    tokenizer = byte_tokenizer("chatml")
    tokenizer.chat_template = template
    recipe = Recipe.model_validate({"model": {"base": "x/y"}, "data": {"train": "r", "sequence_length": 4096}})
    return Encoder(encoder_spec(tokenizer, recipe)), tokenizer


def single(block: Block) -> list[Block]:
    """Each row in a block of its own, so that a report speaks of it alone."""
    if block.lines is None:
        return [Block(block.file, block.number(i), rows=[row]) for i, row in enumerate(block.rows or [])]
    lines = block.lines.split(b"\n")
    return [Block(block.file, block.first + i, lines=line + b"\n") for i, line in enumerate(lines) if line.strip()]


def squeezed(text: str) -> str:
    return "".join(text.split())


def stands(piece: Piece, text: str) -> bool:
    forms = (piece.text, json.dumps(piece.text)[1:-1], json.dumps(piece.text, ensure_ascii=False)[1:-1])
    return any(squeezed(form) in text for form in forms)


def owned_up(piece: Piece, done: Done) -> bool:
    """Whether the report says that such a piece is not there."""
    unused = done.unused
    return bool(
        any(name in unused.columns for name in piece.columns)
        or any(key in unused.turn_keys for key in piece.keys)
        or any(what.startswith(name) for name in piece.lost for what in done.lost.rows)
        or "" in piece.lost
    )


def judge(found: Rows, folder: Path, seen: Counter) -> None:
    """Read a file as ``prepare`` does and ask after every piece. Raises AssertionError."""
    path = save(found, folder)
    encoder, tokenizer = encoder_of(found.template)
    try:
        blocks = [one for block in readers.blocks(path) for one in single(block)]
    except UserError as error:
        assert error.where and str(path) in error.where
        seen["file refused"] += 1
        return
    assert len(blocks) == len(found.rows), "rows are missing"
    names = [found.columns.get(name, name) for name in found.rows[0].cells]
    try:
        form = found.form or rows.detect_format(names)[0]
    except cells.RowError as error:
        assert error.what and error.fix
        seen["file refused"] += 1
        return
    for row, block in zip(found.rows, blocks, strict=True):
        done = process(Task(block, form, found.columns, 0, 0), encoder)
        seen["rows"] += 1
        if done.error is not None:
            assert done.error.where == f"{block.file}:{block.number(0)}" and done.error.what
            seen["refused"] += 1
            continue
        if done.counts["dropped: empty"]:
            assert done.lost.rows, "dropped without a reason"
            seen["dropped by name"] += 1
            continue
        assert len(done.lines.splitlines()) == 1 and len(done.docs["lengths"]) == (2 if form == "preference" else 1)
        ask(row.pieces, done, form, tokenizer, seen)
        if form != "text" and done.controls.rows:
            no_marks(row.cells, form, found, encoder, done, seen)


def ask(pieces: list[Piece], done: Done, form: str, tokenizer: Any, seen: Counter) -> None:
    lengths = done.docs["lengths"]
    mask, at = [], 0
    for n in lengths:
        size = (int(n) + 7) // 8
        bits = np.frombuffer(done.flags[at : at + size], dtype=np.uint8)
        mask.append(np.unpackbits(bits)[: int(n)].astype(bool))
        at += 2 * size
    whole = squeezed(tokenizer.decode(done.tokens))
    learnt = squeezed("\n".join(tokenizer.decode(t) for t in _runs(done.tokens, np.concatenate(mask))))
    for piece in pieces:
        if not stands(piece, whole):
            assert owned_up(piece, done), f"lost in silence: {piece} of {whole}"
            seen["named"] += 1
            continue
        seen["found"] += 1
        if piece.learnt is not None and form != "text":
            word = piece.text[piece.text.index("w") : piece.text.index("q") + 1]
            assert (word in learnt) == piece.learnt, f"learnt or not: {piece} of {learnt}"


def _runs(tokens: Any, mask: Any) -> list[Any]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [tokens[a:b] for a, b in edges.reshape(-1, 2)]


def no_marks(row: dict[str, Any], form: str, found: Rows, encoder: Encoder, done: Done, seen: Counter) -> None:
    """A special token that somebody wrote is no mark: with other letters in its place there are as many."""
    text = json.dumps(row)
    for token in CONTROLS:
        text = text.replace(token, "Z" * len(token))
    other = process(Task(Block("other", 1, rows=[json.loads(text)]), form, found.columns, 0, 0), encoder)
    if other.error is None:
        special = encoder.spec.special_ids
        counts = [sum(int(i) in special for i in one.tokens) for one in (done, other)]
        assert counts[0] == counts[1], "a special token in a text is a mark"
        seen["with special tokens"] += 1


def hunt(folder: Path, examples: int, number: int = 0, most: int = 4) -> Counter:
    seen: Counter = Counter()

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(files(most))
    def look(found: Rows) -> None:
        judge(found, folder, seen)

    look()
    return seen


def test_no_text_is_lost_in_silence(tmp_path):
    seen = hunt(tmp_path, 120)
    assert seen["rows"] > 200 and seen["found"] > 500
    assert all(seen[what] for what in ("refused", "named", "with special tokens")), seen
    assert seen["refused"] < seen["rows"] / 2


@pytest.mark.slow
def test_no_text_is_lost_in_silence_in_many_rows(tmp_path):
    seen = hunt(tmp_path, int(os.environ.get("AIFACTORY_FUZZ_FILES", "2600")), number=1, most=30)
    print(dict(seen))
    assert seen["rows"] > 20_000 or "AIFACTORY_FUZZ_FILES" in os.environ


# ---- faults that are put in on purpose

Patch = Callable[[pytest.MonkeyPatch], None]
FAULTS: dict[str, Patch] = {}


def fault(plant: Patch) -> Patch:
    FAULTS[plant.__name__.replace("_", " ")] = plant
    return plant


@fault
def system_beside_a_conversation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rows, "with_system", lambda row, messages: (questions._system(row), messages)[1])


@fault
def system_beside_a_question(patch: pytest.MonkeyPatch) -> None:
    plain = questions.asked
    patch.setattr(rows, "asked", lambda row, key: [m for m in plain(row, key) if m["role"] != "system"])


@fault
def tools(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rows, "tool_schemas", lambda row: (tool_calls.tool_schemas(row), None)[1])


@fault
def a_tool_of_several_names(patch: pytest.MonkeyPatch) -> None:
    def only_new(row: Any) -> Any:
        row.used.add("functions")
        return tool_calls.tool_schemas(row) if row.cells.get("tools") else None

    patch.setattr(rows, "tool_schemas", only_new)


@fault
def reasoning(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(turns, "_reasoning", lambda value, out, unused: None)


@fault
def unknown_keys_of_turns(patch: pytest.MonkeyPatch) -> None:
    plain = turns._message
    known = turns._TURN_KEYS | {"text"}
    patch.setattr(
        turns,
        "_message",
        lambda raw, where, unused: plain(
            {k: v for k, v in raw.items() if k in known} if isinstance(raw, dict) else raw, where, unused
        ),
    )


@fault
def other_columns(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cells.RawRow, "count", lambda self, fmt, ruled: None)


@fault
def calls(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(turns, "calls_of_turn", lambda raw, where, unused: None)


@fault
def arguments_of_calls(patch: pytest.MonkeyPatch) -> None:
    plain = turns.tool_call

    def without(*args: Any) -> Any:
        call = plain(*args)
        return {**call, "function": {**call["function"], "arguments": {}}}

    patch.setattr(turns, "tool_call", without)


@fault
def history(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(questions, "_history", lambda row: row.used.add("history") or [])


@fault
def the_input_of_an_instruction(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(questions, "_question", lambda row, key, prompt: (row.get("input"), prompt)[1])


@fault
def what_templates_leave_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rendering, "lost", lambda *args: ())


@fault
def turns_that_are_not_to_be_learnt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(turns, "_weight", lambda *args: None)


@fault
def special_tokens(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(control_text.Disguise, "row", lambda self, row: row)


@fault
def lines_of_files(patch: pytest.MonkeyPatch) -> None:
    def two(path: Path) -> Any:
        for block in read_json.json_lines(path):
            yield Block(block.file, block.first, lines=b"".join((block.lines or b"").splitlines(True)[:2]))

    patch.setattr(readers, "json_lines", two)


@fault
def columns_of_parquet(patch: pytest.MonkeyPatch) -> None:
    plain = read_arrow._without_nulls
    patch.setattr(read_arrow, "_without_nulls", lambda row: dict(list(plain(row).items())[:2]))


@fault
def the_other_side_of_a_pair(patch: pytest.MonkeyPatch) -> None:
    plain = rows._pair
    patch.setattr(rows, "_pair", lambda row: (plain(row)[0], plain(row)[0]))


@fault
def the_last_words_of_an_answer(patch: pytest.MonkeyPatch) -> None:
    plain = masks.Masks.chat

    def short(self: Any, *args: Any) -> Any:
        found = plain(self, *args)
        for document in found.documents:
            document.mask[: len(document.mask) // 2] = False
        return found

    patch.setattr(masks.Masks, "chat", short)
    patch.setattr(masks.Masks, "at_once", lambda self, rendered, block: [None] * len(rendered))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name, tmp_path, monkeypatch):
    encoder_of.cache_clear()
    FAULTS[name](monkeypatch)
    with pytest.raises(AssertionError, match=r"lost in silence|learnt or not|is a mark|are missing"):
        hunt(tmp_path, 400)
    encoder_of.cache_clear()
