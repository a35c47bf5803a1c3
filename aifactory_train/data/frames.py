"""Chat templates that only put headers around what is said: rendered by joining strings, their turns known without a
second rendering.

For such a template the rendering of *every* conversation with the same roles is the same frame with other texts in it.
That is proven, not guessed: the template itself is run once on :class:`Text` objects in place of the texts. They can be
written out, stripped and joined. A few questions get the usual answer (a text does not contain ``</think>``, does not
begin with ``<tool_response>``, is not empty), which becomes a condition of the frame; anything else that a template may
do with a text (compare, split, measure, print through a filter) raises :class:`Looked`. A run that ends without it has
taken no decision that depends on a text beyond those conditions, so what it wrote is the frame of all conversations
that meet them. Otherwise there is none, and
:class:`~aifactory_train.data.rendering.Renderer` renders each row, and each question, with the template.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from aifactory_train.data.template import TEMPLATE_ERRORS, compile_template
from aifactory_train.data.template_limits import CHECKED, SPEND
from aifactory_train.data.turns import supervised_turns

#: Conversations of more different shapes (roles and weights, one after another) than this are rendered with the
#: template.
MOST_SHAPES = 1_000
#: Stands for a text where it was turned into a plain string behind our back; a frame that holds it is none.
_SPILT = "\ue000Q7ZV\ue000"


class Looked(BaseException):
    """The template asked something about a text. Not an Exception: filters and tests that catch those must not hide
    it.
    """


def _looked(*_args: Any, **_kwargs: Any) -> Any:
    raise Looked


class Text:
    """Texts of a conversation and literals, end to end: ``parts`` are str, or a slot ``(message, strips)``: the text of
    a message after the calls ``(method, characters)`` one after another. ``asked`` gathers what the template wanted to
    know: ``(slot, question, argument, answer)``."""

    __slots__ = ("asked", "parts")

    def __init__(self, parts: tuple[Any, ...], asked: dict[tuple, None]):
        self.parts, self.asked = parts, asked

    def __add__(self, other: Any) -> Text:
        return Text((*self.parts, *_parts(other)), self.asked)

    def __radd__(self, other: Any) -> Text:
        return Text((*_parts(other), *self.parts), self.asked)

    def _slot(self) -> Any:
        if len(self.parts) != 1 or isinstance(self.parts[0], str):
            raise Looked
        return self.parts[0]

    def _strip(self, method: str, chars: tuple[Any, ...]) -> Text:
        message, strips = self._slot()
        chars = chars or (None,)
        if len(chars) != 1 or not isinstance(chars[0], (str, type(None))):
            raise Looked
        return Text(((message, (*strips, (method, chars[0]))),), self.asked)

    def strip(self, *chars: Any) -> Text:
        return self._strip("strip", chars)

    def lstrip(self, *chars: Any) -> Text:
        return self._strip("lstrip", chars)

    def rstrip(self, *chars: Any) -> Text:
        return self._strip("rstrip", chars)

    def _suppose(self, question: str, argument: Any, answer: bool) -> bool:
        if question != "__len__" and not isinstance(argument, str):
            raise Looked
        self.asked[(self._slot(), question, argument, answer)] = None
        return answer

    def __contains__(self, piece: Any) -> bool:
        return self._suppose("__contains__", piece, False)

    def startswith(self, piece: Any) -> bool:
        return self._suppose("startswith", piece, False)

    def endswith(self, piece: Any) -> bool:
        return self._suppose("endswith", piece, False)

    def __bool__(self) -> bool:
        return self._suppose("__len__", None, True)

    def __getattr__(self, name: str) -> Any:
        raise Looked

    __str__ = __repr__ = __format__ = __len__ = __iter__ = __reversed__ = __getitem__ = _looked
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = __int__ = __float__ = __index__ = _looked  # type: ignore[assignment]
    __mul__ = __rmul__ = __mod__ = __rmod__ = __call__ = __neg__ = __abs__ = __round__ = __bytes__ = _looked


class _Shown(str):
    """A :class:`Text` on its way through ``str()``, which the compiled template calls on all that it writes."""

    text: Text

    def __str__(self) -> str:
        return self


def _parts(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Text):
        return value.parts
    if isinstance(value, _Shown):
        return value.text.parts
    if isinstance(value, str):
        return (value,)
    raise Looked


def _finalize(value: Any) -> Any:
    if not isinstance(value, Text):
        return value
    shown = _Shown(_SPILT)
    shown.text = value
    return shown


def _concat(pieces: Iterable[Any]) -> Any:
    """What jinja makes of the pieces of a macro, a ``set`` block or the whole: a Text as soon as one is in it."""
    held = list(pieces)
    texts = [p if isinstance(p, Text) else p.text for p in held if isinstance(p, (Text, _Shown))]
    if not texts:
        return "".join(held)
    return Text(tuple(part for p in held for part in _parts(p)), texts[0].asked)


#: What is true of every text, by the name of the test.
_TESTS = {
    "string": True,
    "defined": True,
    "undefined": False,
    "none": False,
    "mapping": False,
    "number": False,
    "boolean": False,
    "iterable": True,
    "sequence": True,
}


def _watch_filter(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def watched(*args: Any, **kwargs: Any) -> Any:
        texts = [v for v in (*args, *kwargs.values()) if isinstance(v, Text)]
        if name == "random" or (texts and (name != "trim" or len(texts) != 1 or not isinstance(args[0], Text))):
            raise Looked
        return args[0].strip(*args[1:], *kwargs.values()) if texts else plain(*args, **kwargs)

    return watched


def _watch_test(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def watched(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(v, Text) for v in (*args, *kwargs.values())):
            return plain(*args, **kwargs)
        if name not in _TESTS or len(args) != 1 or kwargs:
            raise Looked
        return _TESTS[name]

    return watched


def _adapt(environment: Any) -> None:
    environment.finalize = _finalize
    environment.concat = _concat
    environment.filters = {
        name: f if name in (SPEND, CHECKED) else _watch_filter(name, f) for name, f in environment.filters.items()
    }
    environment.tests = {name: _watch_test(name, t) for name, t in environment.tests.items()}


@dataclass
class _Skeleton:
    """``literals[0] + slot 0 + literals[1] + ... + literals[-1]``."""

    literals: list[str]
    slots: list[tuple[int, tuple[tuple[str, str | None], ...]]]

    @classmethod
    def of(cls, parts: Iterable[Any]) -> _Skeleton:
        out = cls([""], [])
        for part in parts:
            if isinstance(part, str):
                out.literals[-1] += part
            else:
                out.slots.append(part)
                out.literals.append("")
        if any(_SPILT[0] in literal for literal in out.literals):
            raise Looked
        return out

    def reach_in(self, full: _Skeleton) -> tuple[int, int] | None:
        """Where ``full`` continues if it begins with this one whatever the texts are: ``(characters of literals,
        slots)`` before.
        """
        n = len(self.slots)
        if self.slots != full.slots[:n] or self.literals[:-1] != full.literals[:n]:
            return None
        if not full.literals[n].startswith(self.literals[-1]):
            return None
        return sum(map(len, self.literals)), n


class Frame:
    """What all conversations of one shape are rendered to, as long as they meet ``conditions``."""

    def __init__(
        self,
        full: _Skeleton,
        turns: list[tuple[int, tuple[int, int], tuple[int, int]]],
        conditions: Iterable[tuple[Any, str, Any, bool]],
        messages: int,
    ):
        self._slots = full.slots
        self._pieces = [*itertools.chain.from_iterable((literal, "") for literal in full.literals)][:-1]
        self._turns = turns
        self._conditions = list(conditions)
        #: Every message has its place, without anything but the white space around it taken away.
        self.complete = {message for message, _ in full.slots} == set(range(messages)) and not any(
            chars is not None and chars.strip() for _, strips in full.slots for _, chars in strips
        )
        self.to_check = 4  # rows of this shape that are rendered with the template as well

    def fill(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int, str]]] | None:
        """``(text, [(start, end, content)])``: the rendering, and for each assistant turn that carries loss where its
        answer begins, where its region ends, and what it says. None where the texts do not meet the conditions."""
        for (message, strips), question, argument, answer in self._conditions:
            text = _stripped(messages[message]["content"], strips)
            found = text if argument is None else getattr(text, question)(argument)
            if bool(found) is not answer:
                return None
        texts = [
            _stripped(messages[message]["content"], strips) if strips else messages[message]["content"]
            for message, strips in self._slots
        ]
        reach = [0, *itertools.accumulate(map(len, texts))]
        pieces = self._pieces.copy()
        pieces[1::2] = texts
        return "".join(pieces), [
            (first[0] + reach[first[1]], last[0] + reach[last[1]], messages[k]["content"])
            for k, first, last in self._turns
        ]


def _stripped(text: str, strips: tuple[tuple[str, str | None], ...]) -> str:
    for method, chars in strips:
        text = getattr(text, method)(chars)
    return text


class Frames:
    """The frames of one template, found when a conversation of their shape is met. ``specials`` as for
    ``ChatTemplate``.
    """

    def __init__(self, source: str, specials: dict[str, str]):
        self._template = compile_template(source, _adapt)
        self._always = {**self._template.globals, **specials, "documents": None, "tools": None}
        self._known: dict[tuple[str | tuple[str, int], ...], Frame | None] = {}

    def of(self, messages: list[dict[str, Any]]) -> Frame | None:
        """The frame of these messages (canonical ones, without tools), or None: render them with the template then."""
        shape: list[str | tuple[str, int]] = []
        for message in messages:
            if len(message) == 2:
                shape.append(message["role"])
                continue
            weight = message.get("weight")
            if weight is None or len(message) != 3:
                return None  # calls, names, reasoning: the template will want to look at them
            shape.append((message["role"], weight))
        key = tuple(shape)
        if key not in self._known:
            if len(self._known) >= MOST_SHAPES:
                return None
            self._known[key] = self._prove(key)
        return self._known[key]

    def drop(self, frame: Frame) -> None:
        """Never use ``frame`` again."""
        self._known = {key: None if known is frame else known for key, known in self._known.items()}

    def _prove(self, shape: tuple[str | tuple[str, int], ...]) -> Frame | None:
        """``shape``: the role of each message, with its weight where it has one."""
        messages: list[dict[str, Any]] = []
        asked: dict[tuple, None] = {}
        for i, one in enumerate(shape):
            text = Text(((i, ()),), asked)
            if isinstance(one, str):
                messages.append({"role": one, "content": text})
            else:
                messages.append({"role": one[0], "content": text, "weight": one[1]})
        try:
            full = self._render(messages)
            turns = []
            for k in supervised_turns(messages):
                first = self._render(messages[:k], prompt=True).reach_in(full)
                last = (sum(map(len, full.literals)), len(full.slots))
                if k < len(messages) - 1:
                    last = self._render(messages[: k + 1]).reach_in(full)  # type: ignore[assignment]
                if first is None or last is None:
                    return None
                turns.append((k, first, last))
        except Looked:
            return None
        except TEMPLATE_ERRORS:
            return None  # refused, or an operation that a Text has not: rows of this shape meet the template itself
        return Frame(full, turns, asked, len(shape))

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> _Skeleton:
        self._template.environment.budget.begin()
        values = {**self._always, "messages": messages, "add_generation_prompt": prompt}
        context = self._template.new_context(values, shared=True)
        pieces = self._template.root_render_func(context)
        return _Skeleton.of(itertools.chain.from_iterable(map(_parts, pieces)))
