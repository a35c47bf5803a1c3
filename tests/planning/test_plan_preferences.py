"""DPO, IPO, ORPO and KTO in the plan: pairs are two documents, KTO runs one forward pass more, the reference is scored
once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from common import recipe, request
from hypothesis import given, settings
from hypothesis import strategies as st

from aifactory_train import sites
from aifactory_train.core.errors import UserError
from aifactory_train.data.sampler import split_step
from aifactory_train.model import flops, shapes
from aifactory_train.planning import machine, plan, search, timing, workload

BASE = "meta-llama/Llama-3.1-8B"
DPO: dict[str, Any] = {"kind": "dpo"}
IPO: dict[str, Any] = {"kind": "dpo", "loss": "ipo"}
ORPO: dict[str, Any] = {"kind": "orpo"}
KTO: dict[str, Any] = {"kind": "kto"}


def made(how: dict[str, Any] | None, kind: str = "none", nodes: int = 4, tokens: float | None = 1e8, **more: Any):
    site = sites.load("leonardo-booster", overlay=False)
    block = {"methods__preference": how} if how else {}
    fixed = {"parallel__engine": "fsdp2", "parallel__activation_checkpointing": "none"}
    return plan.make(
        request(site, BASE, nodes, kind, tokens=tokens, rows=64, length=1024, **{**fixed, **block, **more})
    )


@pytest.mark.parametrize("how", [DPO, IPO, ORPO])
def test_a_pair_is_two_documents(how):
    plain, pairs = made(None)[0], made(how)[0]
    assert pairs["step_tokens"] == 2 * plain["step_tokens"]
    assert pairs["steps"] == math.ceil(plain["steps"] / 2)  # the same tokens
    assert pairs["micro_batch"] >= 2
    assert any("two documents that are never divided" in line for line in pairs["reasons"])


@pytest.mark.parametrize("given_now", [frozenset(), frozenset({"train.micro_batch_tokens"})])
def test_no_micro_batch_is_smaller_than_a_pair(given_now):
    found, job = made(DPO, train__micro_batch_tokens=1024, given=given_now)
    assert job.micro_batch >= 2 and found["overrides"]["train.micro_batch_tokens"] >= 2 * 1024


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(16, 200),
    length=st.sampled_from([512, 1024]),
    how=st.sampled_from([None, DPO, KTO]),
    seed=st.integers(0, 10),
)
def test_what_training_packs_is_what_memory_was_counted_for(rows, length, how, seed):
    """The sampler's micro-batches of pairs of any lengths stay within the plan's, with the plan's own settings."""
    asked = recipe(BASE, "lora", rows=rows, length=length, **({"methods__preference": how} if how else {}))
    work = workload.of_recipe(asked, shapes.load(BASE), None, None)
    site = sites.load("leonardo-booster", overlay=False)
    chosen, _ = search.search(work, machine.gpu_of(site), machine.links_of(site), 16, workload.Fixed(engine="ddp"))
    most = search.overrides(chosen, work)["train.micro_batch_tokens"]
    per_row = 2 if how == DPO else 1
    lengths = np.random.default_rng(seed).integers(8, length + 1, (rows, per_row)).sum(1)
    lengths[0] = per_row * length
    shares = split_step(np.arange(rows), lengths, 16, "auto", most)
    assert max(int(lengths[share].sum()) for rank in shares for share in rank) <= chosen.job.tokens


def test_a_step_is_as_long_as_what_it_computes():
    """ORPO's and DPO's steps are alike; KTO's has a forward pass more; all make the logits again in backward."""
    (plain, job), (dpo, _), (orpo, _), (kto, scored) = (made(how) for how in (None, DPO, ORPO, KTO))
    assert dpo["step_seconds"] == orpo["step_seconds"]
    assert kto["micro_batch"] == plain["micro_batch"] and kto["step_tokens"] == plain["step_tokens"]
    seconds = [p["step_seconds"] for p in (plain, kto)]
    assert seconds[1]["matmul"] == pytest.approx(seconds[0]["matmul"] * 4 / 3, rel=1e-4)
    assert seconds[1]["attention"] == pytest.approx(seconds[0]["attention"] * 4.5 / 3.5, rel=1e-4)
    assert seconds[1]["loss"] > 1.5 * seconds[0]["loss"]
    assert seconds[1]["communication_total"] > seconds[0]["communication_total"]
    f = flops.forward(job.shape, 1024)
    beside = [timing.executed_beside(j, 1024, 1.0) for j in (job, scored)]
    assert beside == [0.0, f.linear + f.attention_causal + 2 * f.head]
    assert kto["flops_per_token"]["executed"] == pytest.approx(plain["flops_per_token"]["executed"] + beside[1])
    assert kto["flops_per_token"]["model"] == plain["flops_per_token"]["model"]  # what the method needs, as published


@pytest.mark.parametrize(("how", "passes"), [(None, 0), (DPO, 1), (IPO, 1), (ORPO, 0), (KTO, 2)])
def test_the_reference_is_scored_once(how, passes):
    once, thrice = made(how)[0], made(how, train__epochs=3.0)[0]
    assert (once["reference_hours"] is not None) is (passes > 0)
    for found in (once, thrice):
        training = found["steps"] * found["step_seconds"]["total"] / 3600
        assert found["hours"] == pytest.approx(training + (found["reference_hours"] or 0.0), rel=1e-3)
    assert once["reference_hours"] == thrice["reference_hours"], "the rows of one epoch, however often they are seen"
    if passes:
        share = once["reference_hours"] / (once["hours"] - once["reference_hours"])
        assert 0.15 * passes < share < 0.5 * passes  # a forward pass beside forward and backward


def test_the_reference_of_a_short_run_is_short():
    whole, short = made(DPO)[0], made(DPO, train__max_steps=10)[0]
    assert short["steps"] == 10
    assert short["reference_hours"] == pytest.approx(whole["reference_hours"] * 10 / whole["steps"], rel=1e-3)
    unknown = made(DPO, tokens=None)[0]
    assert unknown["hours"] is None and unknown["reference_hours"] is None


def test_fewer_pairs_than_gpus_are_refused_as_pairs():
    with pytest.raises(UserError, match=r"64 pair\(s\) cannot be divided over 128"):
        made(DPO, nodes=32)


def test_a_teacher_is_said_not_to_be_planned_and_its_loss_makes_the_logits_again():
    teacher = {"methods__distill": {"teacher": "org/teacher"}}
    (plain, before), (found, job) = made(None), made(None, **teacher)
    assert any(line.startswith("teacher pass: of org/teacher") and "not planned" in line for line in found["reasons"])
    assert not any("teacher" in line for line in plain["reasons"])
    assert job.preference and not before.preference and found["step_tokens"] == plain["step_tokens"]


@pytest.mark.parametrize("kind", ["simpo", "cpo"])
def test_pairs_without_a_reference_are_planned_as_orpos(kind):
    found, orpo = made({"kind": kind})[0], made(ORPO)[0]
    assert found["step_tokens"] == orpo["step_tokens"] and found["hours"] == orpo["hours"]
