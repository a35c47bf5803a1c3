"""Memory: closed forms that a person can check, and directions that must never turn round."""

from __future__ import annotations

from dataclasses import replace

import pytest
from common import job
from hypothesis import given, settings
from hypothesis import strategies as st

from aifactory_train.core.errors import UserError
from aifactory_train.model import shapes
from aifactory_train.planning import memory
from aifactory_train.planning.job import GIB, Bytes, Layout, Links

P = 8_030_261_248  # Llama-3-8B, as published


def test_static_state_by_hand():
    """16 bytes per parameter of mixed-precision Adam, divided by the ranks of the shard group."""
    whole = memory.static_state(job(engine="single", world=1, checkpointing="full"))
    assert whole.parameters == 4 * P and whole.gradients == 4 * P and whole.optimizer == 8 * P
    for engine in ("fsdp2", "zero3"):
        state = memory.static_state(job(engine=engine, world=64))
        per_rank = (state.parameters + state.gradients + state.optimizer) * 64
        assert per_rank == pytest.approx({"fsdp2": 16, "zero3": 18}[engine] * P, rel=1e-3)
    one = memory.static_state(job(engine="zero1", world=64))
    assert (one.parameters, one.gradients) == (2 * P, 4 * P) and one.optimizer == pytest.approx(12 * P / 64, rel=1e-6)
    two = memory.static_state(job(engine="zero2", world=64))
    assert two.gradients == pytest.approx(4 * P / 64, rel=1e-6)


def test_lora_trains_only_its_adapters():
    state = memory.static_state(job(engine="single", world=1, method="lora", lora_rank=16))
    adapters = shapes.load("meta-llama/Meta-Llama-3-8B").lora_parameters(16)
    assert state.gradients == 4 * adapters and state.optimizer == 8 * adapters
    assert state.parameters == 2 * P and state.adapters == 4 * adapters


def test_a_four_bit_base_is_about_a_quarter():
    lora = memory.static_state(job(engine="single", world=1, method="lora"))
    four = memory.static_state(job(engine="single", world=1, method="qlora"))
    blocks = shapes.load("meta-llama/Meta-Llama-3-8B").block_linear_parameters * 32
    assert lora.parameters - four.parameters == pytest.approx(blocks * (2 - memory.NF4_BYTES), rel=1e-6)


def test_offloaded_state_is_on_the_host():
    here = memory.predict(job(engine="zero3", world=8))
    away = memory.predict(job(engine="zero3", world=8).with_(layout=Layout("zero3", 8, 8, True)))
    assert away.optimizer == 0 and away.total < here.total
    assert away.host == pytest.approx(here.optimizer + 4 * P / 8 / GIB, rel=1e-3)


def test_accumulating_whole_gradients_is_counted():
    """Our FSDP2 engine reduces once a step: with accumulation every rank holds the whole gradient."""
    one = memory.static_state(job(accumulates_whole=True))
    many = memory.static_state(job(accumulates_whole=True, grad_accum=4))
    assert one.gradients == pytest.approx(4 * P / 8, rel=1e-3) and many.gradients == 4 * P


@settings(max_examples=60, deadline=None)
@given(
    base=st.sampled_from(
        [
            "HuggingFaceTB/SmolLM2-135M",
            "Qwen/Qwen3-8B",
            "swiss-ai/Apertus-8B-2509",
            "google/gemma-3-12b-it",
            "allenai/OLMo-2-1124-7B",
        ]
    ),
    engine=st.sampled_from(["ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"]),
    method=st.sampled_from(["full", "lora", "qlora"]),
    stack=st.sampled_from(["eager", "native", "compiled", "fused"]),
    micro=st.integers(1, 16),
    sequence=st.sampled_from([256, 1024, 4096]),
    accumulation=st.integers(1, 4),
)
def test_directions(base, engine, method, stack, micro, sequence, accumulation):
    from aifactory_train.planning.job import STACKS

    made = job(
        base,
        engine,
        16,
        8 if engine == "hsdp" else None,
        method=method,
        micro_batch=float(micro),
        sequence=sequence,
        grad_accum=accumulation,
        stack=STACKS[stack],
    )
    total = memory.predict(made).total
    assert total > 0 and all(v >= 0 for v in memory.predict(made).as_dict().values())
    assert memory.predict(made.with_(micro_batch=micro + 1.0)).total > total
    kept = [memory.kept_per_block(made.with_(checkpointing=m)) for m in ("full", "selective", "none")]
    assert kept[0] <= kept[1] and kept[0] <= kept[2]
    if engine not in ("ddp",):
        wider = made.with_(layout=Layout(engine, 64, 32 if engine == "hsdp" else 64))
        assert memory.static_state(wider).optimizer <= memory.static_state(made).optimizer


def test_bad_layouts_and_lengths_are_refused():
    with pytest.raises(UserError, match="cannot be divided"):
        Layout("hsdp", 12, 8)
    with pytest.raises(UserError, match="unknown engine"):
        Layout("fsdp3", 8, 8)
    with pytest.raises(UserError, match="longer than the 8192 positions"):
        job(sequence=16384)
    with pytest.raises(UserError, match="checkpointing"):
        job(checkpointing="some")


def test_moments_follow_the_optimizer():
    plain = memory.static_state(job(bytes=Bytes(working=0, optimizer=0)))
    assert plain.optimizer == 0


def test_memory_of_a_job_depends_on_its_machine_by_the_vendor_alone() -> None:
    """Results are kept by everything but GPU and links, so that many sites are asked quickly."""
    here = job(world=16)
    other = here.with_(gpu=replace(here.gpu, sku="other", arch="sm_80", memory_gib=39.5), links=Links(4, 25.0, 12.5))
    memory._kept.clear()
    first = memory.predict(here)
    assert memory.predict(other) is first and memory._predict(other, True, memory.FRAGMENTATION) == first
    amd = here.with_(gpu=replace(here.gpu, vendor="amd"))
    assert memory.predict(amd).framework > first.framework
    for change in (
        {"micro_batch": 2.0},
        {"checkpointing": "full"},
        {"sequence": 4096},
        {"lora_rank": 64, "method": "lora"},
    ):
        assert memory.predict(here.with_(**change)) != first, change
