"""A mixture of experts on a device: its launches do not depend on the number of experts, the host waits for none."""

from __future__ import annotations

from collections import Counter

import moe
import torch

from aifactory_train.audit import pretend
from aifactory_train.audit.recorder import HostAnswers, StepRecorder


def launches(experts: int) -> tuple[Counter[str], int]:
    """(launches by name, what the host waited for) of forward and backward with adapters, on meta tensors."""
    model = moe.adapted("qwen3_moe", moe.recipe(), experts=experts).to("meta")
    ids = torch.randint(5, 300, (2, 9)).to("meta")
    with pretend.chip("sm_90", "H100-80"), StepRecorder(HostAnswers(12)) as seen:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found: Counter[str] = Counter()
    for (_, name), row in seen.rows.items():
        found[name] += row.launches
    return found, sum(seen.syncs.values())


def test_launches_do_not_depend_on_the_number_of_experts() -> None:
    few, waits = launches(4)
    # of each of two layers' two products: forward and backward, each also thin; two sums over an expert's rows
    assert few["grouped_mm"] == 2 * 2 * 4 and few["grouped_outer"] == 2 * 2 * 2
    assert launches(16) == (few, waits)
    assert waits == 0
