"""What rewards make of answers: advantages within a group, and the clipped loss of a micro-batch of answers.

GRPO (Shao et al. 2024, arXiv 2402.03300), the asymmetric clip and mean over tokens of DAPO (Yu et al. 2025, arXiv
2503.14476), the fixed divisor and unscaled advantages of Dr. GRPO (Liu et al. 2025, arXiv 2503.20783), the ratio of
whole answers of GSPO (Zheng et al. 2025, arXiv 2507.18071). Summed over a micro-batch; the loop divides by
:func:`units_of`, over all ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from aifactory_train.model.loss import document_sums

if TYPE_CHECKING:
    from aifactory_train.config.grpo_block import GrpoConfig
    from aifactory_train.model.objective import Likelihood

#: Beside a group's standard deviation, so that rewards which hardly differ are not blown up.
EPSILON = 1e-4
#: What :attr:`GroupObjective.sums` counts in a step: KL and its tokens; ratios beyond the clip, and all ratios.
SUMS = ("kl", "tokens", "clipped", "ratios")


def advantages(rewards: np.ndarray, scale: str) -> np.ndarray:
    """float64 ``[prompts, group]``: rewards less the mean of their group, divided by its standard deviation (of a
    sample) where ``scale`` is ``group``. NaN marks answers that take no part: they have no advantage and are in no
    mean.
    """
    here = np.isfinite(rewards)
    count = here.sum(1, keepdims=True)
    filled = np.where(here, rewards, 0.0)
    away = np.where(here, filled - filled.sum(1, keepdims=True) / np.maximum(count, 1), 0.0)
    if scale == "group":
        away = away / (spread(rewards)[:, None] + EPSILON)
    return away


def spread(rewards: np.ndarray) -> np.ndarray:
    """float64 ``[prompts]``: the standard deviation (of a sample) of each group's rewards, 0 for fewer than two. Equal
    rewards have exactly 0, whatever their sum rounds to.
    """
    found = np.zeros(len(rewards))
    for place, group in enumerate(rewards):
        known = group[np.isfinite(group)]
        if len(known) > 1 and known.min() != known.max():
            found[place] = known.std(ddof=1)
    return found


def units_of(settings: GrpoConfig, lengths: np.ndarray) -> int:
    """What the summed loss of a step's answers, of ``lengths`` tokens (int ``[A]``), is divided by; at least 1."""
    answers = {"grpo": len(lengths), "dapo": int(lengths.sum()), "dr_grpo": len(lengths) * settings.max_new_tokens}
    return max(1, answers[settings.loss])


@dataclasses.dataclass
class GroupObjective:
    """The objective of a micro-batch of answers (:class:`aifactory_train.model.objective.Objective`).

    counts: tokens of each answer, host integers that add up to ``N``; advantages fp32, ``[N]`` or with ratios of
    sequences ``[A]``; sampled fp32 ``[N]``: log-probabilities under the policy that sampled; reference fp32 ``[N]`` or
    None; weights fp32 ``[N]``: what a token counts. ``sums`` (fp64 ``[len(SUMS)]``) collects figures of the step.
    """

    settings: GrpoConfig
    counts: list[int]
    advantages: torch.Tensor
    sampled: torch.Tensor
    reference: torch.Tensor | None
    weights: torch.Tensor
    sums: torch.Tensor

    def loss(self, nll: Likelihood) -> torch.Tensor:
        """The summed loss (fp32 scalar)."""
        how = self.settings
        policy = -nll(reduction="none", temperature=how.temperature)
        if not self.counts:
            return policy.sum()
        log_ratio, weights = policy - self.sampled, self.weights
        if how.ratio == "sequence":
            log_ratio = document_sums(log_ratio, self.counts) / document_sums(torch.ones_like(policy), self.counts)
            weights = document_sums(weights, self.counts)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - how.clip, 1 + how.high)
        each = -torch.minimum(ratio * self.advantages, clipped * self.advantages)
        total = (each * weights).sum()
        # Schulman's estimate of KL(policy || other) from a sample of the policy: never negative
        other = (self.sampled if self.reference is None else self.reference) - policy
        kl = other.exp() - other - 1
        if self.reference is not None:
            total = total + how.kl * (kl * self.weights).sum()
        beyond = (ratio < 1 - how.clip) & (self.advantages < 0) | (ratio > 1 + how.high) & (self.advantages > 0)
        found = torch.zeros(len(SUMS), dtype=torch.float64, device=policy.device)
        found[0], found[1] = kl.detach().double().sum(), len(policy)
        found[2], found[3] = beyond.double().sum(), len(ratio)
        self.sums += found.to(self.sums)
        return total


def token_weights(settings: GrpoConfig, lengths: Sequence[int]) -> np.ndarray:
    """fp32 ``[sum of lengths]``: what each token of answers of ``lengths`` counts."""
    each = 1.0 / np.asarray(lengths, dtype=np.float64) if settings.loss == "grpo" else np.ones(len(lengths))
    return np.repeat(each, lengths).astype(np.float32)
