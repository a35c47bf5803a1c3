"""Mixtures of experts train one curve under every split: ranks, engines, accumulation, with the routers' losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import moe
import pytest
from curves import run_cases
from test_same_curve import agrees, report

FULL = {"optimizer": "adamw", "adapter": "none", "rate": 3e-3, "experts": {"balance_loss": 0.1, "z_loss": 0.01}}
LORA = {**FULL, "adapter": "lora", "rate": 1e-2}
SHORT = {"steps": 4}


def compare(family: str, ranks: int, cases: list[dict[str, Any]], folder: Path, steps: int = 20) -> None:
    wrong = []
    for method in (FULL, LORA):
        wanted = [{**method, **c, "moe": family, "steps": steps} for c in cases if c["adapter"] == method["adapter"]]
        if not wanted:
            continue
        (alone,) = run_cases(1, [{**method, "moe": family, "engine": "ddp", "steps": steps}], folder / "alone")
        for case, curve in zip(wanted, run_cases(ranks, wanted, folder / method["adapter"]), strict=True):
            line = f"{family} {ranks} ranks {report(case, curve, alone)}"
            print(line)
            if not agrees(curve, alone):
                wrong.append(line)
    assert not wrong, "\n".join(wrong)


def case(adapter: str, engine: str, accumulation: int) -> dict[str, Any]:
    return {"adapter": adapter, "engine": engine, "accumulation": accumulation}


def test_two_ranks_train_the_curve_of_one(tmp_path: Path) -> None:
    """LoRA on all experts under both engines, with several micro-batches, some of them empty."""
    compare("mixtral", 2, [case("lora", "fsdp2", 4), case("lora", "ddp", 1)], tmp_path, steps=4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("family", moe.FAMILIES)
def test_every_split_trains_one_curve(family: str, ranks: int, tmp_path: Path) -> None:
    engines = ["ddp"] if ranks == 1 else ["ddp", "fsdp2"]
    cases = [case(adapter, engine, a) for adapter in ("none", "lora") for engine in engines for a in (1, 4)]
    compare(family, ranks, cases, tmp_path, steps=10)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_zero_trains_the_same_curve(tmp_path: Path) -> None:
    cases = [case(adapter, engine, 2) for adapter in ("none", "lora") for engine in ("zero2", "zero3")]
    compare("mixtral", 2, cases, tmp_path, steps=6)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_recomputed_blocks_train_the_same_curve(tmp_path: Path) -> None:
    more = [{**case("lora", e, 2), "checkpointing": c} for e in ("ddp", "fsdp2") for c in ("full", "selective")]
    compare("qwen3_moe", 2, more, tmp_path, steps=6)
