"""Special tokens that stand in what people wrote, encoded as the text that they are there: an ``<|im_end|>`` in an
answer ends no turn.

While a conversation is rendered, each of them is *disguised* as private characters, one for each of its letters, so the
template's own special tokens are the only ones in the rendered text and every place in it stays where it was. Then the
two change roles: the people's get their letters back and the template's are disguised, for a copy of the tokenizer that
knows its special tokens under their disguise alone. So one tokenisation of the whole text gives ids and places, as for
any other row.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from typing import Any

from aifactory_train.data.cells import RowError
from aifactory_train.data.traces import MARKS

#: Letters of the disguises: planes 15 and 16 of Unicode are for private use, and no text is written in them.
_FIRST = 0xF0000
_FIX = "take them out of the row, or let them be read as the template's own: data.control_tokens_in_content=as_tokens"


class Disguise:
    """The special tokens of a tokenizer, and what stands for each. ``tokens``: their texts; those of one letter are
    left alone.
    """

    @classmethod
    def of(cls, tokenizer: Any, special_ids: Iterable[int]) -> Disguise:
        """Of a ``tokenizers.Tokenizer``: of ``special_ids`` those that it looks for in texts."""
        looked_for = tokenizer.get_added_tokens_decoder()
        return cls(looked_for[i].content for i in special_ids if i in looked_for)

    def __init__(self, tokens: Iterable[str]):
        known = sorted({t for t in tokens if len(t) > 1}, key=lambda t: (-len(t), t))
        self.hidden = {token: chr(_FIRST + n) * len(token) for n, token in enumerate(known)}
        self._other = {**self.hidden, **{hidden: token for token, hidden in self.hidden.items()}}
        self._plain = re.compile("|".join(map(re.escape, known)) or r"(?!)")
        self._disguised = re.compile("|".join(self.hidden.values()) or r"(?!)")
        self._both = re.compile("|".join(map(re.escape, self._other)) or r"(?!)")
        self._letter = re.compile(f"[{chr(_FIRST)}-{chr(_FIRST + len(known))}]")

    def _swapped(self, found: re.Match[str]) -> str:
        return self._other[found[0]]

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        """A canonical chat row with its special tokens disguised, but for marks of reasoning in answers. Raises
        :class:`RowError`.
        """
        messages = [
            {key: value if key == "role" else self._hide(value, m["role"] == "assistant") for key, value in m.items()}
            for m in row["messages"]
        ]
        return {**row, "messages": messages, **({"tools": self._hide(row["tools"], False)} if "tools" in row else {})}

    def _hide(self, value: Any, answer: bool) -> Any:
        if isinstance(value, str):
            if self._letter.search(value):
                raise RowError("private characters of Unicode stand beside special tokens", _FIX)
            return self._plain.sub(lambda m: m[0] if answer and MARKS.fullmatch(m[0]) else self._other[m[0]], value)
        if isinstance(value, dict):
            return {self._hide(key, answer): self._hide(inner, answer) for key, inner in value.items()}
        return [self._hide(inner, answer) for inner in value] if isinstance(value, list) else value

    def shown(self, rendered: str) -> str:
        """A rendered text as people read it. Raises :class:`RowError` where the template took a disguise apart."""
        text = self._disguised.sub(self._swapped, rendered)
        if self._letter.search(text) or "\\udb8" in text:
            raise RowError("the chat template takes special tokens that stand in this row apart", _FIX)
        return text

    def exchanged(self, rendered: str) -> str:
        """A rendered text for the tokenizer of :meth:`tokenizer`."""
        return self._both.sub(self._swapped, rendered)

    def tokenizer(self, serialised: str, special_ids: Iterable[int]) -> ControlTokenizer | None:
        """A copy of a tokenizer that takes the disguises for its special tokens; None where it would not give the same
        ids.
        """
        tree = json.loads(serialised)
        for token in tree["added_tokens"]:
            token["content"] = self.hidden.get(token["content"], token["content"])
        words = tree["model"].get("vocab")
        if isinstance(words, dict):
            tree["model"]["vocab"] = {self.hidden.get(word, word): n for word, n in words.items()}
        elif isinstance(words, list):
            tree["model"]["vocab"] = [[self.hidden.get(word, word), score] for word, score in words]
        tree["post_processor"] = None
        return ControlTokenizer.of(serialised, json.dumps(tree), self, special_ids)


class ControlTokenizer:
    """Tokenises texts that :meth:`Disguise.exchanged` wrote."""

    def __init__(self, tokenizer: Any, disguise: Disguise, special_ids: Iterable[int]):
        self.tokenizer, self._disguise = tokenizer, disguise
        unknown = getattr(tokenizer.model, "unk_token", None)
        self._ids = {tokenizer.token_to_id(hidden) for hidden in disguise.hidden.values()} & set(special_ids)
        self._ids.discard(tokenizer.token_to_id(disguise.hidden.get(unknown, unknown)) if unknown else None)

    @classmethod
    def of(cls, plain: str, changed: str, disguise: Disguise, special_ids: Iterable[int]) -> ControlTokenizer | None:
        from tokenizers import Tokenizer

        before = Tokenizer.from_str(plain)
        try:
            after = Tokenizer.from_str(changed)
        except Exception:  # tokenizers raises nothing narrower: a model whose parts name its special tokens
            return None
        for one in (before, after):
            one.no_truncation()
            one.no_padding()
        sample = "".join(f"one {token}two{token} {token}\n" for token in disguise.hidden)
        ids = before.encode(sample, add_special_tokens=False).ids
        if after.encode(disguise.exchanged(sample), add_special_tokens=False).ids != ids:
            return None
        return cls(after, disguise, special_ids)

    def encode(self, exchanged: list[str]) -> list[Any]:
        """One ``Encoding`` a text. Raises :class:`RowError` where text became a special token all the same."""
        found = self.tokenizer.encode_batch(exchanged, add_special_tokens=False)
        for text, encoding in zip(exchanged, found, strict=True):
            theirs = self._disguise._disguised.findall(text)
            known = sum(self.tokenizer.token_to_id(token) in self._ids for token in theirs)
            if sum(i in self._ids for i in encoding.ids) != known:
                raise RowError("the tokenizer has no way to write special tokens of this row as text", _FIX)
        return found


def refused() -> RowError:
    """For rows whose special tokens this tokenizer cannot write as text."""
    return RowError("special tokens stand in this row, and the tokenizer has no way to write them as text", _FIX)


class Prompts:
    """What a model is asked, as text and ids, as its training had it.

    Args:
        template: renders conversations (:class:`~aifactory_train.data.template.ChatTemplate`).
        tokenizer: of transformers, with a fast form.
        as_text: special tokens in what people wrote are text (``data.control_tokens_in_content``).
    """

    def __init__(self, template: Any, tokenizer: Any, *, special_ids: Iterable[int], as_text: bool):
        self.template, self._tokenizer, self._special_ids = template, tokenizer, tuple(special_ids)
        self._disguise = Disguise.of(tokenizer.backend_tokenizer, self._special_ids if as_text else ())

    @functools.cached_property
    def _control(self) -> ControlTokenizer | None:
        return self._disguise.tokenizer(self._tokenizer.backend_tokenizer.to_str(), self._special_ids)

    def special(self, row: dict[str, Any]) -> bool:
        """Whether special tokens stand in a canonical chat row as text, so that no plain text says what the model
        reads.
        """
        return self._disguise.row(row) != row

    def ask(self, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> tuple[str, list[int]]:
        """Text and ids of a conversation and the header of the answer to it. Raises :class:`RowError`."""
        row = {"messages": messages, **({"tools": tools} if tools else {})}
        if not self.special(row):
            text = self.template.render(messages, tools, prompt=True)
            return text, self._tokenizer(text, add_special_tokens=False).input_ids
        hidden = self._disguise.row(row)
        rendered = self.template.render(hidden["messages"], hidden.get("tools"), prompt=True)
        text = self._disguise.shown(rendered)
        if self._control is None:
            raise refused()
        return text, self._control.encode([self._disguise.exchanged(rendered)])[0].ids
