"""Losses of whole answers: DPO (and IPO), ORPO, KTO, and what a forward pass needs to compute them for a micro-batch.

One forward pass gives the log-probability of every supervised token, packed or padded; sums over documents give those of answers, and
the loss is a function of answers. It is summed over a micro-batch; the loop divides by the number of pairs (or judged answers) of the
step over all ranks.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from aifactory_train.loss import chunk_rows

if TYPE_CHECKING:
    from aifactory_train.config import PreferenceConfig


# ---- losses of answers (each term is summed over pairs or answers, in the type of ``policy``)


def dpo_loss(policy: torch.Tensor, reference: torch.Tensor, beta: float, smoothing: float = 0.0) -> torch.Tensor:
    """Sum over P pairs; policy and reference ``[P, 2]`` are log-probabilities of chosen and rejected answers.

    Rafailov et al. 2023, arXiv 2305.18290, equation 7; ``smoothing`` is the conservative form (cDPO) of its authors' note (labels that
    are wrong with that probability; Mitchell 2023, https://ericmitchell.ai/cdpo.pdf, equation 3).
    """
    rewards = beta * (policy - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    return -((1 - smoothing) * F.logsigmoid(margin) + smoothing * F.logsigmoid(-margin)).sum()


def ipo_loss(policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor, beta: float) -> torch.Tensor:
    """Sum over P pairs of ``(difference of log-ratios - 1 / (2 beta))^2``; all ``[P, 2]``, lengths in tokens.

    Azar et al. 2023, arXiv 2310.12036, equation 17 (beta is its tau). Log-ratios are means over an answer's tokens, as in TRL, whose
    authors report that the paper's figures were made so.
    """
    ratios = (policy - reference) / lengths
    return (ratios[:, 0] - ratios[:, 1] - 1 / (2 * beta)).square().sum()


def orpo_loss(policy: torch.Tensor, lengths: torch.Tensor, weight: float) -> torch.Tensor:
    """Sum over P pairs of the chosen answer's mean NLL and ``weight`` times the odds-ratio term; policy, lengths ``[P, 2]``.

    Hong et al. 2024, arXiv 2403.07691, equations 3 to 7: probabilities of answers are geometric means over their tokens, and
    odds(y) = P(y) / (1 - P(y)).
    """
    mean = policy / lengths
    # log(1 - exp(x)) without cancellation: log(-expm1(x)); x < 0 up to rounding
    mean = mean.clamp(max=-1e-7)
    log_odds = mean - torch.log(-torch.expm1(mean))
    return -(mean[:, 0] + weight * F.logsigmoid(log_odds[:, 0] - log_odds[:, 1])).sum()


def kto_loss(
    policy: torch.Tensor,
    reference: torch.Tensor,
    desirable: torch.Tensor,
    baseline: torch.Tensor | float,
    beta: float,
    weights: tuple[float, float] = (1.0, 1.0),
) -> torch.Tensor:
    """Sum over N answers; policy, reference ``[N]``, desirable bool ``[N]``, ``baseline`` the KL estimate z0 (no gradient).

    Ethayarajh et al. 2024, arXiv 2402.01306, section 4: ``weight * (1 - sigmoid(beta (r - z0)))`` of a desirable answer, with the
    sign inside turned for an undesirable one. ``weights`` are lambda_D and lambda_U.
    """
    gain = beta * (policy - reference - baseline)
    value = torch.sigmoid(torch.where(desirable, gain, -gain))
    weight = torch.where(desirable, weights[0], weights[1])
    return (weight * (1 - value)).sum()


def loss_of(
    how: PreferenceConfig,
    policy: torch.Tensor,
    reference: torch.Tensor,
    lengths: torch.Tensor,
    desirable: torch.Tensor,
    baseline: float,
) -> torch.Tensor:
    """The method's loss, summed over answers ``[A]`` (pairs are neighbours, chosen first); all ``[A]``, lengths in tokens."""
    if how.kind == "kto":
        weights = (how.desirable_weight, how.undesirable_weight)
        return kto_loss(policy, reference, desirable, baseline, how.beta, weights)
    if how.kind == "orpo":
        return orpo_loss(policy.view(-1, 2), lengths.view(-1, 2), how.beta)
    if how.loss == "ipo":
        return ipo_loss(policy.view(-1, 2), reference.view(-1, 2), lengths.view(-1, 2), how.beta)
    return dpo_loss(policy.view(-1, 2), reference.view(-1, 2), how.beta, how.label_smoothing)


# ---- log-probabilities of tokens


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


# ---- one micro-batch: what CausalLM.forward is given as ``judged``


@dataclasses.dataclass
class TokenLogps:
    """Asks for the log-probabilities themselves, from the operator that training uses (the reference, KTO's KL estimate)."""

    kernels: bool

    def loss(self, logps: torch.Tensor) -> torch.Tensor:
        return logps


#: What :attr:`Judged.sums` counts in a step: rewards and numbers of good and of bad answers, pairs in the wanted order (equal rewards
#: count half), the preference loss, NLL and targets of replayed rows.
SUMS = ("good", "bad", "good_answers", "bad_answers", "in_order", "preference_loss", "replay_nll", "replay_tokens")


@dataclasses.dataclass
class Judged:
    """What a forward pass needs to turn log-probabilities of tokens into the loss of a micro-batch.

    counts: supervised tokens of each document, host integers; answers: int64 ``[A]``, the documents that are judged, pairs side by
    side and chosen first; lengths, reference fp32 ``[A]``; desirable bool ``[A]``; replayed: int64 documents that are imitated, each
    of their ``replay_tokens`` targets with ``replay_scale``. ``sums`` (fp64 ``[len(SUMS)]``) collects figures of the step.
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
    kernels: bool

    def loss(self, logps: torch.Tensor) -> torch.Tensor:
        """The summed loss (fp32 scalar) of token log-probabilities ``[N]``."""
        if not self.counts:
            return logps.sum()
        # One sum after the other: an index_add on a GPU adds in no fixed order, and a resumed run would differ in the last bits.
        documents = torch.stack([part.sum() for part in logps.split(self.counts)])
        total = torch.zeros((), dtype=logps.dtype, device=logps.device)
        figures = torch.zeros(len(SUMS), dtype=torch.float64, device=logps.device)
        if len(self.answers):
            policy = documents.index_select(0, self.answers)
            total = loss_of(self.settings, policy, self.reference, self.lengths, self.desirable, self.baseline)
            figures[:5] = self._rewards(policy.detach())
            figures[5] = total.detach().double()
        if len(self.replayed):
            nll = -documents.index_select(0, self.replayed).sum()
            total = total + self.replay_scale * nll
            figures[6] = nll.detach().double()
            figures[7] = self.replay_tokens
        self.sums += figures.to(self.sums)
        return total

    def _rewards(self, policy: torch.Tensor) -> torch.Tensor:
        """The first five of :data:`SUMS`. Sums under masks: picking rows out would make the host wait for the device."""
        rewards = (policy / self.lengths if self.settings.kind == "orpo" else policy - self.reference).double()
        good = self.desirable.double()
        right = rewards.new_zeros(())
        if self.settings.kind != "kto":
            pairs = rewards.view(-1, 2)
            right = ((pairs[:, 0] > pairs[:, 1]).double() + 0.5 * (pairs[:, 0] == pairs[:, 1]).double()).sum()
        return torch.stack([(rewards * good).sum(), (rewards * (1 - good)).sum(), good.sum(), (1 - good).sum(), right])
