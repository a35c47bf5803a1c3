"""``train.optimizer: adamw8bit``: near AdamW's curve, resumed bit by bit, on other numbers of ranks, counted, and
refused by name.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from legs import run_legs

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.model import shapes
from aifactory_train.parallel.storage import same_tensors
from aifactory_train.parallel.traits import ENGINES, refuse_what_it_cannot_do
from aifactory_train.planning import search, workload

STEPS = 12


def leg(optimizer: str, folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "engine": "ddp",
        "adapter": "none",
        "optimizer": optimizer,
        "folder": str(folder),
        "to": STEPS,
        "every": 6,
        **more,
    }


def recipe(**more: Any) -> Recipe:
    data = {"train": [{"source": "rows.jsonl", "licence": "MIT"}]}
    return Recipe.model_validate({"model": {"base": "unused"}, "data": data, **more})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("adamw8bit")
    legs = [
        leg("adamw", folder / "full"),
        leg("adamw8bit", folder / "whole"),
        leg("adamw8bit", folder / "cut", to=6),
        leg("adamw8bit", folder / "cut", resume=True),
    ]
    return folder, run_legs(1, legs, folder)


def test_its_curve_is_near_that_of_adamw(alone: tuple[Path, list[dict[str, Any]]]) -> None:
    full, whole = ([run["losses"][str(s)] for s in range(STEPS)] for run in alone[1][:2])
    assert full[-1] < 0.9 * full[0], "nothing was learnt: the comparison says nothing"
    assert full != whole and max(abs(a - b) / b for a, b in zip(whole, full, strict=True)) < 0.02, (full, whole)


def test_it_resumes_bit_by_bit(alone: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = alone
    assert found[3]["resumed"] == 6
    assert not same_tensors(folder / "whole" / "step-12", folder / "cut" / "step-12")
    assert all(found[3]["losses"][str(s)] == found[1]["losses"][str(s)] for s in range(6, STEPS))


@pytest.mark.slow
def test_two_ranks_go_on_with_the_state_of_one(alone: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = alone
    (again,) = run_legs(2, [leg("adamw8bit", folder / "whole", resume=6, to=STEPS, every=99)], folder)
    assert again["resumed"] == 6
    for step in range(6, STEPS):  # the sum over two ranks rounds otherwise, and a code may then be its neighbour
        assert again["losses"][str(step)] == pytest.approx(found[1]["losses"][str(step)], rel=1e-3)


@pytest.mark.parametrize("name", ENGINES)
def test_engines_that_cut_tensors_refuse_it_by_name(name: str) -> None:
    asked = recipe(train={"optimizer": "adamw8bit"}, parallel={"engine": name})
    if ENGINES[name].cuts == "whole":
        refuse_what_it_cannot_do(asked, name)
        return
    with pytest.raises(UserError, match=f"engine {name} cannot keep the state of adamw8bit") as caught:
        refuse_what_it_cannot_do(asked, name)
    assert "parallel.engine=ddp" in str(caught.value.fix)


def test_the_planner_counts_its_bytes_and_leaves_other_engines_out() -> None:
    shape = shapes.load("HuggingFaceTB/SmolLM2-135M")
    eight, full = (workload._bytes(recipe(train={"optimizer": o}), shape) for o in ("adamw8bit", "adamw"))
    assert (full.optimizer, eight.optimizer) == (8, 2 + 2 * 4 / 256)
    work = SimpleNamespace(method="full", optimizer="adamw8bit", keeps_mean=False, bytes=eight)
    found = list(search.layouts(work, 8, 4, workload.Fixed(), False))  # type: ignore[arg-type]
    assert {layout.engine for layout in found} == {"ddp"}


def test_the_bytes_are_those_of_the_state() -> None:
    import torch

    from aifactory_train.kernels.adamw8bit.op import new_state

    size = sum(t.numel() * t.element_size() for t in new_state(torch.zeros(64, 1024)).values())
    shape = shapes.load("HuggingFaceTB/SmolLM2-135M")
    assert size / (64 * 1024) == workload._bytes(recipe(train={"optimizer": "adamw8bit"}), shape).optimizer
