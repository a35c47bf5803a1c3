"""Every form that a row may have, as a table for the documentation: examples, and what the code itself makes of them.

``python tests/data/forms_table.py docs/data.md`` writes it between its two marks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.data.cells import MEDIA, RowError, Unused
from aifactory_train.data.questions import SYSTEM_COLUMNS
from aifactory_train.data.rows import PROMPT_COLUMNS, QUESTIONS, canonical, detect_format
from aifactory_train.data.tool_calls import ARGUMENT_KEYS
from aifactory_train.data.turns import CALL_ROLES, LEARN_KEYS, OTHER_ROLES, ROLES, TEXT_KEYS

BEGIN, END = "<!-- forms: written by python tests/data/forms_table.py -->", "<!-- forms: end -->"

_Q, _A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
_TALK: dict[str, Any] = {"messages": [_Q, _A]}
_CALL = {"name": "f", "arguments": {"x": 1}}
_SAID = {"role": "assistant", "content": "A"}
_EARLIER = [{"role": "user", "content": "Q0"}, {"role": "assistant", "content": "A0"}]

#: ``(what, format or None for auto, row, renamed columns)``
Example = tuple[str, str | None, dict[str, Any], dict[str, str]]


def examples() -> Iterator[Example]:
    """An example of every form. Names that mean the same have one each."""
    yield "a conversation", None, _TALK, {}
    yield "roles", None, {"messages": [{"role": r, "content": r[0].upper()} for r in ROLES if r != "tool"]}, {}
    yield "`messages` as JSON text (CSV)", None, {"messages": json.dumps([_Q, _A])}, {}
    yield "ShareGPT", None, {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, {}
    for other, role in OTHER_ROLES.items():
        before = [_Q, {**_SAID, "tool_calls": [_CALL]}] if role == "tool" else ([_Q] if role == "assistant" else [])
        after = [_SAID] if role in ("tool", "user") else []
        yield f"role `{other}`", None, {"messages": [*before, {"role": other, "content": "T"}, *after]}, {}
    for role in CALL_ROLES:
        turn = {"from": role, "value": json.dumps(_CALL)}
        yield f"role `{role}`: calls as JSON", None, {"conversations": [{"from": "human", "value": "Q"}, turn]}, {}
    for key in TEXT_KEYS:
        yield f"a turn's text under `{key}`", None, {"messages": [{"role": "user", key: "Q"}, _SAID]}, {}
    parts = [{"type": "text", "text": "Q"}]
    yield "content in parts, all of them text", None, {"messages": [{"role": "user", "content": parts}, _SAID]}, {}
    as_text = {"role": "user", "content": json.dumps(parts)}
    yield "content in parts as JSON text", None, {"messages": [as_text, _SAID]}, {}
    yield from _turns()
    for asked, answer in PROMPT_COLUMNS:
        yield f"`{asked}` and `{answer}`", None, {asked: "Q", answer: "A"}, {}
    yield "turns as the question or the answer", None, {"prompt": [_Q], "completion": [_SAID]}, {}
    in_text = {"prompt": json.dumps([_Q]), "completion": json.dumps(_SAID)}
    yield "turns as JSON text (CSV), of a question or an answer", None, in_text, {}
    yield "an answer that repeats the question", None, {"prompt": "Q", "completion": [_Q, _SAID]}, {}
    yield from _beside()
    yield "running text", None, {"text": "T"}, {}
    yield from _judged()
    yield (
        "renamed columns",
        None,
        {"frage": "Q", "prompt": "no", "klasse": 3.0},
        {"frage": "prompt", "klasse": "completion"},
    )


def _judged() -> Iterator[Example]:
    """Pairs of answers, and answers that are rated."""
    pair = {"chosen": "A", "rejected": "B"}
    for name in QUESTIONS:
        asked_in_turns = name in ("conversations", "messages")
        yield f"a pair with `{name}`", "preference", {name: [_Q] if asked_in_turns else "Q", **pair}, {}
    one = {"chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}}
    yield "answers that are one turn", "preference", {"conversations": [{"from": "human", "value": "Q"}], **one}, {}
    yield (
        "a pair of whole conversations",
        "preference",
        {"chosen": [_Q, _SAID], "rejected": [_Q, {**_SAID, "content": "B"}]},
        {},
    )
    whole = [*_EARLIER, _Q]
    both = {"chosen": [*whole, _SAID], "rejected": [*whole, {**_SAID, "content": "B"}]}
    yield "the last question beside them", "preference", {"prompt": "Q", **both}, {}
    in_text = {name: json.dumps(turns) for name, turns in both.items()}
    yield "a pair as JSON text (CSV)", "preference", in_text, {}
    openai = {"preferred_output": [_SAID], "non_preferred_output": [{**_SAID, "content": "B"}]}
    yield "OpenAI's pair", "preference", {"input": {"messages": [_Q], "tools": []}, **openai}, {}
    beside = {"rejected_response": "B"}
    yield "ms-swift's pair", "preference", {"messages": [_Q, _SAID], **beside}, {}
    yield "ms-swift's pair of a question", "preference", {"query": "Q", "response": "A", **beside}, {}
    others = {"rejected_messages": [_Q, {**_SAID, "content": "B"}]}
    yield "ms-swift's pair of conversations", "preference", {"messages": [_Q, _SAID], **others}, {}
    yield "a rated answer", "feedback", {"prompt": "Q", "completion": "A", "label": True}, {}
    yield "`label` as a number or text", "feedback", {"prompt": "Q", "completion": "A", "label": "0.0"}, {}
    yield "LLaMA-Factory's `kto_tag`", "feedback", {"instruction": "Q", "output": "A", "kto_tag": False}, {}
    yield "a judged conversation", "feedback", {"messages": [*_EARLIER, _Q, _A], "label": 1}, {}


def _turns() -> Iterator[Example]:
    """What a turn may hold beside role and text."""
    for key in LEARN_KEYS:
        yield f"`{key}`: a turn that is not learnt", None, {"messages": [_Q, {**_SAID, key: False}, _Q, _A]}, {}
    for key in ("reasoning_content", "thinking", "reasoning"):
        yield f"`{key}` of a turn", None, {"messages": [_Q, {**_A, key: "R"}]}, {}
    nested = [{"type": "function", "function": _CALL}]
    yield "`tool_calls`", None, {"messages": [_Q, {"role": "assistant", "content": None, "tool_calls": nested}]}, {}
    yield "`tool_calls` as JSON text", None, {"messages": [_Q, {**_A, "tool_calls": json.dumps([_CALL])}]}, {}
    for key in ARGUMENT_KEYS[1:]:
        call = {"name": "f", key: {"x": 1}}
        yield f"arguments of a call under `{key}`", None, {"messages": [_Q, {**_A, "tool_calls": [call]}]}, {}
    yield "OpenAI's old `function_call`", None, {"messages": [_Q, {**_A, "function_call": _CALL}]}, {}


def _beside() -> Iterator[Example]:
    """Columns beside a conversation or a question."""
    for name in SYSTEM_COLUMNS:
        yield f"`{name}` beside a conversation", None, {**_TALK, name: "S"}, {}
        yield f"`{name}` beside a question", None, {"prompt": "Q", "completion": "A", name: "S"}, {}
    own = [{"role": "system", "content": "S0"}, _Q, _A]
    yield "a conversation with a system turn of its own", None, {"messages": own, "system": "S"}, {}
    yield "Alpaca's `input`", None, {"instruction": "Q", "input": "I", "output": "A"}, {}
    yield "`context` of an instruction", None, {"instruction": "Q", "context": "C", "response": "A"}, {}
    yield "`context` of a question", None, {"question": "Q", "context": "C", "answer": "A"}, {}
    yield "`context` of a prompt, which is whole", None, {"prompt": "Q", "context": "C", "completion": "A"}, {}
    yield "`history` in pairs", None, {"instruction": "Q", "output": "A", "history": [["Q0", "A0"]]}, {}
    yield "`history` in turns", None, {"instruction": "Q", "output": "A", "history": _EARLIER}, {}
    schema = {"name": "f", "parameters": {}}
    for tools in ([schema], json.dumps([schema]), [json.dumps(schema)]):
        yield "`tools`", None, {**_TALK, "tools": tools}, {}
    yield "OpenAI's old `functions`", None, {**_TALK, "functions": [schema]}, {}
    yield (
        "`id`, `group`, `language`, `label`",
        None,
        {**_TALK, "id": 7, "group": "g", "language": "is", "label": "l"},
        {},
    )
    for name in sorted(MEDIA):
        yield f"`{name}`", None, {**_TALK, name: ["x"]}, {}
    yield "any other column, any other key of a turn", None, {"messages": [{**_Q, "time": 5}, _A], "url": "u"}, {}


def read_as(example: Example) -> str:
    """What the code makes of an example: what is learnt in bold."""
    _, form, row, columns = example
    unused = Unused()
    try:
        found = canonical(row, form or detect_format([columns.get(c, c) for c in row])[0], columns, unused)
    except RowError as error:
        return f"refused: {error.what}"
    if "text" in found:
        return f"**{found['text']}**"
    out = _shown(found["messages"])
    if "rejected" in found:
        out += f"; rejected: {_shown(found['rejected'])}"
    if "desirable" in found:
        out += f"; judged {'good' if found['desirable'] else 'bad'}"
    out += "".join(
        f"; {key}: `{json.dumps(found[key])}`" for key in ("tools", "id", "group", "language", "label") if key in found
    )
    named = [*unused.columns, *unused.turn_keys, *unused.remarks]
    return out + (f"; named: {', '.join(named)}" if named else "")


def _shown(messages: list[dict[str, Any]]) -> str:
    return ", ".join(map(_turn, messages))


def _turn(message: dict[str, Any]) -> str:
    said = [message["content"].replace("\n", "⏎")] if message["content"] else []
    said += [f"reasoning {message[key]}" for key in ("reasoning_content", "thinking") if key in message]
    for call in message.get("tool_calls", ()):
        said.append(f"call {call['function']['name']}({json.dumps(call['function']['arguments'])})")
    learnt = message["role"] == "assistant" and message.get("weight", 1)
    text = " + ".join(said)
    return f"{message['role']} {f'**{text}**' if learnt else text}"


def table() -> str:
    """The table in Markdown."""
    lines = ["| form | a row | is read as (what is learnt in bold) |", "|---|---|---|"]
    for example in examples():
        what, form, row, columns = example
        shown = json.dumps(row, ensure_ascii=False) + (f" with columns={json.dumps(columns)}" if columns else "")
        kind = f" (`{form}`)" if form else ""
        lines.append(f"| {what}{kind} | `{shown}` | {read_as(example)} |")
    return "\n".join(lines)


def written(document: str) -> str:
    """A document with the table between its marks."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(written(Path(name).read_text(encoding="utf-8")), encoding="utf-8")
