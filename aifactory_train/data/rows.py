"""Rows: what one line of training data may look like, and its one canonical form.

Accepted forms (``DataSource.format``; ``auto`` decides by the columns of the first row and says so in the report):

* ``messages``: ``{"messages": [{"role", "content"}, ...], "tools"?: [...]}``; also ShareGPT's ``conversations``;
* ``prompt``: ``{"prompt", "completion", "system"?}``; prompt and completion may themselves be lists of messages;
  Alpaca's ``instruction``/``input``/``output`` and ``question``/``answer`` are read the same way;
* ``text``: ``{"text"}``, continued pre-training;
* ``preference``: ``{"prompt", "chosen", "rejected", "system"?}`` (DPO, ORPO); chosen and rejected may be lists of
  messages, with the prompt as their common beginning where there is no ``prompt``, or where they repeat it; also
  OpenAI's ``preferred_output``, and ``rejected_response`` beside the chosen answer;
* ``feedback``: the ``prompt`` form with ``label`` (or ``kto_tag``), true or false (KTO);
* ``label``, ``labels``: ``{"text", "label"}``, or one of the forms above with the label for an answer (heads,
  :mod:`~aifactory_train.data.labelled`);
* ``retrieval``: ``{"query", "positive", "negative"?}`` (embeddings, :mod:`~aifactory_train.data.matched`).

Every form may carry ``id`` (unique within its source) and ``group`` (rows of one group are never split over train and
eval), and for the slices of an evaluation ``language`` and ``label``.

What else stands beside these is used where its meaning is certain (``system`` beside a conversation, ``context`` and
``history`` of an instruction, ``function_call``, ``loss: false`` of a turn, ...: the table in docs/data.md), refused
where the text would be wrong without it (pictures, sound), and otherwise named with its count (:class:`Unused`).

The canonical row is ``{"messages": [...], "tools"?: [...]}``, with ``rejected: [...]`` or ``desirable: bool`` for
preferences, or ``{"text": ...}``, for heads with ``labels: [...]`` or ``positive`` and ``negatives: [...]``; plus
``id`` and ``group`` where given.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from aifactory_train.core.errors import did_you_mean
from aifactory_train.data import labelled, matched
from aifactory_train.data.cells import (
    RawRow,
    RowError,
    Unused,
    blank,
    column_error,
    kind_of,
    parse_json,
    unseen,
    yes_or_no,
)
from aifactory_train.data.questions import answered, asked, with_system
from aifactory_train.data.tool_calls import tool_schemas
from aifactory_train.data.turns import AS_TURNS, note_text, read_turns, role_of, supervised_turns, turns_in_text

#: Columns of a question, for rows that judge answers.
QUESTIONS = ("prompt", "instruction", "question", "input", "conversations", "messages", "query")
#: (prompt column, completion column) that are read as the prompt form, most specific first.
PROMPT_COLUMNS = [
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("input", "output"),
]
KNOWN_COLUMNS = sorted(
    {"messages", "conversations", "text", "id", "group", "language", "label", "tools", "system"}
    | {c for p in PROMPT_COLUMNS for c in p}
)


def detect_format(columns: list[str]) -> tuple[str, str]:
    """``(format, reason)`` for rows with these columns. Raises :class:`RowError` when none fits."""
    names = set(columns)
    if "chosen" in names and "rejected" in names:
        raise _preferences("chosen", "rejected")
    if "messages" in names:
        return "messages", "there is a column 'messages'"
    if "conversations" in names:
        return "messages", "there is a column 'conversations' (ShareGPT)"
    for prompt, completion in PROMPT_COLUMNS:
        if prompt in names and completion in names:
            return "prompt", f"there are columns '{prompt}' and '{completion}'"
    if "text" in names:
        return "text", "there is a column 'text'"
    if names >= OPENAI_PAIR.keys():
        raise _preferences(*OPENAI_PAIR)
    shown = ", ".join(map(str, columns[:12])) or "none"
    others = [str(c) for c in columns if c not in KNOWN_COLUMNS]
    hint = next((h for c in others if (h := did_you_mean(c, KNOWN_COLUMNS))), "")
    raise RowError(
        f"no known columns: {shown}{hint}",
        "rows need 'messages', 'prompt' and 'completion', or 'text'; rename with data.train.0.columns={mine: prompt, "
        "...}",
    )


def _preferences(chosen: str, rejected: str) -> RowError:
    return RowError(
        f"there are columns '{chosen}' and '{rejected}': preferences",
        f"set methods.preference.kind to dpo or orpo, or rename the answer to learn with columns={{{chosen}: "
        f"completion}}",
    )


def canonical(
    row: Any, fmt: str, columns: dict[str, str], unused: Unused | None = None, ruled: Collection[str] = ()
) -> dict[str, Any]:
    """Validate one raw row and return its canonical form.

    Args:
        fmt: ``messages``, ``prompt``, ``text``, ``preference``, ``feedback``, ``label``, ``labels`` or ``retrieval``.
        columns: new names of columns.
        unused: gathers what the row holds and training does not use.
        ruled: columns that the split reads; they are in use.
    """
    if not isinstance(row, dict):
        raise RowError(f"a row is an object of named columns, this is {kind_of(row)}")
    unused = unused if unused is not None else Unused()
    cells = RawRow(row, columns, unused)
    row = cells.cells
    if fmt == "text":
        text = cells.get("text")
        if not isinstance(text, str):
            raise column_error("text", row)
        if unseen(text):
            raise RowError("'text' is empty")
        note_text(text, unused)
        out: dict[str, Any] = {"text": text}
    elif fmt in ("label", "labels", "retrieval"):
        out = matched.matched(cells) if fmt == "retrieval" else _labelled(cells, several=fmt == "labels")
    else:
        out = {}
        if fmt == "preference":
            messages, out["rejected"] = _pair(cells)
        elif fmt == "feedback":
            if blank(row.get("label")) and not blank(row.get("kto_tag")):  # LLaMA-Factory's name
                row = cells.cells = {name: v for name, v in row.items() if name != "label"}
                row["label"] = row.pop("kto_tag")
            messages = _rated(cells)
            out["desirable"] = desirable(row)
        else:
            messages = _from_messages(cells) if fmt == "messages" else _from_prompt(cells)
        out = {"messages": messages, **out}
        tools = tool_schemas(cells)
        if tools is not None:
            out["tools"] = tools
        if not any(m["role"] == "assistant" for m in messages):
            raise RowError("no assistant turn: nothing to learn from this row", "add the answer, or leave the row out")
        if messages[-1]["role"] != "assistant":
            unused.remarks["a conversation does not end with the assistant: nothing is learnt of its last turns"] += 1
        if all(m.get("weight", 1) == 0 for m in messages if m["role"] == "assistant"):
            raise RowError("every assistant turn has weight 0: all tokens would be masked")
    for key in ("id", "group", "language", "label"):
        value = row.get(key) if key != "label" or fmt not in ("feedback", "label", "labels") else None
        if value is not None and value != "" and value == value:  # not a gap of pandas
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                if key in ("language", "label"):
                    cells.used.discard(key)
                    continue  # some other column of that name
                raise RowError(f"'{key}' is {kind_of(value)}, not text or a number")
            out[key] = str(value)
    cells.count(fmt, ruled)
    return out


def _labelled(row: RawRow, *, several: bool) -> dict[str, Any]:
    """A text and its labels: of an answer that is the label, or of a column beside a text."""
    names = row.cells
    for question, answer in PROMPT_COLUMNS:
        if question in names and answer in names and not _is_turns(names[answer]):
            return labelled.answered(row, question, answer, several)
    if any(names.get(name) for name in ("messages", "conversations")):
        return labelled.of_conversation(row, _from_messages(row), several)
    if any(question in names and answer in names for question, answer in PROMPT_COLUMNS):
        return labelled.of_conversation(row, _from_prompt(row), several)
    found = labelled.beside(row, several)
    if found is None:
        raise RowError(
            f"a head learns from rows with 'text' and 'label' (found: {', '.join(map(str, list(names)[:12]))})",
            "rename with data.train.0.columns={mine: text, other: label}",
        )
    return found


def _is_turns(answer: Any) -> bool:
    return isinstance(answer, list) and bool(answer) and isinstance(answer[0], dict)


def _turns_of_cell(raw: Any) -> Any:
    """What a column of turns holds: a cell of a CSV file, or text in Parquet, holds JSON."""
    if isinstance(raw, str) and raw.lstrip().startswith("["):
        try:
            return parse_json(raw)
        except json.JSONDecodeError:
            raise RowError(
                "'messages' is text that is not valid JSON",
                "what Python prints is none: write the column with json.dumps, or the rows as .jsonl",
            ) from None
    return raw


def _from_messages(row: RawRow) -> list[dict[str, Any]]:
    raw, where = row.get("messages"), "messages"
    if raw is None and "conversations" in row.cells:
        raw = row.get("conversations")
    raw = _turns_of_cell(raw)
    if raw is None:
        raise column_error("messages", row.cells)
    return with_system(row, read_turns(raw, where, row.unused))


def _rated(row: RawRow) -> list[dict[str, Any]]:
    """The conversation whose last answer ``label`` judges."""
    columns = row.cells
    paired = any(p in columns and c in columns for p, c in PROMPT_COLUMNS)
    if paired or not any(columns.get(name) for name in ("messages", "conversations")):
        return _from_prompt(row)
    messages = _from_messages(row)
    if messages[-1]["role"] != "assistant":
        raise RowError("the last turn is not the assistant's: 'label' judges the last answer")
    for message in messages[:-1]:
        if message["role"] == "assistant":
            message["weight"] = 0
    return messages


def _pair(row: RawRow) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The conversations that end with the chosen and with the rejected answer; only what differs carries loss."""
    _from_openai(row)
    _from_conversation(row)
    for name in ("chosen", "rejected"):
        if name not in row.cells:
            raise column_error(name, row.cells)
    answers = {name: row.get(name) for name in ("chosen", "rejected")}
    # LLaMA-Factory writes an answer as one turn.
    answers = {name: [answer] if isinstance(answer, dict) else answer for name, answer in answers.items()}
    for name, answer in answers.items():
        if isinstance(answer, str) and (held := turns_in_text(answer)):
            answers[name] = held
            row.unused.remarks[AS_TURNS] += 1
    key = _question_of_pair(row, answers)
    sides, repeated = [], False
    for name, answer in answers.items():
        if key is None:
            sides.append(with_system(row, read_turns(answer, name, row.unused)))
        else:
            side, again = answered(row, asked(row, key), answer, name)
            sides.append(side)
            repeated = repeated or again
    chosen, rejected = sides
    if chosen == rejected:
        raise RowError("'chosen' and 'rejected' are the same", "leave the row out: there is nothing to prefer")
    if key is None or repeated:
        common = next(
            (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
            min(len(chosen), len(rejected)),
        )
        for side in sides:
            for message in side[:common]:
                if message["role"] == "assistant":
                    message["weight"] = 0
    if [m["content"] for m in chosen if m["role"] == "system"] != [
        m["content"] for m in rejected if m["role"] == "system"
    ]:
        row.unused.remarks["the two answers of a pair stand behind different system turns"] += 1
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        if not supervised_turns(side):
            raise RowError(f"'{name}' has no answer of the assistant of its own")
    return chosen, rejected


#: OpenAI's names of the answers of a pair, whose question stands in ``input: {messages, tools}``.
OPENAI_PAIR = {"preferred_output": "chosen", "non_preferred_output": "rejected"}


def _from_openai(row: RawRow) -> None:
    """Bring a pair in OpenAI's form into ours."""
    cells = row.cells
    if not ("chosen" in cells or "rejected" in cells):
        cells = {OPENAI_PAIR.get(name, name): value for name, value in cells.items()}
    asked = cells.get("input")
    if isinstance(asked, str) and asked.lstrip().startswith("{"):
        try:
            asked = parse_json(asked)
        except ValueError:
            asked = None  # a question that begins with a brace
    if isinstance(asked, dict) and "messages" in asked and "instruction" not in cells:
        cells = {**{name: value for name, value in cells.items() if name != "input"}, **asked}
    row.cells = cells


def _from_conversation(row: RawRow) -> None:
    """Bring a pair that ms-swift writes into ours: the chosen answer ends ``messages``, or is the ``response``, and the
    other one stands beside it as ``rejected_response``, or with its whole conversation as ``rejected_messages``."""
    cells = row.cells
    if not (blank(cells.get("chosen")) and blank(cells.get("rejected"))):
        return
    talk = next((name for name in ("messages", "conversations") if not blank(cells.get(name))), None)
    rest = dict(cells)
    if talk and not blank(cells.get("rejected_messages")):
        rest |= {"chosen": rest.pop(talk), "rejected": rest.pop("rejected_messages")}
    elif talk and not blank(cells.get("rejected_response")):
        turns = _turns_of_cell(cells[talk])
        if not (isinstance(turns, list) and isinstance(turns[-1], dict) and role_of(turns[-1]) == "assistant"):
            raise RowError(f"'{talk}' does not end with the turn that 'rejected_response' is an alternative to")
        rest |= {talk: turns[:-1], "chosen": turns[-1:], "rejected": rest.pop("rejected_response")}
    elif not blank(cells.get("response")) and not blank(cells.get("rejected_response")):
        rest |= {"chosen": rest.pop("response"), "rejected": rest.pop("rejected_response")}
    row.cells = rest


def _question_of_pair(row: RawRow, answers: dict[str, Any]) -> str | None:
    """The column of the question; None where both answers are conversations that hold it."""
    if row.cells.get("prompt") is not None:
        return "prompt"
    talks = all(isinstance(a, list) and a and isinstance(a[0], dict) for a in answers.values())
    if talks and "assistant" not in [role_of(a[0]) for a in answers.values()]:
        return None
    for name in QUESTIONS[1:]:
        if not blank(row.cells.get(name)):
            return name
    if any(isinstance(a, str) for a in answers.values()):
        raise RowError(
            f"the column 'prompt' is missing: '{'chosen' if isinstance(answers['chosen'], str) else 'rejected'}' is "
            f"an answer, "
            f"and no column is its question (found: {', '.join(map(str, list(row.cells)[:12]))})",
            "name the question: data.train.0.columns={mine: prompt}",
        )
    return None


def desirable(row: dict[str, Any]) -> bool:
    """What ``label`` says of a rated answer: true, false, 1 or 0 (1.0 and 0.0 in a column that pandas found gaps in),
    in a CSV as text. Raises :class:`RowError` for anything else."""
    label = row.get("label")
    said = yes_or_no(label)
    if said is not None:
        return said
    if blank(label):
        raise RowError("the column 'label' is missing", "KTO needs label: true (desirable) or false in every row")
    raise RowError(
        f"'label' is {label!r}, not true or false", "KTO needs label: true (desirable) or false in every row"
    )


def _from_prompt(row: RawRow) -> list[dict[str, Any]]:
    for prompt_key, completion_key in PROMPT_COLUMNS:
        if prompt_key in row.cells and completion_key in row.cells:
            break
    else:
        raise column_error("prompt" if "prompt" not in row.cells else "completion", row.cells)
    return answered(row, asked(row, prompt_key), row.get(completion_key), completion_key)[0]
