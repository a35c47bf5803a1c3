"""Losses of whole answers from their log-probabilities: DPO (and IPO), ORPO, SimPO, CPO, KTO; and their rewards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from aifactory_train.config.schema import PreferenceConfig


def dpo_loss(policy: torch.Tensor, reference: torch.Tensor, beta: float, smoothing: float = 0.0) -> torch.Tensor:
    """Sum over P pairs; policy and reference ``[P, 2]`` are log-probabilities of chosen and rejected answers.

    Rafailov et al. 2023, arXiv 2305.18290, equation 7; ``smoothing`` is the conservative form (cDPO) of its authors'
    note (labels that are wrong with that probability; Mitchell 2023, https://ericmitchell.ai/cdpo.pdf, equation 3).
    """
    return margin_loss(beta * (policy - reference), smoothing)


def margin_loss(rewards: torch.Tensor, smoothing: float = 0.0, gamma: float = 0.0) -> torch.Tensor:
    """Sum over P pairs of ``-log sigmoid(reward of the chosen - reward of the rejected answer - gamma)``, rewards ``[P,
    2]``.

    With mean log-probabilities of a token times beta as rewards it is SimPO (Meng et al. 2024, arXiv 2405.14734,
    equation 6), with log-probabilities times beta CPO (Xu et al. 2024, arXiv 2401.08417, equation 4).
    """
    margin = rewards[:, 0] - rewards[:, 1] - gamma
    return -((1 - smoothing) * F.logsigmoid(margin) + smoothing * F.logsigmoid(-margin)).sum()


def ipo_loss(policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor, beta: float) -> torch.Tensor:
    """Sum over P pairs of ``(difference of log-ratios - 1 / (2 beta))^2``; all ``[P, 2]``, lengths in tokens.

    Azar et al. 2023, arXiv 2310.12036, equation 17 (beta is its tau). Log-ratios are means over an answer's tokens, as
    in TRL, whose authors report that the paper's figures were made so.
    """
    ratios = (policy - reference) / lengths
    return (ratios[:, 0] - ratios[:, 1] - 1 / (2 * beta)).square().sum()


def orpo_loss(policy: torch.Tensor, lengths: torch.Tensor, weight: float) -> torch.Tensor:
    """Sum over P pairs of the chosen answer's mean NLL and ``weight`` times the odds-ratio term; policy, lengths ``[P,
    2]``.

    Hong et al. 2024, arXiv 2403.07691, equations 3 to 7: probabilities of answers are geometric means over their
    tokens, and odds(y) = P(y) / (1 - P(y)).
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
    """Sum over N answers; policy, reference ``[N]``, desirable bool ``[N]``, ``baseline`` the KL estimate z0 (no
    gradient).

    Ethayarajh et al. 2024, arXiv 2402.01306, section 4: ``weight * (1 - sigmoid(beta (r - z0)))`` of a desirable
    answer, with the sign inside turned for an undesirable one. ``weights`` are lambda_D and lambda_U.
    """
    gain = beta * (policy - reference - baseline)
    value = torch.sigmoid(torch.where(desirable, gain, -gain))
    weight = torch.where(desirable, weights[0], weights[1])
    return (weight * (1 - value)).sum()


def rewards_of(
    how: PreferenceConfig, policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """The reward of each answer, in the shape of ``policy``; all of one shape, lengths in tokens."""
    if how.kind == "orpo":
        return policy / lengths
    if how.kind == "simpo":
        return how.beta * policy / lengths
    if how.kind == "cpo":
        return how.beta * policy
    ratios = policy - reference
    return how.beta * (ratios / lengths if how.loss == "sigmoid_norm" else ratios)


def loss_of(
    how: PreferenceConfig,
    policy: torch.Tensor,
    reference: torch.Tensor,
    lengths: torch.Tensor,
    desirable: torch.Tensor,
    baseline: float,
) -> torch.Tensor:
    """The method's loss, summed over answers ``[A]`` (pairs are neighbours, chosen first); all ``[A]``, lengths in
    tokens.
    """
    if how.kind == "kto":
        weights = (how.desirable_weight, how.undesirable_weight)
        return kto_loss(policy, reference, desirable, baseline, how.beta, weights)
    if how.kind == "orpo":
        return orpo_loss(policy.view(-1, 2), lengths.view(-1, 2), how.beta)
    if how.loss == "ipo":
        return ipo_loss(policy.view(-1, 2), reference.view(-1, 2), lengths.view(-1, 2), how.beta)
    rewards = rewards_of(how, policy, reference, lengths).view(-1, 2)
    total = margin_loss(rewards, how.label_smoothing, how.gamma if how.kind == "simpo" else 0.0)
    if how.nll_weight:
        total = total - how.nll_weight * (policy / lengths).view(-1, 2)[:, 0].sum()
    return total
