"""Held-out figures of an embedding model, each with a bootstrap interval over queries.

``loss``: the training's loss of a held-out query, all texts of the held-out rows being candidates; ``ndcg_at_10``,
``recall_at_1``, ``recall_at_10``: of the ranking of these texts (each once) by their likeness to the query. A query of
several rows counts once, and all their positives belong to it. The figures of a set depend on how many texts it has:
compare them on the same rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from aifactory_train import metrics
from aifactory_train.core.errors import UserError
from aifactory_train.evaluation.head_outputs import head_outputs
from aifactory_train.evaluation.likelihood import choose_rows
from aifactory_train.metrics.bootstrap import packed, ratio
from aifactory_train.metrics.retrieval import ndcg, ranks, recall
from aifactory_train.model.embedding import Similarity

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.data import PreparedData
    from aifactory_train.data.retrieval import Corpus, MatchedTokens

#: The figures of a ranking, from the places of what belongs to a query.
RANKINGS = {
    "ndcg_at_10": lambda places: ndcg(places, 10),
    "recall_at_1": lambda places: recall(places, 1),
    "recall_at_10": lambda places: recall(places, 10),
}


def evaluate_embeddings(
    module: nn.Module, prepared: PreparedData, recipe: Recipe, *, scoring: dict[str, Any], whole: bool
) -> dict[str, Any]:
    """Figures over all held-out queries, and of each evaluation set under ``sets``; the same on all ranks. ``scoring``:
    arguments of :func:`~aifactory_train.evaluation.head_outputs.head_outputs`; ``whole``: with replicates, and with
    ``methods.head.matryoshka`` the figures of each size under ``dimensions``.
    """
    head = recipe.methods.head
    assert head is not None
    found: list[dict[int, dict[str, np.ndarray]]] = []
    sets: dict[str, Any] = {}
    sizes: tuple[int, ...] = ()
    for name, dataset in prepared.evals.items():
        held: MatchedTokens = dataset  # type: ignore[assignment]
        rows = choose_rows(len(held), recipe.data.eval_rows)
        if not len(rows):
            raise UserError("no held-out rows to evaluate", where=f"data.eval: {held.name}")
        corpus = held.corpus(rows)
        vectors = head_outputs(module, held.base, corpus.documents, None, pooling=head.pooling, **scoring)
        like = Similarity.of(head, vectors.shape[1])
        sizes = like.sizes
        found.append(statistics(torch.from_numpy(vectors), corpus, like))
        sets[name] = _figures([found[-1][sizes[-1]]])
    out = _figures([one[sizes[-1]] for one in found], replicates=whole)
    if whole and len(sizes) > 1:
        out["dimensions"] = {str(size): _figures([one[size] for one in found]) for size in sizes}
    return {**out, "sets": sets}


def statistics(vectors: torch.Tensor, corpus: Corpus, like: Similarity) -> dict[int, dict[str, np.ndarray]]:
    """``{size: {figure: float64 [queries]}}`` of vectors float64 ``[documents, D]``; the loss is that of all sizes."""
    asked, offered = vectors[corpus.queries], vectors[corpus.candidates]
    losses = like.losses(asked, offered, torch.from_numpy(corpus.left_out)).numpy()
    _, once = np.unique(corpus.asked, return_index=True)  # a query of several rows counts once
    _, texts = np.unique(corpus.offered, return_index=True)
    once, texts = np.sort(once), np.sort(texts)
    out = {}
    for size in like.sizes:
        scores = like.scores(asked[once], offered[texts], size).numpy()
        places = ranks(scores, corpus.belongs[np.ix_(once, texts)])
        out[size] = {name: np.asarray([value(p) for p in places]) for name, value in RANKINGS.items()}
        out[size]["loss"] = losses
    return out


def _figures(found: list[dict[str, np.ndarray]], *, replicates: bool = False) -> dict[str, Any]:
    """Of the statistics of some sets, ready for JSON."""
    values = {name: np.concatenate([one[name] for one in found]) for name in ("loss", *RANKINGS)}
    made = {name: metrics.figure(np.stack([v, np.ones(len(v))], axis=1), ratio) for name, v in values.items()}
    out: dict[str, Any] = {name: figure.value for name, figure in made.items()}
    out |= {"rows": len(values["loss"]), "ci": {name: figure.ci for name, figure in made.items()}}
    if replicates:
        out["replicates"] = {n: packed(f.replicates) for n, f in made.items() if f.replicates is not None}
    return out
