"""Vectors of new texts from the export of an embedding run, by transformers' own model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from aifactory_train.core.files import read_json
from aifactory_train.evaluation.predicting import batches_of, tokens_of
from aifactory_train.model.trained import load_embedder

if TYPE_CHECKING:
    from aifactory_train.run.folder import RunFolder


class Embedder:
    """The exported embedding model of a run."""

    def __init__(self, run: RunFolder, device: str):
        self.device = device
        self.model, self.tokenizer, folder = load_embedder(run, device)
        self.how = read_json(folder / "embedding.json", {"pooling": str, "normalise": bool, "sequence_length": int})

    def embed(self, rows: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """``{"id", "embedding", "truncated"}`` of each ``(id, text)``; an embedding has all dimensions, of length 1
        where vectors are compared by cosine.
        """
        kept, cut = tokens_of(self.tokenizer, rows, int(self.how["sequence_length"]))
        vectors = self.vectors(kept)
        return [
            {"id": name, "embedding": [round(x, 7) for x in vectors[i]], "truncated": cut[i]}
            for i, (name, _) in enumerate(rows)
        ]

    @torch.no_grad()
    def vectors(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """The vector of each row of token ids; padded on the right, texts of one length together."""
        out: list[list[float]] = [[] for _ in rows]
        for batch, ids, mask in batches_of(rows, pad_id=0):
            states = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).last_hidden_state
            for row, i in enumerate(batch):
                own = states[row, : len(rows[i])].double()
                vector = own[-1] if self.how["pooling"] == "last_token" else own.mean(dim=0)
                out[i] = (F.normalize(vector, dim=0) if self.how["normalise"] else vector).tolist()
        return out
