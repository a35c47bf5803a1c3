"""Token ids of running text, word by word, each different word tokenised once.

Words repeat, and a byte-level BPE never merges across the pieces that its pre-tokenizer cuts. So text is cut at places where every
pre-tokenizer known here cuts as well, whatever stands around them, and the ids of the parts are looked up. The places are

* a single blank between two characters that are no white space. The patterns below match a blank only as the first character of a match, or
  in a run of white space up to its end; a single blank that something follows therefore begins a match (of itself alone before a digit), and
  none that began earlier holds it;
* the borders of added tokens, which the tokenizer takes out before anything else looks at the text.

A part tokenised by itself is cut like in its text: nothing in the patterns looks back, and what looks ahead (``\\s+(?!\\S)``) only at the end of
a run of white space, which no cut divides. Tokenizers with other patterns, or with added tokens that take blanks in, are not served.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np

from aifactory_train.data.offsets import steps_of

#: Split patterns with the property above: those of Llama 3, Qwen 2 to 3, and Mistral's Tekken (GPT-2's is built into ``ByteLevel``).
_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
#: Parts that are remembered, and the longest of them (characters): some tens of megabytes at most.
_MOST, _LONGEST = 1 << 16, 40
_CUT = re.compile(r"(?<=\S)(?= \S)")


class _Known(dict[str, list[int]]):
    """Ids of parts: those that are remembered, and behind them the long ones of the texts at hand."""

    passing: dict[str, list[int]]

    def __missing__(self, part: str) -> list[int]:
        return self.passing[part]


class Pieces:
    """Ids of texts by way of their parts; :meth:`of` says for which tokenizers."""

    def __init__(self, tokenizer: Any, added: list[str]):
        self._tokenizer = tokenizer
        # The longest one that begins at the first place wins, as in the tokenizer.
        longest_first = sorted(added, key=len, reverse=True)
        self._added = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if added else None
        self._known = _Known()

    @classmethod
    def of(cls, tokenizer: Any) -> Pieces | None:
        """None where the cuts are not known to be those of the tokenizer. ``tokenizer``: one that :func:`offsets.widths` serves."""
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
        added = tokenizer.get_added_tokens_decoder().values()
        if any(t.lstrip or t.rstrip or t.single_word or re.search(r"\s", t.content) for t in added):
            return None
        # Those to be found in normalised text are looked for after the others, inside the parts that are left.
        return cls(tokenizer, [t.content for t in added if not t.normalized]) if known else None

    def ids(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """What ``encode_batch_fast(texts, add_special_tokens=False)`` gives: the ids of all texts, int64, and where those of each
        begin and end, int64 [texts + 1]."""
        cut = [self._cut(text) for text in texts]
        parts = list(itertools.chain.from_iterable(cut))
        known = self._known
        missing = [part for part in set(parts) if part not in known]
        if 2 * len(missing) > len(parts):  # words that hardly repeat: one by one they would only cost more
            return end_to_end([e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)])
        if len(known) + len(missing) > _MOST:
            known.clear()
            missing = list(set(parts))
        known.passing = {}
        found = self._tokenizer.encode_batch_fast(missing, add_special_tokens=False) if missing else []
        for part, encoding in zip(missing, found, strict=True):
            (known if len(part) <= _LONGEST else known.passing)[part] = encoding.ids
        ids, ends = end_to_end(list(map(known.__getitem__, parts)))
        last = np.cumsum(np.fromiter(map(len, cut), dtype=np.int64, count=len(cut)))
        return ids, ends[np.concatenate([[0], last])]

    def _cut(self, text: str) -> list[str]:
        """``text`` in parts that the tokenizer can be given one by one."""
        out: list[str] = []
        for segment in self._added.split(text) if self._added is not None else (text,):
            if " " not in segment:
                if segment:
                    out.append(segment)
                continue
            # Blanks alone as white space, none beside another or at an end? Line ends may stand inside a part, but not beside a blank.
            plain = segment.replace("\n", "x")
            even = plain.split() == plain.split(" ") and "\n " not in segment and " \n" not in segment
            if even and "\0" not in segment:
                out += segment.replace(" ", "\0 ").split("\0")
            else:
                out += _CUT.split(segment)
        return out


def end_to_end(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids end to end, int64, and where each begins and ends, int64 [lists + 1]."""
    edges = np.zeros(len(lists) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, lists), dtype=np.int64, count=len(lists)), out=edges[1:])
    return np.fromiter(itertools.chain.from_iterable(lists), dtype=np.int64, count=int(edges[-1])), edges
