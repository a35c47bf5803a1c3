"""A grammar of rows, templates and files: what people write, with everything that may go wrong, and what has to become
of each text.

Every text holds a word of its own, so it can be told where it went. A :class:`Piece` says where it stands in the row,
under which names a report may own up to leaving it out, and whether it has to be learnt.
"""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from aifactory_train.data.questions import SYSTEM_COLUMNS
from aifactory_train.data.rows import PROMPT_COLUMNS, QUESTIONS
from aifactory_train.data.turns import CALL_ROLES, LEARN_KEYS, OTHER_ROLES, TEXT_KEYS

CONTROLS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
_AROUND = (
    "",
    "",
    "",
    " ",
    "\n",
    "é",
    "👋🏽",
    "世",
    '"',
    "\\",
    "{{ x }}",
    "</b>",
    "\u200b",
    "\t",
    "٣",
    "e\u0301",
    "'s",
    "}",
    "[1]",
)
_ODD = (None, float("nan"), 0, 1.5, True, "", " ", "\u200b", [], {}, [None], {"a": None}, ["x"], {"b": 1}, 10**30)


@dataclass
class Piece:
    """``columns``, ``keys``, ``lost``: the names (or beginnings of them) under which its loss may be reported.
    ``learnt``: it carries loss, it does not, or (None) nobody says."""

    text: str
    columns: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    learnt: bool | None = False


@dataclass
class Row:
    cells: dict[str, Any] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)


@dataclass
class Rows:
    """A file: its rows (all of one form), its kind, and how the recipe reads it."""

    rows: list[Row]
    form: str | None
    kind: str
    columns: dict[str, str]
    template: str


