"""Rows: what one line of training data may look like, and its one canonical form.

Accepted forms (``DataSource.format``; ``auto`` decides by the columns of the first row and says so in the report):

* ``messages``: ``{"messages": [{"role", "content"}, ...], "tools"?: [...]}``; also ShareGPT's ``conversations``;
* ``prompt``: ``{"prompt", "completion", "system"?}``; prompt and completion may themselves be lists of messages; Alpaca's
  ``instruction``/``input``/``output`` and ``question``/``answer`` are read the same way;
* ``text``: ``{"text"}``, continued pre-training;
* ``preference``: ``{"prompt", "chosen", "rejected", "system"?}`` (DPO, ORPO); chosen and rejected may be lists of messages, with
  the prompt as their common beginning where there is no ``prompt``, or where they repeat it;
* ``feedback``: the ``prompt`` form with ``label``, true or false (KTO).

Every form may carry ``id`` (unique within its source) and ``group`` (rows of one group are never split over train and eval), and for
the slices of an evaluation ``language`` and ``label``.

What else stands beside these is used where its meaning is certain (``system`` beside a conversation, ``context`` and ``history`` of an
instruction, ``function_call``, ``loss: false`` of a turn, ...: the table in docs/data.md), refused where the text would be wrong without
it (pictures, sound), and otherwise named with its count (:class:`Unused`).

The canonical row is ``{"messages": [...], "tools"?: [...]}``, with ``rejected: [...]`` or ``desirable: bool`` for preferences, or ``{"text": ...}`` plus ``id`` and ``group`` where given.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from aifactory_train.core.errors import UserError, did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool")
#: Names that other formats give to the roles (ShareGPT, OpenAI's old function calls).
_OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "observation": "tool",
}
#: Roles of ShareGPT whose text is a call, or a list of calls, as JSON.
_CALL_ROLES = ("function_call", "tool_call", "tool_calls")
#: Keys of a turn that are read.
_TURN_KEYS = frozenset(
    {
        *("role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name"),
        *("reasoning_content", "reasoning", "thinking", "weight", "loss", "train"),
    }
)
#: Keys of a turn that say whether it is learnt.
_LEARN_KEYS = ("weight", "loss", "train")
#: Columns, and keys of a turn, whose text is wrong without what they hold.
_MEDIA = frozenset({"image", "images", "audio", "audios", "video", "videos"})
#: What stands in a text for a picture that comes with it.
_PLACEHOLDERS = ("<image>", "<video>", "<audio>")
#: Columns that hold the system prompt, the one that counts first.
_SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
#: Columns of a question, for rows that judge answers.
_QUESTIONS = ("prompt", "instruction", "question", "input")
#: Columns that every form reads.
_COMMON = frozenset({"id", "group", "language", "label"})
#: (prompt column, completion column) that are read as the prompt form, most specific first.
_PROMPT_COLUMNS = [
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("input", "output"),
]
KNOWN_COLUMNS = sorted(
    {"messages", "conversations", "text", "id", "group", "language", "label", "tools", "system"}
    | {c for p in _PROMPT_COLUMNS for c in p}
)


#: How a nested column, a number or a null is mended.
_FLAT = "write what is meant as text into a column of its own, or leave the row out"


class RowError(ValueError):
    """What is wrong with a row; the caller adds the file and the line."""

    def __init__(self, what: str, fix: str | None = None):
        super().__init__(what)
        self.what, self.fix = what, fix


def detect_format(columns: list[str]) -> tuple[str, str]:
    """``(format, reason)`` for rows with these columns. Raises :class:`RowError` when none fits."""
    names = set(columns)
    if "chosen" in names and "rejected" in names:
        raise RowError(
            "there are columns 'chosen' and 'rejected': preferences",
            "set methods.preference.kind to dpo or orpo, or rename the answer to learn with columns={chosen: completion}",
        )
    if "messages" in names:
        return "messages", "there is a column 'messages'"
    if "conversations" in names:
        return "messages", "there is a column 'conversations' (ShareGPT)"
    for prompt, completion in _PROMPT_COLUMNS:
        if prompt in names and completion in names:
            return "prompt", f"there are columns '{prompt}' and '{completion}'"
    if "text" in names:
        return "text", "there is a column 'text'"
    shown = ", ".join(map(str, columns[:12])) or "none"
    hint = next((h for c in columns if (h := did_you_mean(str(c), KNOWN_COLUMNS))), "")
    raise RowError(
        f"no known columns: {shown}{hint}",
        "rows need 'messages', 'prompt' and 'completion', or 'text'; rename with data.train.0.columns={mine: prompt, ...}",
    )


@dataclass
class Unused:
    """What rows held and training does not use: columns and keys of turns by name, and remarks, each with the number of rows
    (turns). Nulls and empty values are not counted."""

    columns: collections.Counter = field(default_factory=collections.Counter)
    turn_keys: collections.Counter = field(default_factory=collections.Counter)
    remarks: collections.Counter = field(default_factory=collections.Counter)

    def update(self, other: Unused) -> None:
        """Add the counts of other rows."""
        self.columns.update(other.columns)
        self.turn_keys.update(other.turn_keys)
        self.remarks.update(other.remarks)

    def as_dict(self) -> dict[str, dict[str, int]]:
        """For the report: the most frequent names first."""
        return {"columns": _most(self.columns), "turn_keys": _most(self.turn_keys)}


#: Names of columns and keys in a report; where rows are keyed by their content there would be as many as rows.
_MOST_NAMES = 100


def _most(counts: collections.Counter) -> dict[str, int]:
    listed = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(n for _, n in listed[_MOST_NAMES:])
    return {**dict(listed[:_MOST_NAMES]), **({f"({len(listed) - _MOST_NAMES} more names)": rest} if rest else {})}


def _blank(value: Any) -> bool:
    """Whether a cell holds nothing: null, not a number (a gap of pandas), empty text, list or object, or an object of nulls."""
    if value is None or value == "" or value == [] or value == {}:
        return True
    if isinstance(value, float):
        return value != value
    if isinstance(value, str):
        return value.isspace() or value in ("[]", "{}", "null")
    if isinstance(value, dict):
        return all(_blank(v) for v in value.values())
    return isinstance(value, list) and all(_blank(v) for v in value)


def parse_json(text: str) -> Any:
    """``json.loads``, but an integer of more digits than Python converts (4,300) stays text. Raises :class:`ValueError`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return _patient.decode(text)


