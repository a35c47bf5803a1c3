"""Rows as other people's tools export them: turns written as JSON text, OpenAI's pairs, calls of other makers, JSON
files with more in them than rows, and keys of a recipe that no row answers to. Used, or named; the word for it stands
in ``train``'s line as well."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from chat_families import byte_tokenizer
from forms_table import table

from aifactory_train.config.loading import load_recipe
from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.data import prepare
from aifactory_train.data.cells import RowError, Unused
from aifactory_train.data.inputs import PREPARED_FORMAT
from aifactory_train.data.report import rows_line
from aifactory_train.data.rows import canonical, detect_format
from aifactory_train.data.traces import lost
from aifactory_train.data.turns import AS_TEXT, AS_TURNS, turns_in_text

Q, A, B = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
TOLD_AGAIN = "an answer begins with its whole question, which is learnt as part of it"


def read(row: dict[str, Any], form: str = "prompt") -> tuple[dict[str, Any], Unused]:
    unused = Unused()
    return canonical(row, form, {}, unused), unused


def said(turns: list[dict[str, Any]]) -> list[str]:
    return [f"{m['role'][0]}:{m['content']}" for m in turns]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": json.dumps([Q]), "completion": "a"}, ["u:q", "a:a"]),
        ({"prompt": "q", "completion": json.dumps([A])}, ["u:q", "a:a"]),
        ({"prompt": "q", "completion": json.dumps(A)}, ["u:q", "a:a"]),
        ({"prompt": "q", "completion": json.dumps([Q, A])}, ["u:q", "a:a"]),
        ({"instruction": f" {json.dumps([{'from': 'human', 'value': 'q {x}'}])}", "output": "a"}, ["u:q {x}", "a:a"]),
        ({"prompt": json.dumps([{"content": "s {", "role": "system"}, Q]), "completion": "a"}, ["s:s {", "u:q", "a:a"]),
    ],
)
def test_turns_as_json_text_are_turns(row, turns):
    out, unused = read(row)
    assert said(out["messages"]) == turns
    assert unused.remarks == {AS_TURNS: 1}


@pytest.mark.parametrize(
    "answer",
    [
        str([A]),  # what pandas writes of a list
        json.dumps([{"role": "nurse", "content": "x"}]),
        json.dumps([{"role": "user", "content": "another"}, A]),  # a conversation that was asked for
        json.dumps([Q]),
        json.dumps([A]) + " and more",
    ],
)
def test_other_text_that_looks_like_turns_is_kept_and_counted(answer):
    out, unused = read({"prompt": "q", "completion": answer})
    assert out["messages"][-1]["content"] == answer
    assert unused.remarks == {AS_TEXT: 1}
    out, unused = read({"text": answer}, "text")
    assert out["text"] == answer and unused.remarks == {AS_TEXT: 1}


@pytest.mark.parametrize(
    "answer", ['["a", "b"]', '{"role": "nurse", "ward": 3}', "[]", "{", '{"a": [{"b": 1}]}', "[1] see"]
)
def test_json_that_is_an_answer_stays_one(answer):
    out, unused = read({"prompt": "q", "completion": answer})
    assert out["messages"][-1]["content"] == answer and not unused.remarks


def test_text_of_blanks_and_deep_json_do_not_hold_up():
    assert turns_in_text(" " * 2_000_000 + "x") == [] == turns_in_text('[{"role": ' + "[" * 100_000)


@pytest.mark.parametrize("question", [{}, {"prompt": "q"}, {"prompt": json.dumps([Q])}])
def test_pairs_as_json_text(question):
    out, unused = read({**question, "chosen": json.dumps([Q, A]), "rejected": json.dumps([Q, B])}, "preference")
    assert (said(out["messages"]), said(out["rejected"])) == (["u:q", "a:a"], ["u:q", "a:b"])
    assert unused.remarks[AS_TURNS] >= 2


@pytest.mark.parametrize("as_text", [False, True])
def test_openai_pairs(as_text):
    asked: Any = {"messages": [Q], "tools": [{"name": "f"}], "parallel_tool_calls": True}
    row = {"input": json.dumps(asked) if as_text else asked, "preferred_output": [A], "non_preferred_output": [B]}
    out, unused = read(row, "preference")
    assert (said(out["messages"]), said(out["rejected"])) == (["u:q", "a:a"], ["u:q", "a:b"])
    assert out["tools"] == [{"name": "f"}] and unused.columns == {"parallel_tool_calls": 1}
    with pytest.raises(RowError, match="preferred_output"):
        detect_format(list(row))
    assert detect_format([*row, "messages"])[0] == "messages"  # as before


def test_a_text_that_repeats_its_question_is_counted():
    human = "\n\nHuman: where does the river end?\n\nAssistant:"
    row = {"prompt": human, "chosen": f"{human} at sea", "rejected": f"{human} no"}
    assert read(row, "preference")[1].remarks == {TOLD_AGAIN: 2}
    assert not read({"prompt": "Hello", "completion": "Hello there"})[1].remarks


@pytest.mark.parametrize("key", ["arguments", "parameters", "args", "input"])
@pytest.mark.parametrize("nested", [False, True])
def test_arguments_of_calls_under_every_name(key, nested):
    call: dict[str, Any] = {"name": "f", key: {"x": 1}}
    turn = {**A, "tool_calls": [{"type": "function", "id": "c", "function": call} if nested else call]}
    out, unused = read({"messages": [Q, turn]}, "messages")
    assert out["messages"][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert not unused.turn_keys


def test_what_else_a_call_holds_is_named():
    call = {
        "type": "retrieval",
        "id": 7,
        "index": 0,
        "function": {"name": "f", "arguments": {}, "output": "o", "args": {"y": 1}},
    }
    _, unused = read({"messages": [Q, {**A, "tool_calls": [call]}]}, "messages")
    assert {name.partition(" (")[0] for name in unused.turn_keys} == {"type", "id", "output", "args"}


def test_small_things_of_a_row():
    assert "id" not in read({"prompt": "q", "completion": "a", "id": float("nan")})[0]
    for nothing in ("null", "[]", [], float("nan")):
        assert "tools" not in read({"messages": [Q, A], "tools": nothing}, "messages")[0]
    assert read({"messages": [{**Q, "from": "gpt"}, A]}, "messages")[1].turn_keys == {"from": 1}
    assert not read({"messages": [{**Q, "from": "human"}, A]}, "messages")[1].turn_keys
    assert read({"prompt": "<image>\nq", "completion": "a"})[1].remarks
    with pytest.raises(RowError) as refused:
        detect_format(["id", "question", "response"])  # 'id' is known: nobody meant it
    assert "'id'?" not in str(refused.value)


# ---- files, and the recipe about them


def rows(count: int = 30) -> list[dict[str, str]]:
    word = random.Random(1).sample([a + b for a in "bdfgklmnprst" for b in ("ako", "elu", "imi", "opa", "uve")], 60)
    return [
        {"prompt": " ".join(word[i : i + 4]), "completion": " ".join(word[59 - i : 63 - i])} for i in range(1, count)
    ]


def prepared(tmp_path: Path, file: Path, **source: Any) -> tuple[dict[str, Any], str]:
    data = {"train": [{"source": str(file), "licence": "own", **source}], "workers": 1, "sequence_length": 512}
    recipe = Recipe.model_validate(
        {"id": "a/b", "model": {"base": "org/none", "licence": "own"}, "data": data, "train": {"batch_rows": 2}}
    )
    report = prepare(recipe, byte_tokenizer(), cache_dir=tmp_path / "cache").report
    return report, ": ".join(rows_line(report))


def test_remarks_stand_in_the_line_of_train(tmp_path):
    file = tmp_path / "r.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["prompt", "completion"])
        writer.writerows(
            [json.dumps([{**Q, "content": r["prompt"]}]), str([{**A, "content": r["completion"]}])] for r in rows()
        )
    report, line = prepared(tmp_path, file, split="test", columns={"frage": "prompt"}, options={"x": 1})
    expected = [AS_TURNS, AS_TEXT, "the column 'frage'", "split 'test' chooses nothing", "options are for a converter"]
    for what in expected:
        assert what in line and any(what in remark for remark in report["sources"][0]["remarks"]), what


def test_what_stands_beside_the_rows_of_a_json_file(tmp_path):
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"version": "2", "note": "", "data": rows(), "names": ["x"]}))
    report, line = prepared(tmp_path, file)
    assert (
        report["rows"]["given"] == 29
        and "'version' beside" in line
        and "'names' beside" in line
        and "'note'" not in line
    )


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            "messages",
        ),
        ({"text": "a long text", "entities": [{"text": "long"}]}, "text"),
        ({"prompt": [Q], "completion": "a"}, "prompt"),
    ],
)
def test_one_row_in_a_json_file_is_not_its_own_list(tmp_path, value, form):
    from aifactory_train.data.documents import Notes
    from aifactory_train.data.read_json import json_rows

    file = tmp_path / "r.json"
    file.write_text(json.dumps(value))
    assert [b.rows for b in json_rows(file, Notes())] == [[value]] and detect_format(list(value))[0] == form
    file.write_text(json.dumps({"conversations": [{"prompt": "q", "completion": "a"}]}))
    assert [b.rows for b in json_rows(file, Notes())] == [[{"prompt": "q", "completion": "a"}]]


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["train", "eval"], {"train"}),
        (["training", "testing", "evaluation"], {"training"}),
        (["training-camp", "train-seats"], {"training-camp", "train-seats"}),
    ],
)
def test_files_to_evaluate_with_are_not_trained_on(tmp_path, names, read):
    from aifactory_train.data import readers

    for name in names:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    assert {Path(b.file).stem for b in readers.blocks(tmp_path)} == read


def test_columns_that_are_null_in_the_first_row_do_not_decide(tmp_path):
    file = tmp_path / "r.jsonl"
    file.write_text(
        "".join(
            json.dumps({"messages": None, "text": None, "chosen": None, "rejected": None, **r}) + "\n" for r in rows()
        )
    )
    report, _ = prepared(tmp_path, file)
    assert report["sources"][0]["format"] == "prompt" and report["rows"]["given"] == 29


def test_an_override_that_a_later_one_replaces_is_named(tmp_path, capsys):
    file = tmp_path / "r.yaml"
    file.write_text("model: {base: org/none, licence: own}\ndata: {train: a.jsonl}\ntrain: {batch_rows: 2}\n")
    given = ["data.train.0.weight=3", "train.seed=1", "train.seed=1", "train.seed=2", "data.train=b.jsonl"]
    assert load_recipe(str(file), given).train.seed == 2
    said = capsys.readouterr().err
    assert "data.train.0.weight=3 has no effect: --set data.train=b.jsonl comes after it" in " ".join(said.split())
    assert said.count("train.seed=1 has no effect") == 1


def test_a_changed_reading_of_rows_builds_caches_again():
    """Where this fails because rows are read otherwise: raise PREPARED_FORMAT, for a cache of the older reading would
    be used in silence.
    """
    digest = hashlib.sha256(table().encode()).hexdigest()[:16]
    assert (PREPARED_FORMAT, digest) == (7, "ff7186242c8e24ee")


def test_a_source_named_twice_is_told_as_such(tmp_path):
    file = tmp_path / "r.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows()))
    data = {"train": [{"source": str(file), "licence": "own"}] * 2, "workers": 1, "sequence_length": 512}
    recipe = Recipe.model_validate(
        {"id": "a/b", "model": {"base": "org/none", "licence": "own"}, "data": data, "train": {"batch_rows": 2}}
    )
    with pytest.raises(UserError, match="repeats one that stands before it"):
        prepare(recipe, byte_tokenizer(), cache_dir=tmp_path / "cache")


def test_names_and_reasoning_of_turns_that_are_not_learnt_leave_a_trace_or_a_count():
    template = "user: q\nassistant: a"
    talk = [{**Q, "name": "Berta"}, {**A, "weight": 0, "reasoning_content": "thought one", "thinking": "thought two"}]
    assert lost(talk, None, template, []) == (
        "name of a turn dropped",
        *["reasoning of turns that are not learnt dropped"] * 2,
    )
    assert lost(talk, None, f"Berta {template} thought one thought two", []) == ()
    both = [Q, {k: v for k, v in talk[1].items() if k != "weight"}]
    assert lost(both, None, "q a thought one", [(1, 2, 15, True)]) == ("reasoning of the last answer dropped",)


@pytest.mark.parametrize("as_text", [False, True])
def test_recipes_new_knows_pairs_of_others(as_text):
    from aifactory_train.recipe_draft.guesses import understand

    turns: Any = [[{**Q, "content": r["prompt"]}, {**A, "content": r["completion"]}] for r in rows()]
    if as_text:
        raw = [{"chosen": json.dumps(t), "rejected": json.dumps([t[0], B])} for t in turns]
    else:
        raw = [{"input": {"messages": t[:1]}, "preferred_output": t[1:], "non_preferred_output": [B]} for t in turns]
    draft, found = understand([(f"r.jsonl:{i}", row) for i, row in enumerate(raw, 1)], {}, None)
    assert draft.form == "preference" and said(found[0]["rejected"]) == [f"u:{rows()[0]['prompt']}", "a:b"]
