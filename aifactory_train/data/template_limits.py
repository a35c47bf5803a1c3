"""What one rendering of a chat template may cost. Templates come with models: a hostile or broken one must end in a
message, not in hours.

Counted and not timed, so that the same template is taken or refused on every machine: passes of loops and calls of
macros, and the size of what repetition, powers, widths and assignments make. Joinery of texts between two assignments
is bounded by the template's length.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from markupsafe import Markup

#: Passes of all loops in one rendering; a call of a macro counts as :data:`_MACRO` of them, which is what it costs.
MOST_PASSES = 2_000_000
_MACRO = 25
#: Characters of a text, and entries of a list, that a template may make at once.
MOST_SIZE, MOST_ENTRIES = 1 << 28, 10_000_000
#: Bits of a whole number.
MOST_BITS = 1_000_000

#: Names of our own filters, in the compiled template alone.
SPEND, CHECKED = "_spend", "_checked"
_WIDE = re.compile(r"%[^%a-zA-Z]*\d{8,}|\{[^{}]*\d{8,}[^{}]*\}")
_STAR = re.compile(r"%[^%a-zA-Z]*\*")
_WIDENS = ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice")


class TooMuch(jinja2.TemplateError):
    """The template asks for more than any conversation needs."""


class Budget:
    """Passes left since :meth:`begin`."""

    def __init__(self) -> None:
        self.left = MOST_PASSES

    def begin(self) -> None:
        self.left = MOST_PASSES


def _too_large() -> TooMuch:
    return TooMuch(
        f"it makes a text beyond {MOST_SIZE:,} characters, a list beyond {MOST_ENTRIES:,} entries or a number beyond "
        f"{MOST_BITS:,} bits"
    )


def checked(value: Any) -> Any:
    """``value``, unless it is larger than what a template may make."""
    if (isinstance(value, str) and len(value) > MOST_SIZE) or (
        isinstance(value, (list, tuple, dict)) and len(value) > MOST_ENTRIES
    ):
        raise _too_large()
    return value


def _modest(operator: str, left: Any, right: Any) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        return operator == "%" or bits <= MOST_BITS
    if operator == "*":
        for many, times in ((left, right), (right, left)):
            if isinstance(many, (str, list, tuple)) and isinstance(times, int):
                return len(many) * times <= (MOST_SIZE if isinstance(many, str) else MOST_ENTRIES)
    return not (operator == "%" and isinstance(left, str) and (_WIDE.search(left) or _star(left, right)))


def _star(text: str, given: Any) -> bool:
    """Whether ``text % given`` takes a width or a precision from what is given, and one is too large."""
    numbers = given if isinstance(given, tuple) else (given,)
    return _STAR.search(text) is not None and any(isinstance(n, int) and abs(n) > MOST_SIZE for n in numbers)


class _Formatter(SandboxedFormatter):
    """``str.format`` whose widths and precisions may stand in what it is given: they are looked at when they are known,
    and all fields together make no more than one text may be."""

    left = 0

    def vformat(self, *given: Any) -> str:
        self.left = MOST_SIZE
        return super().vformat(*given)

    def format_field(self, value: Any, format_spec: str) -> Any:
        if _wide(format_spec):
            raise _too_large()
        made = super().format_field(value, format_spec)
        self.left -= len(made)
        if self.left < 0:
            raise _too_large()
        return made


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    """The same for text that is marked as safe."""


def _wide(spec: str) -> bool:
    """Whether a number in a format specification is beyond what a text may have."""
    return any(len(number) > 9 or int(number) > MOST_SIZE for number in re.findall(r"\d+", spec))


def width(value: Any) -> Any:
    """``value``, unless it is a width beyond what a text may have."""
    if isinstance(value, int) and value > MOST_SIZE:
        raise _too_large()
    return value


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the limits above."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self, **options: Any):
        super().__init__(**options)
        budget = self.budget = Budget()

        self.globals.pop("lipsum", None)  # writes any number of random words

        # Filters, not functions: a template calls them directly, without the sandbox's look at each call.
        @jinja2.pass_context  # so that it is not computed once and for all when the template is compiled
        def spend(context: Any, passes: int) -> str:
            budget.left -= passes
            if budget.left < 0:
                raise TooMuch(f"its loops and macros run more than {MOST_PASSES:,} times in one rendering")
            return ""

        self.filters[SPEND], self.filters[CHECKED] = spend, checked
        for name in ("center", "indent", "batch", "slice", "format", "replace"):
            self.filters[name] = _narrow(self.filters[name])
        self.filters["join"] = _narrow_join(self.filters["join"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not _modest(operator, left, right):
            raise _too_large()
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        made_from = getattr(obj, "__self__", None)
        if isinstance(made_from, str) and not _fits(obj.__name__, made_from, args, kwargs):
            raise _too_large()
        if isinstance(made_from, int):  # to_bytes
            width(max((v for v in (*args, *kwargs.values()) if isinstance(v, int)), default=0))
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is None:
            return None
        text, by_map = value.__self__, value.__name__ == "format_map"
        marked = isinstance(text, Markup)
        formatter: Any = _EscapeFormatter(self, escape=text.escape) if marked else _Formatter(self)

        def wrapper(*args: Any, **kwargs: Any) -> str:
            return type(text)(formatter.vformat(text, (), *args) if by_map else formatter.vformat(text, args, kwargs))

        return wrapper

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: Any = super()._parse(source, name, filename)
        for loop in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            cost = nodes.Const(1 if isinstance(loop, nodes.For) else _MACRO)
            loop.body.insert(0, nodes.ExprStmt(_through(SPEND, cost)).set_lineno(loop.lineno))
        for assigned in tree.find_all(nodes.Assign):
            assigned.node = _through(CHECKED, assigned.node)
        for block in tree.find_all(nodes.AssignBlock):
            block.filter = _through(CHECKED, block.filter)
        return tree.set_environment(self)


def _fits(method: str, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    given = [*args, *kwargs.values()]
    if method in _WIDENS:
        return all(not isinstance(v, int) or v <= MOST_SIZE for v in given)
    if method == "format":  # Jinja's filter, which is the operator %
        return not (_WIDE.search(text) or _star(text, args))
    if method in ("split", "rsplit", "splitlines"):
        between = given[0] if given and isinstance(given[0], str) and given[0] else None
        return (text.count(between) if between else len(text) // 2) <= MOST_ENTRIES
    if method == "join" and given and isinstance(given[0], (list, tuple, dict, str)):
        return len(text) * len(given[0]) <= MOST_SIZE
    if method == "replace" and len(given) > 1 and isinstance(given[0], str) and isinstance(given[1], str):
        return len(text) + (text.count(given[0]) * len(given[1]) if len(given[1]) > len(given[0]) else 0) <= MOST_SIZE
    return True


def _narrow(plain: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that widens or cuts by a number that it is given."""
    by_numbers = plain.__name__ != "do_format"  # whose numbers are what is said

    @functools.wraps(plain)
    def narrow(*args: Any, **kwargs: Any) -> Any:
        if by_numbers and any(isinstance(v, int) and v > MOST_SIZE for v in (*args, *kwargs.values())):
            raise _too_large()
        texts = [v for v in args if isinstance(v, str)]
        if texts and not _fits(
            plain.__name__.removeprefix("do_"), texts[0], tuple(texts[1:]) if by_numbers else args[1:], {}
        ):
            raise _too_large()
        return plain(*args, **kwargs)

    return narrow


def _narrow_join(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def narrow(context: Any, value: Any, d: str = "", *more: Any, **kwargs: Any) -> Any:
        held = value if isinstance(value, (str, list, tuple)) or not d else list(value)
        if d and len(held) * len(str(d)) > MOST_SIZE:
            raise _too_large()
        return plain(context, held, d, *more, **kwargs)

    return narrow


def _through(name: str, value: Any) -> Any:
    return nodes.Filter(value, name, [], [], None, None).set_lineno(value.lineno if value is not None else 1)
