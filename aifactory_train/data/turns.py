"""Turns of a conversation, in every form that they are written in, checked and made one."""

from __future__ import annotations

import re
from typing import Any

from aifactory_train.core.errors import did_you_mean
from aifactory_train.data.cells import (
    MEDIA,
    RowError,
    Unused,
    blank,
    kind_of,
    parse_json,
    unseen,
    yes_or_no,
)
from aifactory_train.data.tool_calls import calls_of_text, calls_of_turn, tool_call

ROLES = ("system", "developer", "user", "assistant", "tool")
#: Names that other formats give to the roles (ShareGPT, OpenAI's old function calls).
OTHER_ROLES = {
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
CALL_ROLES = ("function_call", "tool_call", "tool_calls")
#: Keys under which a turn's text stands, the one that counts first.
TEXT_KEYS = ("content", "value", "text")
#: Keys of a turn that are read.
_TURN_KEYS = frozenset(
    {
        *("role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name"),
        *("reasoning_content", "reasoning", "thinking", "weight", "loss", "train"),
    }
)
#: Keys of a turn that say whether it is learnt.
LEARN_KEYS = ("weight", "loss", "train")
#: What stands in a text for a picture that comes with it.
_PLACEHOLDERS = ("<image>", "<video>", "<audio>")
#: A text that may be turns, in JSON or as Python writes them.
_OPENS, _NAMES_A_ROLE = re.compile(r"\s*(?:\[\s*)?\{"), re.compile(r"""["'](?:role|from)["']\s*:""")
#: Remarks on such texts.
AS_TURNS = "turns written as JSON text, read as turns"
AS_PARTS = "content in parts written as JSON text, read as its text"
AS_TEXT = "text like a list of turns, but no JSON of known roles that fits there: taken as text"


def opening_system_turns(messages: list[dict[str, Any]]) -> int:
    """How many system turns a conversation opens with."""
    return next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), len(messages))


def role_of(raw: dict[str, Any]) -> Any:
    """The role of a turn under its usual name; what it holds where that is none of them."""
    role = raw.get("role")
    if role is None:
        role = raw.get("from")
    if not isinstance(role, str):
        return role
    return "assistant" if role in CALL_ROLES else OTHER_ROLES.get(role, role)


def _like_turns(text: str) -> bool:
    return _OPENS.match(text) is not None and _NAMES_A_ROLE.search(text) is not None


def turns_in_text(text: str) -> list[dict[str, Any]]:
    """The turns that a text is in JSON: cells of CSV files and columns of text cannot hold them otherwise. Empty where
    it is none.
    """
    if not _like_turns(text):
        return []
    try:
        value = parse_json(text)
    except ValueError:
        return []
    turns = [value] if isinstance(value, dict) else value
    return turns if all(isinstance(t, dict) and _is_turn(t) for t in turns) else []


def _is_turn(raw: dict[str, Any]) -> bool:
    role = role_of(raw)
    return (
        isinstance(role, str) and role in ROLES and any(k in raw for k in (*TEXT_KEYS, "tool_calls", "function_call"))
    )


#: What a part of a content names beside its text.
_PART, _PARTS_OF_MEDIA = {"type", "text"}, re.compile(r"image_url|input_image|input_audio|input_file|video_url")
_LIKE_PARTS = re.compile(r"""\s*(?:\[\s*)?\{.*["']type["']\s*:\s*["']""", re.DOTALL)
_PRINTED_PART = re.compile(r"\s*\[\s*\{'(?:type': 'text', 'text': |text': .*'type': 'text')", re.DOTALL)


def text_in_parts(text: str, where: str, unused: Unused) -> str:
    """A text as it is learnt: where it is a content in parts, written as JSON, what they say. Raises :class:`RowError`
    where a part of them is a picture or sound."""
    if text.lstrip()[:1] not in ("[", "{") or not _LIKE_PARTS.match(text):
        return text
    try:
        value = parse_json(text)
    except ValueError:
        if _PRINTED_PART.match(text):
            unused.remarks["text like content in parts, but no JSON: taken as text"] += 1
        return text
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, dict) for part in parts):
        return text
    if any(isinstance(kind := p.get("type"), str) and kind in p and _PARTS_OF_MEDIA.fullmatch(kind) for p in parts):
        return _text_parts(parts, where, unused)  # refuses it
    if not all(p.keys() == _PART and p["type"] in _TEXT_TYPES and isinstance(p["text"], str) for p in parts):
        return text
    unused.remarks[AS_PARTS] += 1
    return _text_parts(parts, where, unused)


def note_text(text: str, unused: Unused) -> None:
    """Count what is taken as text and looks as if something else was meant."""
    if _like_turns(text) and any(f"{quote}{key}{quote}" in text for key in TEXT_KEYS for quote in "\"'"):
        unused.remarks[AS_TEXT] += 1
    if "<" in text:
        stripped = text.strip()
        for mark in _PLACEHOLDERS:
            if stripped.startswith(mark) or stripped.endswith(mark):
                unused.remarks[f"a turn holds {mark}, but nothing but text is read"] += 1