def _integer(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


_patient = json.JSONDecoder(parse_int=_integer)


class _Row:
    """One raw row under the names that its columns have in this program, and which of them were read."""

    def __init__(self, raw: dict[str, Any], columns: dict[str, str], unused: Unused):
        self.cells, self.unused = raw, unused
        self.names: dict[str, str] = {}  # under which name a renamed column stands in the file
        self.used: set[str] = set(_COMMON)
        self.lost: list[str] = []
        if columns:
            self._rename(raw, columns)

    def _rename(self, raw: dict[str, Any], columns: dict[str, str]) -> None:
        """A column that the recipe names wins over one that bears the name already, and the first of two that the recipe names."""
        self.cells = {}
        for column, name in columns.items():
            if column not in raw:
                continue
            value = raw[column]
            if name in self.cells and (_blank(value) or not _blank(self.cells[name])):
                self.lost += [] if _blank(value) else [column]
                continue
            self.cells[name], self.names[name] = value, column
        for column, value in raw.items():
            if column in columns:
                continue
            if column not in self.cells or (self.cells[column] is None and value is not None):
                self.cells[column] = value
                self.names.pop(column, None)
            elif not _blank(value):
                self.lost.append(column)
        self.cells = {name: self.cells[name] for name in _in_order(raw, columns, self.cells)}
        answer = self.cells.get("completion")
        if "completion" in self.names and isinstance(answer, (int, float)) and not _blank(answer):
            # The recipe says that this column is the answer: labels are often numbers.
            self.cells["completion"] = _number_as_text(answer)

    def get(self, name: str) -> Any:
        """The cell, which counts as read."""
        self.used.add(name)
        return self.cells.get(name)

    def count(self, fmt: str, ruled: Collection[str]) -> None:
        """Count what was not read, or refuse it. ``ruled``: columns (names in the file) that the split reads."""
        self.unused.columns.update(name[:80] for name in self.lost if name not in ruled)
        for name, value in self.cells.items():
            if name in self.used or _blank(value):
                continue
            column = str(self.names.get(name, name))
            if name in _MEDIA and fmt != "text" and not isinstance(value, (bool, int, float)):
                raise RowError(
                    f"the column '{column}' holds {_kind(value)}: only text can be trained on",
                    "leave the row out; where its text is right without it, name the column otherwise: "
                    f"data.train.0.columns={{{column}: unused_{column}}}",
                )
            if column not in ruled:
                self.unused.columns[column[:80]] += 1


def _in_order(raw: dict[str, Any], columns: dict[str, str], cells: dict[str, Any]) -> list[str]:
    """Names in the order of the file."""
    return list(dict.fromkeys(name for c in raw if (name := columns.get(c, c)) in cells))


def _number_as_text(value: int | float) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def canonical(
    row: Any, fmt: str, columns: dict[str, str], unused: Unused | None = None, ruled: Collection[str] = ()
) -> dict[str, Any]:
    """Validate one raw row and return its canonical form.

    Args:
        fmt: ``messages``, ``prompt``, ``text``, ``preference`` or ``feedback``.
        columns: new names of columns.
        unused: gathers what the row holds and training does not use.
        ruled: columns that the split reads; they are in use.
    """
    if not isinstance(row, dict):
        raise RowError(f"a row is an object of named columns, this is {_kind(row)}")
    unused = unused if unused is not None else Unused()
    cells = _Row(row, columns, unused)
    row = cells.cells
    if fmt == "text":
        text = cells.get("text")
        if not isinstance(text, str):
            raise _column_error("text", row)
        if not text.strip():
            raise RowError("'text' is empty")
        out: dict[str, Any] = {"text": text}
    else:
        out = {}
        if fmt == "preference":
            messages, out["rejected"] = _pair(cells)
        elif fmt == "feedback":
            messages = _judged(cells)
            out["desirable"] = desirable(row)
        else:
            messages = _from_messages(cells) if fmt == "messages" else _from_prompt(cells)
        out = {"messages": messages, **out}
        tools = _tools(cells)
        if tools is not None:
            out["tools"] = tools
        if not any(m["role"] == "assistant" for m in messages):
            raise RowError("no assistant turn: nothing to learn from this row", "add the answer, or leave the row out")
        if all(m.get("weight", 1) == 0 for m in messages if m["role"] == "assistant"):
            raise RowError("every assistant turn has weight 0: all tokens would be masked")
    for key in ("id", "group", "language", "label"):
        value = row.get(key) if key != "label" or fmt != "feedback" else None
        if value is not None and value != "":
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                if key in ("language", "label"):
                    cells.used.discard(key)
                    continue  # some other column of that name
                raise RowError(f"'{key}' is {_kind(value)}, not text or a number")
            out[key] = str(value)
    cells.count(fmt, ruled)
    return out


def _from_messages(row: _Row) -> list[dict[str, Any]]:
    raw, where = row.get("messages"), "messages"
    if raw is None and "conversations" in row.cells:
        raw = row.get("conversations")
    if isinstance(raw, str) and raw.lstrip().startswith("["):
        try:
            raw = parse_json(raw)  # a CSV cell or Parquet string that holds JSON
        except ValueError:
            raise RowError("'messages' is text that is not valid JSON") from None
    if raw is None:
        raise _column_error("messages", row.cells)
    return _with_system(row, _messages(raw, where, row.unused))


def _system(row: _Row) -> str | None:
    """The text of the system column."""
    for name in _SYSTEM_COLUMNS:
        if isinstance(row.cells.get(name), str) and row.cells[name].strip():
            return row.get(name)
    return None


def _leading(messages: list[dict[str, Any]]) -> int:
    """How many system turns a conversation opens with."""
    return next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), len(messages))


