"""Tool calls and the schemas of tools, OpenAI's old form among them."""

from __future__ import annotations

import json
from typing import Any

from aifactory_train.data.cells import RawRow, RowError, Unused, blank, kind_of, parse_json


def calls_of_turn(raw: dict[str, Any], where: str, unused: Unused) -> list[Any] | None:
    """The tool calls of a turn, those in OpenAI's old form among them."""
    calls = raw.get("tool_calls") or None
    if isinstance(calls, str):
        try:
            calls = parse_json(calls) or None
        except json.JSONDecodeError:
            raise RowError(f"{where}: 'tool_calls' is text that is not valid JSON") from None
    if calls is not None and not isinstance(calls, list):
        raise RowError(f"{where}: 'tool_calls' is {kind_of(calls)}, not a list of calls")
    old = raw.get("function_call")
    if not old or (isinstance(old, dict) and all(value is None for value in old.values())):
        return calls
    call = _old_call(old, where)
    if not calls:
        return [call]
    quiet = Unused()
    if tool_call(call, where, quiet)["function"] not in [tool_call(c, where, quiet)["function"] for c in calls]:
        unused.turn_keys["function_call"] += 1  # the newer key says what was called
    return calls


def _parsed(value: Any, fault: str, fix: str | None = None) -> Any:
    """What text says as JSON; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except json.JSONDecodeError:
        raise RowError(fault, fix) from None


def _old_call(value: Any, where: str) -> dict[str, Any]:
    value = _parsed(value, f"{where}: 'function_call' is text that is not valid JSON", _CALL)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise RowError(f"{where}: 'function_call' is no call with a name", _CALL)
    return {"function": value}


_CALL = 'write it as {"name": ..., "arguments": {...}}, or as tool_calls'


def calls_of_text(value: Any, where: str) -> list[Any]:
    """Calls that stand as JSON in place of the text of a turn."""
    value = _parsed(value, f"{where}: the call is not valid JSON", _CALL)
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"{where} is no call with a name", _CALL)
    return calls


#: Under which keys the arguments of a call stand, the one that counts first: OpenAI's, Llama's, LangChain's,
#: Anthropic's.
ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
#: Kinds of a call, which say nothing more.
_CALL_TYPES = ("function", "tool_call", "tool_use")


def tool_call(call: Any, where: str, unused: Unused) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise RowError(f"{where} is {kind_of(call)}, not an object")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"{where}: a tool call needs function.name")
    key = next((k for k in ARGUMENT_KEYS if function.get(k) is not None), ARGUMENT_KEYS[0])
    arguments = function.get(key)
    if arguments is None:
        arguments = {}
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{where}: function.{key} is not valid JSON") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise RowError(f"{where}: function.{key} is {kind_of(arguments)}, not an object")
    if None in arguments.values():
        unused.remarks["null in the arguments of a tool call, learnt as it is"] += 1
    out: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(call.get("id"), str):
        out["id"] = call["id"]
    if len(call) + len(function) > 2:
        _count_unused(call, function, key, unused)
    return out


def _count_unused(call: dict[str, Any], function: dict[str, Any], key: str, unused: Unused) -> None:
    """Name what a call holds beside its name and arguments."""
    known = {"name": function["name"], key: function.get(key), "function": function}
    for part in [call] if call is function else [call, function]:
        for name, value in part.items():
            said = (
                name == "index"
                or (name == "id" and isinstance(value, str))
                or (name == "type" and value in _CALL_TYPES)
            )
            if not said and not blank(value) and value != known.get(name):
                unused.turn_keys[f"{str(name)[:80]} (of a tool call)"] += 1


def tool_schemas(row: RawRow) -> list[Any] | None:
    """The schemas of the tools, or of OpenAI's old ``functions``."""
    raw, name = row.get("tools"), "tools"
    if blank(raw):
        raw, name = row.cells.get("functions"), "functions"
        if blank(raw):
            return None
        row.used.add("functions")
    if isinstance(raw, str):
        try:
            raw = parse_json(raw)
        except json.JSONDecodeError:
            raise RowError(f"'{name}' is text that is not valid JSON") from None
    if isinstance(raw, list) and raw and all(isinstance(tool, str) for tool in raw):
        try:
            raw = [parse_json(tool) for tool in raw]
        except json.JSONDecodeError:
            raise RowError(f"'{name}' holds text that is not valid JSON") from None
    if not isinstance(raw, list) or not all(isinstance(tool, dict) for tool in raw):
        raise RowError(f"'{name}' is not a list of JSON schemas")
    if name == "functions":
        raw = [tool if "function" in tool else {"type": "function", "function": tool} for tool in raw]
    return raw
