"""Which tokens of a tokenised text carry loss, and how a long one is cut.

Spans of characters become spans of tokens through the offsets of *one* tokenisation of the whole text. Where a token
straddles the border between question and answer, the two sides are tokenised apart, as they are at generation. For a
block of rows whose token ids tell their offsets the masks are built at once, as arrays; both ways give the same bytes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aifactory_train.data.block_tokens import TextBlock
from aifactory_train.data.cells import RowError
from aifactory_train.data.encoder_spec import EncoderSpec
from aifactory_train.data.offsets import Offsets
from aifactory_train.data.rendering import Rendered


@dataclass
class Document:
    """One token sequence. ``tokens`` int64 [n]; ``mask``, ``text_mask`` bool [n]; ``text_bytes`` UTF-8 bytes of the
    text whose tokens carry loss; ``cut``: it was shortened or is a part of a longer one."""

    tokens: np.ndarray
    mask: np.ndarray
    text_mask: np.ndarray
    text_bytes: int
    cut: bool = False


@dataclass
class Encoded:
    """The documents of one row (none when it was dropped), and what is worth counting.

    ``lost``: parts that the template leaves out (:func:`~aifactory_train.data.traces.lost`); ``controls``: special
    tokens in what people wrote. Each as often as it was found."""

    documents: list[Document]
    dropped: str | None = None  # "long" | "masked" | "empty" | "pair"
    flags: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()


class Masks:
    """From tokenised texts to documents: the mask of what carries loss, the documents' length kept."""

    def __init__(self, spec: EncoderSpec, tokenizer: Any, size: int):
        self.spec, self.tokenizer = spec, tokenizer
        self.specials = frozenset(spec.special_ids)
        self.stops = frozenset(spec.stop_ids)
        self._is_special = np.zeros(size, dtype=bool)
        self._is_special[list(spec.special_ids)] = True
        self._is_stop = np.zeros(size, dtype=bool)
        self._is_stop[list(spec.stop_ids)] = True

    def at_once(self, rendered: list[Rendered], block: TextBlock) -> list[Encoded | RowError | None]:
        """The rows of a block in which every border of a turn is one of tokens too; None for the others, and for those
        to be cut, dropped or refused."""
        ids, edges, begins = block.ids, block.edges, block.begins
        counts = np.diff(edges)
        ready = block.whole & (counts > 0) & (counts <= self.spec.sequence_length)
        owners: list[int] = []
        # Of each turn: answer begins, region ends, text begins, text ends; in bytes of the block.
        borders: list[int] = []
        bases = begins[edges[:-1]].tolist()
        for i in np.flatnonzero(ready).tolist():
            full, base, plain = rendered[i].full, bases[i], block.plain[i]
            for turn in rendered[i].turns:
                if turn.text is None:
                    ready[i] = False
                    break
                owners.append(i)
                borders.extend(
                    base + (char if plain else len(full[:char].encode())) for char in (turn.start, turn.end, *turn.text)
                )
        wanted, owner = np.asarray(borders, dtype=np.int64).reshape(-1, 4), np.asarray(owners, dtype=np.int64)
        found = np.searchsorted(begins, wanted)
        fits = (begins[found] == wanted).all(axis=1)
        first, limit, a, b = found.T
        stops = np.append(np.flatnonzero(self._is_stop[ids]), len(ids))
        stop = stops[np.searchsorted(stops, b)]
        fits &= stop < limit
        ready[owner[~fits]] = False
        keep = ready[owner]
        mask = _covered(first[keep], stop[keep] + 1, len(ids))
        text_mask = _covered(a[keep], b[keep], len(ids)) & ~self._is_special[ids] & mask
        if self.spec.supervise == "all":
            mask[:] = True
        heads = edges[:-1][counts > 0]
        mask[heads] = text_mask[heads] = False  # nothing predicts a first token
        before = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(mask, out=before[1:])
        ready &= before[edges[1:]] > before[edges[:-1]]
        sizes = np.bincount(owner, weights=wanted[:, 3] - wanted[:, 2], minlength=len(counts)).astype(np.int64).tolist()
        results: list[Encoded | RowError | None] = [None] * len(rendered)
        places = edges.tolist()
        for i in np.flatnonzero(ready).tolist():
            x, y = places[i], places[i + 1]
            document = Document(ids[x:y], mask[x:y], text_mask[x:y], sizes[i])
            results[i] = Encoded([document], None, tuple(sorted(rendered[i].flags)))
        return results

    def chat(self, rendered: Rendered, tokens: Offsets, tokenizer: Any = None) -> Encoded:
        """The row of one tokenised text. ``tokenizer``: the one that made ``tokens``, where it is not the usual one."""
        full, flags = rendered.full, set(rendered.flags)
        straddling = [t.start for t in rendered.turns if 0 < t.start < len(full) and tokens.straddles(t.start)]
        if straddling:
            read = full if rendered.exchanged is None else rendered.exchanged
            pieces = self._apart(read, straddling, tokens.ids, tokenizer or self.tokenizer)
            if pieces is None:
                flags.add("answer shares a token with the question")
            else:
                flags.add("tokenised apart")
                tokens = pieces
        return self._build(rendered, tokens, flags)

    def _apart(self, full: str, cuts: list[int], ids: list[int], tokenizer: Any) -> Offsets | None:
        """Tokenise the sides of each cut apart; None when that would change the text (a tokenizer that adds a
        space).
        """
        edges = [0, *cuts, len(full)]
        parts = [full[a:b] for a, b in itertools.pairwise(edges)]
        encodings = tokenizer.encode_batch(parts, add_special_tokens=False)
        joined = [i for e in encodings for i in e.ids]
        if self.tokenizer.decode(joined, skip_special_tokens=False) != self.tokenizer.decode(
            ids, skip_special_tokens=False
        ):
            return None
        return Offsets.joined(encodings, edges)

    def _build(self, rendered: Rendered, tokens: Offsets, flags: set[str]) -> Encoded:
        full = rendered.full
        ids = np.asarray(tokens.ids, dtype=np.int64)
        n = len(ids)
        mask = np.zeros(n, dtype=bool)
        text_mask = np.zeros(n, dtype=bool)
        spans: list[tuple[int, int]] = []
        for number, turn in enumerate(rendered.turns):
            first = tokens.first_from(turn.start)
            limit = tokens.first_from(turn.end)
            after = tokens.first_from(turn.text[1]) if turn.text else first
            stop = next((j for j in range(after, limit) if tokens.ids[j] in self.stops), None)
            if stop is None:
                raise RowError(
                    f"no end-of-turn token follows assistant turn {number + 1} in the rendered text: "
                    "the model would never learn to stop",
                    "use a chat template that ends the assistant's turns with a special token (model.chat_template)",
                )
            mask[first : stop + 1] = True
            if turn.text:
                a, b = tokens.overlapping(*turn.text)
                text_mask[a:b] = True
                spans.append(turn.text)
            else:
                for j in range(first, stop):
                    if tokens.ids[j] not in self.specials:
                        text_mask[j] = True
                spans += _without(
                    (turn.start, tokens.span(stop)[0]),
                    [tokens.span(j) for j in range(first, stop) if tokens.ids[j] in self.specials],
                )
        text_mask &= ~self._is_special[ids]
        text_mask &= mask
        if self.spec.supervise == "all":
            mask[:] = True
        return self._fit(full, ids, mask, text_mask, spans, tokens, flags)

    def text(self, text: str, tokens: Offsets) -> Encoded:
        ids = np.asarray(tokens.ids, dtype=np.int64)
        special = self._is_special[ids]
        begin = int(special[0]) if len(ids) else 0
        if self.spec.eos_id is not None and (len(ids) == 0 or ids[-1] != self.spec.eos_id):
            ids = np.append(ids, self.spec.eos_id)
            special = np.append(special, True)
        mask = np.ones(len(ids), dtype=bool)
        text_mask = ~special
        # Without a BOS token nothing predicts the first token: its bytes are not scored either.
        scored_from = 0 if begin or len(tokens.ids) == 0 else tokens.span(0)[1]
        return self._fit(text, ids, mask, text_mask, [(scored_from, len(text))], tokens, set())

    @staticmethod
    def read(ids: Sequence[int], *, cut: bool) -> Encoded:
        """A text that a head reads: nothing of it is predicted, the mask marks the last token, whose hidden state is
        read (of a single token nothing is marked: a first token carries no loss anywhere).
        """
        tokens = np.asarray(ids, dtype=np.int64)
        if not len(tokens):
            return Encoded([], "empty")
        mask = np.zeros(len(tokens), dtype=bool)
        mask[1:][-1:] = True
        return Encoded([Document(tokens, mask, np.zeros(len(tokens), dtype=bool), 0, cut)])

    def _fit(
        self,
        full: str,
        ids: np.ndarray,
        mask: np.ndarray,
        text_mask: np.ndarray,
        spans: list[tuple[int, int]],
        tokens: Offsets,
        flags: set[str],
    ) -> Encoded:
        """Apply ``long_documents``; a part without a supervised token is left out."""
        if len(ids):
            mask[0] = text_mask[0] = False
        length = self.spec.sequence_length
        found = tuple(sorted(flags))
        if len(ids) <= length:
            if not mask.any():
                return Encoded([], "masked", found)
            return Encoded([Document(ids, mask, text_mask, _bytes(full, spans, 0, len(full)))], None, found)
        if self.spec.long_documents == "drop":
            return Encoded([], "long", found)
        pieces: list[Document] = []
        start = 0
        while True:
            stop = min(start + length, len(ids))
            if self.spec.long_documents == "paragraphs" and stop < len(ids):
                stop, inside = _break_before(full, tokens, start, stop)
                if inside:
                    flags.add("cut inside a sentence")
            # Characters of the tokens that this piece predicts: from its second token to the next piece's second token.
            c0 = tokens.begin(start + 1) if start else 0
            c1 = tokens.begin(stop) if stop < len(ids) else len(full)
            part = slice(start, stop)
            m, t = mask[part].copy(), text_mask[part].copy()
            m[0] = t[0] = False
            if m.any():
                pieces.append(Document(ids[part], m, t, _bytes(full, spans, c0, c1), True))
            if stop == len(ids) or self.spec.long_documents == "truncate":
                break
            start = stop - 1  # the last token again, as context: each token is predicted exactly once
        return Encoded(pieces, None if pieces else "masked", tuple(sorted(flags)))


