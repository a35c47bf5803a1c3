"""What a head gives for documents, the same on all ranks."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from aifactory_train.evaluation.likelihood import _micro_batches
from aifactory_train.model.head import Outputs
from aifactory_train.parallel.batches import micro_batch, read_at
from aifactory_train.parallel.pooling import read_pooled


@torch.no_grad()
def head_outputs(
    module: nn.Module,
    dataset: Any,
    documents: np.ndarray,
    ends: np.ndarray | None,
    *,
    width: int | None = None,
    pooling: str | None = None,
    batching: str,
    pad_id: int,
    device: str,
    micro_batch_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    autocast: torch.dtype | None = None,
) -> np.ndarray:
    """The head's outputs for some documents, float64 ``[documents, width]``, the same on all ranks and for any number
    of them. ``ends`` int64 ``[documents]``: the place that is read in each; without them a vector of each, by
    ``pooling``, whose ``width`` the model knows.

    ``module`` is called the same number of times on every rank; its mode is restored, dropout is off meanwhile.
    """
    lengths = np.asarray(dataset.lengths)[documents]
    batches = _micro_batches(lengths, micro_batch_tokens, batching)
    found = np.zeros((len(documents), width or 0))
    was_training = module.training
    module.eval()
    mixed = torch.autocast(device.split(":")[0], dtype=autocast) if autocast is not None else contextlib.nullcontext()
    try:
        for start in range(0, len(batches), world_size):
            mine = batches[start + rank] if start + rank < len(batches) else []
            batch = micro_batch(dataset, documents[mine], batching, pad_id, device)
            if ends is None:
                read_pooled(batch, lengths[mine], batching, pooling or "")
            else:
                read_at(batch, lengths[mine], ends[mine], batching)
                batch.objective = Outputs()
            with mixed:
                outputs = module(**batch.kwargs())
            if not found.shape[1]:
                found = np.zeros((len(documents), outputs.shape[1]))
            if mine:
                found[mine] = outputs.double().cpu().numpy()
    finally:
        module.train(was_training)
    if world_size > 1:
        total = torch.from_numpy(found)
        dist.all_reduce(total)  # each document was read by one rank, the others hold zeros: exact
    return found
