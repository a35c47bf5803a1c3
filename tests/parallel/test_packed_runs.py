"""QLoRA on ranks that share its 4-bit base: the same weights, the same curve, checkpoints of any engine, and a byte
that changes ends the run. Needs bitsandbytes (the extra qlora)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import curves
import helpers
import pytest

pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")


def runs(folder: Path, ranks: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    base = folder / "base"
    if not base.exists():
        helpers.write_model(base, hidden_size=128, intermediate_size=256)
    recipe = helpers.write_recipe(folder / "data", base)
    fixed = [
        "adapter.quantise_base=nf4",
        "eval.before=false",
        "eval.after=false",
        "train.max_steps=30",
        "train.epochs=5",
    ]
    for case in cases:
        more = [f"parallel.engine={case['engine']}", *fixed, *case.get("set", [])]
        case |= {"recipe": str(recipe), "run": str(folder / case["name"]), "overrides": more}
    wanted, out = folder / "cases.json", folder / "out.json"
    wanted.write_text(json.dumps(cases))
    curves.start_ranks(Path(__file__).with_name("packed_runs.py"), ranks, str(wanted), str(out))
    return json.loads(out.read_text())


def relative(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
def test_shares_of_a_four_bit_base_train_its_curve(tmp_path: Path) -> None:
    """fsdp2, read weight by weight and whole, and hsdp = ddp over 20 steps; each goes on from another's checkpoint."""
    cases = [
        {"name": "ddp", "engine": "ddp", "to": 20},
        {"name": "fsdp2", "engine": "fsdp2", "to": 20},
        {"name": "hsdp", "engine": "hsdp", "to": 20, "set": ["parallel.shard_size=1"]},
        {"name": "fsdp2", "engine": "ddp", "from": 20, "to": 24},
        {"name": "ddp", "engine": "fsdp2", "from": 20, "to": 24},
        {"name": "hsdp", "engine": "hsdp", "from": 20, "to": 24, "set": ["parallel.shard_size=2"]},
    ]
    ddp, fsdp2, hsdp, *resumed = runs(tmp_path, 2, cases)
    for other in (fsdp2, hsdp, *resumed):
        assert other["unpacked"] == ddp["unpacked"] and other["digest"] == ddp["digest"] != ""
    assert relative(fsdp2["losses"], ddp["losses"]) <= 1e-5 and relative(hsdp["losses"], ddp["losses"]) <= 1e-5
    assert min(ddp["losses"]) < 0.9 * ddp["losses"][0]
    for held, shards in ((ddp["held"], 1), (fsdp2["held"], 2), (hsdp["held"], 1)):
        assert all(rank == pytest.approx(0.516 * ddp["values"] / shards, rel=0.01) for rank in held), held
    assert [leg["resumed"] for leg in resumed] == [20, 20, 20]
    assert all(relative(leg["losses"], resumed[0]["losses"]) <= 1e-5 for leg in resumed)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_flipped_byte_ends_the_run_by_name(tmp_path: Path, engine: str) -> None:
    cases = [
        {"name": "good", "engine": engine, "to": 1},
        {"name": "bad", "engine": engine, "to": 1, "flip": 1},
    ]
    good, bad = runs(tmp_path, 2, cases)
    assert not good["error"] and (tmp_path / "good" / "checkpoints" / "step-1" / "COMPLETE").is_file()
    assert bad["flipped"] in bad["error"] and "rank 1" in bad["error"], bad["error"]
    assert not (tmp_path / "bad" / "checkpoints" / "step-1").exists()


@pytest.mark.slow
def test_the_export_is_that_of_one_copy_per_rank(tmp_path: Path) -> None:
    import safetensors.torch
    import torch

    few = ["train.max_steps=6", "export.merge=true"]
    cases = [{"name": e, "engine": e, "export": True, "set": few} for e in ("ddp", "fsdp2")]
    assert [case["code"] for case in runs(tmp_path, 2, cases)] == [0, 0]
    for file in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        one, other = (safetensors.torch.load_file(tmp_path / e / "export" / file) for e in ("ddp", "fsdp2"))
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)
