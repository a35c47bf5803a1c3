"""The step audit counts right: FLOPs by hand and by torch's counter, memory by torch's tracker, every kernel in the
table; the floor is below it; a plan's audit is kept and read without torch."""

from __future__ import annotations

import ast
import dataclasses
import json

import helpers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from aifactory_train.audit import floor, kept, pretend, step, traffic
from aifactory_train.audit.recorder import HostAnswers, StepRecorder
from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.kernels import registry
from aifactory_train.model import shapes

LENGTHS = (7, 9)
TOKENS, TARGETS, RANK = 16, 14, 4
SMALL = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


def recipe(adapter: str = "lora", **more) -> Recipe:
    return Recipe.model_validate(
        {
            "id": "test/audit",
            "model": {"base": "org/name"},
            "adapter": {"kind": adapter, "rank": RANK, "alpha": 8},
            "data": {"train": "a.jsonl", "eval": "b.jsonl", "sequence_length": 32},
            "train": {"max_steps": 1, "batch_rows": 2},
            **more,
        }
    )


def spec(**changes) -> step.StepSpec:
    import transformers

    config = transformers.LlamaConfig(**SMALL)
    return dataclasses.replace(step.StepSpec(config, recipe(), "sm_90", "H100-80", LENGTHS), **changes)


@pytest.fixture(scope="module")
def lora() -> step.StepAccount:
    pytest.importorskip("triton")
    return step.run(spec())


def attention_flops() -> int:
    """Two products over half of each square forward, five backward, of both layers."""
    pairs = sum(n * n for n in LENGTHS) // 2
    return 2 * (2 + 5) * 2 * pairs * 4 * 16


def test_flops_are_those_of_hand_arithmetic(lora) -> None:
    shape = shapes.from_config({**SMALL, "model_type": "llama"}, "small")
    total = attention_flops() + 2 * 2 * TARGETS * 160 * 64  # logits, and the gradient of the hidden states
    for layer in range(2):
        for name, (inside, outside) in shape.linears().items():
            dx = layer > 0 or name not in "qkv"
            total += 2 * TOKENS * inside * outside * (1 + dx)
            total += 2 * TOKENS * RANK * (inside * (2 + dx) + outside * 3)
    assert lora.total().flops == total


def test_without_our_kernels_flops_are_those_of_torchs_counter() -> None:
    own = spec(recipe=recipe(kernels={"enabled": "off"}))
    counted = step.run(own).total().flops - attention_flops()
    with pretend.chip("sm_90", "H100-80"):
        with torch.device("meta"):
            engine = step._engine(own, step._core(own))
        with FlopCounterMode(display=False) as counter:
            engine.forward_backward(step._batch(own), 1.0, last=True)
    theirs = counter.get_flop_counts()["Global"]  # attention apart: on meta it knows no lengths, and takes the longest
    assert counted == sum(flops for operator, flops in theirs.items() if "varlen" not in str(operator))


def test_the_host_never_waits_and_the_floor_is_below(lora) -> None:
    shape = shapes.from_config({**SMALL, "model_type": "llama"}, "small")
    lowest = floor.step_bytes(shape, TOKENS, TARGETS, rank=RANK)
    told = lora.as_dict()
    assert told["syncs"] == 0
    assert lowest < told["bytes"] < 4 * lowest  # so small a model has adapters as large as its layers
    assert told["weights_gib"] <= told["peak_gib"]
    assert sum(row["launches"] for row in told["operators"].values()) == told["launches"]
    assert {"forward", "backward", "update"} == set(told["phases"])


def test_the_floor_by_hand() -> None:
    """One layer of everything, trained whole: each product's three matrices three times, the rest once."""
    shape = dataclasses.replace(shapes.from_config({**SMALL, "model_type": "llama"}, "small"), layers=1)
    t, h, f, kv, v = TOKENS, 64, 96, 32, 160
    products = [(t, h, h), (t, h, kv), (t, h, kv), (t, h, h), (t, h, f), (t, h, f), (t, f, h), (TARGETS, h, v)]
    total = sum(3 * (r * a + a * b + r * b) for r, a, b in products)
    total += 3 * 5 * t * h  # three norms: x, y; dy, x, dx
    total += 4 * t * (h + kv)  # rotation
    total += t * ((2 * h + 2 * kv) + (3 * h + 2 * kv) + (h + 2 * kv))  # attention
    total += 8 * t * f  # activation
    total += 4 * t * h  # rows of the embedding and of its gradient
    assert floor.step_bytes(shape, TOKENS, TARGETS) == 2 * total


