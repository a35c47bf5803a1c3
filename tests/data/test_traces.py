"""What a chat template leaves out is counted and said, special tokens in the rows too; nothing is said of a template
that writes everything.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from chat_families import CASES, FAMILIES, PLAIN, REASONING, TOOL_CHAT, TOOLS, byte_tokenizer, chat

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.data.encoder import Encoder
from aifactory_train.data.pipeline import PreparedData, prepare
from aifactory_train.data.report import rows_line
from aifactory_train.data.rows import canonical
from aifactory_train.data.tokenizer import encoder_spec
from aifactory_train.data.traces import Controls, lost

OPEN, CLOSE = "<|im_start|>", "<|im_end|>\n"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' + c.function.arguments|tojson }}{% endfor %}"
)
SCHEMAS = "{% if tools %}{{ '<|im_start|>system\n' + tools|tojson + '<|im_end|>\n' }}{% endif %}"
KEY = "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"


def template(content: str = "m.content", *, before: str = "", extra: str = "", when: str = "true") -> str:
    """ChatML in which ``content`` is what is written of a turn, ``extra`` what follows it; turns for which ``when``
    fails are left out.
    """
    return (
        f"{before}{{% for m in messages %}}{{% if {when} %}}{{{{ '<|im_start|>' + m.role + '\n' "
        f"}}}}{KEY if 'KEY' in extra else ''}"
        f"{{{{ {content} }}}}{extra.replace('KEY', '')}{{{{ '<|im_end|>\n' }}}}{{% endif %}}{{% endfor %}}{PROMPT}"
    )


WHOLE = template(before=SCHEMAS, extra="KEY" + CALLS)


def recipe(train, **data) -> Recipe:
    settings = {"sequence_length": 1024, "eval_fraction": 0.3, "workers": 1, **data}
    return Recipe.model_validate({"model": {"base": "x/y"}, "data": {"train": train, **settings}})


def tokenizer(source: str):
    made = byte_tokenizer("qwen3")
    made.chat_template = source
    return made


def encoded(source: str, messages: list, tools: list | None = None, **data):
    row = canonical({"messages": messages, **({"tools": tools} if tools else {})}, "messages", {})
    return Encoder(encoder_spec(tokenizer(source), recipe("r.jsonl", **data))).encode([row])[0]


def said(source: str, messages: list, tools: list | None = None) -> list[str]:
    return sorted(encoded(source, messages, tools).lost)


def of(path: Path, rows: list, source: str = WHOLE, **data) -> PreparedData:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return prepare(recipe(str(path), **data), tokenizer(source), cache_dir=path.parent / "cache")


WITH_SYSTEM = chat(("system", "Be kind."), ("user", "Please, be nice. Be kind. Who?"), ("assistant", "Me."))
THOUGHT = [
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "content": "Two.", "reasoning_content": "one more than one"},
    {"role": "user", "content": "And one?"},
    {"role": "assistant", "content": "Three.", "reasoning_content": "one more than two"},
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.family}: {c.name}")
def test_templates_of_the_families_lose_nothing_but_what_they_mean_to(case):
    row = canonical({"messages": case.messages, **({"tools": case.tools} if case.tools else {})}, "messages", {})
    (found,) = Encoder(encoder_spec(byte_tokenizer(case.family), recipe("r.jsonl"))).encode([row])
    reasons = any("</think>" in m["content"] for m in case.messages)
    assert set(found.lost) <= ({"reasoning of earlier answers dropped"} if reasons else set())
    assert found.controls == ()


@pytest.mark.parametrize(
    "messages, tools",
    [(PLAIN, None), (WITH_SYSTEM, None), (TOOL_CHAT, TOOLS), (REASONING, None), (THOUGHT, None)],
    ids=["plain", "system", "tools", "reasoning", "reasoning key"],
)
def test_a_template_that_writes_everything_has_no_count(messages, tools):
    assert said(WHOLE, messages, tools) == []


@pytest.mark.parametrize(
    "source, messages, tools, expected",
    [
        (template(when="m.role != 'system'"), WITH_SYSTEM, None, ["system text dropped"]),
        (template(when="m.role != 'system'", extra="KEY"), WITH_SYSTEM, None, ["system text dropped"]),
        (template(extra=CALLS), TOOL_CHAT, TOOLS, ["tool schema dropped"]),
        (template(before=SCHEMAS), TOOL_CHAT, TOOLS, ["answer left empty", "tool call dropped"]),
        (template(before=SCHEMAS, extra=CALLS, when="m.role != 'tool'"), TOOL_CHAT, TOOLS, ["tool answer dropped"]),
        (template(), THOUGHT, None, ["reasoning of earlier answers dropped", "reasoning of the last answer dropped"]),
        (
            template("m.content.split('</think>')[-1]"),
            REASONING,
            None,
            ["reasoning of earlier answers dropped", "reasoning of the last answer dropped"],
        ),
        (FAMILIES["qwen3"], REASONING, None, ["reasoning of earlier answers dropped"]),
        (
            template("m.content.upper() if m.role == 'assistant' else m.content"),
            PLAIN,
            None,
            ["answer text changed"] * 2,
        ),
        (template("m.content if loop.index0 != 2 else ''"), PLAIN, None, ["question text dropped"]),
    ],
    ids=[
        *("system", "system, looked at", "schemas", "calls", "tool answers", "reasoning key", "all reasoning"),
        *("earlier reasoning", "letters", "a question"),
    ],
)
def test_what_a_template_leaves_out_is_counted_by_kind(source, messages, tools, expected):
    if not isinstance(source, str):
        source = byte_tokenizer(source.name).chat_template
    assert said(source, messages, tools) == expected


@pytest.mark.parametrize(
    "content",
    [
        "m.content | trim",
        "m.content.split() | join(' ')",
        "m.content.replace('\\n', '\\n    ')",
        "m.content | tojson",
    ],
)
def test_white_space_and_json_are_no_alarm(content):
    messages = chat(
        ("system", "  Be  kind,\n\tand short. "),
        ("user", 'A "quoted" line\nand ünother one'),
        ("assistant", "First,\n\n  then \\ there."),
    )
    assert said(template(content), messages) == []


@pytest.mark.parametrize("how", ["indent=2", "sort_keys=True, separators=(',', ':')", "ensure_ascii=True"])
def test_json_in_another_layout_is_no_alarm(how):
    tools = [
        {
            "type": "function",
            "function": {
                "name": "add",
                "description": "Fügt an.",
                "parameters": {"type": "object", "properties": {"b": {"type": "string", "enum": ["x", "y"]}, "a": {}}},
            },
        }
    ]
    messages = [
        TOOL_CHAT[0],
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "add", "arguments": {"b": "ü", "a": [1, True, None, {"c": 0.5}]}}}],
        },
    ]
    source = template(
        before=SCHEMAS.replace("tojson", f"tojson({how})"), extra=CALLS.replace("tojson", f"tojson({how})")
    )
    assert said(source, messages, tools) == []
    # Arguments as elements of their own, the tool without the words of JSON Schema.
    calls = (
        "{% for c in m.tool_calls or [] %}{{ '<f=' + c.function.name + '>' }}{% for k, v in "
        "c.function.arguments.items() %}"
        "{{ '<p=' + k + '>' + (v if v is string else v|tojson) + '</p>' }}{% endfor %}{% endfor %}"
    )
    schema = (
        "{% for t in tools or [] %}{{ t.function.name + ': ' + t.function.description }}{% for k, v in "
        "t.function.parameters.properties.items() %}{{ k + (v.enum or []) | join('|') }}{% endfor %}{% endfor %}"
    )
    assert said(template(before=schema, extra=calls), messages, tools) == []
    without = schema.replace("+ ': ' + t.function.description", "")
    assert said(template(before=without, extra=calls), messages, tools) == ["tool schema changed"]
    assert said(template(before=schema, extra=calls.replace("v|tojson", "'...'")), messages, tools) == [
        "tool call changed"
    ]


def test_a_text_is_not_found_in_one_that_holds_the_same_words():
    full = "<u>no, be kind and quick</u><a>be</a>"
    messages = chat(("system", "be kind"), ("user", "no, be kind and quick"), ("assistant", "be"))
    assert lost(messages, None, full, [(2, full.index("<a>") + 3, len(full), True)]) == ("system text dropped",)
    assert lost(messages, None, "<s>be kind</s>" + full, [(2, 45, 54, True)]) == ()
    twice = chat(("user", "yes"), ("assistant", "A"), ("user", "yes"), ("assistant", "B"))
    assert lost(twice, None, "<u>yes</u>A;B;", [(1, 10, 12, True), (3, 12, 14, True)]) == ("question text dropped",)


def test_reasoning_of_a_turn_without_loss_is_not_missed():
    messages = [dict(m) for m in REASONING]
    messages[1]["weight"] = 0
    assert said(byte_tokenizer("qwen3").chat_template, messages) == []


def test_a_turn_of_which_nothing_is_left_carries_no_loss_and_the_others_do():
    source = template(before=SCHEMAS)
    one = encoded(source, TOOL_CHAT, TOOLS)
    made = tokenizer(source)
    (document,) = one.documents
    assert made.decode(document.tokens[document.mask]) == "Three.<|im_end|>"
    only = encoded(source, TOOL_CHAT[:2], TOOLS)
    assert only.dropped == "empty" and only.documents == [] and "tool call dropped" in only.lost
    # Where every token is learnt anyway, nothing changes.
    assert encoded(source, TOOL_CHAT[:2], TOOLS, supervise="all").documents


ANSWERED = [{"messages": chat(("user", f"What is {i}?"), ("assistant", f"It is {i * i}."))} for i in range(30)]
CALLED = [{"messages": [{"role": "user", "content": f"Add {i} and 2"}, TOOL_CHAT[1]]} for i in range(8)]


def test_rows_without_an_answer_are_dropped_by_name_and_most_of_them_refused(tmp_path):
    some = of(tmp_path / "some.jsonl", ANSWERED + CALLED, template())
    source = some.report["sources"][0]
    assert source["counts"]["dropped: empty"] == 8
    assert source["template"]["tool call dropped"] == {"rows": 8, "times": 8}
    assert any("tool call" in w and "8 of 38 rows" in w for w in some.report["warnings"])
    with pytest.raises(
        UserError, match=r"most\.jsonl:3: .*nothing of the answers of 8 of 10 rows \(tool call"
    ) as caught:
        of(tmp_path / "most.jsonl", ANSWERED[:2] + CALLED, template())
    assert "model.chat_template" in str(caught.value.fix)


def test_prepare_and_train_say_what_the_template_leaves_out(tmp_path, capsys):
    from aifactory_train.data.inspect import report_tables

    rows = [{"messages": [{"role": "system", "content": f"Rule {i}."}, *r["messages"]]} for i, r in enumerate(ANSWERED)]
    prepared = of(tmp_path / "r.jsonl", rows, template(when="m.role != 'system'"))
    assert prepared.report["sources"][0]["template"] == {"system text dropped": {"rows": 30, "times": 30}}
    (warning,) = [w for w in prepared.report["warnings"] if "chat template" in w]
    assert "drops the system text in 30 of 30 rows" in warning and "model.chat_template" in warning
    report_tables(prepared)
    assert "template: system text dropped in 30" in " ".join(capsys.readouterr().err.split())
    clean = of(tmp_path / "clean.jsonl", rows)
    assert clean.report["sources"][0]["template"] == {} == clean.report["sources"][0]["control_tokens"]
    assert not [w for w in clean.report["warnings"] if "template" in w or "special" in w]


# ---- special tokens in what people wrote


def test_special_tokens_in_the_rows_are_counted_and_named(tmp_path):
    rows = [*ANSWERED, {"prompt": "no"}][:-1]
    rows += [{"messages": chat(("user", "What is <|im_end|>\n<|im_start|>?"), ("assistant", "<|im_end|> <|im_end|>"))}]
    rows += [{"messages": chat(("user", "<|im_endless|> <b>"), ("assistant", "<think>x</think>y"))}]
    prepared = of(tmp_path / "r.jsonl", rows)
    assert prepared.report["sources"][0]["control_tokens"] == {
        "<|im_end|>": {"rows": 1, "times": 3},
        "<|im_start|>": {"rows": 1, "times": 1},
    }
    (warning,) = [w for w in prepared.report["warnings"] if "special tokens" in w]
    assert "'<|im_end|>' in 1 rows" in warning
    text = of(tmp_path / "t.jsonl", [{"text": f"Page {i}<|endoftext|>next"} for i in range(9)])
    assert text.report["sources"][0]["control_tokens"] == {"<|endoftext|>": {"rows": 9, "times": 9}}


def test_the_longest_special_token_is_named_and_marks_of_reasoning_are_meant():
    controls = Controls(["<s>", "</s>", "<s>x", "<think>", "</think>", "<call>"])
    assert controls.within("a <s>x <s> b</s") == ["<s>x", "<s>"]
    thought = {"messages": chat(("user", "<think>"), ("assistant", "<think>a</think>b"))}
    assert controls.of(thought) == ("<think>",)
    called = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": "</s>"}}}],
    }
    assert controls.of({"messages": [called]}) == ("</s>",)
    assert Controls([]).within("<s>") == []


# ---- where the rows went


def whole(report: dict) -> dict:
    fate = report["rows"]
    assert fate["given"] == fate["used"] + fate["held_out"] + sum(fate["dropped"].values())
    assert fate["used"] == report["sets"]["train"]["rows"] - sum(
        n for why, n in fate["dropped"].items() if why in ("long", "masked", "empty", "pair")
    )
    return fate


def test_every_row_given_for_training_is_accounted_for(tmp_path):
    grouped = [{**row, "group": f"g{i // 10}"} for i, row in enumerate(ANSWERED)]
    rows = [*grouped, *grouped[:3], *({**row, "group": "g1"} for row in CALLED[:2])]
    rows += [
        {"messages": chat(("user", "x" * 2000 + str(i)), ("assistant", f"No {i}.")), "group": f"g{i % 3}"}
        for i in range(4)
    ]
    fate = whole(of(tmp_path / "r.jsonl", rows, template(), eval_rows=5, sequence_length=100).report)
    assert fate["given"] == 39 and fate["held_out"] == 5 and fate["dropped"]["duplicate"] == 3
    assert fate["dropped"]["group held out"] >= 1 and 0 < fate["dropped"].get("masked", 0) <= 4
    dropped = whole(
        of(tmp_path / "l.jsonl", rows, template(), sequence_length=100, long_documents="drop", deduplicate=False).report
    )
    assert "duplicate" not in dropped["dropped"] and 0 < dropped["dropped"]["long"] <= 4
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(r) + "\n" for r in ANSWERED[:4]), encoding="utf-8")
    # the same questions, but nobody said that they are groups
    same = of(tmp_path / "s.jsonl", rows, template(), eval=str(held))
    assert whole(same.report)["dropped"]["overlap: same text"] == 4
    used, why = rows_line({**same.report, "unused": {"columns": {"context": 7}, "turn_keys": {"train": 2}}})
    assert used.startswith("39 given, ") and "4 with the text of a held-out row" in why
    assert "unused columns: context (7)" in why and "unused keys of turns: train (2)" in why


def test_a_rule_that_drops_many_rows_is_a_warning_with_its_setting(tmp_path):
    rows = [{"messages": chat(("user", "x" * 2000 + str(i)), ("assistant", f"No {i}."))} for i in range(10)]
    warnings = of(tmp_path / "r.jsonl", [*ANSWERED, *rows], sequence_length=100).report["warnings"]
    (warning,) = [w for w in warnings if "not trained on" in w]
    assert "cut before the answer begins" in warning and "data.sequence_length" in warning
    few = of(tmp_path / "few.jsonl", [*ANSWERED, rows[0]], sequence_length=100).report["warnings"]
    assert not [w for w in few if "not trained on" in w]
    cut = [{"messages": chat(("user", f"Tell {i}"), ("assistant", f"{i} " * 100))} for i in range(10)]
    (warning,) = [w for w in of(tmp_path / "c.jsonl", cut, sequence_length=100).report["warnings"] if " cut at" in w]
    assert re.search(r"10 of 10 rows \(100%\) are cut at data\.sequence_length", warning)


def test_an_empty_split_names_its_cause(tmp_path):
    rows = tmp_path / "r.jsonl"
    with pytest.raises(
        UserError, match=r"data\.overlap: the split 'train' is empty: 30 row\(s\) with the text"
    ) as caught:
        of(rows, ANSWERED, eval=str(rows))
    assert "data.overlap=allow" in str(caught.value.fix) and "data.eval" in str(caught.value.fix)
    long = [{"messages": chat(("user", "x" * 2000 + str(i)), ("assistant", f"No {i}."))} for i in range(10)]
    with pytest.raises(
        UserError, match=r"data\.sequence_length: .*'train' is empty: \d row\(s\) cut before the answer"
    ):
        of(rows, long, sequence_length=100)
    with pytest.raises(UserError, match=r"'train' is empty: \d row\(s\) longer than") as caught:
        of(rows, long, sequence_length=100, long_documents="drop")
    assert "long_documents=truncate" in str(caught.value.fix)


# ---- a cache that was built from rows at another place


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_a_cache_names_the_files_of_this_run(tmp_path, folder):
    import copy

    made = tokenizer(WHOLE)
    places = []
    for name in ("one", "two"):
        (tmp_path / name / "rows").mkdir(parents=True)
        for part in ("a", "b") if folder else ("a",):
            path = tmp_path / name / "rows" / f"{part}.jsonl"
            path.write_text("".join(json.dumps(r) + "\n" for r in ANSWERED[part == "b" :: 2]), encoding="utf-8")
        places.append(tmp_path / name / "rows" if folder else tmp_path / name / "rows" / "a.jsonl")
    first = prepare(recipe(str(places[0])), made, cache_dir=tmp_path / "cache")
    for path in sorted((tmp_path / "one").rglob("*.jsonl")):
        path.unlink()
    second = prepare(recipe(str(places[1])), made, cache_dir=tmp_path / "cache")
    assert second.reused and second.folder == first.folder
    for i in range(len(second.train)):
        file, _, line = second.train.place(i).rpartition(":")
        assert Path(file).is_file() and file.startswith(str(places[1]))
        assert (
            json.loads(Path(file).read_text().split("\n")[int(line) - 1])["messages"] == second.train.row(i)["messages"]
        )
    assert second.report["sources"][0]["source"] == str(places[1])
    assert str(tmp_path / "one") not in json.dumps(second.report)
    assert copy.deepcopy(second.train).place(0) == second.train.place(0)
