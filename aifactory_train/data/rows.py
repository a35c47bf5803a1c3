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

The canonical row is ``{"messages": [...], "tools"?: [...]}``, with ``rejected: [...]`` or ``desirable: bool`` for preferences, or ``{"text": ...}`` plus ``id`` and ``group`` where given.
"""

from __future__ import annotations

import json
from typing import Any

from aifactory_train.errors import UserError, did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
}
_MESSAGE_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "thinking", "weight"}
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


def canonical(row: Any, fmt: str, columns: dict[str, str]) -> dict[str, Any]:
    """Validate one raw row and return its canonical form. ``fmt`` is ``messages``, ``prompt`` or ``text``."""
    if not isinstance(row, dict):
        raise RowError(f"a row is an object of named columns, this is {_kind(row)}")
    if columns:
        row = {columns.get(key, key): value for key, value in row.items()}
    if fmt == "text":
        text = row.get("text")
        if not isinstance(text, str):
            raise _column_error("text", row)
        if not text.strip():
            raise RowError("'text' is empty")
        out: dict[str, Any] = {"text": text}
    else:
        out = {}
        if fmt == "preference":
            messages, out["rejected"] = _pair(row)
        elif fmt == "feedback":
            messages = _from_prompt(row)
            out["desirable"] = desirable(row)
            row = {k: v for k, v in row.items() if k != "label"}
        else:
            messages = _from_messages(row) if fmt == "messages" else _from_prompt(row)
        out = {"messages": messages, **out}
        tools = row.get("tools")
        if tools:
            out["tools"] = _tools(tools)
        if not any(m["role"] == "assistant" for m in messages):
            raise RowError("no assistant turn: nothing to learn from this row", "add the answer, or leave the row out")
        if all(m.get("weight", 1) == 0 for m in messages if m["role"] == "assistant"):
            raise RowError("every assistant turn has weight 0: all tokens would be masked")
    for key in ("id", "group", "language", "label"):
        value = row.get(key)
        if value is not None and value != "":
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                if key in ("language", "label"):
                    continue  # some other column of that name
                raise RowError(f"'{key}' is {_kind(value)}, not text or a number")
            out[key] = str(value)
    return out


def _from_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    raw = row.get("messages")
    if raw is None and "conversations" in row:
        raw = row["conversations"]
    if isinstance(raw, str) and raw.lstrip().startswith("["):
        try:
            raw = json.loads(raw)  # a CSV cell or Parquet string that holds JSON
        except ValueError:
            raise RowError("'messages' is text that is not valid JSON") from None
    if raw is None:
        raise _column_error("messages", row)
    return _messages(raw, "messages")


def _pair(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The conversations that end with the chosen and with the rejected answer; only what differs carries loss."""
    sides = []
    for name in ("chosen", "rejected"):
        if name not in row:
            raise _column_error(name, row)
    if _whole_conversations(row):
        row = {key: value for key, value in row.items() if key != "prompt"}
    for name in ("chosen", "rejected"):
        if "prompt" in row:
            sides.append(_from_prompt({"prompt": row["prompt"], "completion": row[name], "system": row.get("system")}))
        else:
            sides.append(_messages(row[name], name))
    chosen, rejected = sides
    if chosen == rejected:
        raise RowError("'chosen' and 'rejected' are the same", "leave the row out: there is nothing to prefer")
    if "prompt" not in row:
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


def _whole_conversations(row: dict[str, Any]) -> bool:
    """Whether chosen and rejected are conversations that begin with the prompt themselves, as in several published data sets:
    put before them once more, it would be asked twice."""
    prompt = row.get("prompt")
    for name in ("chosen", "rejected"):
        if not isinstance(row[name], list) or not isinstance(prompt, str) or row.get("system"):
            return False
        first = next((m for m in _messages(row[name], name) if m["role"] != "system"), None)
        if first is None or first["role"] != "user" or first["content"].strip() != prompt.strip():
            return False
    return True


def desirable(row: dict[str, Any]) -> bool:
    """What ``label`` says of a judged answer: true, false, 1 or 0, in a CSV as text. Raises :class:`RowError` for anything else."""
    label = row.get("label")
    if isinstance(label, bool) or (isinstance(label, int) and label in (0, 1)):
        return bool(label)
    if isinstance(label, str) and label.strip().lower() in ("true", "false", "1", "0"):
        return label.strip().lower() in ("true", "1")
    if label is None:
        raise RowError("the column 'label' is missing", "KTO needs label: true (desirable) or false in every row")
    raise RowError(
        f"'label' is {label!r}, not true or false", "KTO needs label: true (desirable) or false in every row"
    )


