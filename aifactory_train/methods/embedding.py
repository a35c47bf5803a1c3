"""Embeddings: a query's positive is told from the positives and negatives of all rows of the step.

The step's rows as a whole are the batch, whatever ranks and micro-batches compute them. Before a step all its texts are
embedded without gradients and gathered; every rank computes the loss of the whole step and its gradient by each vector;
the micro-batches then run forward again and carry their vectors' gradient to the weights. The loss of a step is the sum
over its queries divided by their number.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from aifactory_train.core.errors import UserError
from aifactory_train.data.retrieval import MatchedTokens
from aifactory_train.methods.supervised import Supervised
from aifactory_train.model.embedding import CarriedGradient, Pooled, Similarity
from aifactory_train.parallel.batches import micro_batch, shares_of, to_device
from aifactory_train.parallel.pooling import read_pooled

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.data import PreparedData, TokenDataset
    from aifactory_train.methods.base import RunContext, StepContext
    from aifactory_train.parallel.engine import DeviceBatch


class Embedding(Supervised):
    """In-batch negatives over the whole step, and hard ones where rows have them."""

    def __init__(self, recipe: Recipe):
        assert recipe.methods.head is not None
        super().__init__(recipe)
        self.settings = recipe.methods.head
        self.ready: list[tuple[np.ndarray, DeviceBatch]] = []  # of the step, in the order in which they are asked for
        self.right, self.queries = 0, 0

    def view(self, data: PreparedData) -> PreparedData:
        """The prepared data as rows of texts. Raises :class:`UserError` where no query would have a negative."""
        train = MatchedTokens(data.train, whole=True)
        if self.recipe.train.batch_rows == 1 and (train.sizes < 3).any():
            raise UserError(
                "a step of one row without negatives has nothing to tell its positive from",
                where="train.batch_rows",
                fix="more rows a step (in-batch negatives), or a negative in every row",
            )
        evals: dict[str, TokenDataset] = {name: MatchedTokens(held) for name, held in data.evals.items()}
        return dataclasses.replace(data, train=train, evals=evals)

    def prepare(self, run: RunContext, *, resumed: bool) -> list[tuple[str, str, str]]:
        """What the start-up report says of the vectors; refuses sizes that they do not have."""
        width = int(run.engine.core.language_model.get_input_embeddings().weight.shape[1])
        sizes = Similarity.of(self.settings, width).sizes
        train: MatchedTokens = run.data.train  # type: ignore[assignment]
        hard = int((train.sizes - 2).sum())
        how = f"{self.settings.pooling.replace('_', ' ')}, {', '.join(map(str, sizes))} dimensions"
        return [("vectors", how, "methods.head"), ("negatives", f"{hard:,} in rows, and those of the step", "the rows")]

    # ---- a step

    def micro_batch(self, run: RunContext, share: np.ndarray) -> tuple[DeviceBatch, np.ndarray, np.ndarray]:
        """(batch, its documents, their lengths) of the rows ``share``; documents are those of the view's ``base``."""
        train: MatchedTokens = run.data.train  # type: ignore[assignment]
        documents = train.documents(share)
        batching, lengths = self.recipe.data.batching, train.base.lengths[documents]
        batch = micro_batch(train.base, documents, batching, run.pad_id, run.world.device)
        read_pooled(batch, lengths, batching, self.settings.pooling)
        return batch, documents, lengths

    def before_step(self, step: StepContext) -> None:
        """Embed the texts of the step, and compute its loss and what each vector adds to it; on all ranks alike."""
        run, rank = step.run, step.run.engine.dims.data_rank(step.run.world.rank)
        train: MatchedTokens = run.data.train  # type: ignore[assignment]
        shares = shares_of(self.recipe, step.documents, train.lengths, run.engine.dims.data_ranks, run.world.device)
        rows = np.concatenate([share for micros in shares for share in micros])
        corpus = train.corpus(rows)
        self.ready = [(share, super(Embedding, self).batch(step, share)) for share in shares[rank]]
        found = self._embedded(run, [batch for _, batch in self.ready])
        begin = int(train.sizes[np.concatenate([[], *(s for m in shares[:rank] for s in m)]).astype(np.int64)].sum())
        vectors = gathered(found, begin, len(corpus.documents), run)
        vectors = vectors.double().requires_grad_()
        like = Similarity.of(self.settings, vectors.shape[1])
        left_out = to_device(torch.from_numpy(corpus.left_out), run.world.device)
        asked, offered = vectors[corpus.queries], vectors[corpus.candidates]
        losses = like.losses(asked, offered, left_out)
        losses.sum().backward()
        assert vectors.grad is not None
        with torch.no_grad():
            scores = like.scores(asked, offered, vectors.shape[1]).masked_fill(left_out, -torch.inf)
            self.right = int((scores.argmax(dim=1) == torch.arange(len(asked), device=scores.device)).sum())
            self.queries = len(asked)
        query = int(sum(len(s) for micros in shares[:rank] for s in micros))
        for share, batch in self.ready:
            many = int(train.sizes[share].sum()) if len(share) else 0
            part, losses_here = vectors.grad[begin : begin + many], losses[query : query + len(share)]
            assert isinstance(batch.objective, Pooled)
            lengths = batch.objective.lengths.numpy()
            batch.objective = CarriedGradient(lengths, part.float(), losses_here.detach().sum().float())
            begin, query = begin + many, query + len(share)

    def _embedded(self, run: RunContext, batches: list[DeviceBatch]) -> list[torch.Tensor]:
        """The vectors of this rank's micro-batches as the coming forward passes give them, dropout included."""
        device = torch.device(run.world.device)
        with (
            torch.no_grad(),
            torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=_kind(device)),
        ):
            return [run.engine.module(**batch.kwargs()) for batch in batches]

    def batch(self, step: StepContext, share: np.ndarray) -> DeviceBatch:
        """As :meth:`before_step` made it. Without one (the trial of the largest batch) the gradient is zero."""
        if self.ready:
            known, batch = self.ready.pop(0)
            assert np.array_equal(known, share), "micro-batches are asked for in the order in which they were dealt"
            return batch
        batch = super().batch(step, share)
        assert isinstance(batch.objective, Pooled)
        lengths = batch.objective.lengths.numpy()
        width = int(step.run.engine.core.language_model.get_input_embeddings().weight.shape[1])
        nothing = torch.zeros(len(lengths), width, device=batch.input_ids.device)
        batch.objective = CarriedGradient(lengths, nothing, nothing.sum())
        return batch

    def figures(self) -> dict[str, float]:
        """``in_batch_accuracy``: queries whose positive is the nearest of the step's candidates."""
        return {"in_batch_accuracy": self.right / self.queries} if self.queries else {}


def gathered(parts: list[torch.Tensor], begin: int, count: int, run: RunContext) -> torch.Tensor:
    """The vectors of all ``count`` texts of a step, fp32 ``[count, D]``, the same on all ranks; ``parts`` are this
    rank's, which begin at ``begin``.
    """
    found = torch.cat(parts)
    out = torch.zeros(count, found.shape[1], dtype=torch.float32, device=found.device)
    dims = run.engine.dims
    if run.world.rank % (dims.cp * dims.tp) == 0:  # the others of a group computed the same
        out[begin : begin + len(found)] = found
    if run.world.size > 1:
        dist.all_reduce(out)  # each vector comes from one rank, the others hold zeros: exact
    return out


def _kind(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type
