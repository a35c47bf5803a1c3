"""The path that a step takes on a GPU, run on a CPU: bf16 from fp32 masters, one operator for attention over all
documents, the loss by operators; the same curve, and budgets of what costs time there: read-backs, graphs,
collectives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import curves
import gpu_shaped
import pytest
import torch
import torch.distributed as dist
from read_backs import ReadBacks

from aifactory_train.core import compat
from aifactory_train.model.precision import choose_precision
from aifactory_train.parallel import apply, ddp
from aifactory_train.parallel.build import build_engine
from aifactory_train.parallel.world import World

HALF = {"precision": {"compute": "bf16", "frozen": "bf16"}}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What :func:`gpu_shaped.use` puts in place is gone afterwards."""
    for name in ("varlen_attention", "varlen_supports_gqa"):
        monkeypatch.setattr(compat, name, getattr(compat, name))


def engine(world: World, **case):
    case = {"engine": "ddp", "gpu_shaped": True, **HALF, **case}
    recipe = curves.make_recipe(case)
    precision, _ = choose_precision(recipe, "cpu")
    return build_engine(case["engine"], curves.make_core(case, recipe, precision), recipe, precision, world)


def curve(world: World, **case) -> list[float]:
    running = engine(world, **case)
    return [curves.train_step(running, {"max_norm": 1.0, **case}, world, step)[0] for step in range(20)]


def deviation(found: list[float], exact: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, exact, strict=True))


def test_twenty_steps_as_on_a_gpu_are_those_of_the_plain_path(tmp_path: Path) -> None:
    """Both in bf16: variable-length attention and the operators against attention on each document and chunks."""
    alone = World(0, 1, 0, 1, "cpu", "alone", "here")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        exact = curve(alone, gpu_shaped=False, precision={})
        plain = curve(alone, gpu_shaped=False)
        allowed = 2 * deviation(plain, exact)
        assert 1e-6 < allowed < 0.1 and exact[-1] < 0.9 * exact[0]  # it computes in bf16, and learns
        for case in (
            {"engine": "ddp", "checkpointing": "selective"},
            {"engine": "fsdp2", "checkpointing": "full"},
        ):
            assert deviation(curve(alone, **case), exact) <= allowed, case
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_as_on_gpus_have_the_curve_of_one_process(ranks: int, tmp_path: Path) -> None:
    method = {"steps": 20, "engine": "ddp"}
    exact, plain = (found["losses"] for found in curves.run_cases(1, [method, {**method, **HALF}], tmp_path))
    allowed = 2 * deviation(plain, exact)
    shaped = {**method, **HALF, "gpu_shaped": True, "accumulation": 2}
    cases = [{**shaped, "engine": e, "checkpointing": c} for e in ("ddp", "fsdp2") for c in ("none", "full")]
    for case, found in zip(cases, curves.run_cases(ranks, cases, tmp_path), strict=True):
        assert deviation(found["losses"], exact) <= allowed, case


@pytest.mark.parametrize(("name", "adapter"), [("ddp", "lora"), ("fsdp2", "none")])
def test_the_host_asks_the_device_nothing_within_a_step(name: str, adapter: str) -> None:
    """Forward, backward, clipping and update: 0 read-backs, so that the host runs ahead; what the loop reads is tested
    with the loop.
    """
    with gpu_shaped.rank_of(2) as world:
        for checkpointing in ("none", "selective", "full"):
            running = engine(world, engine=name, adapter=adapter, checkpointing=checkpointing)
            batch = curves.make_batch(curves.step_documents(0), "cpu")
            # DDP looks up, on the host, which parameters were used: an int32 each.
            with ReadBacks(host=torch.int32 if name == "ddp" else None) as asked:
                running.forward_backward(batch, 0.5, last=False)
                running.forward_backward(batch, 0.5, last=True)
                running.clip(1.0, 0.7)
                running.step(1e-3)
            assert not _ours(asked.found), (checkpointing, asked.found)


def _ours(found) -> dict[str, int]:
    """Without what the stand-in for attention reads of its bounds, which a kernel reads on the device."""
    return {name: count for name, count in found.items() if name != "tolist"}


