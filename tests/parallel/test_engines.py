"""What engines are built from: blocks, compute types, DeepSpeed's JSON, refusals, the ranks' discovery."""

from __future__ import annotations

import json
import math

import curves
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.model.attention import Documents
from aifactory_train.model.precision import Precision, choose_precision
from aifactory_train.parallel.apply import apply_compute_type, block_modules
from aifactory_train.parallel.build import build_engine, choose_engine
from aifactory_train.parallel.deepspeed import deepspeed_json
from aifactory_train.parallel.optim import parameter_groups
from aifactory_train.parallel.torch_engine import split_scale
from aifactory_train.parallel.traits import refuse_quantised
from aifactory_train.parallel.world import World, discover

FP32 = Precision(torch.float32, torch.float32, torch.float32, torch.float32)
MIXED = Precision(torch.float32, torch.bfloat16, torch.bfloat16, torch.float32)
ALONE = World(0, 1, 0, 1, "cpu", "alone", "here")


def recipe(**case) -> Recipe:
    return curves.make_recipe({"engine": "zero3", **case})


def core(**case):
    settings = recipe(**case)
    return curves.make_core(case, settings, choose_precision(settings, "cpu")[0])


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_the_blocks_are_the_decoder_layers(adapter: str) -> None:
    model = core(adapter=adapter)
    assert [type(b).__name__ for b in block_modules(model)] == ["LlamaDecoderLayer"] * 2


def test_compute_copies_leave_names_and_masters_alone() -> None:
    model = core()
    names, types = [n for n, _ in model.named_parameters()], {p.dtype for p in model.parameters()}
    apply_compute_type(model, torch.bfloat16)
    batch = curves.make_batch(curves.step_documents(0), "cpu")
    model(**batch.kwargs()).backward()
    assert [n for n, _ in model.named_parameters()] == names
    assert {p.dtype for p in model.parameters()} == types == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    seen = []
    handle = model.backbone.layers[0].mlp.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    model(**batch.kwargs())
    handle.remove()
    assert seen == [torch.bfloat16]


def test_copies_made_ahead_are_those_of_the_weights_as_they_are() -> None:
    """A part of the model that is called by itself after an update computes with the new weights."""
    model = core()
    apply_compute_type(model, torch.bfloat16)
    batch = curves.make_batch(curves.step_documents(0), "cpu")
    with torch.no_grad():
        before = model(**batch.kwargs())
        for parameter in model.parameters():
            parameter.mul_(1.5)
        layer, seen = model.backbone.layers[0], []
        handle = layer.mlp.register_forward_pre_hook(lambda m, i: seen.append(m.down_proj.weight))
        hidden = torch.zeros(1, 2, model.language_model.config.hidden_size, dtype=torch.bfloat16)
        positions = model.backbone.rotary_emb(hidden, torch.arange(2)[None])
        documents = Documents.of(torch.tensor([0, 2], dtype=torch.int32), "cpu")
        layer(hidden, position_embeddings=positions, documents=documents)
        handle.remove()
        assert torch.equal(seen[0].float(), dict(layer.named_parameters())["mlp.down_proj.weight"].bfloat16().float())
        assert model(**batch.kwargs()) != before


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_json_says_what_the_recipe_says(stage: int) -> None:
    tree = json.loads(json.dumps(deepspeed_json(recipe(offload=True), MIXED, 8, stage, 4096)))
    zero = tree["zero_optimization"]
    assert zero["stage"] == stage and zero["offload_optimizer"]["device"] == "cpu"
    assert tree["bf16"]["enabled"] and tree["communication_data_type"] == "fp32"
    # The loop clips, averages nothing, and says itself which micro-batch is the last.
    assert tree["gradient_clipping"] == 0 and tree["gradient_accumulation_steps"] == 1
    assert tree["gradient_allreduce_op"] == ("mean" if stage == 3 else "sum")
    assert "optimizer" not in tree and "scheduler" not in tree


def test_zero_refuses_parameters_that_are_not_fp32() -> None:
    pure = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32)
    with pytest.raises(UserError, match=r"precision\.parameters"):
        deepspeed_json(recipe(), pure, 8, 2, 4096)


def test_what_an_engine_cannot_do_is_refused_with_a_way_out() -> None:
    with pytest.raises(UserError, match=r"parallel\.engine=fsdp2"):
        build_engine("ddp", core(), recipe(engine="ddp", offload=True), FP32, ALONE)
    with pytest.raises(UserError, match=r"parallel\.compile"):
        build_engine("zero3", core(), recipe(compile=True), FP32, ALONE)
    with pytest.raises(UserError, match="unknown engine"):
        build_engine("tensor", core(), recipe(), FP32, ALONE)


