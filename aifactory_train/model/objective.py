"""What a forward pass computes from the vocabulary projection: the loss of a training method, or the likelihood of each
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # the engines' table is read where there is no torch
    import torch

    from aifactory_train.model.loss import Reduction, Shaping


class Walk(Protocol):
    """Another walk through the vocabulary than cross-entropy's: from hidden states ``[N, D]``, the output layer's
    weight ``[V, D]`` and bias ``[V]`` and targets int64 ``[N]`` to a tensor, with ``rows`` of logits at once."""

    def __call__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        how: Shaping,
        rows: int,
    ) -> torch.Tensor: ...


class Likelihood(Protocol):
    """:func:`aifactory_train.model.loss.linear_cross_entropy` of the supervised positions of one micro-batch."""

    def __call__(
        self,
        *,
        reduction: Reduction = "sum",
        counts: Sequence[int] | None = None,
        temperature: float = 1.0,
        walk: Walk | None = None,
    ) -> torch.Tensor: ...


class Objective(Protocol):
    """Turns negative log-likelihoods of a micro-batch into what :meth:`CausalLM.loss` returns."""

    def loss(self, nll: Likelihood) -> torch.Tensor:
        """Calls ``nll`` once, with the reduction that it needs."""


@dataclass(frozen=True)
class SummedNLL:
    """Imitation: the negative log-likelihood summed over all targets (fp32 scalar)."""

    def loss(self, nll: Likelihood) -> torch.Tensor:
        return nll(reduction="sum")


@dataclass(frozen=True)
class TokenNLL:
    """The negative log-likelihood of each target, fp32 ``[N]``: what evaluation and the references of methods score by.
    ``temperature`` divides the logits.
    """

    temperature: float = 1.0

    def loss(self, nll: Likelihood) -> torch.Tensor:
        return nll(reduction="none", temperature=self.temperature)


#: The default of a micro-batch.
SUMMED_NLL = SummedNLL()
