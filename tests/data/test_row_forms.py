"""What a row may hold beside the plain forms: it is used where its meaning is certain, refused where the text would be wrong without
it, or named with its count. Nothing is left out in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_families import byte_tokenizer

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.data import prepare
from aifactory_train.data.cells import RowError, Unused, parse_json
from aifactory_train.data.rows import canonical, desirable

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "depth", "arguments": {"at": "x"}}}
SCHEMA = {"name": "depth", "parameters": {}}


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def reported(*turns: Any) -> list[dict[str, Any]]:
    """Turns as expected: ``"s:..."`` system, ``"u:..."`` user, ``"a:..."`` assistant, ``"-:..."`` assistant without loss."""
    roles = {"s": "system", "u": "user", "a": "assistant", "-": "assistant", "t": "tool"}
    out = []
    for one in turns:
        if isinstance(one, str):
            kind, _, text = one.partition(":")
            one = turn(roles[kind], text, **({"weight": 0} if kind == "-" else {}))
        out.append(one)
    return out


def read(row: dict[str, Any], form: str, columns: dict[str, str] | None = None) -> tuple[dict[str, Any], Unused]:
    unused = Unused()
    return canonical(row, form, columns or {}, unused), unused


S = {"messages": [Q, A]}
P = {"prompt": "q", "completion": "a"}
I = {"instruction": "q", "output": "a"}  # noqa: E741

# (form, row, turns, columns that are named, keys of turns that are named)
USED: list[tuple[str, dict[str, Any], list[dict[str, Any]], dict[str, int], dict[str, int]]] = [
    # system
    ("messages", {**S, "system": "s"}, reported("s:s", "u:q", "a:a"), {}, {}),
    ("messages", {**S, "system_prompt": "s"}, reported("s:s", "u:q", "a:a"), {}, {}),
    ("messages", {**S, "system": ""}, reported("u:q", "a:a"), {}, {}),
    ("messages", {**S, "system": None}, reported("u:q", "a:a"), {}, {}),
    ("messages", {**S, "system": {"name": "x"}}, reported("u:q", "a:a"), {"system": 1}, {}),
    ("messages", {"messages": reported("s:s", "u:q", "a:a"), "system": " s "}, reported("s:s", "u:q", "a:a"), {}, {}),
    ("messages", {"messages": reported("s:own", "u:q", "a:a"), "system": "s"}, reported("s:own", "u:q", "a:a"), {"system": 1}, {}),
    ("messages", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}, reported("s:s", "u:q", "a:a"), {}, {}),
    ("prompt", {**P, "system_prompt": "s"}, reported("s:s", "u:q", "a:a"), {}, {}),
    ("prompt", {"prompt": reported("s:s", "u:q"), "completion": "a", "system": "s"}, reported("s:s", "u:q", "a:a"), {}, {}),
    ("text", {"text": "t", "system": "s", "title": "x"}, [], {"system": 1, "title": 1}, {}),
    # context
    ("prompt", {"instruction": "q", "response": "a", "context": "c", "category": "k"}, reported("u:q\n\nc", "a:a"), {"category": 1}, {}),
    ("prompt", {"question": "q", "answer": "a", "context": "c"}, reported("u:q\n\nc", "a:a"), {}, {}),
    ("prompt", {"instruction": "q: c?", "response": "a", "context": "c"}, reported("u:q: c?", "a:a"), {}, {}),
    ("prompt", {**I, "context": ""}, reported("u:q", "a:a"), {}, {}),
    ("prompt", {**I, "input": "i"}, reported("u:q\n\ni", "a:a"), {}, {}),
    ("prompt", {**I, "input": "i", "context": "c"}, reported("u:q\n\ni", "a:a"), {"context": 1}, {}),
    ("prompt", {**I, "context": {"a": 1}}, reported("u:q", "a:a"), {"context": 1}, {}),
    ("prompt", {**P, "context": "c", "input": "i"}, reported("u:q", "a:a"), {"context": 1, "input": 1}, {}),
    # history
    ("prompt", {**I, "history": [["x", "y"]]}, reported("u:x", "-:y", "u:q", "a:a"), {}, {}),
    ("prompt", {**I, "history": '[["x", "y"]]', "system": "s"}, reported("s:s", "u:x", "-:y", "u:q", "a:a"), {}, {}),
    ("prompt", {**I, "history": reported("u:x", "a:y")}, reported("u:x", "-:y", "u:q", "a:a"), {}, {}),
    ("prompt", {**I, "history": []}, reported("u:q", "a:a"), {}, {}),
    ("prompt", {**I, "history": "created in May"}, reported("u:q", "a:a"), {"history": 1}, {}),
    ("prompt", {**I, "history": [["x", "y", "z"]]}, reported("u:q", "a:a"), {"history": 1}, {}),
    # other columns
    ("messages", {**S, "id": 1, "source": "web", "url": "u", "score": 0.5, "gap": None, "nan": float("nan")}, reported("u:q", "a:a"), {"source": 1, "url": 1, "score": 1}, {}),
    ("messages", {**S, "prompt": "q", "label": True}, reported("u:q", "a:a"), {"prompt": 1, "label": 1}, {}),
    ("messages", {**S, "images": [], "image": None, "video": 3}, reported("u:q", "a:a"), {"video": 1}, {}),
    ("text", {"text": "t", "image": "x.png"}, [], {"image": 1}, {}),
    # what is learnt of a turn
    *(
        ("messages", {"messages": [Q, {**A, key: no}, Q, {**A, key: yes}]}, reported("u:q", "-:a", "u:q", "a:a"), {}, {})
        for key, no, yes in (("loss", False, True), ("train", False, True), ("train", 0, 1), ("loss", "false", None), ("loss", 0.0, 1.0))
    ),
    ("messages", {"messages": [{**Q, "weight": 0}, {**A, "weight": 1.0}]}, [{**Q, "weight": 0}, {**A, "weight": 1}], {}, {}),
    ("messages", {"messages": [{**Q, "loss": False}, A]}, reported("u:q", "a:a"), {}, {}),
    ("messages", {"messages": [{**Q, "loss": True}, A]}, reported("u:q", "a:a"), {}, {"loss (of a turn that is not the assistant's)": 1}),
    # calls
    ("messages", {"messages": [Q, turn("assistant", "a", function_call={"name": "depth", "arguments": '{"at": "x"}'})]}, [Q, {**A, "tool_calls": [CALL]}], {}, {}),
    ("messages", {"messages": [Q, {"role": "assistant", "content": None, "function_call": '{"name": "depth", "arguments": {"at": "x"}}'}]}, [Q, turn("assistant", "", tool_calls=[CALL])], {}, {}),
    ("messages", {"messages": [{**Q, "function_call": None}, {**A, "function_call": {"name": None, "arguments": None}}]}, reported("u:q", "a:a"), {}, {}),
    ("messages", {"messages": [Q, {**A, "tool_calls": [CALL], "function_call": CALL["function"]}]}, [Q, {**A, "tool_calls": [CALL]}], {}, {}),
    ("messages", {"messages": [Q, {**A, "tool_calls": [CALL], "function_call": {"name": "other"}}]}, [Q, {**A, "tool_calls": [CALL]}], {}, {"function_call": 1}),
    ("messages", {"messages": [Q, {**A, "tool_calls": json.dumps([CALL])}]}, [Q, {**A, "tool_calls": [CALL]}], {}, {}),
    ("messages", {"messages": [Q, {**A, "tool_calls": [CALL]}, {"role": "function", "name": "depth", "content": "5"}, A]}, [Q, {**A, "tool_calls": [CALL]}, turn("tool", "5", name="depth"), A], {}, {}),
    (
        "messages",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "depth", "arguments": {"at": "x"}}'}, {"from": "observation", "value": "5"}, {"from": "gpt", "value": "a"}]},
        [Q, turn("assistant", "", tool_calls=[CALL]), turn("tool", "5"), A],
        {},
        {},
    ),
    ("messages", {"messages": [turn("human", "q"), turn("gpt", "a")]}, reported("u:q", "a:a"), {}, {}),
    ("messages", {"messages": [{"from": "user", "content": "q"}, {"role": "assistant", "value": "a"}]}, reported("u:q", "a:a"), {}, {}),
    ("messages", {"messages": [{"role": "user", "text": "q"}, A]}, reported("u:q", "a:a"), {}, {}),
    # reasoning and other keys
    ("messages", {"messages": [Q, {**A, "reasoning": "r"}]}, [Q, {**A, "reasoning_content": "r"}], {}, {}),
    ("messages", {"messages": [Q, {**A, "reasoning": "r", "reasoning_content": "r"}]}, [Q, {**A, "reasoning_content": "r"}], {}, {}),
    ("messages", {"messages": [Q, {**A, "reasoning": "r", "reasoning_content": "o"}]}, [Q, {**A, "reasoning_content": "o"}], {}, {"reasoning": 1}),
    ("messages", {"messages": [Q, {**A, "reasoning": [{"type": "x"}]}]}, reported("u:q", "a:a"), {}, {"reasoning": 1}),
    ("messages", {"messages": [{**Q, "timestamp": 5}, {**A, "refusal": None, "annotations": [], "score": 1}]}, reported("u:q", "a:a"), {}, {"timestamp": 1, "score": 1}),
    # a list of turns as the answer that repeats the question
    ("prompt", {"prompt": [Q], "completion": [Q, A]}, reported("u:q", "a:a"), {}, {}),
    ("prompt", {"prompt": reported("u:x", "a:y", "u:q"), "completion": reported("u:x", "a:y", "u:q", "a:a")}, reported("u:x", "-:y", "u:q", "a:a"), {}, {}),
    ("prompt", {"prompt": reported("u:x", "a:y", "u:q"), "completion": [Q, A]}, reported("u:x", "-:y", "u:q", "a:a"), {}, {}),
    ("prompt", {"prompt": "q", "completion": reported("u:x", "a:y", "u:q", "a:a")}, reported("u:x", "-:y", "u:q", "a:a"), {}, {}),
    ("prompt", {"prompt": "q", "completion": reported("a:y", "u:more", "a:a")}, reported("u:q", "a:y", "u:more", "a:a"), {}, {}),
    ("prompt", {"prompt": "q", "completion": reported("u:x", "a:y", "u:q")}, reported("u:q", "u:x", "a:y", "u:q"), {}, {}),
    # rated answers
    ("feedback", {"messages": reported("u:x", "a:y", "u:q", "a:a"), "label": 1.0}, reported("u:x", "-:y", "u:q", "a:a"), {}, {}),
    ("feedback", {**P, "label": False, "source": "web"}, reported("u:q", "a:a"), {"source": 1}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("form", "row", "turns", "columns", "keys"), USED)
def test_what_stands_beside_is_used_or_named(form, row, turns, columns, keys):
    before = json.dumps(row)
    out, unused = read(row, form)
    if form == "text":
        assert out == {"text": "t"}
    else:
        assert out["messages"] == turns
    assert dict(unused.columns) == columns and dict(unused.turn_keys) == keys
    assert json.dumps(row) == before  # a caller's row is not changed


REFUSED = [
    ("messages", {**S, "images": ["a.png"]}, "the column 'images' holds a list"),
    ("messages", {**S, "image": "a.png"}, "the column 'image' holds text"),
    ("prompt", {**P, "audio": {"path": "a.wav"}}, "the column 'audio' holds an object"),
    ("prompt", {**P, "video": "https://x/y"}, "the column 'video'"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "images": ["a.png"]}, "the column 'images'"),
    ("messages", {"messages": [{**Q, "images": ["a.png"]}, A]}, "messages[0]: 'images' is not text"),
    ("messages", {"messages": [Q, {**A, "loss": "maybe"}]}, "messages[1]: 'loss' is 'maybe'"),
    ("messages", {"messages": [Q, {**A, "train": [1, 0]}]}, "messages[1]: 'train' is [1, 0]"),
    ("messages", {"messages": [Q, {**A, "weight": 0.5}]}, "messages[1]: 'weight' is 0.5"),
    ("messages", {"messages": [Q, {**A, "weight": 1, "loss": False}]}, "'weight' is true and 'loss' is false"),
    ("messages", {"messages": [Q, {**A, "loss": False}]}, "every assistant turn has weight 0"),
    ("messages", {"messages": [Q, {**A, "function_call": "depth(x)"}]}, "'function_call' is text that is not valid JSON"),
    ("messages", {"messages": [Q, {**A, "function_call": {"arguments": "{}"}}]}, "'function_call' is no call with a name"),
    ("messages", {"messages": [{**Q, "function_call": {"name": "f"}}, A]}, "only the assistant has tool_calls"),
    ("messages", {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f(x)"}]}, "the call is not valid JSON"),
    ("messages", {"conversations": [{"from": ["human"], "value": "q"}]}, "unknown role ['human']"),
    ("preference", {"chosen": "a", "rejected": "b", "who": "x"}, "the column 'prompt' is missing"),
    ("preference", {"prompt": "q", "chosen": "a"}, "the column 'rejected' is missing"),
    ("preference", {"prompt": [Q], "chosen": [Q], "rejected": [Q, A]}, "'chosen' has no answer"),
    ("feedback", {"messages": [Q, A, Q], "label": True}, "the last turn is not the assistant's"),
    ("feedback", {**P, "label": 0.5}, "'label' is 0.5"),
    ("feedback", {**P, "label": float("nan")}, "the column 'label' is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "row", "what"), REFUSED)
def test_what_would_make_the_text_wrong_is_refused(form, row, what):
    with pytest.raises(RowError) as caught:
        read(row, form)
    assert what in caught.value.what


def test_a_refused_column_is_allowed_under_another_name():
    out, unused = read({**S, "images": ["a.png"]}, "messages", {"images": "unused_images"})
    assert out == {"messages": [Q, A]} and unused.columns == {"images": 1}


@pytest.mark.parametrize("mark", ["<image>\nq", "q <image>", "<video>q"])
def test_a_placeholder_of_a_picture_is_counted(mark):
    _, unused = read({"messages": [turn("user", mark), A]}, "messages")
    assert sum(unused.remarks.values()) == 1
    _, unused = read({"messages": [turn("user", "what does <image> mean in RSS?"), A]}, "messages")
    assert not unused.remarks


UNSEEN = ["", " \n", "\u200b", "\ufeff \u2060", "\u00ad\u3164", "\0\x1f", "\u2800"]


@pytest.mark.parametrize("nothing", UNSEEN)
def test_a_text_that_nobody_sees_is_empty(nothing):
    for form, row in (
        ("messages", {"messages": [Q, turn("assistant", nothing)]}),
        ("prompt", {"prompt": nothing, "completion": "a"}),
        ("prompt", {"prompt": "q", "completion": nothing}),
        ("text", {"text": nothing}),
        ("preference", {"prompt": "q", "chosen": nothing, "rejected": "b"}),
        ("feedback", {**P, "completion": nothing, "label": True}),
    ):
        with pytest.raises(RowError, match="empty"):
            read(row, form)
    assert read({"messages": [turn("user", nothing), A]}, "messages")[1].remarks == {"a user's turn is empty": 1}
    seen = f"{nothing}é{nothing}"
    assert read({"prompt": "q", "completion": seen}, "prompt")[0]["messages"][1]["content"] == seen


def test_gaps_that_pandas_filled_with_nan_are_gaps():
    row = parse_json(
        '{"messages": [{"role": "user", "content": "q", "name": NaN}, {"role": "assistant", "content": "a", "weight": NaN, "tool_calls": NaN}], '
        '"tools": NaN, "system": NaN, "conversations": NaN, "score": -Infinity}'
    )
    out, unused = read(row, "messages")
    assert out == {"messages": [Q, A]} and unused.columns == {"score": 1} and not unused.turn_keys
    out, _ = read(
        parse_json('{"prompt": NaN, "instruction": "q", "input": NaN, "system": NaN, "chosen": "a", "rejected": "b"}'),
        "preference",
    )
    assert out["messages"] == [Q, A]
    assert read({"messages": [Q, {**A, "weight": float("nan")}]}, "messages")[0]["messages"] == [Q, A]


# ---- tools


@pytest.mark.parametrize(
    ("row", "tools"),
    [
        ({"tools": [SCHEMA]}, [SCHEMA]),
        ({"tools": json.dumps([SCHEMA])}, [SCHEMA]),
        ({"tools": [json.dumps(SCHEMA)]}, [SCHEMA]),
        ({"functions": [SCHEMA]}, [{"type": "function", "function": SCHEMA}]),
        ({"functions": json.dumps([SCHEMA])}, [{"type": "function", "function": SCHEMA}]),
        ({"functions": []}, None),
    ],
)
def test_schemas_of_tools_in_every_form(row, tools):
    out, unused = read({**S, **row}, "messages")
    assert out.get("tools") == tools and not unused.columns


def test_nulls_in_arguments_of_json_are_kept_and_counted():
    call = {"function": {"name": "depth", "arguments": {"at": None}}}
    out, unused = read({"messages": [Q, {**A, "tool_calls": [call]}]}, "messages")
    assert (
        out["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"at": None}
        and sum(unused.remarks.values()) == 1
    )


# ---- renamed columns


@pytest.mark.parametrize(
    ("row", "columns", "turns", "named"),
    [
        ({"question": "q", "answer": "a", "prompt": "no"}, {"question": "prompt", "answer": "completion"}, ["u:q", "a:a"], {"prompt": 1}),
        ({"prompt": "no", "question": "q", "answer": "a"}, {"question": "prompt", "answer": "completion"}, ["u:q", "a:a"], {"prompt": 1}),
        ({"prompt": "q", "question": None, "completion": "a"}, {"question": "prompt"}, ["u:q", "a:a"], {}),
        ({"prompt": "a", "completion": "q"}, {"prompt": "completion", "completion": "prompt"}, ["u:q", "a:a"], {}),
        ({"x": "q", "y": "no", "completion": "a"}, {"x": "prompt", "y": "prompt"}, ["u:q", "a:a"], {"y": 1}),
        ({"x": None, "y": "q", "completion": "a"}, {"x": "prompt", "y": "prompt"}, ["u:q", "a:a"], {}),
        ({"text": "q", "label": 0}, {"text": "prompt", "label": "completion"}, ["u:q", "a:0"], {}),
        ({"text": "q", "label": 3.0}, {"text": "prompt", "label": "completion"}, ["u:q", "a:3"], {}),
        ({"text": "q", "label": True}, {"text": "prompt", "label": "completion"}, ["u:q", "a:true"], {}),
    ],
)  # fmt: skip
def test_the_column_that_the_recipe_names_wins(row, columns, turns, named):
    out, unused = read(row, "prompt", columns)
    assert out["messages"] == reported(*turns) and dict(unused.columns) == named


def test_a_number_as_the_answer_is_text_only_where_the_recipe_names_the_column():
    with pytest.raises(RowError, match="'completion' is a number"):
        read({"prompt": "q", "completion": 1}, "prompt")


# ---- pairs

GOOD, BAD = reported("u:q", "a:a"), reported("u:q", "a:b")
LONG = reported("u:x", "a:y", "u:q", "a:a"), reported("u:x", "a:y", "u:q", "a:b")
PAIRS = [
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, ["u:q"]),
    ({"question": "q", "chosen": "a", "rejected": "b"}, ["u:q"]),
    ({"instruction": "q", "chosen": "a", "rejected": "b"}, ["u:q"]),
    ({"instruction": "q", "input": "i", "chosen": "a", "rejected": "b"}, ["u:q\n\ni"]),
    ({"instruction": "q", "chosen": "a", "rejected": "b", "history": [["x", "y"]]}, ["u:x", "-:y", "u:q"]),
    ({"question": "q", "system": "s", "chosen": "a", "rejected": "b"}, ["s:s", "u:q"]),
    ({"question": "q", "chosen": reported("a:a"), "rejected": reported("a:b")}, ["u:q"]),
    ({"chosen": GOOD, "rejected": BAD}, ["u:q"]),
    ({"prompt": None, "chosen": GOOD, "rejected": BAD}, ["u:q"]),
    ({"system": "s", "chosen": GOOD, "rejected": BAD}, ["s:s", "u:q"]),
    ({"prompt": "q", "chosen": GOOD, "rejected": BAD}, ["u:q"]),
    ({"prompt": " q ", "chosen": GOOD, "rejected": BAD}, ["u:q"]),
    ({"prompt": [Q], "chosen": GOOD, "rejected": BAD}, ["u:q"]),
    ({"prompt": "q", "system": "s", "chosen": GOOD, "rejected": BAD}, ["s:s", "u:q"]),
    ({"prompt": reported("s:s", "u:q"), "chosen": GOOD, "rejected": BAD}, ["s:s", "u:q"]),
    (
        {"prompt": "q", "system": "s", "chosen": reported("s:s") + GOOD, "rejected": reported("s:s") + BAD},
        ["s:s", "u:q"],
    ),
    (
        {"prompt": reported("s:s", "u:q"), "chosen": reported("s:s") + GOOD, "rejected": reported("s:s") + BAD},
        ["s:s", "u:q"],
    ),
    ({"prompt": "q", "chosen": LONG[0], "rejected": LONG[1]}, ["u:x", "-:y", "u:q"]),
    ({"prompt": [Q], "chosen": LONG[0], "rejected": LONG[1]}, ["u:x", "-:y", "u:q"]),
    ({"prompt": "x", "chosen": LONG[0], "rejected": LONG[1]}, ["u:x", "-:y", "u:q"]),
    ({"prompt": reported("u:x", "a:y", "u:q"), "chosen": LONG[0], "rejected": LONG[1]}, ["u:x", "-:y", "u:q"]),
    ({"prompt": reported("u:x", "a:y", "u:q"), "chosen": GOOD, "rejected": BAD}, ["u:x", "-:y", "u:q"]),
    ({"prompt": reported("u:x", "a:y", "u:q"), "chosen": "a", "rejected": "b"}, ["u:x", "-:y", "u:q"]),
    ({"prompt": [Q], "chosen": reported("a:a"), "rejected": reported("a:b")}, ["u:q"]),
    ({"prompt": [Q], "chosen": GOOD, "rejected": reported("a:b")}, ["u:q"]),
    ({"question": [Q], "chosen": [turn("bot", "a")], "rejected": [{"from": "model", "value": "b"}]}, ["u:q"]),
    (
        {"conversations": [Q], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
        ["u:q"],
    ),
]


@pytest.mark.parametrize(("row", "asked"), PAIRS)
def test_the_question_of_a_pair_is_asked_once(row, asked):
    out, unused = read({**row, "score": 1}, "preference")
    assert out["messages"] == reported(*asked, "a:a") and out["rejected"] == reported(*asked, "a:b")
    assert dict(unused.columns) == {"score": 1}


@pytest.mark.parametrize("value", [True, 1, 1.0, "1", "true", "1.0", False, 0, 0.0, "0", "False", "0.0"])
def test_judgements_in_every_form(value):
    assert desirable({"label": value}) is (str(value).lower() in ("true", "1", "1.0"))


# ---- files

HUGE = "9" * 5000


def source(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def lines(count: int, first: int = 0, **more: Any) -> str:
    rows = ({"prompt": f"question {i}?", "completion": f"answer {i * 7}", **more} for i in range(first, first + count))
    return "".join(json.dumps(row) + "\n" for row in rows)


def run(tmp_path: Path, train: Any, **data: Any):
    recipe = Recipe.model_validate({"model": {"base": "x/y"}, "data": {"train": train, "overlap": "allow", **data}})
    return prepare(recipe, byte_tokenizer(), cache_dir=tmp_path / "cache")


def test_a_number_of_any_length_is_read_as_text():
    assert parse_json(f'{{"a": {HUGE}, "b": [7]}}') == {"a": HUGE, "b": [7]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.jsonl", lines(20) + f'{{"prompt": "x", "completion": "y", "score": {HUGE}}}\n'),
        ("r.json", f'[{{"prompt": "x", "completion": "y", "score": {HUGE}}}, ' + lines(20).strip().replace("\n", ",") + "]"),
    ],
)  # fmt: skip
def test_a_huge_number_in_a_column_that_is_not_used(tmp_path, name, content):
    report = run(tmp_path, source(tmp_path / name, content)).report
    assert report["sources"][0]["rows"] == 21 and report["unused"] == {"columns": {"score": 1}, "turn_keys": {}}


def test_a_huge_number_is_no_moment(tmp_path):
    path = source(tmp_path / "r.jsonl", lines(5, day=10**400))
    with pytest.raises(UserError, match="cannot be ordered"):
        run(tmp_path, path, split_by={"time": "day"})


def test_files_that_were_joined_with_their_byte_order_marks(tmp_path):
    mark = b"\xef\xbb\xbf"
    path = source(tmp_path / "r.jsonl", mark + lines(10).encode() + mark + lines(10, 10).encode() + mark + b"\n")
    assert run(tmp_path, path).report["sources"][0]["rows"] == 20
    table = b"".join(
        mark + b"prompt,completion\n" + b"".join(b"q %d,a %d\n" % (i, i) for i in range(k, k + 9)) for k in (0, 9)
    )
    prepared = run(tmp_path, source(tmp_path / "r.csv", table))
    assert prepared.report["sources"][0]["rows"] == 18
    assert prepared.report["sources"][0]["counts"]["left out: repeated header lines"] == 1
    assert any("repeated header" in warning for warning in prepared.report["warnings"])


def test_nulls_that_arrow_fills_in_are_left_out(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def row(i: int, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        schema = {"type": "object", "properties": {k: {"type": "string"} for k in arguments}}
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        turns = [
            turn("user", f"q {i}"),
            turn("assistant", "", tool_calls=[call]),
            turn("tool", "5"),
            turn("assistant", "a"),
        ]
        return {"messages": turns, "tools": [{"type": "function", "function": {"name": name, "parameters": schema}}]}

    rows = [row(i, "ship", {"name": "x"}) if i % 2 else row(i, "depth", {"at": "y", "unit": "m"}) for i in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    assert "None" in str(pq.read_table(tmp_path / "r.parquet").to_pylist())
    plain = run(tmp_path, source(tmp_path / "r.jsonl", "".join(json.dumps(r) + "\n" for r in rows)))
    assert run(tmp_path, str(tmp_path / "r.parquet")).train.digest == plain.train.digest


# ---- folders


@pytest.mark.parametrize(
    ("files", "read", "others"),
    [
        (["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl"], [0], {"test": 1, "validation": 1}),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"], [0, 1], {"test": 1}),
        (["train.jsonl", "valid.jsonl", "dev.jsonl"], [0], {"validation": 2}),
        (["TRAIN.jsonl", "Test.jsonl"], [0], {"test": 1}),
        (["train_sft.jsonl", "test_sft.jsonl"], [0], {"test": 1}),
        (["orders_train.jsonl", "orders-val.jsonl", "extra.jsonl"], [0], {"validation": 1, "(no split)": 1}),
        (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], [0, 1], {"test": 1}),
        (["train.jsonl", "more.jsonl"], [0, 1], {}),
        (["test.jsonl", "valid.jsonl"], [0, 1], {}),
        (["training-camp.jsonl", "test.jsonl"], [0, 1], {}),
        (["trainees.jsonl", "testing.jsonl", "latest.jsonl"], [0, 1, 2], {}),
        (["train.jsonl", "a-crash-test-car.jsonl"], [0, 1], {}),
    ],
)  # fmt: skip
def test_the_training_split_of_a_folder_is_read_alone(tmp_path, files, read, others):
    for i, name in enumerate(files):
        source(tmp_path / "ds" / name, lines(10, 10 * i))
    report = run(tmp_path, str(tmp_path / "ds")).report
    facts = report["sources"][0]
    assert facts["rows"] == 10 * len(read)
    assert {k: len(v) for k, v in facts.get("files", {}).get("other_splits", {}).items()} == others
    assert any("only the split 'train' is read" in w for w in report["warnings"]) == bool(others)


@pytest.mark.parametrize(
    ("split", "rows"), [("test", 2), ("train", 10), ("validation", 3), ("valid", 3), ("all", 15), ("es", 2)]
)
def test_the_split_of_a_folder_can_be_chosen(tmp_path, split, rows):
    for name, n in (("train.jsonl", 10), ("test.jsonl", 2), ("dev.jsonl", 3)):
        source(tmp_path / "ds" / name, lines(n))
    prepared = run(tmp_path, {"source": str(tmp_path / "ds"), "split": split}, deduplicate=False)
    assert prepared.report["sources"][0]["rows"] == rows
    assert not any("only the split" in warning for warning in prepared.report["warnings"])


def test_held_out_rows_of_a_folder_are_those_of_its_validation_split(tmp_path):
    for name, first in (("train.jsonl", 0), ("test.jsonl", 30), ("dev.jsonl", 60)):
        source(tmp_path / "ds" / name, lines(10, first))
    prepared = run(tmp_path, str(tmp_path / "ds"), eval=str(tmp_path / "ds"))
    (held,) = prepared.evals.values()
    assert "dev.jsonl" in held.place(0) and len(held) == 10 and len(prepared.train) == 10


def test_a_file_of_a_folder_without_rows_is_pointed_to(tmp_path):
    source(tmp_path / "ds" / "a.json", '{"version": 1, "owner": "me"}')
    source(tmp_path / "ds" / "b.jsonl", lines(10))
    with pytest.raises(UserError) as caught:
        run(tmp_path, str(tmp_path / "ds"))
    assert "a.json" in caught.value.where and "move it out" in caught.value.fix


def test_files_about_the_data_are_named_and_not_read(tmp_path):
    source(tmp_path / "ds" / "train.jsonl", lines(10))
    for name in ("dataset_infos.json", "croissant.json", "dataset_info.json"):
        source(tmp_path / "ds" / name, '{"default": {"features": {"a": 1}}}')
    source(tmp_path / "ds" / "README.md", "# About")
    facts = run(tmp_path, str(tmp_path / "ds")).report["sources"][0]
    assert facts["rows"] == 10
    assert set(facts["files"]["about"]) == {"README.md", "croissant.json", "dataset_info.json", "dataset_infos.json"}


# ---- what is told


def test_names_and_counts_are_in_the_report_and_printed(tmp_path, capsys):
    from aifactory_train.data.inspect import report_tables

    rows = [
        {"messages": [{**turn("user", f"q {i}"), "stamp": i}, A], "url": "u", "kunde": i % 5, **({"note": "n"} if i < 3 else {})}
        for i in range(20)
    ]  # fmt: skip
    path = source(tmp_path / "r.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    prepared = run(tmp_path, path, split_by={"group": "kunde"}, workers=1)
    assert prepared.report["unused"] == {"columns": {"url": 20, "note": 3}, "turn_keys": {"stamp": 20}}
    assert run(tmp_path, path, split_by={"group": "kunde"}, workers=1).report["unused"] == prepared.report["unused"]
    report_tables(prepared)
    printed = capsys.readouterr()
    told_text = printed.out + printed.err
    assert "not used: column 'url' (20 rows)" in told_text and "not used: key of a turn 'stamp' (20 turns)" in told_text


def test_names_that_are_as_many_as_rows_are_summed_up():
    unused = Unused()
    for i in range(300):
        canonical({**P, f"key {i}": 1}, "prompt", {}, unused)
    columns = unused.as_dict()["columns"]
    assert len(columns) == 101 and columns["(200 more names)"] == 200
