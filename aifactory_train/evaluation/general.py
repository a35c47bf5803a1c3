"""The forgetting check: what a model still knows of general text after it has learnt something narrow.

The text lies in ``general_text.jsonl``: eleven short passages of prose, dialogue, arithmetic, code and a letter, mostly
English, written for this check and under this project's licence. It is far too small to rank models. It is large enough
to show that one model has got worse at what nobody trained it on (McCloskey and Cohen 1989, "catastrophic
interference").
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.data.masks import Document

TEXT = Path(__file__).parent / "general_text.jsonl"


class GeneralTexts:
    """Documents in memory behind the part of :class:`aifactory_train.data.TokenDataset` that scoring reads."""

    def __init__(self, name: str, documents: list[Document]):
        self.name, self._documents = name, documents
        self.lengths = np.asarray([len(d.tokens) for d in documents], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._documents)

    def tokens(self, i: int) -> np.ndarray:
        return self._documents[i].tokens

    def mask(self, i: int) -> np.ndarray:
        return self._documents[i].mask

    def text_mask(self, i: int) -> np.ndarray:
        return self._documents[i].text_mask

    def text_bytes(self, i: int) -> int:
        return self._documents[i].text_bytes


def passages() -> list[dict[str, Any]]:
    """The rows of the general text: ``id``, ``language``, ``text``."""
    return [json.loads(line) for line in TEXT.read_text(encoding="utf-8").splitlines()]


def general_documents(recipe: Recipe, tokenizer: Any) -> GeneralTexts:
    """The passages as this recipe's tokenizer and sequence length have them; a passage that is too long is split."""
    from aifactory_train.data.encoder import Encoder
    from aifactory_train.data.masks import Encoded
    from aifactory_train.data.tokenizer import encoder_spec

    spec = dataclasses.replace(encoder_spec(tokenizer, recipe), long_documents="split")
    encoded = Encoder(spec).encode([{"text": row["text"]} for row in passages()])
    return GeneralTexts("general text", [d for e in encoded if isinstance(e, Encoded) for d in e.documents])


def forgetting(before: dict[str, Any] | None, after: dict[str, Any] | None, limit: float) -> dict[str, Any] | None:
    """What became of the general text's bits per byte, and a ``warning`` where they rose by more than the share
    ``limit``.

    ``before`` and ``after`` are the ``general`` blocks of the figures; None where either was not measured.
    """
    old, new = (before or {}).get("bits_per_byte"), (after or {}).get("bits_per_byte")
    if not old or new is None:
        return None
    change = (new - old) / old
    out: dict[str, Any] = {"before": old, "after": new, "change": change, "limit": limit, "warning": None}
    if change > limit:
        out["warning"] = (
            f"general text is {change:.1%} harder for the model than before ({old:.3f} to {new:.3f} bits per byte, "
            f"limit {limit:.0%}): "
            "it is forgetting; mix in general data (data.train with share), or lower train.learning_rate or the "
            "number of steps"
        )
    return out
