"""Held-out figures of a preference method, as statistics that add up over pairs (KTO: answers), each with a bootstrap
interval.

===================== ==================================================================================================
``preference_loss``    the method's loss of a pair (an answer), as in training; early stopping follows it
``reward_accuracy``    share of pairs whose chosen answer has the higher reward; equal rewards count half
``reward_margin``      mean reward of good minus mean reward of bad answers
``preference_accuracy``, ``preference_margin``  the same of log-probabilities alone, without a reference
``chosen_logp``, ``rejected_logp``  mean log-probability of an answer in nats (KTO: desirable, undesirable)
===================== ==================================================================================================

The reward is beta times the log-ratio to the reference (``loss: sigmoid_norm``: a mean over tokens). ORPO, SimPO and
CPO have none: rewards and log-probabilities of the first two are means over tokens (SimPO's reward times beta), CPO's
reward is beta times the log-probability. KTO's answers are not paired, so it has no accuracy; its KL estimate is that
of the whole set, and the bootstrap holds it fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from aifactory_train.config.preference_block import WITH_REFERENCE
from aifactory_train.metrics import PREFERENCE_METRICS
from aifactory_train.metrics.bootstrap import ratio
from aifactory_train.model.answer_loss import loss_of, rewards_of

if TYPE_CHECKING:
    from aifactory_train.config.schema import PreferenceConfig
    from aifactory_train.evaluation.results import SetResult


#: Statistics ``[rows, K]`` and the value of their sums.
Statistics = tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]


def statistics(results: list[SetResult], how: PreferenceConfig) -> dict[str, Statistics]:
    """``{metric: ([rows, K], value of their sums)}`` over all sets; figures of the reference only where it was
    computed.
    """
    parts = [(_of_labels if how.kind == "kto" else _of_pairs)(result, how) for result in results]
    out: dict[str, Statistics] = {}
    for name in PREFERENCE_METRICS:
        found = [part[name] for part in parts if name in part]
        if len(found) == len(parts):
            margin = how.kind == "kto" and name.endswith("_margin")
            out[name] = (np.concatenate(found), difference_of_means if margin else ratio)
    return out


def _mean(values: np.ndarray) -> np.ndarray:
    return np.stack([values, np.ones(len(values))], axis=1)


def _in_order(good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    return _mean((good > bad) + 0.5 * (good == bad))


def _of_pairs(result: SetResult, how: PreferenceConfig) -> dict[str, np.ndarray]:
    assert result.rejected is not None
    good, bad = -result.scored.nll, -result.rejected.nll
    lengths = np.stack([result.scored.tokens, result.rejected.tokens], axis=1)
    policy = np.stack([good, bad], axis=1)
    reference: np.ndarray | None = np.zeros_like(policy)
    if how.by_token:
        good, bad = (policy / lengths).T
    if how.kind in WITH_REFERENCE:
        kept = result.dataset.reference  # type: ignore[attr-defined]
        reference = None if kept is None else np.stack([kept["own"], kept["rejected"]], axis=1)
    out = {
        "preference_accuracy": _in_order(good, bad),
        "preference_margin": _mean(good - bad),
        "chosen_logp": _mean(good),
        "rejected_logp": _mean(bad),
    }
    if reference is None:
        return out
    answers = [torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64)) for x in (policy, reference, lengths)]
    rewards = rewards_of(how, *answers).numpy()
    out["reward_accuracy"] = _in_order(rewards[:, 0], rewards[:, 1])
    out["reward_margin"] = _mean(rewards[:, 0] - rewards[:, 1])
    sides = torch.tensor([True, False])
    out["preference_loss"] = _mean(_losses(how, policy, reference, lengths, sides.expand(len(policy), 2), 0.0))
    return out


def _of_labels(result: SetResult, how: PreferenceConfig) -> dict[str, np.ndarray]:
    good = -result.scored.nll
    bad = -result.rejected.nll if result.rejected is not None else np.zeros(0)
    policy, desirable = np.concatenate([good, bad]), np.arange(len(good) + len(bad)) < len(good)
    out = {
        "preference_margin": margin_of_labels(policy, desirable),
        "chosen_logp": _mean(good),
        "rejected_logp": _mean(bad),
    }
    kept = result.dataset.reference  # type: ignore[attr-defined]
    if kept is None or result.exchanged is None:
        return out
    reference = np.concatenate([kept["own"], kept.get("rejected", np.zeros(0))])
    baseline = max(0.0, float((-result.exchanged.nll - kept["exchanged"]).mean()))
    out["reward_margin"] = margin_of_labels(how.beta * (policy - reference), desirable)
    one = [x[:, None] for x in (policy, reference, np.ones(len(policy)))]
    labels = torch.from_numpy(desirable[:, None])
    out["preference_loss"] = _mean(_losses(how, one[0], one[1], one[2], labels, baseline))
    return out


def _losses(
    how: PreferenceConfig,
    policy: np.ndarray,
    reference: np.ndarray,
    lengths: np.ndarray,
    desirable: torch.Tensor,
    baseline: float,
) -> np.ndarray:
    """The loss of each row of answers ``[rows, A]``, float64 ``[rows]``."""
    of = [torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64)) for x in (policy, reference, lengths)]
    rows = [float(loss_of(how, p, r, n, d, baseline)) for p, r, n, d in zip(*of, desirable, strict=True)]
    return np.asarray(rows)


def margin_of_labels(values: np.ndarray, desirable: np.ndarray) -> np.ndarray:
    """Statistics ``[rows, 4]`` of answers with a label each; :func:`difference_of_means` of their sums is the
    margin.
    """
    good = desirable.astype(float)
    return np.stack([values * good, good, values * (1 - good), 1 - good], axis=1)


def difference_of_means(sums: np.ndarray) -> np.ndarray:
    """Mean of the good minus mean of the bad, NaN where a resample holds one kind only; sums ``[..., 4]``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]
