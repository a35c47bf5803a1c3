"""Plans of mixtures of experts and hybrids: all experts in memory, the chosen ones in time, else a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
from common import job, recipe

from aifactory_train.audit.floor import step_bytes
from aifactory_train.core.errors import UserError
from aifactory_train.model import flops, shapes
from aifactory_train.planning import memory, plan_for, timing
from aifactory_train.planning.job import GIB
from aifactory_train.sites import load

BASES = ["Qwen/Qwen3-30B-A3B", "unsloth/gpt-oss-20b-BF16", "mistralai/Mixtral-8x7B-v0.1"]
HYBRIDS = ["Qwen/Qwen3-Next-80B-A3B-Instruct", "Qwen/Qwen3.5-35B-A3B", "ibm-granite/granite-4.0-h-small"]
FAST = [(BASES[0], "lora"), (BASES[1], "none"), (BASES[2], "lora"), (HYBRIDS[2], "lora")]


def check(base: str, kind: str, site: str, nodes: int) -> str:
    """A plan whose figures can be, or a refusal that says how to do it."""
    try:
        found, made = plan_for(recipe(base, kind, rows=1024), load(site), nodes, tokens=1e8)
    except UserError as error:
        assert "does not fit" in error.what and error.fix and "--" in error.fix, str(error)
        return "refused"
    shape = made.shape
    assert found["memory_gib"]["total"] <= 0.95 * found["capacity_gib"]
    assert 0.02 < found["mfu"] <= found["hfu"] * 1.001 < 0.8
    # the weights of all experts lie somewhere, the time is that of the active ones
    kept = found["memory_gib"]["parameters"] * made.layout.shard
    assert kept > 0.95 * shape.parameters * 2 / GIB
    assert found["active_parameters"] < 0.5 * found["parameters"]
    assert found["flops_per_token"]["model"] < 8 * found["active_parameters"]
    return "planned"


@pytest.mark.parametrize(("base", "kind"), FAST)
def test_a_plan_or_a_reason(base: str, kind: str) -> None:
    assert "planned" in {check(base, kind, site, nodes) for site, nodes in (("lumi-g", 2), ("jupiter-booster", 16))}


@pytest.mark.slow
@pytest.mark.parametrize("site", ["lumi-g", "leonardo-booster", "jupiter-booster"])
@pytest.mark.parametrize("kind", ["lora", "none"])
@pytest.mark.parametrize("base", BASES + HYBRIDS)
def test_every_size_of_job(base: str, kind: str, site: str) -> None:
    found = [check(base, kind, site, nodes) for nodes in (1, 2, 4, 8, 16)]
    # what fits on some nodes fits on more
    assert found == sorted(found, reverse=True) and found[-1] == "planned"


def test_memory_counts_all_experts_and_time_the_chosen() -> None:
    many = shapes.load(BASES[0])
    assert many.experts is not None
    few = replace(many, experts=replace(many.experts, count=64))
    wide = replace(many, experts=replace(many.experts, chosen=16))
    states = [memory.static_state(job(shape, method="lora")).parameters for shape in (many, few)]
    halved = many.layers * 64 * 3 * many.hidden * many.experts.ffn * 2 / 8  # bf16, over 8 ranks
    assert states[0] - states[1] == pytest.approx(halved, rel=0.01)
    assert many.active_parameters - few.active_parameters == many.layers * 64 * many.hidden  # rows of the router
    work = [flops.forward(shape, 2048).linear for shape in (many, wide)]
    assert work[1] - work[0] == 2 * many.layers * 8 * 3 * many.hidden * many.experts.ffn
    kept = [memory.block_kept(job(shape, method="lora")) for shape in (many, wide)]
    assert kept[1] > kept[0] + 8 * 2 * (many.hidden + 3 * many.experts.ffn)


def test_fewer_tokens_an_expert_are_slower() -> None:
    """The same products, cut into more experts: each has fewer rows."""
    shape = shapes.load(BASES[0])
    assert shape.experts is not None
    spread = replace(shape, experts=replace(shape.experts, count=512))
    seconds = [timing.predict(job(s, method="lora", micro_batch=1.0)).matmul for s in (shape, spread)]
    assert seconds[1] > 1.5 * seconds[0]


def test_padding_of_few_experts_on_many_ranks_is_gathered() -> None:
    """8 experts on 64 ranks: each rank sends one, eight times what there is; groups of 8 send what there is."""
    shape = shapes.load("mistralai/Mixtral-8x7B-v0.1")
    flat, group = memory.padded(job(shape, "fsdp2", 64)), memory.padded(job(shape, "hsdp", 64, 8))
    assert group[0] == pytest.approx(shape.parameters, rel=1e-3)
    assert flat[0] > 7 * shape.parameters and flat[1] > 7 * shape.largest_block


def test_a_hybrid_is_the_sum_of_its_blocks() -> None:
    shape = shapes.load(HYBRIDS[0])
    net, attention = shape.kinds
    assert (net.layers, attention.layers, net.recurrence is not None) == (36, 12, True)
    made = job(shape, checkpointing="none", sequence=1024)
    kept, _ = memory.activation_bytes(made)
    alone = [memory.activation_bytes(job(replace(k, name="one"), sequence=1024))[0] for k in (net, attention)]
    outside = alone[0] + alone[1] - kept  # counted twice
    assert 0 < outside < 0.01 * kept
    # a longer document costs the attention alone more
    short, long = flops.forward(shape, 1024), flops.forward(shape, 4096)
    assert short.recurrent == long.recurrent > 0
    assert long.attention_causal / short.attention_causal == pytest.approx(4, rel=0.01)


def test_a_four_bit_base_keeps_stacked_experts_as_they_are() -> None:
    shape = shapes.load(BASES[0])
    state = memory.static_state(job(shape, "ddp", 8, method="qlora"))
    experts = shape.layers * 128 * 3 * shape.hidden * 768
    assert state.parameters > 2 * experts
    assert shape.packed_parameters < 0.05 * shape.parameters


@pytest.mark.parametrize("base", [*BASES, *HYBRIDS])
def test_the_floor_of_a_step_reads_every_expert_and_no_token_twice(base: str) -> None:
    """It holds the weights of all experts that tokens reach, and grows with tokens less than in proportion."""
    shape = shapes.load(base)
    few, many = (step_bytes(shape, n, n - 1, rank=16) for n in (4096, 8192))
    routed = sum(k.layers * k.experts.count * k.experts.weights(k.hidden) for k in shape.kinds if k.experts)
    assert few > 2 * 2 * routed  # forward, and the gradient of the rows
    assert few < many < 2 * few
    assert step_bytes(shape, 4096, 4095) > few  # all weights trained: their gradients too


def test_the_floor_of_experts_by_hand() -> None:
    shape = shapes.load(BASES[2])
    dense = replace(shape, experts=None)
    t, h, f, e, k = 1024, shape.hidden, 14336, 8, 2
    router = 2 * (t * h + h * e + t * e)
    products = 2 * (t * h + e * h * 2 * f + k * t * 2 * f) + 2 * (k * t * f + e * f * h + t * h)
    more = shape.layers * (router + products + 8 * k * t * f)
    # adapters on everything but the experts and the router: what is named is attention
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    with_experts = step_bytes(shape, t, t - 1, rank=16, adapted=names)
    assert with_experts - step_bytes(dense, t, t - 1, rank=16, adapted=names) == 2 * more