class _Writer:
    """Writes one row."""

    def __init__(self, number: int, chance: random.Random):
        self.row, self.number, self._chance = Row(), number, chance
        self.words = 0

    def often(self, percent: int) -> bool:
        return self._chance.randrange(100) < percent

    def one(self, values: Any) -> Any:
        return values[self._chance.randrange(len(values))]

    def text(self, **what: Any) -> str:
        self.words += 1
        said = f"{self.one(_AROUND)}w{self.number}x{self.words}q{self.one(_AROUND)} {self.one(_AROUND)}"
        if self.often(6):
            said += self.one(CONTROLS) + self.one(("", " z"))
        self.row.pieces.append(Piece(said, **what))
        return said

    def odd(self, value: Any, mark: int) -> Any:
        """``value``, or now and then something that does not belong there; what was to be found in it is then
        forgotten.
        """
        if not self.often(3):
            return value
        del self.row.pieces[mark:]
        return self.one(_ODD)

    @property
    def mark(self) -> int:
        return len(self.row.pieces)

    # ---- turns

    def turn(
        self, role: str, *, learnt: bool | None = False, more: dict[str, Any] | None = None, silent: bool = False
    ) -> dict[str, Any]:
        kinds = {
            "system": "system text",
            "developer": "system text",
            "user": "question text",
            "tool": "tool answer",
            "assistant": "answer",
        }
        names = [role, *(other for other, own in OTHER_ROLES.items() if own == role)]
        turn: dict[str, Any] = {self.one(("role", "role", "from")): self.one(names) if self.often(30) else role}
        if role == "assistant" and self.often(8):
            yes = self.often(50)
            learnt = learnt and yes
            turn[self.one(LEARN_KEYS)] = self.one((yes, int(yes), str(yes).lower(), float(yes)))
        if not silent:
            mark = self.mark
            said: Any = self.text(lost=(kinds[role],), learnt=learnt, columns=(), keys=("value",))
            if self.often(4):
                said = [{"type": "text", "text": said}]
            turn[self.one(TEXT_KEYS) if self.often(20) else "content"] = self.odd(said, mark)
        if role == "assistant" and self.often(12):
            key = self.one(("reasoning_content", "reasoning", "thinking"))
            # What a turn without loss thought is not missed; which turns have none the row alone says.
            turn[key] = self.text(keys=(key,), lost=("reasoning",) if learnt else ("",), learnt=None)
        if self.often(6):
            key = self.one(("stamp", "rating", "refusal", "annotations"))
            mark = self.mark
            turn[key] = self.odd(self.text(keys=(key,), lost=(), learnt=False), mark)
        return {**turn, **(more or {})}

    def call(self, *, learnt: bool | None) -> dict[str, Any]:
        what = {"lost": ("tool call",), "learnt": learnt, "keys": ("function_call",)}
        arguments: Any = {self.one(("at", "unit", "why")): self.text(**what)}
        if self.often(20):
            arguments["deep"] = {"k": [self.text(**what), 1, False]}
        if self.often(20):
            arguments = json.dumps(arguments)
        call = {"name": f"f{self.number}", "arguments": arguments}
        return call

    def exchange(self, *, learnt: bool | None = True) -> list[dict[str, Any]]:
        turns = [self.turn("user")]
        if self.often(15):
            style = self.one(("tool_calls", "text", "function_call", "role"))
            mark = self.mark
            call = self.call(learnt=None)
            if style == "role":
                turns.append({"from": self.one(CALL_ROLES), "value": self.one((json.dumps(call), json.dumps([call])))})
            elif style == "function_call":
                turns.append(
                    self.turn("assistant", learnt=learnt, silent=True, more={"function_call": call, "content": None})
                )
            else:
                calls: Any = [{"type": "function", "function": call}] if self.often(60) else [call]
                calls = self.odd(json.dumps(calls) if style == "text" else calls, mark)
                turns.append(self.turn("assistant", learnt=learnt, silent=self.often(50), more={"tool_calls": calls}))
            turns.append(self.turn("tool"))
        return [*turns, self.turn("assistant", learnt=learnt)]

    def talk(self, *, system: int = 20, most: int = 2) -> list[dict[str, Any]]:
        turns = [self.turn(self.one(("system", "developer")))] if self.often(system) else []
        for _ in range(1 + self._chance.randrange(most)):
            turns += self.exchange()
        return turns

    # ---- columns

    def beside(self) -> None:
        """Columns that stand beside what is asked and answered."""
        cells = self.row.cells
        if self.often(15):
            name = self.one(SYSTEM_COLUMNS)
            self.cell(name, lost=("system text",))
        if self.often(15):
            mark = self.mark
            schema: Any = {
                "name": f"f{self.number}",
                "description": self.text(lost=("tool schema",), columns=("tools", "functions")),
                "parameters": {},
            }
            if self.often(40):
                properties = {
                    "at": {
                        "type": "string",
                        "description": self.text(lost=("tool schema",), columns=("tools", "functions")),
                    }
                }
                schema["parameters"] = {"type": "object", "properties": properties}
            schema = self.one((schema, {"type": "function", "function": schema}))
            tools = self.one(([schema], json.dumps([schema]), [json.dumps(schema)]))
            cells[self.one(("tools", "tools", "functions"))] = self.odd(tools, mark)
        for name in ("source", "note", "context", "input", "history", "prompt", "score"):
            if self.often(4) and name not in cells:
                self.cell(name, lost=("question text",))
        if self.often(2):
            cells[self.one(("images", "audio"))] = self.one((["a.png"], "a.png", [], None))
        for name in ("id", "group", "language", "label"):
            if self.often(6) and name not in cells:
                cells[name] = self.odd(f"{name}-{self.number}", self.mark)

    def cell(self, name: str, **what: Any) -> None:
        mark = self.mark
        self.row.cells[name] = self.odd(self.text(columns=(name,), **what), mark)

    def asked(self, name: str) -> None:
        mark = self.mark
        if self.often(20):
            earlier = self.exchange(learnt=False) if self.often(40) else []
            asked = [*earlier, self.turn("user")]
            self.within(name, mark)
            self.row.cells[name] = self.odd(asked, mark)
        else:
            self.cell(name, lost=("question text",))

    def within(self, name: str, mark: int) -> None:
        """The pieces since ``mark`` stand in a column, which may be named as a whole."""
        for piece in self.row.pieces[mark:]:
            piece.columns = (*piece.columns, name)

    def answer(self, name: str) -> None:
        mark = self.mark
        if self.often(20):
            turns = [self.turn("assistant", learnt=True)]
            self.within(name, mark)
            self.row.cells[name] = self.odd(turns, mark)
        else:
            said = self.text(columns=(name,), lost=("answer",), learnt=True)
            self.row.cells[name] = self.odd(said, mark)


FORMS = ("messages", "conversations", "prompt", "history", "text", "pair", "pair of talks", "feedback", "judged talk")


