"""Exports of sharded engines and of checkpoints: no rank holds more than one shard file's worth, and the result is the
model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import curves
import helpers
import pytest
import torch
from safetensors.torch import load_file

from aifactory_train.core.errors import RunFailed
from aifactory_train.exporting.streaming import Scratch, ShardFiles

SHARD = 400_000  # bytes; the model below has 1.3 MB, its embedding 100 KB


def export_all(folder: Path, cases: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Per (engine, adapter): what tests/checkpoint/exporting.py found, after a training on two ranks."""
    base = helpers.write_model(folder / "base", layers=8)
    recipe = helpers.write_recipe(folder / "data", base)
    listed = []
    for engine, adapter in cases:
        overrides = [
            f"parallel.engine={engine}",
            f"adapter.kind={adapter}",
            "checkpoint.every_steps=null",
            "eval.before=false",
        ]
        run = str(folder / f"run-{engine}-{adapter}")
        listed.append(
            {"recipe": str(recipe), "overrides": overrides, "run": run, "shard": SHARD, "merge": adapter != "none"}
        )
    (folder / "cases.json").write_text(json.dumps(listed))
    curves.start_ranks(
        Path(__file__).with_name("exporting.py"), 2, str(folder / "cases.json"), str(folder / "out.json")
    )
    return json.loads((folder / "out.json").read_text())


def check(folder: Path, cases: list[tuple[str, str]]) -> None:
    for (engine, adapter), found in zip(cases, export_all(folder, cases), strict=True):
        most = {place: max(rank.get(place, 0) for rank in found["held"]) for place in ("live", "stored")}
        print(f"{engine} {adapter}: whole model {found['whole']:,} bytes, held at most {most}, shard {SHARD:,}")
        assert found["whole"] > 3 * SHARD, "the model must be much larger than a shard file for this to mean anything"
        for place, held in most.items():
            assert 0 < held <= SHARD, (engine, adapter, place, found["held"])
        if (
            engine in ("fsdp2", "zero3") and adapter != "dora"
        ):  # its rank's half, adapters, and a tensor or two on the way
            loaded = max(rank["loading"] for rank in found["held"])
            print(f"{engine} {adapter}: held at most {loaded:,} bytes while reading")
            assert 0.4 * found["whole"] < loaded < 0.75 * found["whole"], (engine, found["held"])
        kind = "model" if adapter == "none" else "merged"
        assert all(verdict["passed"] for verdict in found["gate"].values()) and kind in found["gate"]
        live, stored = Path(found["live"]), Path(found["live"]).with_name("stored")
        index = json.loads((live / kind / "model.safetensors.index.json").read_text())
        files = sorted({*index["weight_map"].values()})
        assert len(files) >= 4 and index["metadata"]["total_size"] == found["whole"] - extra_bytes(live, adapter)
        for file in files:
            assert (live / kind / file).stat().st_size <= SHARD + 10_000  # the header comes on top
        for path in [p for p in live.rglob("*.safetensors*") if p.is_file()]:
            assert path.read_bytes() == (stored / path.relative_to(live)).read_bytes(), path


def extra_bytes(live: Path, adapter: str) -> int:
    """Bytes of the adapter, which a merged model no longer has."""
    if adapter == "none":
        return 0
    return sum(t.numel() * 4 for t in load_file(live / "adapter" / "adapter_model.safetensors").values())


def test_no_rank_holds_more_than_a_shard_file(tmp_path: Path) -> None:
    check(tmp_path, [("fsdp2", "lora"), ("zero3", "none")])


@pytest.mark.slow
def test_no_rank_holds_more_than_a_shard_file_under_any_engine(tmp_path: Path) -> None:
    check(tmp_path, [("fsdp2", "none"), ("zero3", "lora"), ("zero2", "none"), ("fsdp2", "dora")])


# ---- the parts


def test_shard_files_are_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(3 + i, 5) for i in range(7)}
    tensors["empty"], tensors["scalar"] = torch.empty(0, 4), torch.tensor(2.5)
    plan = {name: (tuple(t.shape), torch.bfloat16 if name == "t3" else t.dtype) for name, t in tensors.items()}
    files = ShardFiles(tmp_path, plan, max_bytes=300)
    for name in reversed(tensors):
        files.put(name, tensors[name])
    files.finish()
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(places) == set(tensors) and len(set(places.values())) > 2
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / places[name])[name], tensor.to(plan[name][1])), name


def test_a_missing_or_misshapen_tensor_is_told(tmp_path: Path) -> None:
    files = ShardFiles(tmp_path, {"a": ((2, 2), torch.float32), "b": ((2,), torch.float32)}, max_bytes=10**6)
    files.put("a", torch.ones(2, 2))
    with pytest.raises(RunFailed, match="b among them"):
        files.finish()
    with pytest.raises(RunFailed, match="shape"):
        files.put("b", torch.ones(3))


def test_scratch_gives_back_what_was_put(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "scratch")
    tensors = {"a": torch.randn(4, 3).t(), "b": torch.randn(5).bfloat16(), "c": torch.empty(0), "d": torch.tensor(1.0)}
    for name, tensor in tensors.items():
        scratch.put(name, tensor)
    for name in reversed(tensors):
        assert torch.equal(scratch[name], tensors[name]) and scratch[name].dtype == tensors[name].dtype
    scratch.close()
    assert not list(tmp_path.iterdir())
