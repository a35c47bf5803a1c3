"""Losses of whole answers: DPO (and IPO), ORPO, SimPO, CPO, KTO, and what a forward pass needs to compute them for a
micro-batch.

One forward pass gives the log-probability of every supervised token, packed or padded; sums over documents give those
of answers, and the loss is a function of answers. It is summed over a micro-batch; the loop divides by the number of
pairs (or rated answers) of the step over all ranks.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from aifactory_train.model.answer_loss import loss_of, rewards_of

if TYPE_CHECKING:
    from aifactory_train.config.schema import PreferenceConfig
    from aifactory_train.model.objective import Likelihood


#: What :attr:`PairObjective.sums` counts in a step: rewards and numbers of good and of bad answers, pairs in the wanted
#: order (equal rewards count half), the preference loss, NLL and targets of replayed rows.
SUMS = ("good", "bad", "good_answers", "bad_answers", "in_order", "preference_loss", "replay_nll", "replay_tokens")


@dataclasses.dataclass
class PairObjective:
    """The objective of a micro-batch of answers (:class:`aifactory_train.model.objective.Objective`).

    counts: supervised tokens of each document, host integers; answers: int64 ``[A]``, the documents that are judged,
    pairs side by side and chosen first; lengths, reference fp32 ``[A]``; desirable bool ``[A]``; replayed: int64
    documents that are imitated, each of their ``replay_tokens`` targets with ``replay_scale``. ``sums`` (fp64
    ``[len(SUMS)]``) collects figures of the step.
    """

    settings: PreferenceConfig
    counts: list[int]
    answers: torch.Tensor
    lengths: torch.Tensor
    reference: torch.Tensor
    desirable: torch.Tensor
    replayed: torch.Tensor
    replay_tokens: int
    replay_scale: float
    baseline: float
    sums: torch.Tensor

    def loss(self, nll: Likelihood) -> torch.Tensor:
        """The summed loss (fp32 scalar)."""
        documents = -nll(reduction="documents", counts=self.counts)
        if not self.counts:
            return documents.sum()
        total = torch.zeros((), dtype=documents.dtype, device=documents.device)
        figures = torch.zeros(len(SUMS), dtype=torch.float64, device=documents.device)
        if len(self.answers):
            policy = documents.index_select(0, self.answers)
            total = loss_of(self.settings, policy, self.reference, self.lengths, self.desirable, self.baseline)
            figures[:5] = self._rewards(policy.detach())
            figures[5] = total.detach().double()
        if len(self.replayed):
            imitated = -documents.index_select(0, self.replayed).sum()
            total = total + self.replay_scale * imitated
            figures[6] = imitated.detach().double()
            figures[7] = self.replay_tokens
        self.sums += figures.to(self.sums)
        return total

    def _rewards(self, policy: torch.Tensor) -> torch.Tensor:
        """The first five of :data:`SUMS`. Sums under masks: picking rows out would make the host wait for the
        device.
        """
        rewards = rewards_of(self.settings, policy, self.reference, self.lengths).double()
        good = self.desirable.double()
        right = rewards.new_zeros(())
        if self.settings.kind != "kto":
            pairs = rewards.view(-1, 2)
            right = ((pairs[:, 0] > pairs[:, 1]).double() + 0.5 * (pairs[:, 0] == pairs[:, 1]).double()).sum()
        return torch.stack([(rewards * good).sum(), (rewards * (1 - good)).sum(), good.sum(), (1 - good).sum(), right])
