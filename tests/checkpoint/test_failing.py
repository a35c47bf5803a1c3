"""A rank that raises, exits, is killed or hangs: all ranks end in time, and the files name rank, host and cause."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
from test_stopping import scenarios

from aifactory_train.config.schema import Recipe
from aifactory_train.parallel.memory_advice import MemoryUse, advise, is_out_of_memory, out_of_memory

TIMEOUT_S = 15  # parallel.timeout_s of these runs


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return scenarios("fail", tmp_path_factory.mktemp("fail"), 400)


CAUSES = {
    "raises": ("exception", "ValueError: row 17 cannot be computed"),
    "exits": ("exception", "asked to end with 7"),
    "killed": ("lost", "the process vanished"),
    "hangs": ("hang", "no progress for"),
    "frozen-saving": ("hang", "the others gave up waiting"),
    "frozen-in-ddp": ("hang", "the others gave up waiting"),
}


@pytest.mark.parametrize("kind", CAUSES)
def test_the_rank_that_broke_is_named(found: dict[str, Any], kind: str) -> None:
    seen = found[kind]
    assert seen["left"] == [] and all(code != 0 for code in seen["codes"].values()), seen["codes"]
    assert seen["seconds"] <= TIMEOUT_S + 90, seen["seconds"]
    assert seen["state"] == "failed"
    cause = seen["cause"]
    assert (cause["rank"], cause["node"], cause["kind"]) == (1, socket.gethostname(), CAUSES[kind][0]), cause
    assert CAUSES[kind][1] in cause["message"], cause


def test_the_others_say_that_they_lost_a_peer(found: dict[str, Any]) -> None:
    for kind, seen in found.items():
        other = seen["outcomes"]["0"]
        assert other["status"] == "failed", kind
        assert any(word in other["message"].lower() for word in ("connection", "timed out", "peer")), other


def test_a_hang_leaves_its_stacks(found: dict[str, Any]) -> None:
    assert found["hangs"]["flight"] == ["flight-1.txt"]
    assert "scenarios.py" in found["hangs"]["outcomes"]["1"]["message"]


# ---- out of memory


def recipe(**parallel: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"base": "m"},
            "data": {"train": ["r.jsonl"], "sequence_length": 1024},
            "train": {"micro_batch_tokens": 8192},
            "parallel": parallel,
        }
    )


def test_running_out_of_memory_says_what_to_change_by_how_much() -> None:
    gib = 2**30
    use = MemoryUse(capacity=64 * gib, resident=20 * gib, peak=100 * gib)
    lines = advise(recipe(), use, world_size=8, trained_bytes=16 * gib)
    # (0.95 * 64 - 20) / (100 - 20) = 0.51 of the activations fit; a tenth is left as margin
    assert lines[0].startswith("--set train.micro_batch_tokens=3760 ")
    assert any("activation_checkpointing=selective" in line for line in lines)
    assert any("engine=fsdp2" in line and "14.0 GiB" in line for line in lines)
    error = out_of_memory(torch.OutOfMemoryError("CUDA out of memory."), recipe(), use, 8, 16 * gib)
    assert "64.0 GiB in all" in str(error) and "micro_batch_tokens=3760" in str(error) and error.exit_code == 1


def test_advice_never_asks_for_what_is_set_or_impossible() -> None:
    settings = recipe(engine="zero3", activation_checkpointing="full", offload_optimizer=True)
    settings.train.micro_batch_tokens = 1024  # a micro-batch is one document already
    lines = advise(settings, None, world_size=8, trained_bytes=2**34)
    assert lines == ["--set data.sequence_length=512 (now 1024; longer documents are cut)"]


def test_memory_errors_are_told_from_others() -> None:
    with pytest.raises(RuntimeError) as host:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(host.value)
    assert is_out_of_memory(torch.OutOfMemoryError("x")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("Connection closed by peer")) and not is_out_of_memory(ValueError("x"))
