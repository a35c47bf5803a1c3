"""What a chat template leaves out of the rendered text: every part of a conversation is looked for in it.

Templates drop system turns, tools, tool calls or reasoning without a word, and what they drop is not learnt. So each
turn's text, its reasoning, its tool calls and the tools of a row have to leave a trace: as written, without the white
space around it, with other white space, or as JSON written anew. A part of which nothing is found is *dropped*, one of
which only pieces are found is *changed*.

White space alone is never counted, nor is reasoning of a turn without loss: the model will not see it at generation
either.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

#: What ends the reasoning in an answer's text: ``</think>`` and its relatives.
_ENDS = re.compile(r"</(?:seed:)?think(?:ing)?>|</reasoning>|\[/THINK\]")
#: The marks themselves. Where a tokenizer has special tokens for them, whoever writes them means those.
MARKS = re.compile(r"</?(?:seed:)?think(?:ing)?>|</?reasoning>|\[/?THINK\]")
_KINDS = {"system": "system text", "developer": "system text", "user": "question text", "tool": "tool answer"}
#: Letters of a line or sentence from which it tells that a text is there in part.
_PIECE = 12
#: A turn that carries loss: ``(message, begins, ends, found)``: its region in the rendered text, and whether its text
#: stands there.
Region = tuple[int, int, int, bool]


class _Where:
    """A text to look in, and what is made of it to look less exactly."""

    def __init__(self, text: str):
        self.text = text

    @functools.cached_property
    def squeezed(self) -> str:
        return _squeeze(self.text)

    @functools.cached_property
    def folded(self) -> str:
        return self.squeezed.casefold()


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _forms(text: str) -> Iterator[str]:
    """The text without white space: as it is, and as it stands inside JSON."""
    yield _squeeze(text)
    for ascii_ in (False, True):
        yield _squeeze(json.dumps(text, ensure_ascii=ascii_)[1:-1])


def _trace(text: str, where: _Where) -> str | None:
    """``dropped``, ``changed``, or None where all of ``text`` is there."""
    text = text.strip()
    if not text or text in where.text or any(form in where.squeezed for form in _forms(text)):
        return None
    pieces = [p for piece in re.split(r"[\n.!?]+", text) if len(p := _squeeze(piece)) >= _PIECE]
    return "changed" if any(p.casefold() in where.folded for p in (_squeeze(text), *pieces)) else "dropped"


def _verdict(found: Iterable[bool]) -> str | None:
    """Of the pieces of one part: None where all were found."""
    each = list(found)
    return None if all(each) else ("changed" if any(each) else "dropped")


def _leaves(value: Any) -> Iterator[str]:
    """Keys and values of JSON as text; null and empty text leave no trace that could be looked for."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, bool):
        yield "rue" if value else "alse"  # true, True
    elif value is not None:
        yield json.dumps(value)


def _is_in(text: str, where: _Where) -> bool:
    return text in where.text or any(form in where.squeezed for form in _forms(text))


def _as_json(value: Any, where: _Where) -> bool:
    """Whether ``value`` stands there as JSON, in whatever layout."""
    plain = json.dumps(value, ensure_ascii=False)
    if plain in where.text:
        return True
    return any(_squeeze(form) in where.squeezed for form in (plain, json.dumps(value)))


def _call(call: dict[str, Any], where: _Where) -> str | None:
    function = call["function"]
    name, arguments = _is_in(function["name"], where), function["arguments"]
    if name and _as_json(arguments, where):
        return None
    return _verdict([name, *(_is_in(leaf, where) for leaf in _leaves(arguments))]) if name else "dropped"


def _described(schema: Any) -> Iterator[str]:
    """What of a tool's schema has to be there in any notation: names, descriptions, choices. Words like ``type`` and
    ``required`` may become other signs."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key == "properties" and isinstance(value, dict):
                for name, inner in value.items():
                    yield str(name)
                    yield from _described(inner)
            elif key in ("name", "description") and isinstance(value, str):
                yield value
            elif key == "enum" and isinstance(value, list):
                yield from (v for v in value if isinstance(v, str))
            else:
                yield from _described(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _described(value)


def _tool(tool: dict[str, Any], where: _Where) -> str | None:
    function = tool.get("function", tool)
    if _as_json(function, where) or _as_json(tool, where):
        return None
    name = function.get("name") if isinstance(function, dict) else None
    if isinstance(name, str) and not _is_in(name, where):
        return "dropped"
    return _verdict(_is_in(text, where) for text in _described(function) if text.strip())


def _reasoning(message: dict[str, Any]) -> list[str]:
    said = (message.get("reasoning_content"), message.get("thinking"))
    return list(dict.fromkeys(text for text in said if text))


def _answer(text: str) -> tuple[str, str]:
    """Reasoning inside an answer's text, and the answer."""
    ends = [m.span() for m in _ENDS.finditer(text)]
    return (MARKS.sub("", text[: ends[-1][0]]), text[ends[-1][1] :]) if ends else ("", text)


