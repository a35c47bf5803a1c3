"""A collective waits for every step of its ring: what a plan proposes for thousands of GPUs follows from it."""

from __future__ import annotations

import pytest
from common import H100, job, request

from aifactory_train.planning import plan, timing
from aifactory_train.planning.job import Links
from aifactory_train.sites import load

BASE = "meta-llama/Llama-3.1-8B"


def test_a_ring_by_hand() -> None:
    assert timing.ring_seconds(1, 8) == 0
    assert timing.ring_seconds(8, 8) == pytest.approx(1e-6 * (14 + 7 * 1.9))
    assert timing.ring_seconds(4096, 4) == pytest.approx(1e-6 * (14 + 3072 * 1.9 + 1023 * 4.0))
    assert timing.tree_seconds(1024, 1) == pytest.approx(1e-6 * (14 + 2 * 10 * 8.5))


def test_one_gpu_waits_for_nobody() -> None:
    assert timing.latency(job(BASE, "single", 1)) == (0.0, 0.0)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3", "zero2", "ddp"])
def test_waiting_grows_with_ranks_however_fast_the_links(engine: str) -> None:
    fast = Links(8, 1e9, 1e9)
    waits = [sum(timing.latency(job(BASE, engine, ranks).with_(links=fast))) for ranks in (8, 64, 512, 4096)]
    assert waits == sorted(waits) and 0 < waits[0] < waits[-1]
    step = timing.predict(job(BASE, engine, 4096).with_(links=fast, gpu=H100)).communication_total
    assert step > 0.99 * waits[-1]


def test_copies_in_groups_wait_less() -> None:
    flat, groups = (sum(timing.latency(job(BASE, *spread))) for spread in (("fsdp2", 4096), ("hsdp", 4096, 32)))
    assert groups < 0.1 * flat


def test_no_flat_collectives_over_thousands_of_gpus() -> None:
    """Full fine-tuning of an 8B model on 4,096 GPUs: copies in groups, not one ring through all of them."""
    asked = request(load("jupiter-booster"), BASE, 1024, "none", tokens=1e10, train__batch_rows=4096)
    found, _ = plan.make(asked)
    assert found["engine"] == "hsdp" and found["mesh"]["shard"] <= 64
    flat = [a for a in found["alternatives"] if a["mesh"]["shard"] == 4096]
    assert all(a["slower"] > 0.2 for a in flat)
