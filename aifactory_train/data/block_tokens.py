"""Many texts tokenised at once, without offsets where token ids tell their widths."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from aifactory_train.data.offsets import Offsets, widths
from aifactory_train.data.pieces import Pieces, end_to_end


@dataclass
class TextBlock:
    """Some texts tokenised without offsets. ``ids`` int64 [all], of text ``i`` those in
    ``[edges[i], edges[i + 1])``; ``begins`` int64 [all + 1]: bytes before each token, texts end to end; ``whole`` bool
    [texts]: the widths of its tokens add up to the text, so ``begins`` is right for it; ``plain``: it is ASCII (a byte
    is a character)."""

    ids: np.ndarray
    edges: np.ndarray
    begins: np.ndarray
    whole: np.ndarray
    plain: list[bool]

    def offsets(self, i: int, text: str) -> Offsets:
        a, b = int(self.edges[i]), int(self.edges[i + 1])
        return Offsets.of_widths(self.ids[a:b].tolist(), text, np.diff(self.begins[a : b + 1]))


class BlockTokenizer:
    """A tokenizer, and the ways past the slow parts of it that hold for it (each None where it does not).

    ``widths`` int64 [size]: bytes of each token (:func:`~aifactory_train.data.offsets.widths`); ``added``: ids that the
    post-processor writes around a text; ``pieces``: words tokenised once.
    """

    def __init__(self, tokenizer: Any, size: int):
        self.tokenizer = tokenizer
        self.widths = widths(tokenizer)
        if self.widths is not None and len(self.widths) < size:
            self.widths = np.append(self.widths, np.zeros(size - len(self.widths), dtype=np.int64))
        self.added = self._added_around() if self.widths is not None else None
        self.pieces = Pieces.of(tokenizer, self.widths) if self.widths is not None else None
        self._to_check = 256

    def _added_around(self) -> tuple[list[int], list[int]] | None:
        """Ids that the post-processor writes before and behind every text."""
        alone, whole = (self.tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
        for at in range(len(whole) - len(alone) + 1):
            if whole[at : at + len(alone)] == alone:
                return whole[:at], whole[at + len(alone) :]
        return None

    def block(self, texts: list[str], *, added: bool = False) -> TextBlock:
        """Tokenise without offsets (only where :func:`widths` has an answer). ``added``: with the post-processor's
        tokens.
        """
        assert self.widths is not None
        ids, edges = self.ids(texts, added)
        width = self.widths[ids]
        before, behind = self.added if added and self.added is not None else ([], [])
        for place in (edges[:-1, None] + np.arange(len(before)), edges[1:, None] - 1 - np.arange(len(behind))):
            width[place.ravel()] = 0
        begins = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(width, out=begins[1:])
        plain = [t.isascii() for t in texts]
        sizes = [len(t) if ascii_ else len(t.encode()) for t, ascii_ in zip(texts, plain, strict=True)]
        whole = begins[edges[1:]] - begins[edges[:-1]] == np.asarray(sizes, dtype=np.int64)
        normalizer = self.tokenizer.normalizer
        for i, (text, ascii_) in enumerate(zip(texts, plain, strict=True)):
            if normalizer is not None and not ascii_ and normalizer.normalize_str(text) != text:
                whole[i] = False
        return TextBlock(ids, edges, begins, whole, plain)

    def ids(self, texts: list[str], added: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, int64, and where those of each begin and end, int64 [texts + 1]."""
        if self.pieces is None or (added and self.added is None):
            return end_to_end([e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=added)])
        ids, edges = self.pieces.ids(texts)
        if self._to_check > 0:  # the first texts go both ways
            some = texts[: self._to_check]
            self._to_check -= len(some)
            proof, _ = end_to_end([e.ids for e in self.tokenizer.encode_batch_fast(some, add_special_tokens=False)])
            if not np.array_equal(proof, ids[: edges[len(some)]]):
                self.pieces = None
                return self.ids(texts, added)
        before, behind = self.added if added and self.added is not None else ([], [])
        if before or behind:
            rows = [ids[a:b].tolist() for a, b in itertools.pairwise(edges.tolist())]
            return end_to_end([[*before, *row, *behind] for row in rows])
        return ids, edges

    def count(self, texts: list[str]) -> int:
        """Tokens of all ``texts`` together, without those that the post-processor would add."""
        if self.widths is None:
            return sum(len(e) for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        return len(self.ids(texts, False)[0])
