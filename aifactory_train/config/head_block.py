"""The recipe's ``methods.head``: a model that classifies in place of one that writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from aifactory_train.config.embedding_block import FIGURES, check_embedding, check_others
from aifactory_train.config.strict import Strict

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe

#: Form of the rows (``data.train[].format``) that each kind of head learns from.
FORMS = {"classification": "label", "multi_label": "labels", "reward": "preference", "embedding": "retrieval"}
#: Figures that every head of labels has; ``eval.metrics`` may name them, and changes nothing by it.
_OWN_FIGURES = frozenset({"accuracy", "micro_f1", "macro_f1"})
_DEFAULT_FIGURES = frozenset({"bits_per_byte", "perplexity"})  # of eval.metrics where a recipe names none


class HeadConfig(Strict):
    """A small layer on the last hidden states in place of the vocabulary (docs/methods.md)."""

    kind: Literal["classification", "multi_label", "reward", "embedding"] = Field(
        description="classification: rows with text and one label; multi_label: any number of labels (a list, or text "
        "that eval.label_separator divides). Labels are data.labels, else those of the rows in alphabetical order. "
        "reward: a reward model from pairs (prompt, chosen, rejected). embedding: a vector of each text, from pairs "
        "(query, positive) with or without negatives."
    )
    class_weights: Literal["balanced"] | dict[str, float] | None = Field(
        None,
        description="What a row counts by its label, 1 where it is not named; balanced: rows / (labels x rows of this "
        "label). multi_label: of a label that applies against one that does not; balanced: rows without it / rows with "
        "it.",
    )
    pooling: Literal["last_token", "mean", "cls"] = Field(
        "last_token",
        description="embedding: which hidden states are the vector of a text. cls is for encoders and refused here.",
    )
    temperature: float = Field(
        0.05, gt=0, le=100, description="embedding: what similarities are divided by (1 / scale of others)."
    )
    normalise: bool = Field(True, description="embedding: compare by cosine; false: by dot product.")
    matryoshka: list[Annotated[int, Field(ge=1)]] | None = Field(
        None,
        min_length=1,
        description="embedding: sizes of which the first dimensions alone are an embedding too; all of them always "
        "are. The losses of the sizes add up.",
    )


def outputs(recipe: Recipe) -> int | None:
    """Rows of the head's weight; None for a recipe without a head, and for embeddings, which need no layer. Labels must
    be settled (``data.labels``).
    """
    head = recipe.methods.head
    return None if head is None or head.kind == "embedding" else len(names(recipe))


def embeds(recipe: Recipe) -> bool:
    """Whether the recipe trains an embedding model."""
    return recipe.methods.head is not None and recipe.methods.head.kind == "embedding"


def pooling_of(recipe: Recipe) -> str | None:
    """How the vector of a text is read; None where the recipe trains no embedding model."""
    head = recipe.methods.head
    return head.pooling if head is not None and head.kind == "embedding" else None


def names(recipe: Recipe) -> list[str]:
    """What the head's outputs mean, in their order."""
    assert recipe.methods.head is not None
    if recipe.methods.head.kind == "reward":
        return ["reward"]
    assert recipe.data.labels is not None, "the rows' labels are settled when they are read"
    return recipe.data.labels


def check_head(recipe: Recipe) -> None:
    """Rules of ``methods.head`` with other keys; its sources get their form of rows. Raises :class:`ValueError`."""
    head, data = recipe.methods.head, recipe.data
    assert head is not None
    wanted = FORMS[head.kind]
    for source in [*data.train, *(data.eval or [])]:
        if source.share is not None:
            raise ValueError("data.train: a head does not predict text, so nothing can be replayed (share)")
        if source.format == "auto":
            source.__dict__["format"] = wanted  # object-level write: validate_assignment would run the rules again
        if source.format != wanted:
            raise ValueError(
                f"methods.head: {head.kind} needs rows of format {wanted}, not {source.format}; leave format out"
            )
    if recipe.methods.goldfish is not None:
        raise ValueError("methods.goldfish: withholds tokens from next-token loss, and a head has none")
    if recipe.model.vocabulary is not None:
        raise ValueError("model.vocabulary: new tokens are learnt by predicting them, and a head predicts labels")
    if recipe.adapter.train_embeddings:
        raise ValueError("adapter.train_embeddings: does not go with a head; adapter.kind none trains all weights")
    if head.kind == "embedding":
        check_embedding(recipe)
    else:
        check_others(head)
    if head.kind in ("reward", "embedding") and (data.labels is not None or head.class_weights is not None):
        key = "data.labels" if data.labels is not None else "methods.head.class_weights"
        why = {
            "reward": "a reward model compares the two answers of a pair",
            "embedding": "an embedding tells the positive of a query from other texts",
        }[head.kind]
        raise ValueError(f"{key}: belongs to heads of labels; {why}")
    if head.kind != "reward" and data.long_documents in ("split", "paragraphs"):
        raise ValueError(
            f"data.long_documents: {data.long_documents} would give each piece of a text "
            f"{'the match' if head.kind == 'embedding' else 'the label'} of the whole; "
            "truncate or drop"
        )
    if head.kind != "multi_label" and recipe.eval.label_separator is not None:
        raise ValueError(
            "eval.label_separator: divides several labels; set methods.head.kind multi_label, or leave it out"
        )
    if data.labels is not None and len(set(data.labels)) != len(data.labels):
        raise ValueError("data.labels: a label stands there twice")
    if data.labels is not None and len(data.labels) < 2 and head.kind == "classification":
        raise ValueError("data.labels: one label is nothing to tell apart")
    if isinstance(head.class_weights, dict):
        for name, weight in head.class_weights.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"methods.head.class_weights: the weight of '{name}' must be above 0")
            if data.labels is not None and name not in data.labels:
                raise ValueError(f"methods.head.class_weights: '{name}' is not in data.labels")
    _check_eval(recipe)


def _check_eval(recipe: Recipe) -> None:
    assert recipe.methods.head is not None
    asked, kind = set(recipe.eval.metrics), recipe.methods.head.kind
    odd = sorted(asked if kind in ("reward", "embedding") else asked - _OWN_FIGURES)
    if odd and asked != _DEFAULT_FIGURES:
        own = "nDCG@10, recall" if kind == "embedding" else "accuracy, F1, AUROC, calibration error"
        raise ValueError(
            f"eval.metrics: {', '.join(odd)} judges text, and a head writes none; its own figures ({own}) come by "
            "themselves: take it out"
        )
    figures = {"reward": ("auto", "loss", "reward_accuracy"), "embedding": FIGURES}.get(kind, ("auto", "loss"))
    if recipe.eval.best_by not in figures:
        raise ValueError(f"eval.best_by: {recipe.eval.best_by} is no figure of this head; {', '.join(figures)} are")
