"""Chat templates: rendered exactly as ``tokenizer.apply_chat_template`` does, but compiled once, the same on every day,
and without importing torch or transformers (tokenising processes import this module).

The environment follows the public description of Hugging Face chat templates: a sandboxed Jinja with ``trim_blocks``
and ``lstrip_blocks``, ``break``/``continue``, ``raise_exception``, ``strftime_now``, a ``tojson`` that does not escape
HTML, and ``{% generation %}`` blocks. A test compares it with transformers for each template family.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable
from typing import Any

import jinja2

from aifactory_train.data.cells import RowError
from aifactory_train.data.template_limits import LimitedEnvironment, width

#: What ``strftime_now`` returns: Llama 3's own default date. Were it today's, the same rows would give other tokens
#: tomorrow.
TEMPLATE_DATE = datetime.datetime(2024, 7, 26)
#: What running a template on a row may raise.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    LookupError,
    AttributeError,
    ValueError,
    ArithmeticError,
    AssertionError,
    RecursionError,
    MemoryError,
)


class TemplateRefused(RowError):
    """The template called ``raise_exception`` or cannot render these turns."""


class ChatTemplate:
    """The compiled template of a tokenizer with the special tokens it refers to.

    ``specials`` maps ``bos_token``, ``eos_token``, ``pad_token``, ... to their text. ``tool_use`` renders rows with
    tools where the tokenizer names a template of its own for them; ``source`` is None where it has none for the others.
    """

    def __init__(self, source: str | None, specials: dict[str, str], tool_use: str | None = None):
        self.source = source
        self.specials = dict(specials)
        self._plain = self._compiled(source) if source else None
        self._tools = self._compiled(tool_use) if tool_use else self._plain

    def _compiled(self, source: str) -> tuple[Any, dict[str, Any]]:
        template = compile_template(source)
        # What every rendering sees, as one plain dictionary: Jinja would merge its layers of globals anew for each row.
        return template, {**template.globals, **self.specials, "documents": None}

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None = None, *, prompt: bool = False) -> str:
        """The text of ``messages``; with ``prompt`` the header of the assistant's next turn follows."""
        chosen = self._tools if tools is not None else self._plain
        if chosen is None:
            raise RowError(
                "the tokenizer has a chat template for rows with tools alone",
                "name one for the others: model.chat_template=FILE.jinja",
            )
        template, always = chosen
        template.environment.budget.begin()
        try:
            values = {**always, "messages": messages, "tools": tools, "add_generation_prompt": prompt}
            context = template.new_context(values, shared=True)
            return "".join(template.root_render_func(context))
        except jinja2.TemplateError as error:
            raise TemplateRefused(f"the chat template refuses this row: {error}") from None
        except TEMPLATE_ERRORS as error:
            raise TemplateRefused(f"the chat template cannot render this row: {error}") from None


@functools.lru_cache(maxsize=8)
def compile_template(source: str, adapt: Callable[[Any], None] | None = None) -> Any:
    """The compiled ``jinja2.Template``. ``adapt`` may change the environment first (:mod:`frames` watches what a
    template does).
    """
    from jinja2.exceptions import TemplateError, TemplateSyntaxError
    from jinja2.ext import Extension

    class Generation(Extension):
        """``{% generation %}...{% endgeneration %}`` marks assistant text for other tools; here it is plain text."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            lineno = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(lineno)

        def _same(self, caller: Any) -> str:
            return caller()

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=width(indent), separators=separators, sort_keys=sort_keys
        )

    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
    if adapt is not None:
        adapt(environment)
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise RowError(
            f"the chat template is not valid Jinja: {error.message} (template line {error.lineno})"
        ) from None
    except (SyntaxError, *TEMPLATE_ERRORS) as error:  # of Python, for what Jinja made of it
        raise RowError(
            f"the chat template cannot be compiled, it is nested too deeply or broken ({type(error).__name__})"
        ) from None
