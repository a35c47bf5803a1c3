"""From documents to the tensors of one micro-batch on a rank's device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aifactory_train.data import Shares, collate, split_step
from aifactory_train.model.attention import Documents
from aifactory_train.parallel.engine import DeviceBatch

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.data import TokenDataset


#: On a CPU a micro-batch need not be larger than this many tokens: measured on a 135M model (two cores,
#: benchmarks/README.md), steps of 2,000 tokens in two micro-batches ran as fast as in one, with 1.1 GB less at the
#: peak, and 5 % faster than in four, each of which reads every weight from memory anew. Some more than two packs of
#: 512, whose documents are shared out anew.
CPU_MICRO_BATCH = 1100


def micro_limit(most: int, lengths: Any, device: str) -> int:
    """Most tokens in one micro-batch of a step with documents of ``lengths`` (int ``[K]``):
    ``train.micro_batch_tokens``, and on a CPU no more than :data:`CPU_MICRO_BATCH` or the step's longest document. The
    curve does not depend on it."""
    if device != "cpu" or len(lengths) == 0:
        return most
    return min(most, max(CPU_MICRO_BATCH, int(lengths.max())))


def shares_of(recipe: Recipe, documents: np.ndarray, lengths: np.ndarray, ranks: int, device: str) -> Shares:
    """``[rank][micro] -> documents`` of a step. ``lengths``: int ``[all documents]``; ``ranks``: those that have
    documents of their own.
    """
    settings, batching = recipe.train, recipe.data.batching
    most = micro_limit(settings.micro_batch_tokens, lengths[documents], device)
    return split_step(documents, lengths, ranks, settings.grad_accum, most, batching)


def micro_batch(dataset: TokenDataset, share: Any, batching: str, pad_id: int, device: str) -> DeviceBatch:
    """The documents ``share`` (int ``[K]``, indices into ``dataset``) packed or padded, on ``device``.

    A rank without documents computes one token without a loss, so that it takes part in the collectives.
    """
    if len(share) == 0:
        return empty_batch(pad_id, device)
    return device_batch(collate(dataset, share, batching, pad_id), device)


def read_at(batch: DeviceBatch, lengths: Any, ends: Any, batching: str) -> None:
    """Let a batch of documents of ``lengths`` (int ``[K]``) be read at one place of each (``ends``), as heads do."""
    tokens = np.asarray(lengths, dtype=np.int64)
    width = int(batch.input_ids.shape[1])
    begins = np.cumsum(tokens) - tokens if batching == "packed" else np.arange(len(tokens)) * width
    device = str(batch.input_ids.device)
    batch.positions = to_device(torch.from_numpy(begins + np.asarray(ends, dtype=np.int64)), device)
    batch.targets = torch.zeros_like(batch.positions)


def empty_batch(pad_id: int, device: str) -> DeviceBatch:
    """One token (``[1, 1]``) and no supervised position."""
    one = torch.full((1, 1), pad_id, dtype=torch.int64, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    lone = Documents.of(torch.tensor([0, 1], dtype=torch.int32), device)
    return DeviceBatch(one, torch.zeros_like(one), lone, none, none, real=torch.zeros_like(one, dtype=torch.bool))


def device_batch(batch: Any, device: str) -> DeviceBatch:
    """A collated :class:`aifactory_train.data.Batch` on the device; supervised positions are found on the host."""
    labels = batch.labels.flatten().numpy()
    positions = np.flatnonzero(labels != -100)
    return DeviceBatch(
        input_ids=to_device(batch.input_ids, device),
        position_ids=to_device(batch.position_ids, device),
        documents=Documents.of(pinned(batch.cu_seqlens, device), device),
        positions=to_device(torch.from_numpy(positions), device),
        targets=to_device(torch.from_numpy(labels[positions]), device),
        real=None if batch.real is None or batch.real.all() else to_device(batch.real, device),
    )


def pinned(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A host tensor in memory that a GPU copies from by itself; as it is where there is no other device."""
    return tensor if device == "cpu" else tensor.pin_memory()


def to_device(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A host tensor on ``device``. The host does not wait for the copy, nor for what the device was given to do before
    it.
    """
    return pinned(tensor, device).to(device, non_blocking=True)
