"""``train --profile``: phases that add up to the step, words about the largest items, ranks told apart; nothing where
it is not asked for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aifactory_train.cli import main
from aifactory_train.core.errors import UserError
from aifactory_train.record.events import EventBus, PhaseBegan, RunEnded, RunStarted, StepDone
from aifactory_train.run.profiled_steps import steps_asked
from aifactory_train.training.step_profile import PHASES, StepProfiler, _linear_flops
from aifactory_train.training.step_profile_page import write_page


@pytest.mark.parametrize(("text", "steps"), [("4", 4), ("5-8", (5, 8)), ("7-7", (7, 7))])
def test_steps_are_a_number_or_a_range(text: str, steps: Any) -> None:
    assert steps_asked(text) == steps


@pytest.mark.parametrize("text", ["0", "8-5", "0-3", "some", "-3", "1.5", "3-", ""])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="names no steps") as no:
        steps_asked(text)
    assert no.value.where == "--profile" and "5-8" in str(no.value.fix)


class Loop:
    """A loop of small steps that says what the trainer says."""

    def __init__(self, folder: Path, asked: str, rank: int = 0, size: int = 1):
        world: Any = SimpleNamespace(device="cpu", rank=rank, size=size, is_main=rank == 0)
        run: Any = SimpleNamespace(path=folder)
        self.profiler = StepProfiler(asked, run, world)
        self.bus = EventBus(self.profiler)
        self.weight = torch.nn.Parameter(torch.randn(300, 300))

    def steps(self, total: int, done: int = 0, naps: float = 0.0) -> None:
        nothing: Any = None
        self.bus.emit(RunStarted(done, total, nothing, nothing, {}, "ddp", "fp32", []))
        for step in range(done, total):
            started = time.perf_counter()
            self.bus.emit(PhaseBegan(step, "fetch"))
            rows = torch.randn(200, 300)
            for _ in range(2):
                self.bus.emit(PhaseBegan(step, "forward"))
                time.sleep(naps)
                loss = (rows @ self.weight).square().mean()
                loss.backward()
            self.bus.emit(PhaseBegan(step, "reduce"))
            norm = float(self.weight.grad.norm())  # type: ignore[union-attr]
            self.bus.emit(PhaseBegan(step, "update"))
            with torch.no_grad():
                self.weight -= 0.1 * self.weight.grad / norm
            self.weight.grad = None
            seconds = time.perf_counter() - started
            self.bus.emit(StepDone({"step": step + 1, "seconds": seconds}, [], [], step + 1 == total))
            self.bus.emit(PhaseBegan(step + 1, "save"))
        self.bus.emit(RunEnded("finished"))


def table(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / "profile" / f"rank-{rank}.json").read_text())


def test_phases_add_up_to_the_step_and_operators_to_their_phase(tmp_path: Path) -> None:
    before = torch.Tensor.backward
    Loop(tmp_path, "5-7").steps(9, naps=0.005)
    assert torch.Tensor.backward is before
    found = table(tmp_path)
    assert (found["first"], found["last"]) == (5, 7)
    assert list(found["phases"]) == list(PHASES) and all(seconds > 0 for seconds in found["phases"].values())
    assert sum(found["phases"].values()) == pytest.approx(found["seconds"], rel=0.02)
    assert found["phases"]["forward"] > 0.01  # two naps
    for phase, seconds in found["phases"].items():
        own = sum(item["seconds"] for item in found["items"] if item["phase"] == phase)
        assert 0.8 * seconds <= own <= 1.1 * seconds + 1e-4, phase  # of the smallest only the largest 40 are kept
    products = {i["phase"]: i for i in found["items"] if i["operator"] == "aten::mm"}
    assert products["forward"]["flop"] == pytest.approx(2 * 2 * 200 * 300 * 300)  # two micro-batches
    assert set(products) == {"forward", "backward"} and products["backward"]["calls"] == 2
    assert found["between"].keys() == {"save"}


def test_the_page_says_it_in_words(tmp_path: Path) -> None:
    Loop(tmp_path, "2").steps(6, naps=0.01)
    plan = {"step_seconds": {"matmul": 0.01, "loss": 0.0, "total": 0.011}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    page = write_page(tmp_path / "profile", SimpleNamespace(path=tmp_path), 1).read_text()  # type: ignore[arg-type]
    assert "Steps 4 to 5, 1 rank" in page and "is **forward**" in page
    assert page.count(" of the step") >= 4 and "3. " in page and "4. " not in page
    assert "1. outside operators (Python, waiting) in forward" in page, page
    assert "The plan says 0.0110 s a step (matmul 0.0100 s)" in page
    assert "`trace-rank-0.json.gz`" in page and (tmp_path / "profile" / "trace-rank-0.json.gz").stat().st_size


def test_a_floor_is_given_where_matrices_are_multiplied(tmp_path: Path) -> None:
    loop = Loop(tmp_path, "1-2")
    loop.weight = torch.nn.Parameter(torch.randn(300, 3000))
    loop.steps(2)
    item = next(i for i in table(tmp_path)["items"] if i["flop"])
    page = (tmp_path / "profile" / "profile.md").read_text()
    assert f"{item['flop'] / 1e9:.2f} GFLOP at the" in page and table(tmp_path)["product_flops"] > 1e8


def test_the_slowest_rank_is_named(tmp_path: Path) -> None:
    for rank in (1, 2, 0):  # rank 0 writes the page of what is there
        loop = Loop(tmp_path, "1-2", rank, 4)
        loop.weight = torch.nn.Parameter(torch.randn(300, 40_000 if rank == 1 else 300))
        loop.steps(2)
    page = (tmp_path / "profile" / "profile.md").read_text()
    assert "Slowest: rank 1 on " in page and "Nothing was written by rank 3." in page


@pytest.mark.parametrize(("asked", "done", "recorded"), [("50-60", 0, 0), ("1-2", 4, 0), ("5-50", 0, 2), ("40", 0, 6)])
def test_steps_that_do_not_come_are_said(
    asked: str, done: int, recorded: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Loop(tmp_path, asked).steps(6, done)
    said = capsys.readouterr()
    assert ("nothing is recorded" in said.out + said.err) == (not recorded)
    assert not recorded or table(tmp_path)["last"] - table(tmp_path)["first"] + 1 == recorded
    assert (tmp_path / "profile").exists() == bool(recorded)


def test_a_wrong_value_ends_with_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["train", "health/phenotype-terms"], ["launch", "health/phenotype-terms", "--dry-run"]):
        assert main([*command, "--profile", "many"]) == 2
        assert "--profile: 'many' names no steps" in capsys.readouterr().err
    assert main(["launch", "runs/x", "--resume", "--profile", "3"]) == 2


def test_launch_hands_it_to_the_ranks() -> None:
    from aifactory_train.launchers.files import arguments
    from aifactory_train.launchers.request import LaunchRequest

    def given(**more: Any) -> list[str]:
        return arguments(SimpleNamespace(request=LaunchRequest("a/b", **more)), "/run")  # type: ignore[arg-type]

    assert given(profile="5-8")[-2:] == ["--profile", "5-8"] and "--profile" not in given()


def test_products_of_onednn_are_counted() -> None:
    event = SimpleNamespace(name="mkldnn::_linear_pointwise", input_shapes=[[4, 6, 8], [5, 8], []])
    assert _linear_flops(event) == 2 * 24 * 8 * 5
    assert _linear_flops(SimpleNamespace(name="aten::add", input_shapes=[[4, 8], [5, 8]])) == 0