def read_turns(raw: Any, where: str, unused: Unused) -> list[dict[str, Any]]:
    if not isinstance(raw, list):
        raise RowError(f"'{where}' is {kind_of(raw)}, not a list of turns")
    if not raw:
        raise RowError(f"'{where}' is an empty list")
    return [_plain(m) or _message(m, f"{where}[{i}]", unused) for i, m in enumerate(raw)]


def _plain(raw: Any) -> dict[str, Any] | None:
    """A turn that is nothing but a role and text, as most are; None for any other."""
    if type(raw) is dict and len(raw) == 2:
        role, content = raw.get("role"), raw.get("content")
        if type(content) is str and "!" <= content[:1] <= "~" and type(role) is str and role in ROLES:
            odd = content[0] in "[{" or (role == "user" and "<" in content)
            return None if odd else {"role": role, "content": content}
    return None


def _message(raw: Any, where: str, unused: Unused) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise RowError(f"{where} is {kind_of(raw)}, not an object with role and content")
    role = raw.get("role")
    if role is None:
        role = raw.get("from")
    content, content_key = raw.get("content"), "content"
    if content is None:
        content_key = next((key for key in TEXT_KEYS[1:] if raw.get(key) is not None), "content")
        content = raw.get(content_key)
    calls: Any = None
    if isinstance(role, str) and role not in ROLES:
        if role in CALL_ROLES:
            role, calls, content = "assistant", calls_of_text(content, f"{where} ({role})"), ""
        else:
            role = OTHER_ROLES.get(role, role)
    if role not in ROLES:
        hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        raise RowError(f"{where}: unknown role {role!r}{hint}", f"roles are {', '.join(ROLES)}")
    if isinstance(content, list):
        content = _text_parts(content, where, unused)
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise RowError(f"{where}: 'content' is {kind_of(content)}, not text")
    content = text_in_parts(content, where, unused)
    out: dict[str, Any] = {"role": role, "content": content}
    calls = calls or calls_of_turn(raw, where, unused)
    if calls:
        if role != "assistant":
            raise RowError(f"{where}: only the assistant has tool_calls")
        out["tool_calls"] = [tool_call(call, f"{where}.tool_calls[{i}]", unused) for i, call in enumerate(calls)]
    for key in ("name", "tool_call_id", "reasoning_content", "thinking"):
        if raw.get(key) is not None:
            if not isinstance(raw[key], str):
                raise RowError(f"{where}: '{key}' is {kind_of(raw[key])}, not text")
            out[key] = raw[key]
    if not blank(raw.get("reasoning")):
        _reasoning(raw["reasoning"], out, unused)
    weight = _weight(raw, role, where, unused)
    if weight is not None:
        out["weight"] = weight
    if not raw.keys() <= _TURN_KEYS:
        for key, value in raw.items():
            if key in _TURN_KEYS or key == content_key or blank(value):
                continue
            if key in MEDIA and not isinstance(value, (bool, int, float)):
                raise RowError(f"{where}: '{key}' is not text", "only text can be trained on: leave the row out")
            unused.turn_keys[str(key)[:80]] += 1
    if content_key == "content" and raw.get("value") is not None and raw["value"] not in (content, raw["content"]):
        unused.turn_keys["value"] += 1
    if role == "user" or content[:1] in ("[", "{"):
        note_text(content, unused)
    if raw.get("from") is not None and role_of(raw) != role_of({"role": raw["from"]}):
        unused.turn_keys["from"] += 1
    if not calls and role in ("assistant", "user") and unseen(content):
        if role == "assistant":
            raise RowError(f"{where}: the assistant's turn is empty")
        unused.remarks["a user's turn is empty"] += 1
    return out


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
    for key in LEARN_KEYS:
        value = raw.get(key)
        if value is None or value != value:  # a gap of pandas
            continue
        learnt = yes_or_no(value)
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


#: Types of a content part that is text, those of OpenAI's later interface among them.
_TEXT_TYPES = ("text", "input_text", "output_text")


def _text_parts(parts: list[Any], where: str, unused: Unused) -> str:
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type", "text") in _TEXT_TYPES and isinstance(part.get("text"), str):
            texts.append(part["text"])
            if not part.keys() <= _PART:
                beside = (key for key in part if key not in _PART and not blank(part[key]))
                unused.turn_keys.update(f"{str(key)[:80]} (of a content part)" for key in beside)
        else:
            kind = part.get("type") if isinstance(part, dict) else kind_of(part)
            raise RowError(f"{where}: a content part of type '{kind}' is not text", "only text can be trained on")
    return "".join(texts)


def supervised_turns(messages: list[dict[str, Any]]) -> list[int]:
    """Indices of the assistant turns that carry loss (weight 0 takes one out)."""
    return [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1) != 0]
