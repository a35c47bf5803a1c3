"""Log-probabilities of tokens straight from hidden states, with gradients, in chunks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from aifactory_train.model.loss import chunk_rows

if TYPE_CHECKING:
    pass


def token_logps(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, scale: float, rows: int | None, kernels: bool
) -> torch.Tensor:
    """Log-probability of each label, fp32 ``[N]``, with gradients; the logits exist in chunks only (backward makes them again).

    hidden ``[N, D]``, weight ``[V, D]``, labels int64 ``[N]``. ``kernels``: by the registered operator ``linear_logps``, which runs
    Triton where the registry selects it; else plain torch.
    """
    if hidden.shape[0] == 0:
        return hidden.sum(1).float() + 0.0 * weight[:1].sum().float()
    if kernels:
        from aifactory_train.kernels.linear_dpo.op import linear_logps

        return linear_logps(hidden, weight, labels, scale=scale, chunk_size=rows)
    step = chunk_rows(weight.shape[0], rows)
    parts = [
        checkpoint(_logps_of_chunk, hidden[a : a + step], weight, labels[a : a + step], scale, use_reentrant=False)
        for a in range(0, hidden.shape[0], step)
    ]
    return torch.cat(parts)


def _logps_of_chunk(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
    logits = (hidden @ weight.t()).float() * scale
    return logits.gather(1, labels.unsqueeze(1)).squeeze(1) - torch.logsumexp(logits, dim=1)


@dataclasses.dataclass
class TokenLogps:
    """Asks for the log-probabilities themselves, from the operator that training uses (the reference, KTO's KL estimate)."""

    kernels: bool

    def loss(self, logps: torch.Tensor) -> torch.Tensor:
        return logps
