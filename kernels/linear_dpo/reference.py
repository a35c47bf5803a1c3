"""Log-probabilities and DPO in plain torch with all logits at once: the oracle of the tests (fp64-capable)."""

import torch

from aifactory_train.kernels.cross_entropy.reference import cross_entropy


def linear_logps(hidden, weight, labels, bias=None, scale=1.0, softcap=None):
    """Log-probability of each label, [N] in at least fp32; 0 where the label is -100."""
    return -cross_entropy(torch.nn.functional.linear(hidden, weight, bias), labels, scale, softcap)


def dpo(logps: torch.Tensor, reference_logps: torch.Tensor, beta: float, smoothing: float):
    """(sum of losses over pairs, chosen rewards, rejected rewards) from per-sequence log-probabilities [2 P], chosen
    first.

    Rafailov et al., arXiv 2305.18290, equation 7; ``smoothing`` is the conservative form (label noise) of the same
    authors.
    """
    rewards = beta * (logps - reference_logps)
    chosen, rejected = rewards.chunk(2)
    margin = chosen - rejected
    sigmoid = torch.nn.functional.logsigmoid
    loss = -(1 - smoothing) * sigmoid(margin) - smoothing * sigmoid(-margin)
    return loss.sum(), chosen.detach(), rejected.detach()


def linear_dpo(hidden, weight, labels, reference_logps, bias=None, beta=0.1, smoothing=0.0, scale=1.0, softcap=None):
    """The operator of that name with all logits at once."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    logps = linear_logps(rows, weight, labels.reshape(-1), bias, scale, softcap).view(labels.shape).sum(-1)
    return dpo(logps, reference_logps.to(logps.dtype), beta, smoothing)