def test_the_peak_is_that_of_torchs_own_tracker() -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    def step_of(model: torch.nn.Module, tracker) -> None:
        with tracker:
            model(torch.arange(4, 20)[None], use_cache=False).logits.square().mean().backward()

    theirs, ours = (helpers.tiny_model("llama", layers=2) for _ in range(2))
    tracker = MemTracker()
    tracker.track_external(theirs)
    step_of(theirs, tracker)
    peak = next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]
    recorder = StepRecorder(HostAnswers(1))
    for tensor in [*ours.parameters(), *ours.buffers()]:
        recorder.holdings.see(tensor, "weights")
    step_of(ours, recorder)
    assert sum(recorder.holdings.peak.values()) == peak


def test_every_kernel_has_an_entry_whose_arguments_it_has() -> None:
    found = {kernel.function: kernel.source for op in registry.OPERATORS for kernel in registry.operator(op).kernels}
    assert len(found) > 10
    for function, source in found.items():
        name = function.partition(":")[2]
        words = traffic.entry(name)
        trees = [ast.parse(source.read_text())]
        trees += [ast.parse(p.read_text()) for p in (helpers.ROOT / "kernels").glob("*/triton_kernels.py")]
        trees.append(ast.parse((helpers.ROOT / "kernels/reduce.py").read_text()))
        defined = {n.name: n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        arguments = {a.arg for a in defined[name].args.args}
        conditions = {word.partition("?")[2] for word in words.values()} - {""}
        assert set(words) | conditions <= arguments, name


def test_a_kernel_without_an_entry_is_refused_by_name() -> None:
    with pytest.raises(KeyError, match="'new_kernel' has no entry"):
        traffic.moved("new_kernel", {})


def job(name: str = "org/name", **changes):
    from aifactory_train.planning.job import GpuRates, Layout, Links, TrainingJob

    values = {
        "shape": shapes.from_config({**SMALL, "model_type": "llama"}, name),
        "gpu": GpuRates("H100-80", arch="sm_90"),
        "links": Links(4, None, None),
        "layout": Layout("ddp", 1, 1),
        "sequence": 16,
        "micro_batch": 2,
        "method": "lora",
        "lora_rank": RANK,
    }
    return TrainingJob(**{**values, **changes})


def test_an_audit_is_kept_and_read_without_torch(tmp_path, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("AIFACTORY_CACHE", str(tmp_path))
    made = kept.of_plan(job(), recipe())
    assert made["from_cache"] is None and made["bytes"] > made["floor_bytes"]
    monkeypatch.setattr(kept.importlib.util, "find_spec", lambda name: None)
    again = kept.of_plan(job(), recipe())
    assert again["from_cache"] and {**again, "from_cache": None} == json.loads(json.dumps(made))
    with pytest.raises(UserError, match="needs torch") as error:
        kept.of_plan(job(checkpointing="full"), recipe())
    assert "AIFACTORY_CACHE" in str(error.value.fix)


def test_ranks_that_shard_gather_and_reduce(tmp_path) -> None:
    """FSDP2 on four ranks: each block is gathered twice and reduced once, the root gathered once."""
    pytest.importorskip("triton")
    whole = recipe("none", parallel={"engine": "fsdp2"})
    told = step.run(spec(recipe=whole, engine="fsdp2", world=4)).as_dict()
    count = {name: row["count"] for name, row in told["collectives"].items()}
    assert count["c10d::_allgather_base_"] == 2 * 2 + 1 and count["c10d::_reduce_scatter_base_"] == 3
    one = step.run(spec(recipe=recipe("none"))).as_dict()
    assert told["peak_by_component_gib"]["optimizer"] <= one["peak_by_component_gib"]["optimizer"]


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_what_cannot_be_audited_is_refused(engine: str) -> None:
    with pytest.raises(UserError, match="runs torch's engines"):
        step.run(spec(engine=engine))


# ---- experts and recurrent layers


def mixture(family: str, adapter: str = "lora", micro_batches: int = 1, **more) -> step.StepSpec:
    import moe

    return spec(config=moe.config(family, layers=2), recipe=recipe(adapter, **more), micro_batches=micro_batches)


@pytest.fixture(scope="module")
def routed() -> step.StepAccount:
    pytest.importorskip("triton")
    return step.run(mixture("qwen3_moe"))


def test_experts_are_counted_without_waiting(routed) -> None:
    """Two products a layer, forward and backward, each also thin; sums for both matrices of an adapter."""
    told = routed.as_dict()
    assert told["syncs"] == 0
    assert told["operators"]["grouped_mm"]["launches"] == 2 * 2 * 4
    assert told["operators"]["grouped_outer"]["launches"] == 2 * 2 * 2
    lowest = floor.step_bytes(shapes.from_config(mixture("qwen3_moe").config.to_dict(), "m"), TOKENS, TARGETS, rank=4)
    assert lowest < told["bytes"] < 10 * lowest  # so small a model moves the most in norms and copies


def test_flops_of_experts_are_those_of_hand_arithmetic(routed) -> None:
    rows, h, f, r = 2 * TOKENS, 32, 48, RANK
    products = [(h, 2 * f), (f, h)]
    weights = sum(2 * 2 * rows * a * b for a, b in products)  # forward, and the rows' gradient
    thin = sum(2 * rows * r * 3 * (a + b) for a, b in products)
    counted = routed.as_dict()["operators"]
    assert counted["grouped_mm"]["flops"] + counted["grouped_outer"]["flops"] == 2 * (weights + thin)


def test_without_our_kernels_the_host_is_told_an_even_load(routed) -> None:
    pytest.importorskip("triton")
    own = step.run(mixture("qwen3_moe", kernels={"enabled": "off"}))
    assert own.syncs["tolist"] == 2 * 2 * 2  # both products of a layer, forward and backward
    assert own.total().flops == routed.total().flops


def test_a_balance_loss_goes_forward_once_more() -> None:
    """With several micro-batches: all of them before the first backward pass."""
    pytest.importorskip("triton")
    plain, balanced = (
        step.run(mixture("mixtral", "none", 2, experts=given)).as_dict() for given in ({}, {"balance_loss": 0.01})
    )
    before, after = (told["operators"]["grouped_mm"]["launches"] for told in (plain, balanced))
    assert before == 2 * 2 * 2 * 2 and after == before + 2 * 2 * 2


def test_recurrent_layers_are_counted_and_what_the_host_computes_is_not() -> None:
    """The boundaries of documents are made on the host: no wait, no launch."""
    pytest.importorskip("triton")
    told = step.run(mixture("qwen3_5_moe")).as_dict()
    assert told["syncs"] == 0 and told["operators"]["aten::convolution"]["flops"] > 0
    shape = shapes.from_config({**mixture("qwen3_5_moe").config.to_dict()}, "m")
    assert any(kind.recurrence is not None for kind in shape.kinds)
    assert floor.step_bytes(shape, TOKENS, TARGETS, rank=RANK) < told["bytes"]


@pytest.mark.slow
def test_the_benchmark_counts_experts_on_both_sides() -> None:
    """One layer of Qwen3-30B-A3B, whole width: ours moves less than peft on transformers' own path."""
    pytest.importorskip("triton")
    pytest.importorskip("liger_kernel")
    import subprocess
    import sys

    words = ["--json", "--case", "qwen3-30b-a3b-lora", "--layers", "1", "--checkpointing", "none"]
    program = str(helpers.ROOT / "benchmarks/step_audit.py")
    done = subprocess.run([sys.executable, program, *words], capture_output=True, text=True, cwd=helpers.ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads(done.stdout)["cases"]
    assert row["status"] == "done" and row["ours"]["syncs"] == 0
    assert row["floor_ratio"] > 1 and row["bytes_ratio"] < 1 and row["peak_above_weights_ratio"] < 1
    for peer in ("peer", "peer_as_loaded", "peer_defaults"):
        assert row[peer].get("refused") or row[peer]["bytes"] > row["floor_bytes"], peer
