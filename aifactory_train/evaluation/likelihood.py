"""Held-out likelihood: every row scored, sums with intervals."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from aifactory_train import metrics
from aifactory_train.core.errors import UserError
from aifactory_train.metrics.bootstrap import packed, ratio
from aifactory_train.model.objective import TokenNLL
from aifactory_train.parallel.batches import micro_batch

if TYPE_CHECKING:
    from aifactory_train.data import TokenDataset


@dataclass
class HeldOut:
    """Likelihood of held-out documents. Arrays are float64 ``[rows]`` in the order of ``documents``, the same on all
    ranks.
    """

    documents: np.ndarray  # int64 [rows], indices into the data set
    nll: np.ndarray  # nats over all supervised targets
    tokens: np.ndarray  # supervised targets
    text_nll: np.ndarray  # nats over the targets that are text
    text_bytes: np.ndarray  # UTF-8 bytes of that text

    @property
    def rows(self) -> int:
        return len(self.documents)

    @property
    def loss(self) -> float:
        """Mean NLL in nats per supervised token."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float | None:
        return metrics.perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        return metrics.bits_per_byte(float(self.text_nll.sum()), int(self.text_bytes.sum()))

    def statistics(self, name: str, rows: np.ndarray | None = None) -> tuple[np.ndarray, Any]:
        """(``[rows, 2]``, value of their sums) of ``bits_per_byte``, ``loss`` or ``perplexity``."""
        top, below = (
            (self.text_nll / math.log(2), self.text_bytes) if name == "bits_per_byte" else (self.nll, self.tokens)
        )
        both = np.stack([top, below], axis=1)
        return (both if rows is None else both[rows]), _exp_ratio if name == "perplexity" else ratio

    def figures(self, rows: np.ndarray | None = None, *, replicates: bool = False) -> dict[str, Any]:
        """Figures of some rows (default: all) with bootstrap intervals over rows (95 %), ready for JSON."""
        chosen = np.arange(self.rows) if rows is None else rows
        out: dict[str, Any] = {}
        ci: dict[str, Any] = {}
        drawn: dict[str, str] = {}
        for name in metrics.LIKELIHOOD_METRICS:
            found = metrics.figure(*self.statistics(name, chosen))
            samples = found.replicates
            finite = samples is not None and bool(np.isfinite(samples).all())
            out[name] = found.value if found.value is not None and math.isfinite(found.value) else None
            ci[name] = found.ci if finite else None
            if replicates and finite and samples is not None:
                drawn[name] = packed(samples)
        out.update(
            rows=len(chosen),
            tokens=int(self.tokens[chosen].sum()),
            text_bytes=int(self.text_bytes[chosen].sum()),
            ci=ci,
        )
        return {**out, "replicates": drawn} if replicates else out


def _exp_ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp(ratio(sums))


def choose_rows(total: int, most: int) -> np.ndarray:
    """At most ``most`` of ``total`` documents, evenly spaced, so that every part of the set is represented."""
    if total <= most:
        return np.arange(total)
    return np.unique(np.linspace(0, total - 1, most).round().astype(np.int64))


def held_out(
    module: nn.Module,
    dataset: TokenDataset,
    *,
    max_rows: int,
    batching: str,
    pad_id: int,
    device: str,
    micro_batch_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    autocast: torch.dtype | None = None,
    took: Callable[[int, float], None] | None = None,
) -> HeldOut:
    """Likelihood of at most ``max_rows`` documents; the result does not depend on the number of ranks.

    ``module`` is a (wrapped or sharded) :class:`CausalLM`, called the same number of times on every rank. The model's
    mode is restored; dropout is off meanwhile. ``took`` hears how many tokens the first micro-batches of all ranks had,
    and how many seconds they took.
    """
    documents = choose_rows(len(dataset), max_rows)
    if not len(documents):
        raise UserError("no held-out rows to evaluate", where=f"data.eval: {dataset.name}")
    batches = _micro_batches(dataset.lengths[documents], micro_batch_tokens, batching)
    sums = np.zeros((4, len(documents)))  # nll, tokens, text_nll, text_bytes
    was_training = module.training
    module.eval()
    try:
        for start in range(0, len(batches), world_size):
            mine = batches[start + rank] if start + rank < len(batches) else []
            began = time.monotonic()
            _score(module, dataset, documents, mine, sums, batching, pad_id, device, autocast)
            if took is not None and start == 0:
                together = [row for batch in batches[:world_size] for row in batch]
                took(int(dataset.lengths[documents[together]].sum()), time.monotonic() - began)
    finally:
        module.train(was_training)
    if world_size > 1:
        total = torch.from_numpy(sums)
        dist.all_reduce(total)  # each row was scored by one rank, the others hold zeros: exact
    return HeldOut(documents, *sums)


def _micro_batches(lengths: np.ndarray, most_tokens: int, batching: str) -> list[list[int]]:
    """Rows (indices into ``lengths``) of each micro-batch, longest first, none above ``most_tokens`` unless it is one
    row.
    """
    batches: list[list[int]] = []
    width = used = 0
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        cost = width * (len(batches[-1]) + 1) if batching == "padded" and batches else used + length
        if not batches or cost > most_tokens:
            batches.append([])
            width, used = length, 0
        batches[-1].append(row)
        used += length
    return batches


@torch.no_grad()
def _score(
    module: nn.Module,
    dataset: TokenDataset,
    documents: np.ndarray,
    rows: list[int],
    sums: np.ndarray,
    batching: str,
    pad_id: int,
    device: str,
    autocast: torch.dtype | None,
) -> None:
    """Add the figures of ``rows`` to their columns of ``sums``; without rows the module is called on one padding
    token.
    """
    batch = micro_batch(dataset, documents[rows], batching, pad_id, device)
    batch.objective = TokenNLL()
    context = torch.autocast(device.split(":")[0], dtype=autocast) if autocast is not None else contextlib.nullcontext()
    with context:
        nll = module(**batch.kwargs())
    if not rows:
        return
    values = nll.double().cpu().numpy()
    edges = np.concatenate([[0], np.cumsum(batch.documents.lengths)])
    where = batch.positions.cpu().numpy()
    owner = np.searchsorted(edges, where, side="right") - 1  # one segment per document
    for k, row in enumerate(rows):
        mine = owner == k
        text = dataset.text_mask(int(documents[row]))[where[mine] - edges[k] + 1]  # of the target, not of its context
        sums[0, row] = values[mine].sum()
        sums[1, row] = mine.sum()
        sums[2, row] = values[mine][text].sum()
        sums[3, row] = dataset.text_bytes(int(documents[row]))
