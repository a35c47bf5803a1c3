"""Labels of new texts from the export of a run with a head: by transformers' own classifier, as any user of the export
computes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aifactory_train.config.head_block import embeds
from aifactory_train.core.errors import UserError
from aifactory_train.core.files import read_json
from aifactory_train.data import labelled, matched, readers
from aifactory_train.data.cells import RowError, to_user_error
from aifactory_train.data.read_json import parse_lines
from aifactory_train.metrics.scores import sigmoid, softmax
from aifactory_train.model.trained import load_classifier

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.run.folder import RunFolder

#: Most tokens of one batch, padding counted.
BATCH_TOKENS = 4096


def texts_of(path: Path, recipe: Recipe) -> list[tuple[str, str]]:
    """``(id, text)`` of each row, the id its own or its line. Raises :class:`UserError` with file and line."""
    source = recipe.data.train[0]
    columns = {} if source.converter else source.columns
    out: list[tuple[str, str]] = []
    for block in readers.blocks(path, role="eval"):
        rows: Iterable[tuple[int, Any]]
        rows = parse_lines(block) if block.lines is not None else enumerate(block.rows or [])
        for number, row in rows:
            line = number if block.lines is not None else block.number(number)
            try:
                text = (matched if embeds(recipe) else labelled).text_alone(row, columns)
            except RowError as error:
                raise to_user_error(error, f"{block.file}:{line}") from None
            out.append((str(row["id"]) if row.get("id") not in (None, "") else f"{path.name}:{line}", text))
    if not out:
        raise UserError("no rows: every line is blank", where=str(path))
    return out


def tokens_of(tokenizer: Any, rows: Sequence[tuple[str, str]], length: int) -> tuple[list[list[int]], list[bool]]:
    """(the first ``length`` tokens of each ``(id, text)``, whether it had more)."""
    kept = [tokenizer(text, truncation=True, max_length=length).input_ids for _, text in rows]
    return kept, [len(tokenizer(text).input_ids) > length for _, text in rows]


def batches_of(rows: Sequence[Sequence[int]], pad_id: int) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """``(which rows, ids [B, T], mask [B, T])``, both int64: padded on the right, texts of one length together."""
    waiting = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    while waiting:
        width = len(rows[waiting[0]])
        count = max(1, BATCH_TOKENS // width)
        batch, waiting = waiting[:count], waiting[count:]
        ids = torch.full((len(batch), width), pad_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, : len(rows[i])] = torch.tensor(rows[i])
            mask[row, : len(rows[i])] = 1
        yield batch, ids, mask


class Predictor:
    """The exported head of a run, with what was chosen on its held-out rows."""

    def __init__(self, run: RunFolder, device: str):
        self.device = device
        self.model, self.tokenizer, folder = load_classifier(run, device)
        self.head = read_json(folder / "head.json", {"labels": list, "kind": str, "sequence_length": int})

    def predict(self, rows: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """``{"id", "labels", "probabilities", "truncated"}`` of each ``(id, text)``.

        ``labels``: the best one; of any number of labels those above their thresholds. Probabilities are calibrated by
        the temperature where there is one.
        """
        kept, cut = tokens_of(self.tokenizer, rows, int(self.head["sequence_length"]))
        outputs = self.outputs(kept)
        names, several = self.head["labels"], self.head["kind"] == "multi_label"
        temperature = float(self.head.get("temperature", 1.0))
        if several:
            probabilities = sigmoid(outputs, temperature)
            given = sigmoid(outputs) >= np.asarray(self.head.get("thresholds", [0.5] * len(names)))
        else:
            probabilities = softmax(outputs, temperature)
            given = np.eye(len(names), dtype=bool)[outputs.argmax(axis=1)]
        return [
            {
                "id": name,
                "labels": [names[k] for k in np.flatnonzero(given[i])],
                "probabilities": {label: round(float(p), 6) for label, p in zip(names, probabilities[i], strict=True)},
                "truncated": cut[i],
            }
            for i, (name, _) in enumerate(rows)
        ]

    @torch.no_grad()
    def outputs(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """float64 ``[rows, labels]`` of token ids, padded on the right, texts of one length together."""
        out = np.zeros((len(rows), len(self.head["labels"])))
        for batch, ids, mask in batches_of(rows, int(self.model.config.pad_token_id)):
            found = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).logits
            out[batch] = found.double().cpu().numpy()
        return out