def _messages(raw: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(raw, list):
        raise RowError(f"'{where}' is {_kind(raw)}, not a list of turns")
    if not raw:
        raise RowError(f"'{where}' is an empty list")
    return [_message(m, f"{where}[{i}]") for i, m in enumerate(raw)]


def _message(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise RowError(f"{where} is {_kind(raw)}, not an object with role and content")
    if "role" not in raw and "from" in raw:
        raw = {"role": _SHAREGPT_ROLES.get(raw["from"], raw["from"]), "content": raw.get("value")}
    role = raw.get("role")
    if role not in ROLES:
        hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        raise RowError(f"{where}: unknown role {role!r}{hint}", f"roles are {', '.join(ROLES)}")
    content = raw.get("content")
    if isinstance(content, list):
        content = _text_parts(content, where)
    calls = raw.get("tool_calls") or None
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise RowError(f"{where}: 'content' is {_kind(content)}, not text")
    out: dict[str, Any] = {"role": role, "content": content}
    if calls:
        if role != "assistant":
            raise RowError(f"{where}: only the assistant has tool_calls")
        out["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    for key in ("name", "tool_call_id", "reasoning_content", "thinking"):
        if raw.get(key) is not None:
            if not isinstance(raw[key], str):
                raise RowError(f"{where}: '{key}' is {_kind(raw[key])}, not text")
            out[key] = raw[key]
    weight = raw.get("weight")
    if weight is not None:
        if weight not in (0, 1):
            raise RowError(f"{where}: 'weight' is {weight!r}; a turn is supervised (1) or not (0)")
        out["weight"] = int(weight)
    if role == "assistant" and not content.strip() and not calls:
        raise RowError(f"{where}: the assistant's turn is empty")
    return out


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


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise RowError(f"{where} is {_kind(call)}, not an object")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"{where}: a tool call needs function.name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            raise RowError(f"{where}: function.arguments is not valid JSON") from None
    if not isinstance(arguments, dict):
        raise RowError(f"{where}: function.arguments is {_kind(arguments)}, not an object")
    out: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(call.get("id"), str):
        out["id"] = call["id"]
    return out


def _tools(raw: Any) -> list[Any]:
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except ValueError:
            raise RowError("'tools' is text that is not valid JSON") from None
    if not isinstance(raw, list) or not all(isinstance(tool, dict) for tool in raw):
        raise RowError("'tools' is not a list of JSON schemas")
    return raw


def _from_prompt(row: dict[str, Any]) -> list[dict[str, Any]]:
    for prompt_key, completion_key in _PROMPT_COLUMNS:
        if prompt_key in row and completion_key in row:
            break
    else:
        raise _column_error("prompt" if "prompt" not in row else "completion", row)
    prompt, completion = row[prompt_key], row[completion_key]
    messages: list[dict[str, Any]] = []
    system = row.get("system")
    if system is not None and system != "":
        if not isinstance(system, str):
            raise RowError(f"'system' is {_kind(system)}, not text")
        messages.append({"role": "system", "content": system})
    if isinstance(prompt, list):
        messages += _messages(prompt, prompt_key)
    elif isinstance(prompt, str):
        if not prompt.strip():
            raise RowError(f"'{prompt_key}' is empty")
        extra = row.get("input") if prompt_key == "instruction" else None
        if extra is not None and not isinstance(extra, str):
            raise RowError(f"'input' is {_kind(extra)}, not text")
        messages.append({"role": "user", "content": f"{prompt}\n\n{extra}" if extra else prompt})
    else:
        raise RowError(f"'{prompt_key}' is {_kind(prompt)}, not text or a list of turns", _FLAT)
    if isinstance(completion, list):
        # Only the completion is learnt: earlier assistant turns are part of the question.
        for message in messages:
            if message["role"] == "assistant":
                message["weight"] = 0
        messages += _messages(completion, completion_key)
    elif isinstance(completion, str):
        if not completion.strip():
            raise RowError(f"'{completion_key}' is empty: no assistant turn to learn from")
        for message in messages:
            if message["role"] == "assistant":
                message["weight"] = 0
        messages.append({"role": "assistant", "content": completion})
    else:
        raise RowError(f"'{completion_key}' is {_kind(completion)}, not text or a list of turns", _FLAT)
    return messages


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