def _with_system(row: _Row, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation behind the system column; one that opens with a system turn of its own keeps that."""
    told = _system(row)
    if told is None:
        return messages
    own = messages[: _leading(messages)]
    if not own:
        return [{"role": "system", "content": told}, *messages]
    if not any(m["content"].strip() == told.strip() for m in own):
        row.used.difference_update(_SYSTEM_COLUMNS)  # named as a column that was not used
        row.unused.remarks["system column left out: the conversation opens with another system turn"] += 1
    return messages


def _judged(row: _Row) -> list[dict[str, Any]]:
    """The conversation whose last answer ``label`` judges."""
    columns = row.cells
    paired = any(p in columns and c in columns for p, c in _PROMPT_COLUMNS)
    if paired or not any(columns.get(name) for name in ("messages", "conversations")):
        return _from_prompt(row)
    messages = _from_messages(row)
    if messages[-1]["role"] != "assistant":
        raise RowError("the last turn is not the assistant's: 'label' judges the last answer")
    for message in messages[:-1]:
        if message["role"] == "assistant":
            message["weight"] = 0
    return messages


def _pair(row: _Row) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The conversations that end with the chosen and with the rejected answer; only what differs carries loss."""
    for name in ("chosen", "rejected"):
        if name not in row.cells:
            raise _column_error(name, row.cells)
    answers = {name: row.get(name) for name in ("chosen", "rejected")}
    key = _question_of_pair(row, answers)
    sides, repeated = [], False
    for name, answer in answers.items():
        if key is None:
            sides.append(_with_system(row, _messages(answer, name, row.unused)))
        else:
            side, again = _answered(row, _asked(row, key), answer, name)
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
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        if not supervised_turns(side):
            raise RowError(f"'{name}' has no answer of the assistant of its own")
    return chosen, rejected


def _question_of_pair(row: _Row, answers: dict[str, Any]) -> str | None:
    """The column of the question; None where both answers are conversations that hold it."""
    if row.cells.get("prompt") is not None:
        return "prompt"
    if all(isinstance(a, list) and a and isinstance(a[0], dict) for a in answers.values()):
        openings = [a[0].get("role") or a[0].get("from") for a in answers.values()]
        if "assistant" not in openings and "gpt" not in openings:
            return None
    for name in _QUESTIONS[1:]:
        if not _blank(row.cells.get(name)):
            return name
    if any(isinstance(a, str) for a in answers.values()):
        raise RowError(
            f"the column 'prompt' is missing: '{'chosen' if isinstance(answers['chosen'], str) else 'rejected'}' is an answer, "
            f"and no column is its question (found: {', '.join(map(str, list(row.cells)[:12]))})",
            "name the question: data.train.0.columns={mine: prompt}",
        )
    return None


def desirable(row: dict[str, Any]) -> bool:
    """What ``label`` says of a judged answer: true, false, 1 or 0 (1.0 and 0.0 in a column that pandas found gaps in), in a CSV as
    text. Raises :class:`RowError` for anything else."""
    label = row.get("label")
    said = _yes_or_no(label)
    if said is not None:
        return said
    if _blank(label):
        raise RowError("the column 'label' is missing", "KTO needs label: true (desirable) or false in every row")
    raise RowError(
        f"'label' is {label!r}, not true or false", "KTO needs label: true (desirable) or false in every row"
    )


def _yes_or_no(value: Any) -> bool | None:
    """True, false, 1, 0, 1.0, 0.0 or one of them as text; None for anything else."""
    if isinstance(value, (bool, int, float)):
        return bool(value) if value in (0, 1) else None
    if isinstance(value, str):
        return {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}.get(
            value.strip().lower()
        )
    return None


def _messages(raw: Any, where: str, unused: Unused) -> list[dict[str, Any]]:
    if not isinstance(raw, list):
        raise RowError(f"'{where}' is {_kind(raw)}, not a list of turns")
    if not raw:
        raise RowError(f"'{where}' is an empty list")
    return [_message(m, f"{where}[{i}]", unused) for i, m in enumerate(raw)]


def _message(raw: Any, where: str, unused: Unused) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise RowError(f"{where} is {_kind(raw)}, not an object with role and content")
    role = raw.get("role")
    if role is None:
        role = raw.get("from")
    content, content_key = raw.get("content"), "content"
    if content is None:
        content_key = next((key for key in ("value", "text") if raw.get(key) is not None), "content")
        content = raw.get(content_key)
    calls: Any = None
    if isinstance(role, str) and role not in ROLES:
        if role in _CALL_ROLES:
            role, calls, content = "assistant", _calls_of_text(content, f"{where} ({role})"), ""
        else:
            role = _OTHER_ROLES.get(role, role)
    if role not in ROLES:
        hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        raise RowError(f"{where}: unknown role {role!r}{hint}", f"roles are {', '.join(ROLES)}")
    if isinstance(content, list):
        content = _text_parts(content, where)
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise RowError(f"{where}: 'content' is {_kind(content)}, not text")
    out: dict[str, Any] = {"role": role, "content": content}
    calls = calls or _calls(raw, where, unused)
    if calls:
        if role != "assistant":
            raise RowError(f"{where}: only the assistant has tool_calls")
        out["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]", unused) for i, call in enumerate(calls)]
    for key in ("name", "tool_call_id", "reasoning_content", "thinking"):
        if raw.get(key) is not None:
            if not isinstance(raw[key], str):
                raise RowError(f"{where}: '{key}' is {_kind(raw[key])}, not text")
            out[key] = raw[key]
    if not _blank(raw.get("reasoning")):
        _reasoning(raw["reasoning"], out, unused)
    weight = _weight(raw, role, where, unused)
    if weight is not None:
        out["weight"] = weight
    if not raw.keys() <= _TURN_KEYS:
        for key, value in raw.items():
            if key in _TURN_KEYS or key == content_key or _blank(value):
                continue
            if key in _MEDIA and not isinstance(value, (bool, int, float)):
                raise RowError(f"{where}: '{key}' is not text", "only text can be trained on: leave the row out")
            unused.turn_keys[str(key)[:80]] += 1
    if content_key == "content" and raw.get("value") is not None and raw["value"] != content:
        unused.turn_keys["value"] += 1
    if role == "user" and "<" in content:
        stripped = content.strip()
        for mark in _PLACEHOLDERS:
            if stripped.startswith(mark) or stripped.endswith(mark):
                unused.remarks[f"a turn holds {mark}, but nothing but text is read"] += 1
    if role == "assistant" and not content.strip() and not calls:
        raise RowError(f"{where}: the assistant's turn is empty")
    return out