#: Where a long document may be cut, best first: between paragraphs, between lines, behind a sentence.
_BREAKS = (re.compile(r"\n[ \t]*\n\s*"), re.compile(r"\n\s*"), re.compile(r"[.!?…。！？][\"'»”)]*\s+|[。！？]"))


def _break_before(full: str, tokens: Offsets, start: int, stop: int) -> tuple[int, bool]:
    """The last good place to cut ``[start, stop)``, at least half of it kept; ``(stop, True)`` when there is none."""
    c0, c1 = tokens.begin(start + (stop - start) // 2), tokens.begin(stop)
    for pattern in _BREAKS:
        for end in reversed([m.end() for m in pattern.finditer(full, c0, c1)]):
            at = tokens.first_from(end)
            if start + 1 < at <= stop:
                return at, False
    return stop, True


def _covered(begins: np.ndarray, ends: np.ndarray, n: int) -> np.ndarray:
    """bool [n]: inside some of the ranges ``[begins, ends)``."""
    change = np.bincount(begins, minlength=n + 1) - np.bincount(ends, minlength=n + 1)
    return np.cumsum(change[:n]) > 0


def _without(span: tuple[int, int], holes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out, at = [], span[0]
    for a, b in holes:
        if a > at:
            out.append((at, a))
        at = max(at, b)
    if at < span[1]:
        out.append((at, span[1]))
    return out


def _bytes(full: str, spans: list[tuple[int, int]], c0: int, c1: int) -> int:
    """UTF-8 bytes of the parts of ``spans`` that lie in ``[c0, c1)``."""
    return sum(len(full[max(a, c0) : min(b, c1)].encode()) for a, b in spans if max(a, c0) < min(b, c1))
