"""What engines are built from: blocks, compute types, DeepSpeed's JSON, refusals, the ranks' discovery."""

from __future__ import annotations

import json

import curves
import pytest
import torch

from aifactory_train.config import Recipe
from aifactory_train.errors import UserError
from aifactory_train.model import Precision, choose_precision
from aifactory_train.parallel import build_engine, refuse_quantised
from aifactory_train.parallel.apply import apply_compute_type, block_modules
from aifactory_train.parallel.deepspeed import deepspeed_json
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


def test_a_four_bit_base_is_refused_by_engines_that_split_it() -> None:
    settings = recipe(adapter="lora", adapter_more={"quantise_base": "nf4"})
    with pytest.raises(UserError, match="4-bit"):
        refuse_quantised(settings, "fsdp2")
    refuse_quantised(settings, "ddp")


def test_ranks_are_found_from_each_launcher() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert discover(torchrun) == (3, 8, 1, 2, "torchrun")
    mpi = {
        f"OMPI_COMM_WORLD_{k}": v for k, v in (("RANK", "1"), ("SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "2"))
    }
    assert discover(mpi) == (1, 2, 1, 2, "mpi")
    assert discover({"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"})[4] == "mpi"
    assert discover({}) == (0, 1, 0, 1, "alone")
    with pytest.raises(UserError, match="WORLD_SIZE"):
        discover({"RANK": "0"})