def test_what_would_wait_is_counted() -> None:
    tensor = torch.arange(4.0)
    with ReadBacks() as asked:
        bool((tensor == 0).all())
        tensor.nonzero()
        torch.stack([tensor[0], tensor[1]]).tolist()
        float(tensor[1])
    assert asked.found == {"_local_scalar_dense": 2, "nonzero": 1, "tolist": 1}


# ---- compilation


def graphs(world: World, monkeypatch: pytest.MonkeyPatch, **case) -> tuple[list[int], dict]:
    """Nodes of each graph that three steps of different lengths are traced into, and the places that were not
    traced.
    """
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    dynamo.reset()
    counters.clear()
    found: list[int] = []

    def backend(graph, example):
        found.append(len(graph.graph.nodes))
        return graph.forward

    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **more: whole(f, backend=backend, **more))
    running = engine(world, compile=True, layers=4, **case)
    monkeypatch.setattr(torch, "compile", whole)
    for step in range(3):
        documents = curves.step_documents(step)[: 2 + step]
        running.forward_backward(curves.make_batch(documents, "cpu"), 0.5, last=True)
        running.step(1e-3)
    return found, dict(counters["graph_break"])


ALL = [
    (name, checkpointing, compute)
    for name in ("ddp", "fsdp2", "hsdp")
    for checkpointing in ("none", "selective", "full")
    for compute in ("bf16", "fp32")
]
SHARES = [pytest.param(*case, marks=() if case == ("ddp", "full", "bf16") else pytest.mark.slow) for case in ALL]