def _write(writer: _Writer, form: str, names: tuple[str, str]) -> None:
    cells = writer.row.cells
    mark = writer.mark
    if form in ("messages", "conversations"):
        talk = writer.talk()
        cells[form] = writer.odd(json.dumps(talk) if writer.often(6) else talk, mark)
    elif form == "prompt":
        writer.asked(names[0])
        writer.answer(names[1])
    elif form == "history":
        pairs = [
            [writer.text(columns=("history",)), writer.text(columns=("history",))] for _ in range(1 + writer.often(50))
        ]
        cells["history"] = writer.one((pairs, json.dumps(pairs)))
        writer.cell("instruction", lost=("question text",))
        writer.cell("output", lost=("answer",), learnt=True)
        if writer.often(50):
            writer.cell("input")
    elif form == "text":
        writer.cell("text", learnt=None)
    elif form == "pair":
        writer.asked(writer.one(QUESTIONS[:1]) if writer.often(60) else writer.one(QUESTIONS[:4]))
        writer.answer("chosen")
        writer.answer("rejected")
    elif form == "pair of talks":
        asked = [writer.turn("user")]
        for name in ("chosen", "rejected"):
            cells[name] = [*asked, writer.turn("assistant", learnt=True)]
    elif form == "feedback":
        writer.asked("prompt")
        writer.answer("completion")
        cells["label"] = writer.odd(writer.one((True, 0, 1.0, "false")), writer.mark)
    else:
        cells["messages"] = [*(writer.exchange(learnt=False) if writer.often(40) else []), *writer.exchange()]
        cells["label"] = writer.one((True, False, "1"))
        for piece in writer.row.pieces:
            piece.learnt = None if piece.learnt else piece.learnt  # an answer before the last one is not learnt,
            piece.lost = ("",) if piece.lost == ("reasoning",) else piece.lost  # and what it thought not missed
    writer.beside()


_OPEN = "{{ '<|im_start|>' + m.role + '\n' }}"
_KEY = "{% set r = m.reasoning_content or m.thinking %}{% if r %}{{ '<think>' + r + '</think>' }}{% endif %}"
_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' + c.function.arguments|tojson }}{% endfor %}"
)
_TOOLS = "{% if tools %}{{ '<|im_start|>system\n' + tools|tojson + '<|im_end|>\n' }}{% endif %}"


@st.composite
def templates(draw: Any) -> str:
    """ChatML that writes all, or leaves something out."""
    whole = draw(st.integers(0, 3)) > 0
    keep = (lambda: True) if whole else (lambda: draw(st.booleans()))
    content = draw(st.sampled_from(("m.content", "m.content|trim", "m.content.strip()", "'' + m.content")))
    when = "true" if whole else draw(st.sampled_from(("true", "m.role != 'system'", "m.role != 'tool'")))
    end = draw(st.sampled_from(("'<|im_end|>\n'", "'<|im_end|>'")))
    head = _TOOLS if keep() else ""
    body = f"{_OPEN}{_KEY if keep() else ''}{{{{ {content} }}}}{_CALLS if keep() else ''}{{{{ {end} }}}}"
    return (
        f"{head}{{% for m in messages %}}{{% if {when} %}}{body}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


@st.composite
def files(draw: Any, most: int = 4) -> Rows:
    form = draw(st.sampled_from(FORMS))
    names = draw(st.sampled_from(PROMPT_COLUMNS))
    chance = random.Random(draw(st.integers(0, 2**48)))
    kind = draw(st.sampled_from(("jsonl", "jsonl", "json", "parquet", "arrow", "csv")))
    rows = []
    for number in range(draw(st.integers(1, most))):
        writer = _Writer(number, chance)
        _write(writer, form, names)
        rows.append(writer.row)
    columns = {}
    if chance.randrange(8) == 0:
        for name in sorted({name for row in rows for name in row.cells}):
            if name in ("history", "context", *SYSTEM_COLUMNS) or chance.randrange(2):
                continue
            columns[f"my {name}"] = name
        for row in rows:
            row.cells = {next((m for m, n in columns.items() if n == name), name): v for name, v in row.cells.items()}
            for piece in row.pieces:
                piece.columns = tuple(
                    next((m for m, n in columns.items() if n == name), name) for name in piece.columns
                )
    read_as = {"pair": "preference", "pair of talks": "preference", "feedback": "feedback", "judged talk": "feedback"}
    return Rows(rows, read_as.get(form), kind, columns, draw(templates()))


def save(rows: Rows, folder: Path) -> Path:
    """The file; as JSON Lines where the kind cannot hold such rows."""
    cells = [row.cells for row in rows.rows]
    names = list(dict.fromkeys(name for row in cells for name in row))
    path = folder / f"rows.{rows.kind}"
    if rows.kind in ("parquet", "arrow"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in cells])
            if rows.kind == "parquet":
                pq.write_table(table, path)
            else:
                with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
                    out.write_table(table)
            return path
        except (pa.ArrowException, OverflowError, NotImplementedError):
            pass
    elif rows.kind == "csv":
        flat = all(isinstance(v, (str, type(None))) and "\0" not in str(v) for row in cells for v in row.values())
        if flat and "messages" not in names:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(cells)
            return path
    elif rows.kind == "json" and "messages" not in names:
        path.write_text(json.dumps(cells, ensure_ascii=False), encoding="utf-8")
        return path
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in cells), encoding="utf-8")
    return path
