"""Token ids of running text, word by word, each different word tokenised once.

Words repeat, and a byte-level BPE never merges across the pieces that its pre-tokenizer cuts. So text is cut at places
where every pre-tokenizer known here cuts as well, whatever stands around them, and the ids of the parts are looked up.
The places are

* a single blank with white space neither before nor behind it. The patterns below match a blank only as the first
  character of a match, or in a run of white space up to its end; a single blank therefore begins a match (of itself
  alone before a digit or an end), and none that began earlier holds it;
* the borders of added tokens, which the tokenizer takes out before anything else looks at the text.

A part tokenised by itself is cut like in its text: nothing in the patterns looks back, and what looks ahead
(``\\s+(?!\\S)``) only at the end of a run of white space, which no cut divides. Tokenizers with other patterns, or with
added tokens that take blanks in, are not served.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np

from aifactory_train.data.offsets import steps_of

#: Split patterns with the property above: those of Llama 3, Qwen 2 to 3, and Mistral's Tekken (GPT-2's is built into
#: ``ByteLevel``).
_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
#: Parts, and ids of parts, after which all are forgotten: some tens of megabytes at most.
_MOST, _MOST_IDS = 1 << 16, 1 << 20
_CUT = re.compile(r"(?<=\S)(?= \S)")
#: Stand between parts, and behind each text, while a block is cut; a block with texts that hold them is not cut.
_BETWEEN, _END = "\0", "\1"
#: New parts that are tokenised as one text, an added token behind each: an ``Encoding`` costs more than most parts.
_TOGETHER = 64


class _Numbers(dict[str, int]):
    """The number of each part, in the order in which they were met; ``new``: those that were met since it was emptied
    last.
    """

    def __init__(self) -> None:
        self.new: list[str] = []

    def __missing__(self, part: str) -> int:
        self[part] = number = len(self)
        self.new.append(part)
        return number


class Pieces:
    """Ids of texts by way of their parts; :meth:`of` says for which tokenizers."""

    def __init__(self, tokenizer: Any, width: np.ndarray, added: dict[str, int]):
        self._tokenizer, self._width, self._added_ids = tokenizer, width, added
        # The longest one that begins at the first place wins, as in the tokenizer.
        longest_first = sorted(added, key=len, reverse=True)
        self._added = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if added else None
        self._forget()

    def _forget(self) -> None:
        self._known = _Numbers()
        for part in (_END, *self._added_ids):
            self._known[part] = len(self._known)
        # Ids of all parts, end to end; those of part ``n`` are ``_ids[_edges[n]:_edges[n + 1]]``.
        self._ids, self._edges = self._whole(["", *self._added_ids])

    @classmethod
    def of(cls, tokenizer: Any, width: np.ndarray) -> Pieces | None:
        """None where the cuts are not known to be those of the tokenizer. ``tokenizer``: one that
        :func:`offsets.widths` serves, ``width``: what it answers."""
        *before, last = steps_of(tokenizer)
        if last["use_regex"]:
            known = all(step["type"] == "Digits" for step in before)
        else:
            known = (
                len(before) == 1
                and before[0]["type"] == "Split"
                and before[0]["pattern"].get("Regex") in _PATTERNS
                and before[0]["behavior"] == "Isolated"
                and not before[0]["invert"]
            )
        added = tokenizer.get_added_tokens_decoder()
        if any(t.lstrip or t.rstrip or t.single_word or re.search(r"[\s\0\1]", t.content) for t in added.values()):
            return None
        # Those to be found in normalised text are looked for after the others, inside the parts that are left.
        return cls(tokenizer, width, {t.content: n for n, t in added.items() if not t.normalized}) if known else None

    def ids(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """What ``encode_batch_fast(texts, add_special_tokens=False)`` gives: the ids of all texts, int64, and where
        those of each begin and end, int64 [texts + 1]."""
        if any(_BETWEEN in text or _END in text for text in texts):
            return self._whole(texts)
        if len(self._known) > _MOST or len(self._ids) > _MOST_IDS:
            self._forget()
        known = self._known
        known.new = []
        parts = self._cut(texts)
        numbers = np.fromiter(map(known.__getitem__, parts), dtype=np.int64, count=len(parts))
        if known.new:
            if 2 * len(known.new) > len(parts) - len(texts):  # words that hardly repeat would only cost more one by one
                for part in known.new:
                    del known[part]
                return self._whole(texts)
            ids, edges = self._tokenise(known.new)
            self._edges = np.append(self._edges, edges[1:] + len(self._ids))
            self._ids = np.append(self._ids, ids)
        begins = self._edges[numbers]
        sizes = self._edges[numbers + 1] - begins
        ends = np.cumsum(sizes)
        places = np.repeat(begins - ends + sizes, sizes) + np.arange(int(ends[-1]) if len(ends) else 0)
        return self._ids[places], np.append(0, ends[numbers == known[_END]])

    def _whole(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return end_to_end([e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)])

    def _tokenise(self, parts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`ids` of parts that hold no added token, many as one text with an added token behind each. That this
        one was found in all these places, and nowhere else, shows in its id and in the bytes before it; then nothing
        reaches from a part into another."""
        if not self._added_ids:
            return self._whole(parts)
        mark, number = next(iter(self._added_ids.items()))
        ids, _ = self._whole([mark.join([*parts[i : i + _TOGETHER], ""]) for i in range(0, len(parts), _TOGETHER)])
        ends = np.flatnonzero(ids == number)
        sizes = np.fromiter((len(p) if p.isascii() else len(p.encode()) for p in parts), np.int64, count=len(parts))
        if not np.array_equal(np.cumsum(self._width[ids])[ends], np.cumsum(sizes + len(mark.encode()))):
            return self._whole(parts)
        return np.delete(ids, ends), np.append(0, ends - np.arange(len(ends)))

    def _cut(self, texts: list[str]) -> list[str]:
        """All texts in parts that the tokenizer can be given one by one, ``_END`` behind each text."""
        block = (_BETWEEN + _END + _BETWEEN).join([*map(_divided, texts), ""])
        if self._added is not None:
            block = _BETWEEN.join(self._added.split(block))
        return block.split(_BETWEEN)


def _divided(text: str) -> str:
    """``text`` with ``_BETWEEN`` before each blank that begins a part."""
    # Printable: no other white space than blanks. Line ends may stand inside a part, but not beside a blank.
    even = text.replace("\n", "").isprintable() and "  " not in text and "\n " not in text and " \n" not in text
    return text.replace(" ", _BETWEEN + " ") if even else _CUT.sub(_BETWEEN, text)


def end_to_end(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids end to end, int64, and where each begins and ends, int64 [lists + 1]."""
    edges = np.zeros(len(lists) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, lists), dtype=np.int64, count=len(lists)), out=edges[1:])
    return np.fromiter(itertools.chain.from_iterable(lists), dtype=np.int64, count=int(edges[-1])), edges
