"""The path that a step takes on a GPU, run on a CPU: bf16 from fp32 masters, one operator for attention over all
documents, the loss by operators; the same curve, and budgets of what costs time there: read-backs, graphs,
collectives."""

from __future__ import annotations

from pathlib import Path

import curves
import gpu_shaped
import pytest
import torch
import torch.distributed as dist
from read_backs import ReadBacks

from aifactory_train.core import compat
from aifactory_train.model.precision import choose_precision
from aifactory_train.parallel import apply
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


ALL = [(name, checkpointing) for name in ("ddp", "fsdp2") for checkpointing in ("none", "selective", "full")]
SHARES = [pytest.param(*case, marks=() if case == ("ddp", "full") else pytest.mark.slow) for case in ALL]


@pytest.mark.parametrize(("name", "checkpointing"), SHARES)
def test_one_compilation_serves_all_blocks(name: str, checkpointing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 (on a CPU the default is fp32, where nothing is copied): with lengths as numbers, and for any length; no
    more.
    """
    with gpu_shaped.rank_of(2) as world:
        found, breaks = graphs(world, monkeypatch, engine=name, checkpointing=checkpointing)
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


@pytest.mark.parametrize("micros", [1, 3])
def test_collectives_of_a_step(micros: int) -> None:
    """FSDP2 gathers, for each micro-batch, each block for forward and backward and the root once; it reduces once a
    step; one norm.
    """
    blocks = 2
    batch = curves.make_batch(curves.step_documents(0), "cpu")
    with gpu_shaped.rank_of(2) as world:
        running = engine(world, engine="fsdp2")
        with gpu_shaped.Collectives() as seen:
            for micro in range(micros):
                running.forward_backward(batch, 0.5, last=micro == micros - 1)
            running.clip(1.0)
            running.step(1e-3)
    assert set(seen.found) == {"allgather", "reduce_scatter", "allreduce"}, seen.found
    assert seen.found["allgather"] == micros * (2 * blocks + 1), seen.found
    assert (seen.found["reduce_scatter"], seen.found["allreduce"]) == (blocks + 1, 1), seen.found
