"""What a row says twice, in another tool's words, or as text of something else: used, or refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aifactory_train.core.errors import UserError
from aifactory_train.data import readers
from aifactory_train.data.cells import RowError, Unused
from aifactory_train.data.documents import Notes
from aifactory_train.data.read_csv import EMPTY_COLUMNS, EMPTY_ROWS
from aifactory_train.data.read_json import parse_lines
from aifactory_train.data.rows import canonical
from aifactory_train.data.turns import AS_PARTS

Q, A, B = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("assistant", "b")))


def read(row: dict[str, Any], form: str = "messages") -> tuple[dict[str, Any], Unused]:
    unused = Unused()
    return canonical(row, form, {}, unused), unused


def rows_in(path: Path, notes: Notes | None = None) -> list[Any]:
    found: list[Any] = []
    for block in readers.blocks(path, notes=notes):
        found += [row for _, row in parse_lines(block)] if block.lines is not None else block.rows or []
    return found


# ---- one key twice

DOUBLED = [
    '{"prompt": "p", "completion": "a", "prompt": "other"}',
    '{"messages": [{"role": "user", "content": "q", "content": "other"}, {"role": "assistant", "content": "a"}]}',
    '{"prompt": "p", "completion": "a", "meta": {"deep": [{"x": 1, "x": 2}]}}',
]


@pytest.mark.parametrize("line", DOUBLED)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_key_with_two_values_is_refused_with_its_line(tmp_path, line, suffix):
    path = tmp_path / f"rows{suffix}"
    good = '{"prompt": "p", "completion": "a", "n": 1' + "0" * 5000 + "}"
    path.write_text(f"{good}\n{line}\n" if suffix == ".jsonl" else f"[{good},\n{line},\n{good}]")
    with pytest.raises(UserError, match=r"key '(prompt|content|x)' stands more than once") as refused:
        rows_in(path)
    assert refused.value.where == f"{path}:2" and refused.value.fix


def test_a_key_that_says_the_same_twice_is_no_fault(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "completion": "a", "prompt": "p"}\n')
    assert rows_in(path) == [{"prompt": "p", "completion": "a"}]


@pytest.mark.parametrize("deep", [False, True])
def test_json_inside_a_row_is_held_to_the_same(deep):
    text = "[" * 100_000 if deep else '{"x": 1, "x": 2}'
    for row in (
        {"messages": [Q, {**A, "tool_calls": [{"name": "f", "arguments": text}]}]},
        {"messages": [Q, {**A, "function_call": text}]},
        {"messages": [Q, A], "tools": text},
        {"messages": f"[{text}]"},
    ):
        with pytest.raises(RowError, match="too deeply" if deep else "more than once"):
            read(row)


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path, kind):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([["p"], ["a"], ["other"]], names=["prompt", "completion", "prompt"])
    path = tmp_path / ("rows.parquet" if kind == "parquet" else "rows.arrow")
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        make = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
        with make(path, table.schema) as out:
            out.write_table(table)
    with pytest.raises(UserError, match="two columns bear the name 'prompt'"):
        rows_in(path)


# ---- pairs and ratings of others


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [Q, A], "rejected_response": "b"},
        {"messages": json.dumps([Q, A]), "rejected_response": "b"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "rejected_response": [B]},
        {"query": "q", "response": "a", "rejected_response": "b"},
        {"messages": [Q, A], "rejected_messages": [Q, B]},
    ],
)
def test_pairs_of_ms_swift(row):
    out, unused = read({**row, "channel": "c"}, "preference")
    assert (out["messages"], out["rejected"]) == ([Q, A], [Q, B]) and unused.columns == {"channel": 1}


def test_of_a_conversation_only_the_last_answer_is_judged():
    out, _ = read({"messages": [Q, B, Q, A], "rejected_response": "b"}, "preference")
    assert out["messages"] == [Q, {**B, "weight": 0}, Q, A] and out["rejected"] == [Q, {**B, "weight": 0}, Q, B]


@pytest.mark.parametrize(
    "row", [{"messages": [Q, A, Q], "rejected_response": "b"}, {"messages": [Q, A], "rejected_response": ""}]
)
def test_pairs_whose_other_answer_is_missing_are_refused_by_name(row):
    with pytest.raises(RowError, match=r"rejected_response|'chosen'"):
        read(row, "preference")


@pytest.mark.parametrize(("tag", "good"), [(True, True), ("false", False), (0.0, False)])
def test_kto_tag_is_the_label(tag, good):
    for row in ({"messages": [Q, A]}, {"instruction": "q", "output": "a"}):
        out, unused = read({**row, "kto_tag": tag, "label": None}, "feedback")
        assert out["desirable"] is good and not unused.columns
    out, unused = read({"messages": [Q, A], "kto_tag": tag, "label": True}, "feedback")
    assert out["desirable"] is True and unused.columns == {"kto_tag": 1}


# ---- content in parts, as JSON text


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("kind", ["text", "input_text"])
def test_parts_as_json_text_are_their_text(as_list, kind):
    part = {"type": kind, "text": "said"}
    text = json.dumps([part] if as_list else part)
    for row, form in (
        ({"messages": [{**Q, "content": text}, {**A, "content": text}]}, "messages"),
        ({"prompt": text, "completion": f"\n {text}"}, "prompt"),
    ):
        out, unused = read(row, form)
        assert [m["content"] for m in out["messages"]] == ["said"] * 2 and unused.remarks == {AS_PARTS: 2}


def test_parts_that_hold_a_picture_are_refused_and_other_json_stays():
    picture = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": "u"}}]
    with pytest.raises(RowError, match="image_url"):
        read({"messages": [{**Q, "content": json.dumps(picture)}, A]})
    for answer in ([{"type": "button", "text": "Go"}], [{"type": "image", "src": "u"}], {"type": "text"}, ["text"]):
        out, unused = read({"messages": [Q, {**A, "content": json.dumps(answer)}]})
        assert out["messages"][1]["content"] == json.dumps(answer) and not unused.remarks
    printed = str([{"type": "text", "text": "said"}])
    out, unused = read({"messages": [Q, {**A, "content": printed}]})
    assert out["messages"][1]["content"] == printed and sum(unused.remarks.values()) == 1


def test_what_a_part_holds_beside_its_text_is_named():
    part = {"type": "text", "text": "q", "cache_control": {"type": "ephemeral"}, "annotations": []}
    _, unused = read({"messages": [{**Q, "content": [part]}, A]})
    assert unused.turn_keys == {"cache_control (of a content part)": 1}


# ---- empty cells around a table


@pytest.mark.parametrize(
    ("text", "empty_rows", "empty_columns"),
    [
        ("prompt,completion\nq,a\n,\n , \n,,,\n", 3, 0),
        ("prompt,completion,,\nq,a,,\n,,,\n", 1, 2),
        ("prompt,,completion\nq,,a\n,,\n", 1, 1),
        ("prompt,completion\nq,a,,\n\n", 0, 0),
        ("prompt;completion;\r\nq;a;\r\n;;\r\n", 1, 1),
    ],
)
def test_empty_rows_and_columns_of_spreadsheets(tmp_path, text, empty_rows, empty_columns):
    path = tmp_path / "rows.csv"
    path.write_text(text, newline="")
    notes = Notes()
    assert rows_in(path, notes) == [{"prompt": "q", "completion": "a"}]
    assert (notes.beside[EMPTY_ROWS], notes.beside[EMPTY_COLUMNS]) == (empty_rows, empty_columns)


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("prompt,completion,\nq,a,\nq,a,b\n", "column 3 has no name in the first line, and holds 'b'", 3),
        ("prompt,completion\nq,a,b\n", "3 cells, but the header names 2", 2),
        ("prompt,completion\nq\n", "1 cells, but the header names 2", 2),
        (",,\nprompt,completion,\n", "must name every column", 1),
    ],
)
def test_cells_that_hold_something_are_never_dropped(tmp_path, text, what, line):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=what) as refused:
        rows_in(path)
    assert refused.value.where == f"{path}:{line}"


# ---- turns that nothing is learnt of


def test_turns_behind_the_last_answer_are_counted():
    _, unused = read({"messages": [Q, A, Q]})
    assert sum(unused.remarks.values()) == 1
    assert not read({"messages": [Q, A]})[1].remarks


def test_pairs_behind_different_system_turns_are_counted():
    system = {"role": "system", "content": "s"}
    for chosen, count in (([system, Q, A], 1), ([Q, A], 0)):
        _, unused = read({"chosen": chosen, "rejected": [Q, B]}, "preference")
        assert sum(unused.remarks.values()) == count
