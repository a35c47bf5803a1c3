"""What is asked (system column, earlier turns, question) and the answer behind it, put together to a conversation."""

from __future__ import annotations

from typing import Any

from aifactory_train.data.cells import (
    FLAT,
    RawRow,
    RowError,
    Unused,
    blank,
    kind_of,
    parse_json,
    unseen,
)
from aifactory_train.data.turns import (
    AS_TURNS,
    note_text,
    opening_system_turns,
    read_turns,
    role_of,
    text_in_parts,
    turns_in_text,
)

#: Columns that hold the system prompt, the one that counts first.
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")


def _system(row: RawRow) -> str | None:
    """The text of the system column."""
    for name in SYSTEM_COLUMNS:
        if isinstance(row.cells.get(name), str) and row.cells[name].strip():
            return row.get(name)
    return None


def with_system(row: RawRow, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation behind the system column; one that opens with a system turn of its own keeps that."""
    text = _system(row)
    if text is None:
        return messages
    own = messages[: opening_system_turns(messages)]
    if not own:
        return [{"role": "system", "content": text}, *messages]
    if not any(m["content"].strip() == text.strip() for m in own):
        row.used.difference_update(SYSTEM_COLUMNS)  # named as a column that was not used
        row.unused.remarks["system column left out: the conversation opens with another system turn"] += 1
    return messages


def asked(row: RawRow, key: str) -> list[dict[str, Any]]:
    """What is asked: the system column, earlier turns, the question and what belongs to it. None of it is learnt."""
    prompt = row.get(key)
    messages: list[dict[str, Any]] = []
    system = row.get("system")
    if system is not None and system != "":
        if not isinstance(system, str):
            raise RowError(f"'system' is {kind_of(system)}, not text")
        messages.append({"role": "system", "content": system})
    elif (text := _system(row)) is not None:
        messages.append({"role": "system", "content": text})
    if isinstance(prompt, str) and (held := turns_in_text(prompt)) and role_of(held[-1]) != "assistant":
        prompt = held
        row.unused.remarks[AS_TURNS] += 1
    if isinstance(prompt, list):
        turns = read_turns(prompt, key, row.unused)
        same = messages and any(
            m["content"].strip() == messages[0]["content"].strip() for m in turns[: opening_system_turns(turns)]
        )
        messages = turns if same else messages + turns
    elif isinstance(prompt, str):
        if unseen(prompt):
            raise RowError(f"'{key}' is empty")
        prompt = text_in_parts(prompt, key, row.unused)
        note_text(prompt, row.unused)
        messages += _history(row)
        messages.append({"role": "user", "content": _question(row, key, prompt)})
    else:
        raise RowError(f"'{key}' is {kind_of(prompt)}, not text or a list of turns", FLAT)
    for message in messages:
        if message["role"] == "assistant":
            message["weight"] = 0
    return messages


def _question(row: RawRow, key: str, prompt: str) -> str:
    """The question with Alpaca's ``input``, or with the ``context`` that an instruction or a question is about. (Of a
    ``prompt`` one expects that it is whole.)"""
    extra = row.get("input") if key == "instruction" else None
    if extra is not None and not isinstance(extra, str):
        raise RowError(f"'input' is {kind_of(extra)}, not text")
    context = row.cells.get("context")
    if not extra and key in ("instruction", "question") and isinstance(context, str) and context.strip():
        row.used.add("context")
        extra = context if context.strip() not in prompt else None
    return f"{prompt}\n\n{extra}" if extra else prompt


def _history(row: RawRow) -> list[dict[str, Any]]:
    """Earlier turns: Alpaca's ``history``, a list of pairs of question and answer, or a list of turns. Anything else of
    that name is a column that is not used."""
    history = row.cells.get("history")
    if isinstance(history, str) and history.lstrip().startswith("["):
        try:
            history = parse_json(history)
        except ValueError:
            return []
    if not isinstance(history, (list, tuple)) or blank(history):
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
            turns = read_turns(list(history), "history", row.unused)
        except RowError:
            return []
        row.used.add("history")
        return turns[opening_system_turns(turns) :] if _system(row) is not None else turns
    return []


def answered(row: RawRow, asked: list[dict[str, Any]], answer: Any, key: str) -> tuple[list[dict[str, Any]], bool]:
    """The conversation with its answer, and whether the answer (a list of turns) repeated what was asked."""
    if isinstance(answer, str):
        if unseen(answer):
            raise RowError(f"'{key}' is empty: no assistant turn to learn from")
        if held := _turns_of_answer(row, asked, answer):
            return answered(row, asked, held, key)
        answer = text_in_parts(answer, key, row.unused)
        _note_repeated(row, asked, answer)
        return [*asked, {"role": "assistant", "content": answer}], False
    if not isinstance(answer, list):
        raise RowError(f"'{key}' is {kind_of(answer)}, not text or a list of turns", FLAT)
    turns = read_turns(answer, key, row.unused)
    lead, opening = opening_system_turns(turns), opening_system_turns(asked)
    own, said = turns[:lead], turns[lead:]
    system, question = asked[:opening], asked[opening:]
    again = _repeats(question, said)
    if not again:
        return asked + turns, False
    for message in said[:again]:
        if message["role"] == "assistant":
            message["weight"] = 0
    if own and system and not _alike(own, system):
        row.used.difference_update(SYSTEM_COLUMNS)
        row.unused.remarks["system column left out: the conversation opens with another system turn"] += 1
    before = question[: len(question) - again] if again < len(question) else []
    return [*(own or system), *before, *said], True


def _turns_of_answer(row: RawRow, asked: list[dict[str, Any]], answer: str) -> list[dict[str, Any]]:
    """The turns that an answer is as JSON text: those of the assistant, or with the question before them. Any other
    conversation is text that somebody asked for."""
    held = turns_in_text(answer)
    if held:
        roles = [role_of(turn) for turn in held]
        question = asked[opening_system_turns(asked) :]
        quiet = Unused()
        if roles[-1] == "assistant" and (
            "user" not in roles or _repeats(question, _said_in(read_turns(held, "", quiet)))
        ):
            row.unused.remarks[AS_TURNS] += 1
            return held
    note_text(answer, row.unused)
    return []


def _said_in(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return turns[opening_system_turns(turns) :]


#: Shorter questions may well be the beginning of their answer.
_TOLD_AGAIN = 20


def _note_repeated(row: RawRow, asked: list[dict[str, Any]], answer: str) -> None:
    """Count a text that holds the question once more, as the rows of HH-RLHF do."""
    question = asked[-1]["content"].strip() if asked else ""
    if len(question) >= _TOLD_AGAIN and answer.lstrip().startswith(question):
        row.unused.remarks["an answer begins with its whole question, which is learnt as part of it"] += 1


def _repeats(question: list[dict[str, Any]], said: list[dict[str, Any]]) -> int:
    """How many of the turns that an answer opens with are the question once more: all of it, its end, or, where the
    question is only the last one of a conversation, everything up to it. 0: none."""
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


def _said(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
