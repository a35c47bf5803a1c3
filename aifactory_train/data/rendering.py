"""Chat rows rendered with a template, and the assistant's turns found in the text.

No template ships marks that say which part the assistant wrote, so it is found by rendering. For the assistant turn
``k`` of a conversation ``m``:

* ``full = render(m)`` is what is trained on; ``ask = render(m[:k], prompt=True)`` is what the model sees when it has to
  answer. Where ``full`` starts with ``ask``, the answer begins right there: training and generation agree by
  construction.
* Templates that rewrite earlier turns (system text moved into the last user turn, old reasoning dropped) break that
  prefix. Then the turn's text is replaced by a marker, and what lies before and after the marker is found again in
  ``full``.
* The turn ends with its end-of-turn token, which is supervised; whatever the template writes behind it is not.

Where the template provably does not look at texts (:mod:`frames`), ``full`` and the turns come from joining strings;
both ways give the same text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from aifactory_train.data.cells import RowError
from aifactory_train.data.encoder_spec import EncoderSpec
from aifactory_train.data.frames import Frame, Frames
from aifactory_train.data.template import ChatTemplate, TemplateRefused
from aifactory_train.data.traces import Controls, lost
from aifactory_train.data.turns import supervised_turns

MARKER = "QZ7VXK"  # plain letters and digits: no template trims, splits or escapes it


@dataclass
class Turn:
    """Character spans in the rendered text: the answer begins at ``start``, its region ends at ``end``; ``text`` is
    where the turn's content stands, or None when the template rewrote it."""

    start: int
    end: int
    text: tuple[int, int] | None


@dataclass
class Rendered:
    """The text of a row, and where the turns that carry loss stand in it."""

    full: str
    turns: list[Turn]
    flags: set[str] = field(default_factory=set)
    lost: tuple[str, ...] = ()
    empty: bool = False  # nothing is left of any answer
    exchanged: str | None = None  # ``full`` for the tokenizer that reads special tokens in what people wrote as text