def _calls(raw: dict[str, Any], where: str, unused: Unused) -> list[Any] | None:
    """The tool calls of a turn, those in OpenAI's old form among them."""
    calls = raw.get("tool_calls") or None
    if isinstance(calls, str):
        try:
            calls = parse_json(calls) or None
        except ValueError:
            raise RowError(f"{where}: 'tool_calls' is text that is not valid JSON") from None
    if calls is not None and not isinstance(calls, list):
        raise RowError(f"{where}: 'tool_calls' is {_kind(calls)}, not a list of calls")
    old = raw.get("function_call")
    if not old or (isinstance(old, dict) and all(value is None for value in old.values())):
        return calls
    call = _old_call(old, where)
    if not calls:
        return [call]
    quiet = Unused()
    if _tool_call(call, where, quiet)["function"] not in [_tool_call(c, where, quiet)["function"] for c in calls]:
        unused.turn_keys["function_call"] += 1  # the newer key says what was called
    return calls


def _old_call(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            raise RowError(f"{where}: 'function_call' is text that is not valid JSON", _CALL) from None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise RowError(f"{where}: 'function_call' is no call with a name", _CALL)
    return {"function": value}


_CALL = 'write it as {"name": ..., "arguments": {...}}, or as tool_calls'


def _calls_of_text(value: Any, where: str) -> list[Any]:
    """Calls that stand as JSON in place of the text of a turn."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            raise RowError(f"{where}: the call is not valid JSON", _CALL) from None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"{where} is no call with a name", _CALL)
    return calls


def _reasoning(value: Any, out: dict[str, Any], unused: Unused) -> None:
    """``reasoning`` is what most templates call ``reasoning_content``."""
    if isinstance(value, str) and not out.get("reasoning_content"):
        if out.get("thinking") != value:
            out["reasoning_content"] = value
    elif value != out.get("reasoning_content"):
        unused.turn_keys["reasoning"] += 1


def _weight(raw: dict[str, Any], role: str, where: str, unused: Unused) -> int | None:
    """Whether the turn is supervised, by any of the keys that say so; None where none does."""
    said: dict[str, bool] = {}
    for key in _LEARN_KEYS:
        value = raw.get(key)
        if value is None:
            continue
        learnt = _yes_or_no(value)
        if learnt is None:
            raise RowError(f"{where}: '{key}' is {value!r:.60}; a turn is supervised (1, true) or not (0, false)")
        said[key] = learnt
    if not said:
        return None
    if len(set(said.values())) > 1:
        words = " and ".join(f"'{key}' is {str(learnt).lower()}" for key, learnt in said.items())
        raise RowError(f"{where}: {words}", "say once whether the turn is supervised")
    learnt = next(iter(said.values()))
    if role != "assistant" and learnt and "weight" not in said:
        unused.turn_keys[f"{next(iter(said))} (of a turn that is not the assistant's)"] += 1
    if "weight" in said or (role == "assistant" and not learnt):
        return int(learnt)
    return None


def _text_parts(parts: list[Any], where: str) -> str:
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise RowError(f"{where}: a content part of type '{kind}' is not text", "only text can be trained on")
    return "".join(texts)


def _tool_call(call: Any, where: str, unused: Unused) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise RowError(f"{where} is {_kind(call)}, not an object")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"{where}: a tool call needs function.name")
    arguments = function.get("arguments")
    if arguments is None:
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments) if arguments.strip() else {}
        except ValueError:
            raise RowError(f"{where}: function.arguments is not valid JSON") from None
    if not isinstance(arguments, dict):
        raise RowError(f"{where}: function.arguments is {_kind(arguments)}, not an object")
    if None in arguments.values():
        unused.remarks["null in the arguments of a tool call, learnt as it is"] += 1
    out: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(call.get("id"), str):
        out["id"] = call["id"]
    return out


def _tools(row: _Row) -> list[Any] | None:
    """The schemas of the tools, or of OpenAI's old ``functions``."""
    raw, name = row.get("tools"), "tools"
    if not raw:
        raw, name = row.cells.get("functions"), "functions"
        if _blank(raw):
            return None
        row.used.add("functions")
    if isinstance(raw, str):
        try:
            raw = parse_json(raw)
        except ValueError:
            raise RowError(f"'{name}' is text that is not valid JSON") from None
    if isinstance(raw, list) and raw and all(isinstance(tool, str) for tool in raw):
        try:
            raw = [parse_json(tool) for tool in raw]
        except ValueError:
            raise RowError(f"'{name}' holds text that is not valid JSON") from None
    if not isinstance(raw, list) or not all(isinstance(tool, dict) for tool in raw):
        raise RowError(f"'{name}' is not a list of JSON schemas")
    if name == "functions":
        raw = [tool if "function" in tool else {"type": "function", "function": tool} for tool in raw]
    return raw


def _from_prompt(row: _Row) -> list[dict[str, Any]]:
    for prompt_key, completion_key in _PROMPT_COLUMNS:
        if prompt_key in row.cells and completion_key in row.cells:
            break
    else:
        raise _column_error("prompt" if "prompt" not in row.cells else "completion", row.cells)
    return _answered(row, _asked(row, prompt_key), row.get(completion_key), completion_key)[0]


def _asked(row: _Row, key: str) -> list[dict[str, Any]]:
    """What is asked: the system column, earlier turns, the question and what belongs to it. None of it is learnt."""
    prompt = row.get(key)
    messages: list[dict[str, Any]] = []
    system = row.get("system")
    if system is not None and system != "":
        if not isinstance(system, str):
            raise RowError(f"'system' is {_kind(system)}, not text")
        messages.append({"role": "system", "content": system})
    elif (told := _system(row)) is not None:
        messages.append({"role": "system", "content": told})
    if isinstance(prompt, list):
        turns = _messages(prompt, key, row.unused)
        same = messages and any(
            m["content"].strip() == messages[0]["content"].strip() for m in turns[: _leading(turns)]
        )
        messages = turns if same else messages + turns
    elif isinstance(prompt, str):
        if not prompt.strip():
            raise RowError(f"'{key}' is empty")
        messages += _history(row)
        messages.append({"role": "user", "content": _question(row, key, prompt)})
    else:
        raise RowError(f"'{key}' is {_kind(prompt)}, not text or a list of turns", _FLAT)
    for message in messages:
        if message["role"] == "assistant":
            message["weight"] = 0
    return messages


def _question(row: _Row, key: str, prompt: str) -> str:
    """The question with Alpaca's ``input``, or with the ``context`` that an instruction or a question is about. (Of a ``prompt`` one
    expects that it is whole.)"""
    extra = row.get("input") if key == "instruction" else None
    if extra is not None and not isinstance(extra, str):
        raise RowError(f"'input' is {_kind(extra)}, not text")
    context = row.cells.get("context")
    if not extra and key in ("instruction", "question") and isinstance(context, str) and context.strip():
        row.used.add("context")
        extra = context if context.strip() not in prompt else None
    return f"{prompt}\n\n{extra}" if extra else prompt


def _history(row: _Row) -> list[dict[str, Any]]:
    """Earlier turns: Alpaca's ``history``, a list of pairs of question and answer, or a list of turns. Anything else of that name is
    a column that is not used."""
    history = row.cells.get("history")
    if isinstance(history, str) and history.lstrip().startswith("["):
        try:
            history = parse_json(history)
        except ValueError:
            return []
    if not isinstance(history, (list, tuple)) or _blank(history):
        return []
    if all(isinstance(pair, (list, tuple)) and len(pair) == 2 and all(_said(t) for t in pair) for pair in history):
        row.used.add("history")
        return [
            {"role": role, "content": text}
            for pair in history
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    if all(isinstance(turn, dict) for turn in history):
        try:
            turns = _messages(list(history), "history", row.unused)
        except RowError:
            return []
        row.used.add("history")
        return turns[_leading(turns) :] if _system(row) is not None else turns
    return []


def _said(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _answered(row: _Row, asked: list[dict[str, Any]], answer: Any, key: str) -> tuple[list[dict[str, Any]], bool]:
    """The conversation with its answer, and whether the answer (a list of turns) repeated what was asked."""
    if isinstance(answer, str):
        if not answer.strip():
            raise RowError(f"'{key}' is empty: no assistant turn to learn from")
        return [*asked, {"role": "assistant", "content": answer}], False
    if not isinstance(answer, list):
        raise RowError(f"'{key}' is {_kind(answer)}, not text or a list of turns", _FLAT)
    turns = _messages(answer, key, row.unused)
    lead, opening = _leading(turns), _leading(asked)
    own, said = turns[:lead], turns[lead:]
    system, question = asked[:opening], asked[opening:]
    again = _repeats(question, said)
    if not again:
        return asked + turns, False
    for message in said[:again]:
        if message["role"] == "assistant":
            message["weight"] = 0
    if own and system and not _alike(own, system):
        row.used.difference_update(_SYSTEM_COLUMNS)
        row.unused.remarks["system column left out: the conversation opens with another system turn"] += 1
    before = question[: len(question) - again] if again < len(question) else []
    return [*(own or system), *before, *said], True


def _repeats(question: list[dict[str, Any]], said: list[dict[str, Any]]) -> int:
    """How many of the turns that an answer opens with are the question once more: all of it, its end, or, where the question is
    only the last one of a conversation, everything up to it. 0: none."""
    if not said or said[0]["role"] != "user":
        return 0
    for n in range(min(len(question), len(said)), 0, -1):
        if _alike(question[-n:], said[:n]):
            return n
    last = max(i for i, m in enumerate(said) if m["role"] == "user") + 1
    answered = any(m["role"] == "assistant" for m in said[last:])
    if answered and 0 < len(question) <= last and _alike(question, said[last - len(question) : last]):
        return last
    return 0


def _alike(some: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Whether turns say the same, apart from blanks around them."""
    return [_gist(m) for m in some] == [_gist(m) for m in others]


def _gist(message: dict[str, Any]) -> tuple[Any, ...]:
    return message["role"], message["content"].strip(), message.get("tool_calls")


def _column_error(name: str, row: dict[str, Any]) -> RowError:
    if name in row:
        return RowError(
            f"'{name}' is {_kind(row[name])}, not text", _FLAT if isinstance(row[name], (dict, list)) else None
        )
    return RowError(
        f"the column '{name}' is missing{did_you_mean(name, map(str, row))} (found: {', '.join(map(str, list(row)[:12]))})"
    )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "empty (null)" if value is None else names.get(type(value), type(value).__name__)


def to_user_error(error: RowError, where: str) -> UserError:
    return UserError(error.what, where=where, fix=error.fix)


def supervised_turns(messages: list[dict[str, Any]]) -> list[int]:
    """Indices of the assistant turns that carry loss (weight 0 takes one out)."""
    return [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1) != 0]
