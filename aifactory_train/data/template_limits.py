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
from jinja2.sandbox import ImmutableSandboxedEnvironment

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
    return not (operator == "%" and isinstance(left, str) and _WIDE.search(left))


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
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        text = getattr(value, "__self__", None)
        if isinstance(text, str) and not _fits(value.__name__, text, (), {}):
            raise _too_large()
        return super().wrap_str_format(value)

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
    if method in ("format", "format_map"):
        return not _WIDE.search(text)
    if method == "join" and given and isinstance(given[0], (list, tuple, dict, str)):
        return len(text) * len(given[0]) <= MOST_SIZE
    if method == "replace" and len(given) > 1 and isinstance(given[0], str) and isinstance(given[1], str):
        return len(text) + (text.count(given[0]) * len(given[1]) if len(given[1]) > len(given[0]) else 0) <= MOST_SIZE
    return True


def _narrow(plain: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that widens or cuts by a number that it is given."""
    import functools

    @functools.wraps(plain)
    def narrow(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(v, int) and v > MOST_SIZE for v in (*args, *kwargs.values())):
            raise _too_large()
        texts = [v for v in args if isinstance(v, str)]
        if texts and not _fits(plain.__name__.removeprefix("do_"), texts[0], tuple(texts[1:]), {}):
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
