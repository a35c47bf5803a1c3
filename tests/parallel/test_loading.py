"""No rank of a sharded engine ever holds the whole model: counted while the weights are read, under FSDP2 and
ZeRO-3.
"""

from __future__ import annotations

import json
from pathlib import Path

import curves
import helpers
import pytest

LARGEST = 400 * 64 * 4  # bytes of the embedding, the largest tensor of the model below


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_ranks_read_their_shares_and_train_the_same_curve(tmp_path: Path, adapter: str) -> None:
    base = helpers.write_model(tmp_path / "base", layers=8)
    whole = (base / "model.safetensors").stat().st_size
    recipe = helpers.write_recipe(tmp_path / "data", base)
    cases = [
        {
            "recipe": str(recipe),
            "base": str(base),
            "run": str(tmp_path / engine),
            "overrides": [f"parallel.engine={engine}", f"adapter.kind={adapter}", "eval.before=false"],
        }
        for engine in ("ddp", "fsdp2", "zero3")
    ]
    wanted, out = tmp_path / "cases.json", tmp_path / "out.json"
    wanted.write_text(json.dumps(cases))
    curves.start_ranks(Path(__file__).with_name("loading.py"), 2, str(wanted), str(out))
    ddp, *sharded = json.loads(out.read_text())
    for engine, found in zip(("fsdp2", "zero3"), sharded, strict=True):
        most = max(sum(rank.values()) for rank in found["held"])
        print(f"{engine} {adapter}: held at most {most:,} of {whole:,} bytes")
        assert whole / 2 * 0.8 < most < whole / 2 + 2.5 * LARGEST < whole, (engine, found["held"])
        assert found["losses"] == pytest.approx(ddp["losses"], rel=1e-5), engine
    assert not any(ddp["held"])
