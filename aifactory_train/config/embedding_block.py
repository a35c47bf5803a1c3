"""Rules of ``methods.head`` of kind embedding with other keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aifactory_train.config.head_block import HeadConfig
    from aifactory_train.config.schema import Recipe

#: Settings of embeddings alone, with their defaults.
_OWN = {"pooling": "last_token", "temperature": 0.05, "normalise": True, "matryoshka": None}
#: Held-out figures that ``eval.best_by`` may name.
FIGURES = ("auto", "loss", "ndcg_at_10")


def check_others(head: HeadConfig) -> None:
    """Settings of embeddings beside another kind of head are refused. Raises :class:`ValueError`."""
    for key, default in _OWN.items():
        if getattr(head, key) != default:
            raise ValueError(f"methods.head.{key}: belongs to kind embedding, not {head.kind}")


def check_embedding(recipe: Recipe) -> None:
    """Raises :class:`ValueError`."""
    head = recipe.methods.head
    assert head is not None
    if head.pooling == "cls":
        raise ValueError(
            "methods.head.pooling: cls reads the first token, which sees nothing but itself in a causal model; "
            "last_token or mean read the text"
        )
    if not head.normalise and head.matryoshka is not None:
        raise ValueError("methods.head.normalise: the first dimensions alone (matryoshka) are compared by their angle")
    sizes = head.matryoshka or []
    if len(set(sizes)) != len(sizes):
        raise ValueError("methods.head.matryoshka: a size stands there twice")
    if recipe.model.trust_remote_code:
        raise ValueError(
            "model.trust_remote_code: the export of an embedding model is loaded by transformers' own classes alone"
        )
    if recipe.model.vocabulary is not None:
        raise ValueError("model.vocabulary: new tokens are learnt by predicting them, and an embedding predicts none")
