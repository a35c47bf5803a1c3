"""Traits say of each engine what it really does; an engine from elsewhere is one class and one row of the table."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import curves
import pytest
import torch

from aifactory_train.config.schema import ParallelConfig
from aifactory_train.core.errors import UserError
from aifactory_train.model import shapes
from aifactory_train.model.precision import Precision
from aifactory_train.parallel.build import build_engine
from aifactory_train.parallel.dims import ParallelDims
from aifactory_train.parallel.memory_advice import advise
from aifactory_train.parallel.state import Piece
from aifactory_train.parallel.torch_engine import TorchEngine
from aifactory_train.parallel.traits import DEFAULT, ENGINES, EngineTraits, engine_that_runs, refuse_what_it_cannot_do
from aifactory_train.parallel.world import World
from aifactory_train.planning import memory, search, timing, workload
from aifactory_train.planning.job import GpuRates, Layout, Links

FP32 = Precision(torch.float32, torch.float32, torch.float32, torch.float32)
ALONE = World(0, 1, 0, 1, "cpu", "alone", "here")
H100 = GpuRates("h100-80", "sm_90", "nvidia", 79.6, 3350.0, 989.4, 450.0, 700.0)
LINKS = Links(4, 450.0, 400.0)


def test_the_recipe_names_the_engines_of_the_table() -> None:
    assert set(get_args(ParallelConfig.model_fields["engine"].annotation)) == {"auto", *ENGINES}
    assert DEFAULT in ENGINES


def test_traits_and_dims_need_no_torch() -> None:
    code = (
        "import sys, aifactory_train.parallel.dims, aifactory_train.parallel.build, aifactory_train.planning.search; "
    )
    code += "print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_traits_are_what_the_engines_hold(tmp_path: Path) -> None:
    cases = [{"engine": name, "shard_size": 1 if name == "hsdp" else None} for name in ENGINES]
    cases[list(ENGINES).index("hsdp")]["shard_size"] = 2
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    script = Path(curves.__file__).with_name("sharding.py")
    curves.start_ranks(script, 2, str(tmp_path / "cases.json"), str(tmp_path / "out.json"))
    for found in json.loads((tmp_path / "out.json").read_text()):
        traits = ENGINES[found["name"]]
        for what in ("shards_parameters", "shards_gradients", "shards_optimizer"):
            assert found[what] == getattr(traits, what), (found["name"], what)
        sharded = traits.shard_group != "none"
        assert found["dims"] == ([1, 2, 2] if sharded else [2, 1, 2])


@pytest.mark.parametrize("name", ENGINES)
def test_a_row_of_the_table_is_consistent(name: str) -> None:
    traits = ENGINES[name]
    assert traits.load().__name__ == traits.made_by.partition(":")[2]
    assert (traits.cuts == "whole") == (not traits.shards_optimizer) == (traits.shard_group == "none")
    assert (traits.weights == "always") == (not traits.shards_parameters)
    assert traits.shards_optimizer or not traits.shards_gradients
    assert traits.shards_gradients or not traits.shards_parameters
    # 4-bit weights are runs of bytes: cut by rows or not at all, never flattened with others or cast to a master
    assert not traits.holds_quantised or (traits.cuts in ("whole", "rows") and not traits.fp32_masters)


def test_a_stage_of_zero_that_runs_as_another() -> None:
    assert engine_that_runs("zero1", bf16=True, offload_optimizer=False) == "zero2"
    assert engine_that_runs("zero1", bf16=True, offload_optimizer=True) == "zero1"
    assert engine_that_runs("hsdp", bf16=True, offload_optimizer=False) == "hsdp"


# ---- dims


def test_who_shares_the_data() -> None:
    """tp and cp ranks have the documents of their group, pp ranks those of their column; every share is somebody's."""
    dims = ParallelDims(dp_replicate=2, dp_shard=3, cp=2, tp=2, ep=4, pp=2)
    assert dims.world == 48 and dims.data_ranks == 6
    shares = [dims.data_rank(rank) for rank in range(dims.world)]
    assert shares[:8] == [0, 0, 0, 0, 1, 1, 1, 1] and shares[:24] == shares[24:]
    assert all(shares.count(share) == dims.world // dims.data_ranks for share in range(dims.data_ranks))
    dims.check_world(48)
    with pytest.raises(UserError, match="48 ranks, 24 were started"):
        dims.check_world(24)


def test_dims_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.tp"):
        ParallelDims(tp=0)
    with pytest.raises(UserError, match=r"parallel\.ep"):
        ParallelDims(dp_shard=4, ep=3)


@pytest.mark.parametrize(
    ("engine", "shard_size", "wanted"),
    [
        ("ddp", None, (8, 1)),
        ("fsdp2", None, (1, 8)),
        ("zero2", None, (1, 8)),
        ("hsdp", None, (2, 4)),
        ("hsdp", 2, (4, 2)),
    ],
)
def test_todays_engines_spread_data_alone(engine: str, shard_size: int | None, wanted: tuple[int, int]) -> None:
    dims = ParallelDims.of(engine, curves.make_recipe({"engine": engine, "shard_size": shard_size}), 8, 4)
    assert dims == ParallelDims(*wanted) and dims.data_ranks == 8
    assert [dims.data_rank(rank) for rank in range(8)] == list(range(8))


def test_groups_that_do_not_divide_the_ranks_are_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.shard_size"):
        ParallelDims.of("hsdp", curves.make_recipe({"engine": "hsdp", "shard_size": 3}), 8, 4)


# ---- an engine from elsewhere


class ToyEngine(TorchEngine):
    """Everything on every rank, for one rank."""

    def __init__(self, name: str, core: Any, recipe: Any, precision: Any, world: Any):
        super().__init__(name, core, recipe, precision, world)
        self.module = core
        self._build_optimizer()

    def forward_backward(self, batch: Any, scale: float, last: bool) -> torch.Tensor:
        loss = self.module(**batch.kwargs())
        (loss * scale).backward()
        return loss.detach()

    def _pieces(self, tensor: torch.Tensor) -> list[Piece]:
        return [Piece((0,) * tensor.dim(), tensor)]

    def _owned(self, number: int) -> bool:
        return True

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> EngineTraits:
    traits = EngineTraits(
        made_by=f"{__name__}:ToyEngine",
        means="it is a toy",
        gradient_buffers=True,
        compute_copies=True,
        cannot_compile="a toy is not compiled",
    )
    monkeypatch.setitem(ENGINES, "toy", traits)
    return traits


def toy_recipe(**case: Any) -> Any:
    """A recipe that asks for the toy, as one whose literal of engines had its name."""
    recipe = curves.make_recipe({"engine": "auto", **case})
    recipe.parallel.__dict__["engine"] = "toy"
    return recipe


def test_a_registered_engine_trains(toy: EngineTraits) -> None:
    case = {"rate": 1e-2}
    recipe = toy_recipe()
    steps = {}
    for name in ("toy", DEFAULT):
        engine = build_engine(name, curves.make_core(case, recipe, FP32), recipe, FP32, ALONE)
        before = [p.detach().clone() for p in engine.core.parameters()]
        loss = engine.forward_backward(curves.make_batch(curves.step_documents(0), "cpu"), 0.01, last=True)
        norm = engine.clip(None)
        engine.step(1e-2)
        assert engine.updates == 1 and any(
            (a != b).any() for a, b in zip(before, engine.core.parameters(), strict=True)
        )
        steps[name] = (float(loss), float(norm), [p.detach().clone() for p in engine.core.parameters()])
    assert steps["toy"][:2] == steps[DEFAULT][:2]
    assert all(torch.equal(a, b) for a, b in zip(steps["toy"][2], steps[DEFAULT][2], strict=True))


def test_a_registered_engine_is_known_to_the_planner(toy: EngineTraits) -> None:
    recipe = curves.make_recipe({"engine": "auto", "adapter": "lora"})
    recipe.train.__dict__["batch_rows"] = 64
    work = workload.of_recipe(recipe, shapes.load("meta-llama/Meta-Llama-3-8B"), None, None)
    open_ = {layout.engine for layout in search.layouts(work, 8, 4, workload.Fixed(), False)}
    assert {"toy", "ddp", "hsdp"} <= open_
    assert "toy" not in {layout.engine for layout in search.layouts(work, 8, 4, workload.Fixed(), True)}
    best, _ = search.search(work, H100, LINKS, 8, workload.Fixed(engine="toy"))
    same, _ = search.search(work, H100, LINKS, 8, workload.Fixed(engine=DEFAULT))
    assert search.overrides(best, work)["parallel.engine"] == "toy"
    assert memory.predict(best.job) == memory.predict(same.job)
    assert timing.predict(best.job) == timing.predict(same.job)
    with pytest.raises(UserError, match=r"(?s)unknown engine 'tensor'.*toy"):
        Layout("tensor", 8, 1)


def test_a_registered_engine_is_known_to_the_checks_and_the_advice(toy: EngineTraits) -> None:
    from aifactory_train.launchers.checks.software import quantisation_supported

    for case in ({"compile": True}, {"offload": True}, {"adapter": "lora", "adapter_more": {"quantise_base": "nf4"}}):
        with pytest.raises(UserError):
            refuse_what_it_cannot_do(toy_recipe(**case), "toy")
    refuse_what_it_cannot_do(toy_recipe(), "toy")
    recipe = toy_recipe(adapter="lora", adapter_more={"quantise_base": "nf4"})
    context: Any = SimpleNamespace(
        recipe=recipe,
        batch=True,
        request=SimpleNamespace(venv=None, accept=None),
        system=SimpleNamespace(user=SimpleNamespace(venv=None)),
    )
    (finding,) = quantisation_supported(context)
    assert "toy" in str(finding)
    assert any("parallel.engine=fsdp2" in line for line in advise(toy_recipe(), None, 4, 2**30))


@pytest.mark.parametrize(
    ("engine", "asked", "wanted"),
    [
        ("hsdp", {"dp_shard": 2}, (4, 2)),
        ("hsdp", {"dp_replicate": 4}, (4, 2)),
        ("hsdp", {"dp_shard": 2, "dp_replicate": 4, "tp": 1, "cp": 1, "ep": 1}, (4, 2)),
        ("fsdp2", {"dp_shard": 8}, (1, 8)),
        ("ddp", {"dp_replicate": 8, "dp_shard": "auto"}, (8, 1)),
    ],
)
def test_dims_that_a_recipe_asks_for(engine: str, asked: dict[str, Any], wanted: tuple[int, int]) -> None:
    recipe = curves.make_recipe({"engine": engine, "dims": asked})
    dims = ParallelDims.of(engine, recipe, 8, 4)
    assert (dims.dp_replicate, dims.dp_shard) == wanted


@pytest.mark.parametrize(
    ("engine", "asked", "message"),
    [
        ("fsdp2", {"dp_shard": 4}, "engine fsdp2 on 8 ranks has dp_shard 8, and 4 is asked for"),
        ("ddp", {"dp_shard": 8}, "has dp_shard 1"),
        ("hsdp", {"dp_shard": 2, "dp_replicate": 2}, "has dp_replicate 4, and 2"),
        ("hsdp", {"dp_replicate": 3}, "dp_replicate 4, and 3|cannot be split"),
        ("hsdp", {"dp_shard": 3}, "cannot be split"),
    ],
)
def test_dims_that_do_not_fit_the_ranks_are_refused(engine: str, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ParallelDims.of(engine, curves.make_recipe({"engine": engine, "dims": asked}), 8, 4)


@pytest.mark.parametrize("key", ["tp", "cp", "ep"])
def test_kinds_of_parallelism_that_are_not_there_are_refused_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)dims\.{key}.*parallelism is not there"):
        curves.make_recipe({"engine": "auto", "dims": {key: 2}})
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        curves.make_recipe({"engine": "auto", "dims": {key: 0}})


def test_a_shard_that_is_given_twice_is_one_setting() -> None:
    with pytest.raises(ValueError, match="they are one setting"):
        curves.make_recipe({"engine": "hsdp", "shard_size": 4, "dims": {"dp_shard": 2}})
    twice = curves.make_recipe({"engine": "hsdp", "shard_size": 2, "dims": {"dp_shard": 2}})
    assert twice.parallel.copy_ranks == 2
