"""Weights in 4 bits as one run of bytes: what is packed comes back, ranks that share it train the curve of those that
do not, and a byte that changes is found, on whatever rank."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from curves import run_cases

from aifactory_train.model.packed import Packing, pieces_of
from aifactory_train.parallel.frozen import weighted_sum


def test_sections_neither_overlap_nor_leave_more_than_their_alignment() -> None:
    for shape in ((1, 2), (64, 48), (33, 7), (512, 768), (8192, 28672)):
        for nested in (256, 0):
            packing = Packing(shape, torch.bfloat16, nested=nested)
            end = 0
            for dtype, count, first in packing.sections.values():
                assert end <= first < end + 16 and first % 16 == 0
                end = first + count * dtype.itemsize
            assert end == packing.nbytes
    assert Packing((8192, 28672), torch.bfloat16).nbytes / (8192 * 28672) == pytest.approx(0.516, rel=0.001)


def test_what_is_packed_comes_back() -> None:
    """Without bitsandbytes: each section holds what was put there, by its own type."""
    packing = Packing((48, 64), torch.float32)
    parts = {
        name: torch.randint(0, 256, (count,), dtype=torch.uint8) if dtype == torch.uint8 else torch.randn(count)
        for name, (dtype, count, _) in packing.sections.items()
    }
    outer = SimpleNamespace(absmax=parts["outer"], blocksize=256)
    state = SimpleNamespace(
        absmax=parts["scales"],
        offset=parts["offset"].reshape(()),
        state2=outer,
        nested=True,
        shape=torch.Size((48, 64)),
        dtype=torch.float32,
        quant_type="nf4",
        blocksize=64,
    )
    assert Packing.of(state) == packing
    whole = packing.pack(parts["codes"][:, None], state)
    for name, (dtype, count, first) in packing.sections.items():
        assert torch.equal(whole[first : first + count * dtype.itemsize].view(dtype), parts[name]), name
    weight: Any = parts["codes"].view(-1, 1)
    weight.quant_state = state  # as bitsandbytes keeps it: the same sum, wherever the tensors lie
    assert sum(weighted_sum(t, at) for t, at in pieces_of(weight)) == weighted_sum(whole)


def test_the_sum_of_shares_is_that_of_the_whole_and_sees_every_flip(monkeypatch: pytest.MonkeyPatch) -> None:
    from aifactory_train.parallel import frozen

    monkeypatch.setattr(frozen, "CHUNK", 100)
    whole = torch.randn(61, 7, dtype=torch.float32).to(torch.bfloat16)
    before = weighted_sum(whole)
    for cut in (0, 1, 30, 61):
        assert weighted_sum(whole[:cut]) + weighted_sum(whole[cut:], cut * 14) == before
    dice = random.Random(0)
    for _ in range(300):
        flipped = whole.clone()
        content = flipped.view(-1).view(torch.uint8)
        for place in dice.sample(range(len(content)), dice.choice([1, 2])):
            content[place] ^= 1 << dice.randrange(8)
        assert weighted_sum(flipped) != before


def test_two_ranks_that_share_the_base_train_its_curve_and_watch_it(tmp_path: Path) -> None:
    method = {"adapter": "lora", "adapter_more": {"quantise_base": "nf4"}, "optimizer": "adamw", "steps": 20}
    kinds = [("ddp", {}), ("fsdp2", {"accumulation": 4}), ("fsdp2", {"checkpointing": "full", "tied": True})]
    cases = [{**method, "engine": engine, "flip": None, **more} for engine, more in kinds]
    cases += [{**method, "engine": engine, "flip": 1, "steps": 1} for engine in ("ddp", "fsdp2")]
    ddp, *shared, ddp_flipped, fsdp_flipped = run_cases(2, cases, tmp_path)
    plain = run_cases(1, [{**method, "engine": "ddp", "adapter_more": {}, "steps": 1}], tmp_path)[0]
    assert plain["losses"][0] != ddp["losses"][0]  # it is another model in 4 bits
    assert len(ddp["changed"]) == 64
    for curve in shared:
        assert curve["losses"] == pytest.approx(ddp["losses"], rel=1e-5)
        assert curve["norms"] == pytest.approx(ddp["norms"], rel=1e-4)
        assert curve["changed"] == ddp["changed"]
    for found in (ddp_flipped, fsdp_flipped):
        assert "up_proj.base_layer.weight (rank 1)" in found["changed"] and "step 7 is not saved" in found["changed"]
