"""A mixture of experts on a device: its launches do not depend on the number of experts, the host waits for none."""

from __future__ import annotations

from collections import Counter

import moe
import torch

from aifactory_train.audit import pretend
from aifactory_train.audit.recorder import HostAnswers, StepRecorder


def launches(experts: int) -> tuple[Counter[str], int]:
    """(launches by name, what the host waited for) of a layer's router and adapted experts, forward and backward, on
    meta tensors.
    """
    model = moe.adapted("qwen3_moe", moe.recipe(), experts=experts).to("meta")
    hidden = torch.empty(2, 9, 32, device="meta", requires_grad=True)
    with pretend.chip("sm_90", "H100-80"), StepRecorder(HostAnswers(12)) as seen:
        model.get_base_model().model.layers[0].mlp(hidden).sum().backward()
    found: Counter[str] = Counter()
    for (_, name), row in seen.rows.items():
        found[name] += row.launches
    return found, sum(seen.syncs.values())


def test_launches_do_not_depend_on_the_number_of_experts() -> None:
    few, waits = launches(4)
    # of two products: forward and backward, each also thin; the sums over an expert's rows of both thin matrices
    assert few["grouped_mm"] == 2 * 4 and few["grouped_outer"] == 2 * 2
    assert launches(16) == (few, waits)
    assert waits == 0
