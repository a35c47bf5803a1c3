"""Where tokens stand in their text: asked of the tokenizer, or, for byte-level tokenizers, added up from the width of
each token.

A byte-level BPE writes a text's UTF-8 bytes one to one: a token of its vocabulary stands for as many bytes as its name
has letters, an added token for those of its content. So ids alone say where each token begins, and
``encode_batch_fast``, which keeps no offsets, is enough. It holds for a text exactly when the widths of its tokens add
up to its bytes: a token can stand for more than its own width (an added one that swallows blanks around it) or for text
that left no token (removed by a pre-tokenizer), never for less.
:func:`widths` says for which tokenizers; every text is checked by its sum, and what does not add up is tokenised with
offsets.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from typing import Any

import numpy as np

_SPLITTERS = {"Split", "Digits", "ByteLevel"}  # pre-tokenizers that change no byte; ByteLevel is the last one


def widths(tokenizer: Any) -> np.ndarray | None:
    """UTF-8 bytes that each token id stands for, int64 [largest id + 1] (0 where there is no such id); None where that
    has no answer.

    ``tokenizer``: a ``tokenizers.Tokenizer``. A normalizer other than NFC changes texts, and so do pre-tokenizers that
    write blanks as letters (SentencePiece); an unknown token or dropout make the ids depend on more than the text.
    """
    model, steps = tokenizer.model, steps_of(tokenizer)
    plain = (
        type(model).__name__ == "BPE"
        and not any(
            getattr(model, key)
            for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        )
        and {step["type"] for step in steps} <= _SPLITTERS
        and bool(steps)
        and steps[-1]["type"] == "ByteLevel"
        and not any(step.get("add_prefix_space") for step in steps)
        and (tokenizer.normalizer is None or _state(tokenizer.normalizer)["type"] == "NFC")
    )
    if not plain:
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    added = {token: len(entry.content.encode()) for token, entry in tokenizer.get_added_tokens_decoder().items()}
    ids = np.fromiter(vocabulary.values(), dtype=np.int64, count=len(vocabulary))
    out = np.zeros(max(int(ids.max(initial=-1)), *added, -1) + 1, dtype=np.int64)
    out[ids] = np.fromiter(map(len, vocabulary), dtype=np.int64, count=len(vocabulary))
    out[list(added)] = list(added.values())
    return out


def steps_of(tokenizer: Any) -> list[dict[str, Any]]:
    """The settings of the pre-tokenizers, one after another."""
    if tokenizer.pre_tokenizer is None:
        return []
    state = _state(tokenizer.pre_tokenizer)
    return state["pretokenizers"] if state["type"] == "Sequence" else [state]


def _state(part: Any) -> dict[str, Any]:
    return json.loads(part.__getstate__())


class Offsets:
    """Token ids of one text with their spans of characters.

    Made of an ``Encoding`` of ``tokenizers`` (its own lookups are used: no list of tuples for each row), or of spans:
    :meth:`joined` and
    :meth:`of_widths`.
    """

    def __init__(self, encoding: Any, length: int):
        self._encoding = encoding
        self._length = length
        self._spans: list[tuple[int, int]] | None = None
        self._of_widths: tuple[str, np.ndarray] = ("", np.empty(0, dtype=np.int64))
        self.ids: list[int] = encoding.ids

    @classmethod
    def joined(cls, encodings: list[Any], edges: list[int]) -> Offsets:
        """Of the pieces of a text that begin at ``edges`` (the last one is the text's end)."""
        spans = [(a + base, b + base) for e, base in zip(encodings, edges, strict=False) for a, b in e.offsets]
        return cls._of([i for e in encodings for i in e.ids], edges[-1], spans)

    @classmethod
    def of_widths(cls, ids: list[int], text: str, width: np.ndarray) -> Offsets:
        """Of a text whose tokens stand for ``width`` bytes each (int64 [n], adding up to all of it); those of width 0
        stand for no text.
        """
        self = cls.__new__(cls)
        self._encoding, self._length, self._spans, self.ids = None, len(text), None, ids
        self._of_widths = text, width
        return self

    @classmethod
    def _of(cls, ids: list[int], length: int, spans: list[tuple[int, int]]) -> Offsets:
        self = cls.__new__(cls)
        self._encoding, self._length, self._spans, self.ids = None, length, spans, ids
        self._index(spans)
        return self

    def _index(self, spans: list[tuple[int, int]]) -> None:
        # Tokens that stand for text, in its order.
        self._real = [j for j, (a, b) in enumerate(spans) if a < b]
        self._begins = [spans[j][0] for j in self._real]
        self._ends = [spans[j][1] for j in self._real]

    def _add_up(self) -> list[tuple[int, int]]:
        """The spans behind :meth:`of_widths`, when they are first asked for."""
        text, width = self._of_widths
        ends = np.cumsum(width)
        begins = ends - width
        if not text.isascii():
            # A token that holds a part of a character's bytes stands for the character, as in tokenizers' own offsets.
            raw = np.frombuffer(text.encode(), dtype=np.uint8)
            character = np.append(np.cumsum((raw & 0xC0) != 0x80) - 1, len(text))
            begins, ends = character[begins], character[ends - 1] + 1
        begins[width == 0] = ends[width == 0] = 0
        spans = list(zip(begins.tolist(), ends.tolist(), strict=True))
        self._index(spans)
        return spans

    def span(self, j: int) -> tuple[int, int]:
        """Characters ``[a, b)`` of token ``j``."""
        if self._spans is None:
            if self._encoding is None:
                self._spans = self._add_up()
                return self._spans[j]
            one = self._encoding.token_to_chars(j)  # None for a token that stands for no text (an added BOS)
            if one is not None:
                return one
            self._spans = self._encoding.offsets
        return self._spans[j]

    def begin(self, j: int) -> int:
        """First character of token ``j``, the end of the text behind the last one."""
        return self.span(j)[0] if j < len(self.ids) else self._length

    def first_from(self, char: int) -> int:
        """First token that begins at ``char`` or later (the number of tokens when there is none)."""
        if char >= self._length:
            return len(self.ids)
        if self._encoding is None:
            if self._spans is None:
                self._spans = self._add_up()
            at = bisect_left(self._begins, char)
            return self._real[at] if at < len(self._real) else len(self.ids)
        j = self._encoding.char_to_token(char)
        if j is None:
            return self._next_after(0, char)
        return j if self._encoding.token_to_chars(j)[0] >= char else self._next_after(j, char)

    def _next_after(self, j: int, char: int) -> int:
        while j < len(self.ids) and (self.span(j)[0] < char or self.span(j)[0] == self.span(j)[1]):
            j += 1
        return j

    def overlapping(self, a: int, b: int) -> tuple[int, int]:
        """Tokens ``[first, last)`` that hold any character of ``[a, b)``."""
        first, last = self.first_from(a), self.first_from(b)
        while first > 0 and self.span(first - 1)[1] > a:
            first -= 1
        return first, max(first, last)

    def straddles(self, char: int) -> bool:
        """Whether one token holds both the character before ``char`` and the one at it."""
        if self._encoding is None:
            if self._spans is None:
                self._spans = self._add_up()
            at = bisect_right(self._ends, char)
            return at < len(self._begins) and self._begins[at] < char
        j = self._encoding.char_to_token(char)
        return j is not None and self._encoding.token_to_chars(j)[0] < char
