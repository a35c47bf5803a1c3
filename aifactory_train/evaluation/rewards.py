"""Held-out figures of a reward model, each with a bootstrap interval over pairs.

``loss``: the negative log-likelihood of the pairs' order; ``reward_accuracy``: pairs whose chosen answer has the higher
reward, equal ones count half; ``reward_margin``: mean reward of chosen minus mean reward of rejected answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from aifactory_train import metrics
from aifactory_train.core.errors import UserError
from aifactory_train.evaluation.head_outputs import head_outputs
from aifactory_train.evaluation.likelihood import choose_rows
from aifactory_train.metrics.bootstrap import packed, ratio

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.data import PreparedData


def evaluate_rewards(
    module: nn.Module, prepared: PreparedData, recipe: Recipe, *, scoring: dict[str, Any], whole: bool
) -> dict[str, Any]:
    """Figures over all held-out pairs, and of each evaluation set under ``sets``; the same on all ranks. ``scoring``:
    arguments of :func:`~aifactory_train.evaluation.head_outputs.head_outputs`; ``whole``: with replicates.
    """
    found, sets = [], {}
    for name, dataset in prepared.evals.items():
        held: Any = dataset
        pairs = choose_rows(len(held), recipe.data.eval_rows)
        if not len(pairs):
            raise UserError("no held-out rows to evaluate", where=f"data.eval: {held.name}")
        documents = held.sides(pairs).reshape(-1)
        rewards = head_outputs(module, held.base, documents, held.ends[documents], width=1, **scoring)
        found.append(rewards.reshape(-1, 2))
        sets[name] = figures_of(found[-1])
    return {**figures_of(np.concatenate(found), replicates=whole), "sets": sets}


def figures_of(rewards: np.ndarray, *, replicates: bool = False) -> dict[str, Any]:
    """Of rewards float64 ``[pairs, 2]``, chosen first; ready for JSON."""
    margin = rewards[:, 0] - rewards[:, 1]
    one = np.ones(len(margin))
    values = {
        "loss": np.logaddexp(0.0, -margin),
        "reward_accuracy": (margin > 0) + 0.5 * (margin == 0),
        "reward_margin": margin,
    }
    found = {name: metrics.figure(np.stack([v, one], axis=1), ratio) for name, v in values.items()}
    out: dict[str, Any] = {name: figure.value for name, figure in found.items()}
    out |= {"rows": len(margin), "ci": {name: figure.ci for name, figure in found.items()}}
    if replicates:
        out["replicates"] = {n: packed(f.replicates) for n, f in found.items() if f.replicates is not None}
    return out
