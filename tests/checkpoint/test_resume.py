"""Resume: bitwise on the same number of ranks, the same curve on another number and under another engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from legs import run_legs

from aifactory_train.parallel.storage import faults, read_parameters, same_tensors, steps_in


def case(engine: str, adapter: str) -> dict[str, Any]:
    more: dict[str, Any] = {"adapter_more": {"dropout": 0.1}} if adapter == "lora" else {}
    if engine == "hsdp":
        more["shard_size"] = 2
    return {"engine": engine, "adapter": adapter, "accumulation": 2, **more}


def check_bitwise(ranks: int, cases: list[dict[str, Any]], folder: Path) -> None:
    """Six steps at a stretch, against three, an asynchronous save, and three more in a new engine."""
    legs = []
    for number, one in enumerate(cases):
        whole, cut = str(folder / f"{number}-whole"), str(folder / f"{number}-cut")
        legs += [
            {**one, "folder": whole, "to": 6},
            {**one, "folder": cut, "to": 3, "asynchronous": True},
            {**one, "folder": cut, "to": 6, "resume": True},
        ]
    found = run_legs(ranks, legs, folder)
    for number, one in enumerate(cases):
        whole, first, second = found[3 * number : 3 * number + 3]
        assert second["resumed"] == 3, (one, second)
        assert {**first["losses"], **second["losses"]} == whole["losses"], one
        assert {**first["norms"], **second["norms"]} == whole["norms"], one
        differing = same_tensors(folder / f"{number}-whole" / "step-6", folder / f"{number}-cut" / "step-6")
        assert not differing, (one, differing)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    check_bitwise(
        2, [case("fsdp2", "none"), case("ddp", "lora"), case("zero2", "lora"), case("zero3", "none")], tmp_path
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_engine_resumes_bitwise_on_four_ranks(tmp_path: Path) -> None:
    engines = ["ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"]
    check_bitwise(4, [case(e, a) for e in engines for a in ("none", "lora")], tmp_path)


def test_a_save_in_the_background_holds_the_step_it_was_asked_for(tmp_path: Path) -> None:
    """The weights go on changing while an asynchronous save writes; what it wrote is the state of its step."""
    legs = [
        {**case("fsdp2", "none"), "folder": str(tmp_path / "async"), "to": 8, "every": 2, "asynchronous": True},
        {**case("fsdp2", "none"), "folder": str(tmp_path / "plain"), "to": 8, "every": 2},
    ]
    run_legs(2, legs, tmp_path)
    for step in (2, 4, 6, 8):
        assert not same_tensors(tmp_path / "async" / f"step-{step}", tmp_path / "plain" / f"step-{step}"), step
    assert same_tensors(tmp_path / "plain" / "step-2", tmp_path / "plain" / "step-4")  # the comparison can tell


def follow(chain: list[tuple[int, str]], adapter: str, folder: Path) -> None:
    """Four steps under each (ranks, engine) of the chain, against one process all the way."""
    end = 4 * len(chain)
    reference = run_legs(1, [{"engine": "ddp", "adapter": adapter, "folder": str(folder / "one"), "to": end}], folder)[
        0
    ]
    losses: dict[str, float] = {}
    for number, (ranks, engine) in enumerate(chain):
        leg = {**case(engine, adapter), "adapter_more": {}, "folder": str(folder / "chain"), "to": 4 * (number + 1)}
        found = run_legs(ranks, [{**leg, "resume": number > 0}], folder)[0]
        assert found["resumed"] == (4 * number or None), found
        losses.update(found["losses"])
    off = {step: abs(losses[step] - loss) / loss for step, loss in reference["losses"].items()}
    print(f"{chain}: largest deviation of a loss {max(off.values()):.1e}")
    assert max(off.values()) <= 1e-5, off
    one, other = (dict(read_parameters(folder / name / f"step-{end}", "")) for name in ("one", "chain"))
    assert {n: (t.shape, t.dtype) for n, t in one.items()} == {n: (t.shape, t.dtype) for n, t in other.items()}


def test_ranks_and_engines_may_change_between_attempts(tmp_path: Path) -> None:
    follow([(2, "fsdp2"), (1, "ddp"), (2, "zero3")], "none", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_four_two_one_four_ranks_under_four_engines(tmp_path: Path, adapter: str) -> None:
    follow([(4, "hsdp"), (2, "zero2"), (1, "ddp"), (4, "zero3"), (4, "zero1"), (2, "fsdp2")], adapter, tmp_path)


def test_only_the_last_checkpoints_and_no_torn_one_are_kept(tmp_path: Path) -> None:
    legs = [{**case("ddp", "lora"), "folder": str(tmp_path / "run"), "to": 6, "every": 1, "keep": 2}]
    torn = tmp_path / "run" / ".writing-step-9"
    torn.mkdir(parents=True)
    (torn / "state-00000.safetensors").write_bytes(b"half")
    run_legs(1, legs, tmp_path)
    assert steps_in(tmp_path / "run") == [6, 5]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["step-5", "step-6"]
    marker = json.loads((tmp_path / "run" / "step-6" / "COMPLETE").read_text())
    assert (marker["step"], marker["engine"], marker["world_size"]) == (6, "ddp", 1)
    written = {p.name for p in (tmp_path / "run" / "step-6").iterdir()} - {"COMPLETE"}
    assert set(marker["files"]) == written and not faults(tmp_path / "run" / "step-6")