def lost(messages: list[dict[str, Any]], tools: list[Any] | None, full: str, regions: list[Region]) -> tuple[str, ...]:
    """What of a conversation is not in its rendering ``full``: a phrase for each part, ``system text dropped`` say.

    Args:
        regions: the turns that carry loss, in order.
    """
    out: list[str] = []
    whole = _Where(full)
    learnt = {message: (begin, end, found) for message, begin, end, found in regions}
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)

    def note(what: str, verdict: str | None) -> None:
        if verdict is not None:
            out.append(f"{what} {verdict}")

    at, unclear = 0, []
    for i, message in enumerate(messages):
        text = message["content"].strip()
        if message.get("name") and not _is_in(message["name"], whole):
            note("name of a turn", "dropped")
        if i in learnt:
            begin, end, found = learnt[i]
            here = _Where(full[begin:end])
            which = "reasoning of the last answer" if i == last else "reasoning of earlier answers"
            if not found and text:
                inner, answer = _answer(text)
                note(which, _trace(inner, here))
                note("answer text", _trace(answer, here))
            for own in _reasoning(message):
                note(which, _trace(own, here))
            for call in message.get("tool_calls") or ():
                note("tool call", _call(call, here))
            at = end
            continue
        for own in _reasoning(message):
            note("reasoning of turns that are not learnt", _trace(own, whole))
        for call in message.get("tool_calls") or ():
            note("tool call", _call(call, whole))
        if not text:
            continue
        found_at = full.find(text, at)
        if found_at < 0:
            unclear.append(i)
        else:
            at = found_at + len(text)
    if unclear:
        for i, verdict in _outside(messages, full, whole, learnt):
            note(_KINDS.get(messages[i]["role"], "answer text"), verdict)
    if tools:
        pieces, at = [], 0
        for begin, end, _ in learnt.values():
            pieces.append(full[at:begin])
            at = max(at, end)
        around = _Where("\n".join([*pieces, full[at:]]))  # a call names its tool, too: that is no schema
        for tool in tools:
            note("tool schema", _tool(tool, around))
    return tuple(out)


def _outside(
    messages: list[dict[str, Any]], full: str, whole: _Where, learnt: dict[int, tuple[int, int, bool]]
) -> Iterator[tuple[int, str]]:
    """``(message, verdict)`` of the turns without loss that are not there: each needs a place of its own, the longest
    ones choose first, so that a text that is dropped is not taken for found in one that holds the same words."""
    taken = [(begin, end) for begin, end, _ in learnt.values()]
    texts = {i: m["content"].strip() for i, m in enumerate(messages) if i not in learnt}
    for i in sorted(texts, key=lambda i: -len(texts[i])):
        text = texts[i]
        if messages[i]["role"] == "assistant" and text and text not in full:
            text = _answer(text)[1].strip()
        if not text:
            continue
        place = full.find(text)
        found = place >= 0
        while place >= 0:
            clash = next((end for begin, end in taken if begin < place + len(text) and place < end), None)
            if clash is None:
                break
            place = full.find(text, max(clash - len(text) + 1, place + 1))
        if place >= 0:
            taken.append((place, place + len(text)))
            continue
        verdict = "dropped" if found else _trace(text, whole)
        if verdict is not None:
            yield i, verdict


class Controls:
    """Special tokens of a tokenizer, looked for in what people wrote: there they are read as the template's own
    marks.
    """

    def __init__(self, tokens: Iterable[str]):
        known = sorted({t for t in tokens if len(t) > 1}, key=lambda t: (-len(t), t))
        self._begins = sorted({t[:2] for t in known})
        self._any = re.compile("|".join(map(re.escape, known))) if known else None

    def within(self, text: str) -> list[str]:
        """The special tokens in ``text``, each as often as it stands there."""
        if self._any is None or not any(begin in text for begin in self._begins):
            return []
        return self._any.findall(text)

    def of(self, row: dict[str, Any]) -> tuple[str, ...]:
        """Those in a canonical row. Marks of reasoning in an answer are meant as such."""
        if "text" in row:
            return tuple(self.within(row["text"]))
        out: list[str] = []
        for message in row["messages"]:
            found = self.within(message["content"])
            if len(message) > 2:
                rest = {k: v for k, v in message.items() if k not in ("role", "content", "weight")}
                found += self.within(json.dumps(rest, ensure_ascii=False)) if rest else []
            if found:
                answer = message["role"] == "assistant"
                out += [token for token in found if not (answer and MARKS.fullmatch(token))]
        if "tools" in row:
            out += self.within(json.dumps(row["tools"], ensure_ascii=False))
        return tuple(out)

    def without(self, text: str) -> str:
        """``text`` without special tokens and marks of reasoning."""
        return MARKS.sub("", self._any.sub("", text) if self._any is not None else text)