class Renderer:
    """Renders chat rows with the templates of one tokenizer.

    Args:
        stops: texts of the tokens that end an assistant's turn.
    """

    def __init__(self, spec: EncoderSpec, controls: Controls, stops: list[str]):
        some = spec.template or spec.tool_template
        self.template = ChatTemplate(spec.template, spec.specials, spec.tool_template) if some else None
        self.frames = Frames(spec.template, spec.specials) if spec.template else None
        # Where every token carries loss, no answer is looked for.
        self._controls, self._stops, self._learns_all = controls, stops, spec.supervise == "all"

    def render(self, row: dict[str, Any]) -> Rendered:
        """Render a chat row, find the assistant's turns in the text, and note what the template leaves out of it."""
        if self.template is None:
            raise RowError(
                "the tokenizer has no chat template",
                "name one with model.chat_template=FILE.jinja, use an instruct model, or train on rows with 'text'",
            )
        messages, tools = row["messages"], row.get("tools")
        frame = self.frames.of(messages) if self.frames is not None and not tools else None
        rendered = self._framed(frame, messages) if frame is not None else None
        if rendered is None:
            return self._traced(self._render(messages, tools), messages, tools)
        assert frame is not None
        # Every text has its place in a complete frame.
        return rendered if frame.complete else self._traced(rendered, messages, tools)

    def _framed(self, frame: Frame, messages: list) -> Rendered | None:
        """The frame with these texts in it; None where it does not fit them."""
        filled = frame.fill(messages)
        if filled is None:
            return None
        full, turns = filled
        rendered = Rendered(full, [Turn(a, b, _find_text(full, a, b, content)) for a, b, content in turns])
        if frame.to_check:  # the first rows of each shape go both ways
            frame.to_check -= 1
            proof = self._render(messages, None)
            if proof != rendered:
                assert self.frames is not None
                self.frames.drop(frame)
                return None
        return rendered

    def _traced(self, rendered: Rendered, messages: list, tools: Any) -> Rendered:
        """``rendered`` with what the template left out of it. A turn of which nothing is left is not learnt: its
        end-of-turn token alone would teach the model to say nothing."""
        full, turns = rendered.full, rendered.turns
        regions = [
            (k, turn.start, turn.end, turn.text is not None)
            for k, turn in zip(supervised_turns(messages), turns, strict=True)
        ]
        rendered.lost = lost(messages, tools, full, regions)
        if rendered.lost and not self._learns_all:
            left = [turn for turn in turns if turn.text is not None or self._says(full, turn)]
            rendered.lost += ("answer left empty",) * (len(turns) - len(left))
            rendered.turns, rendered.empty = left, not left
        return rendered

    def _says(self, full: str, turn: Turn) -> bool:
        """Whether the template wrote anything between the beginning of the turn and its end-of-turn token."""
        text = full[turn.start : turn.end]
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        return bool(self._controls.without(text[: min(ends, default=len(text))]).strip())

    def _render(self, messages: list, tools: Any) -> Rendered:
        assert self.template is not None
        full = self.template.render(messages, tools)
        rendered = Rendered(full, [])
        for k in supervised_turns(messages):
            rendered.turns.append(self._locate(full, messages, tools, k, rendered.flags))
        return rendered

    def _locate(self, full: str, messages: list, tools: Any, k: int, flags: set[str]) -> Turn:
        content = messages[k]["content"]
        ask = self._render_or_none(messages[:k], tools, prompt=True)  # None: a template that needs at least one turn
        later: str | None = None
        start = len(ask) if ask is not None and full.startswith(ask) else None
        if start is not None and k == len(messages) - 1:
            return Turn(start, len(full), _find_text(full, start, len(full), content))
        later = self._render_or_none(messages[: k + 1], tools)
        if start is not None and later is not None and full.startswith(later):
            return Turn(start, len(later), _find_text(full, start, len(later), content))
        marked, end = self._around(full, messages, tools, k)
        if start is None:
            flags.add("context rewritten")
            start = marked - _lead(ask, later, content, full, marked)
        return Turn(start, end, _find_text(full, start, end, content))

    def _render_or_none(self, messages: list, tools: Any, *, prompt: bool = False) -> str | None:
        assert self.template is not None
        try:
            return self.template.render(messages, tools, prompt=prompt)
        except TemplateRefused:
            return None

    def _around(self, full: str, messages: list, tools: Any, k: int) -> tuple[int, int]:
        """Where turn ``k`` begins and ends in ``full``, found by putting a marker in its place.

        The end is that of the text up to the next turn; when the template treats the marker differently from the text
        (it parses reasoning out of it, say), common beginning and end of both renderings bound the turn.
        """
        assert self.template is not None
        marker = MARKER
        while marker in full:
            marker += "Q"
        replaced = [dict(m) for m in messages]
        replaced[k] = {"role": "assistant", "content": marker}
        probe = self._render_or_none(replaced, tools)
        if probe is None and messages[k].get("tool_calls"):
            # Some templates want every tool answer to follow a call: keep the call beside the marker.
            replaced[k]["tool_calls"] = messages[k]["tool_calls"]
            probe = self._render_or_none(replaced, tools)
        if probe is None or marker not in probe:
            raise RowError("the chat template leaves this assistant turn out of the text")
        before, after = probe.split(marker, 1)
        start = _common(before, full) if not full.startswith(before) else len(before)
        tail = len(full) - len(after) if full.endswith(after) else len(full) - _common(after[::-1], full[::-1])
        # `tail` is where the content ends; the end-of-turn token that follows belongs to the turn as well.
        end = min(len(full), tail + _stop_reach(full[tail:], self._stops))
        return min(start, tail), max(end, tail)


def _find_text(full: str, start: int, end: int, content: str) -> tuple[int, int] | None:
    """Where the turn's content stands between ``start`` and ``end``: as written, or trimmed by the template."""
    at = full.find(content, start, end) if content else -1
    if at < 0:
        content = content.strip()
        at = full.find(content, start, end) if content else -1
    return (at, at + len(content)) if at >= 0 else None


def _lead(ask: str | None, later: str | None, content: str, full: str, marked: int) -> int:
    """Characters (a space, say) that the template writes between its question and the text: the model has to write them
    too.
    """
    if ask is None or later is None or not later.startswith(ask):
        return 0
    found = _find_text(later, len(ask), len(later), content)
    lead = later[len(ask) : found[0]] if found else ""
    return len(lead) if full[:marked].endswith(lead) else 0


def _common(a: str, b: str) -> int:
    """Length of the common beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _stop_reach(tail: str, stops: list[str]) -> int:
    """Characters from the beginning of ``tail`` to the end of the turn-ending token that follows at once (0: none
    does).
    """
    lead = len(tail) - len(tail.lstrip())
    for text in stops:
        if tail.startswith(text, lead):
            return lead + len(text)
    return 0