@pytest.mark.parametrize(("name", "checkpointing", "compute"), SHARES)
def test_one_compilation_serves_all_blocks(
    name: str, checkpointing: str, compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 (on a CPU the default is fp32, where nothing is copied) as in fp32: with lengths as numbers, and for any
    length; no more.
    """
    more = {"shard_size": 2} if name == "hsdp" else {}
    precision = {"compute": compute, "frozen": compute}
    with gpu_shaped.rank_of(4 if name == "hsdp" else 2) as world:
        found, breaks = graphs(
            world, monkeypatch, engine=name, checkpointing=checkpointing, precision=precision, **more
        )
    assert not breaks and 1 <= len(found) <= 2


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_compiled_blocks_that_run_as_they_are_compute_the_same(checkpointing: str, capsys) -> None:
    """Where compilation gives up in the middle of a run, checkpointing computes a block again after its copies are
    gone.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    alone = World(0, 1, 0, 1, "cpu", "alone", "here")
    try:
        gradients = []
        for compiled in (False, True):
            running = engine(alone, checkpointing=checkpointing, compile=compiled)
            with torch.compiler.set_stance("force_eager"):
                running.forward_backward(curves.make_batch(curves.step_documents(0), "cpu"), 0.5, last=True)
            gradients.append([p.grad for _, p in running.named])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    finally:
        dist.destroy_process_group()


def test_what_could_not_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from torch._dynamo.utils import counters

    module = torch.nn.Linear(2, 2)
    apply._tell_what_was_not_compiled(module)
    counters["graph_break"]["a dictionary that is written to\n  and more"] += 3
    for _ in range(2):
        module(torch.zeros(1, 2))
    said = capsys.readouterr().err
    assert said.count("3 places could not be compiled") == 1 and "a dictionary that is written to)" in said


# ---- collectives


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "hsdp"])
@pytest.mark.parametrize("micros", [1, 3])
def test_collectives_of_a_step(name: str, micros: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 gathers, for each micro-batch, each block for forward and backward and the root once; it reduces once a
    step, HSDP over its copies besides; one norm. DDP sums once a step, and every rank has the norm; the one besides is
    its map of the parameters that were used (an int32 each).
    """
    blocks, buckets = 2, []
    batch = curves.make_batch(curves.step_documents(0), "cpu")
    with gpu_shaped.rank_of(4 if name == "hsdp" else 2) as world:
        nowhere = ddp._sum_hook
        monkeypatch.setattr(ddp, "_sum_hook", lambda dtype, bucket: (buckets.append(1), nowhere(dtype, bucket))[1])
        running = engine(world, engine=name, **({"shard_size": 2} if name == "hsdp" else {}))
        with gpu_shaped.Collectives() as seen:
            for micro in range(micros):
                running.forward_backward(batch, 0.5, last=micro == micros - 1)
            running.clip(1.0)
            running.step(1e-3)
        monkeypatch.undo()
    if name == "ddp":
        assert len(buckets) == 1, buckets  # all of this model is in one
        assert seen.found == {"allreduce": 1}, seen.found
        return
    assert seen.found == {
        "allgather": micros * (2 * blocks + 1),
        "reduce_scatter": blocks + 1,
        "allreduce": 1 + (blocks + 1 if name == "hsdp" else 0),
    }, seen.found


#: (engine, micro-batches) -> collectives of a step, on two ranks in bf16 (where stage 1 runs as stage 2).
ZERO = {
    ("zero1", 1): {"allreduce": 6, "allgather": 2},
    ("zero1", 3): {"allreduce": 8, "allgather": 2},
    ("zero2", 1): {"allreduce": 6, "allgather": 2},
    ("zero2", 3): {"allreduce": 8, "allgather": 2},
    ("zero3", 1): {"allgather": 7, "reduce_scatter": 1, "allreduce": 4},
    ("zero3", 3): {"allgather": 11, "reduce_scatter": 3, "allreduce": 4},
}


@pytest.mark.slow
def test_collectives_of_zero(tmp_path: Path) -> None:
    """DeepSpeed's, over gloo: as many in every step, once stage 3 has seen the order of its modules twice; stage 3
    gathers for each micro-batch, the others once a step.
    """
    cases = [{"engine": name, "steps": 4, "accumulation": micros, "count": True, **HALF} for name, micros in ZERO]
    for (key, budget), seen in zip(ZERO.items(), curves.run_cases(2, cases, tmp_path), strict=True):
        assert seen["collectives"][2] == seen["collectives"][3] == budget, (key, seen["collectives"])


# ---- launches


def launches(layers: int, monkeypatch: pytest.MonkeyPatch, *, kernels: bool, checkpointing: str) -> tuple[int, int]:
    """(forward, backward and update) operators that launch something, of a LoRA step of a model on the meta device:
    views are none, and one of our operators is one, as its Triton code is (its partial sums apart).
    """
    from aifactory_train.kernels import runtime
    from aifactory_train.model.gpu_operators import apply_kernels

    monkeypatch.setattr(runtime, "use_triton", lambda op, x: kernels)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cuda": False)  # meta is no device to autocast
    alone = World(0, 1, 0, 1, "cpu", "alone", "here")
    case = {"engine": "ddp", "adapter": "lora", "layers": layers, "gpu_shaped": True, **HALF}
    case |= {"checkpointing": checkpointing, "adapter_more": {"targets": "all-linear"}}
    recipe = curves.make_recipe(case)
    precision, _ = choose_precision(recipe, "cpu")
    core = curves.make_core(case, recipe, precision)
    if kernels:
        apply_kernels(core.model, arch="sm_90", sku="H100-80")
    running = build_engine("ddp", core.to("meta"), recipe, precision, alone)
    batch = curves.make_batch(curves.step_documents(0), "cpu")
    batch = replace(
        batch,
        **{n: getattr(batch, n).to("meta") for n in ("input_ids", "position_ids", "positions", "targets")},
    )
    with gpu_shaped.Launches() as seen:
        loss = running.module(**batch.kwargs())
        forward = sum(seen.found.values())
        loss.backward()
    return forward, sum(seen.found.values()) - forward


#: (forward, backward) of one layer: without recomputation, and where the backward pass computes the block again.
LAUNCHES = {"none": (27, 39), "full": (27, 65)}


def test_launches_of_a_lora_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per layer (the difference that one more makes), adapters on all seven matrices: 27 and 39, where the model's own
    operators need 80 and 116.
    """
    for checkpointing, budget in LAUNCHES.items():
        per_layer = {}
        for kernels in (False, True):
            two, three = (launches(n, monkeypatch, kernels=kernels, checkpointing=checkpointing) for n in (2, 3))
            per_layer[kernels] = (three[0] - two[0], three[1] - two[1])
        assert all(0 < seen <= most for seen, most in zip(per_layer[True], budget, strict=True)), per_layer
        assert sum(per_layer[True]) < 0.4 * sum(per_layer[False]), per_layer
