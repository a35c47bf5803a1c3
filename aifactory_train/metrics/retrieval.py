"""Figures of a ranking: what belongs to a query should stand first."""

from __future__ import annotations

import numpy as np


def ranks(scores: np.ndarray, belongs: np.ndarray) -> list[np.ndarray]:
    """The places (int64, from 1, rising) of what belongs to each query, among candidates by falling score.

    scores float64 and belongs bool ``[queries, candidates]``. Of equal scores what belongs comes last: a model that
    tells nothing apart finds nothing.
    """
    out = []
    for row, relevant in zip(scores, belongs, strict=True):
        others = np.sort(row[~relevant])
        own = np.sort(row[relevant])[::-1]
        before = len(others) - np.searchsorted(others, own, side="left")
        out.append((before + np.arange(1, len(own) + 1)).astype(np.int64))
    return out


def ndcg(places: np.ndarray, k: int = 10) -> float:
    """Normalised discounted cumulative gain at ``k`` of one query (Järvelin and Kekäläinen 2002), relevance 0 or 1."""
    gain = float((1.0 / np.log2(places[places <= k] + 1.0)).sum())
    best = float((1.0 / np.log2(np.arange(2, 2 + min(len(places), k)))).sum())
    return gain / best


def recall(places: np.ndarray, k: int) -> float:
    """The share of what belongs to a query that stands among the first ``k``."""
    return float((places <= k).mean())