def test_a_shard_size_without_its_engine_is_not_ignored() -> None:
    assert choose_engine(recipe(engine="auto"), ALONE)[0] == "ddp"
    assert choose_engine(recipe(engine="hsdp", shard_size=2), ALONE)[0] == "hsdp"
    with pytest.raises(UserError, match=r"parallel\.engine=hsdp"):
        choose_engine(recipe(engine="auto", shard_size=2), ALONE)


@given(st.integers(1, 2**40))
def test_a_scale_is_a_power_of_two_and_a_rest(units: int) -> None:
    power, rest = split_scale(1 / units)
    assert power * rest == 1 / units and 0.5 <= rest < 1 and math.frexp(power)[0] == 0.5


def test_bf16_gradients_are_those_of_the_sum_over_the_units_of_the_step() -> None:
    """To fp32's rounding and for any number of units: 1 / 4104 itself, sent through bf16, would round everything one
    way.
    """
    settings = recipe(engine="ddp", precision={"compute": "bf16"})
    engine = build_engine("ddp", core(precision={"compute": "bf16"}), settings, MIXED, ALONE)

    def gradient(scale: float, rest: float, most: float | None = None) -> tuple[torch.Tensor, float]:
        engine.discard()
        for step in range(3):
            engine.forward_backward(curves.make_batch(curves.step_documents(step), "cpu"), scale, last=step == 2)
        norm = float(engine.clip(most, rest))
        return torch.cat([p.grad.flatten().double() for p in engine.core.parameters()]), norm  # type: ignore[union-attr]

    plain, whole = gradient(1.0, 1.0)
    assert whole == pytest.approx(float(plain.norm()), rel=1e-5)
    for units in (1, 385, 2053, 4104, 2**20 - 1):
        found, norm = gradient(*split_scale(1 / units))
        assert float((found * units - plain).norm() / plain.norm()) < 1e-6
        assert norm == pytest.approx(whole / units, rel=1e-5)
    clipped, norm = gradient(*split_scale(1 / 4104), most=whole / 4104 / 10)
    assert norm == pytest.approx(whole / 4104, rel=1e-5)  # before clipping
    assert float(clipped.norm()) == pytest.approx(norm / 10, rel=5e-2)  # the 1e-6 of clip_factor counts here
    crude = gradient(1 / 4104, 1.0)[0] * 4104
    assert abs(float((crude * plain).sum() / plain.square().sum()) - 1) > 1e-4  # what this is for


def test_matrices_decay_and_embeddings_norms_and_biases_do_not() -> None:
    names = ["model.embed_tokens.weight", "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"]
    names += ["h.0.attn.c_attn.weight", "layers.0.q_proj.lora_A.default.weight"]
    parameters = [(name, torch.nn.Parameter(torch.zeros(2, 2))) for name in names]
    parameters += [(name, torch.nn.Parameter(torch.zeros(2))) for name in ("norm.weight", "q_proj.bias")]
    groups = {group["weight_decay"]: group["names"] for group in parameter_groups(parameters, 0.1)}
    assert groups == {0.1: names[3:], 0.0: [*names[:3], "norm.weight", "q_proj.bias"]}


def test_a_four_bit_base_is_refused_by_engines_that_cannot_cut_it() -> None:
    settings = recipe(adapter="lora", adapter_more={"quantise_base": "nf4"})
    for name in ("zero1", "zero2", "zero3"):
        with pytest.raises(UserError, match=r"4-bit(?s:.*)parallel.engine=fsdp2"):
            refuse_quantised(settings, name)
    for name in ("auto", "ddp", "fsdp2", "hsdp"):
        refuse_quantised(settings, name)
    dora = recipe(adapter="dora", adapter_more={"quantise_base": "nf4"})
    with pytest.raises(UserError, match=r"DoRA(?s:.*)parallel.engine=ddp"):
        refuse_quantised(dora, "fsdp2")
    refuse_quantised(dora, "ddp")


def test_ranks_are_found_from_each_launcher() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert discover(torchrun) == (3, 8, 1, 2, "torchrun")
    mpi = {
        f"OMPI_COMM_WORLD_{k}": v for k, v in (("RANK", "1"), ("SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "2"))
    }
    assert discover(mpi) == (1, 2, 1, 2, "mpi")
    assert discover({"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"})[4] == "mpi"
    assert discover({}) == (0, 1, 0, 1, "alone")
    slurm = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "0",
    }
    assert discover({**slurm, "MASTER_ADDR": "n1"}) == (2, 4, 0, 1, "srun")
    assert discover({**slurm, "SLURM_STEP_NUM_TASKS": "1"})[4] == "alone"
    with pytest.raises(UserError, match="4 tasks without MASTER_ADDR"):
        discover(slurm)  # each of the four would think it is alone
    with pytest.raises(UserError, match="WORLD_SIZE"):
        discover({"RANK": "0"})
