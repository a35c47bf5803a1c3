"""Training curves of tiny models, many cases in one process group. Run by tests (``run_cases``), one process per rank.

    python curves.py CASES.json OUT.json        with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set

The batches are a pure function of the step: eight documents of unequal length with unequal numbers of supervised
tokens, dealt to ranks and micro-batches in turn. The arithmetic of a step is the loop's: every micro-batch adds the
gradient of ``sum of losses / supervised tokens of all ranks``.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

DOCUMENTS = 8
VOCABULARY = 300


def start_ranks(script: Path, ranks: int, *args: str, timeout: float = 540, env: dict[str, str] | None = None) -> None:
    """Run ``script`` once per rank on a free port; raises with the errors of the ranks that failed."""
    import helpers

    port = helpers.reserved_port()
    number = str(port.getsockname()[1])
    base = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": number, **(env or {})}
    # Files, not pipes: a rank whose pipe is full stops in the middle of a collective.
    logs = [tempfile.TemporaryFile("w+") for _ in range(ranks)]  # noqa: SIM115 - closed below
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), *args],
            env={
                **base,
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(ranks),
            },
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]
    failures, end = [], time.monotonic() + timeout
    try:
        for rank, child in enumerate(children):
            code = child.wait(timeout=max(0.1, end - time.monotonic()))
            if code:
                logs[rank].seek(0)
                failures.append(f"rank {rank} ended with {code}\n{logs[rank].read()[-4000:]}")
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for log in logs:
            log.close()
        port.close()
    assert not failures, "\n".join(failures)


def run_cases(ranks: int, cases: list[dict[str, Any]], folder: Path, timeout: float = 540) -> list[dict[str, Any]]:
    """The curves of all cases: per case ``{"losses": [...], "norms": [...]}`` (floats of rank 0)."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted, found = folder / f"cases-{ranks}.json", folder / f"curves-{ranks}.json"
    wanted.write_text(json.dumps(cases))
    start_ranks(Path(__file__), ranks, str(wanted), str(found), timeout=timeout)
    return json.loads(found.read_text())


# ---- one case


def make_recipe(case: dict[str, Any]):
    from aifactory_train.config.schema import Recipe

    return Recipe.model_validate(
        {
            "model": {"base": "unused"},
            "data": {"train": ["unused.jsonl"]},
            "adapter": {"kind": case.get("adapter", "none"), "rank": 4, "alpha": 8, **case.get("adapter_more", {})},
            "experts": case.get("experts", {}),
            "train": {
                "optimizer": case.get("optimizer", "adamw"),
                "learning_rate": case.get("rate", 1e-2),
                "max_grad_norm": case.get("max_norm"),
                "weight_decay": 0.1,
                **case.get("train", {}),
            },
            "parallel": {
                "engine": case["engine"],
                "shard_size": case.get("shard_size"),
                "dims": case.get("dims", {}),
                "activation_checkpointing": case.get("checkpointing", "none"),
                "compile": case.get("compile", False),
                "offload_optimizer": case.get("offload", False),
            },
            "precision": case.get("precision", {}),
        }
    )


def make_core(case: dict[str, Any], recipe, precision):
    import helpers
    import torch

    from aifactory_train.model import attention, experts, routing
    from aifactory_train.model.adapters import apply_adapter
    from aifactory_train.model.causal_lm import CausalLM
    from aifactory_train.model.precision import apply_precision
    from aifactory_train.model.report import ModelReport

    attention.register()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape["layers"] = case.get("layers", 2)
    if case.get("moe"):
        import moe

        # experts are looked at here: recurrent layers, which Qwen3.5 has beside them, have tests of their own
        kinds = {"layer_types": ["full_attention"] * 2} if case["moe"] == "qwen3_5_moe" else {}
        model = moe.model(case["moe"], vocabulary=VOCABULARY, **kinds)
        experts.use(model)
    else:
        model = helpers.tiny_model("llama", vocabulary=VOCABULARY, tied=case.get("tied", True), **shape)
    model.set_attn_implementation(attention.PER_DOCUMENT)
    model.config.use_cache = False
    if recipe.adapter.quantise_base != "none":
        import four_bits

        four_bits.pack(model, precision.frozen)
    torch.manual_seed(5)
    model = apply_adapter(model, recipe, ModelReport())
    if recipe.adapter.kind != "none":
        with (
            torch.no_grad()
        ):  # lora_B starts at zero; a little noise gives every parameter a gradient from the first step
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.05)
    apply_precision(model, precision)
    core = CausalLM(model, loss_rows=16)
    core.routing = routing.watch(model, core.language_model, recipe, ModelReport(), "cpu")
    if not case.get("gpu_shaped"):
        return core
    import gpu_shaped

    return gpu_shaped.use(core)


def step_documents(step: int) -> list[tuple[list[int], int]]:
    """``(tokens, how many of the last positions are supervised)`` of each document of a step; four steps, repeated."""
    import random

    dice = random.Random(step % 4)
    documents = []
    for _ in range(DOCUMENTS):
        length = dice.randint(4, 24)
        start, stride = dice.randrange(VOCABULARY), dice.choice([1, 3, 7])
        documents.append(([(start + stride * i) % VOCABULARY for i in range(length)], dice.randint(1, length - 1)))
    return documents


def make_batch(documents: list[tuple[list[int], int]], device: str):
    """The documents packed into one row; a batch without documents is one token without a loss."""
    import torch

    from aifactory_train.model.attention import Documents
    from aifactory_train.parallel.engine import DeviceBatch

    tokens, places, positions, targets, edges = [], [], [], [], [0]
    for ids, supervised in documents:
        begin = len(tokens)
        for i in range(len(ids) - 1 - supervised, len(ids) - 1):
            positions.append(begin + i)
            targets.append(ids[i + 1])
        tokens += ids
        places += range(len(ids))
        edges.append(len(tokens))
    if not documents:
        tokens, places, edges = [0], [0], [0, 1]

    def row(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return DeviceBatch(
        row(tokens)[None],
        row(places)[None],
        Documents.of(torch.tensor(edges, dtype=torch.int32), device),
        row(positions),
        row(targets),
        real=None if documents else torch.zeros(1, 1, dtype=torch.bool, device=device),
    )


def train_step(engine, case: dict[str, Any], world, step: int) -> tuple[float, float]:
    """One optimizer step; ``case["bug"]`` plants one of the classic mistakes."""
    import torch
    import torch.distributed as dist

    from aifactory_train.parallel.torch_engine import split_scale
    from aifactory_train.training import routed

    documents = step_documents(step)
    supervised = sum(count for _, count in documents)
    accumulation, bug = case.get("accumulation", 1), case.get("bug")
    mine = documents[world.rank :: world.size]
    micros = [mine[i::accumulation] for i in range(accumulation)]
    power, rest = split_scale(1.0 / supervised)
    loss = torch.zeros((), dtype=torch.float64)
    batches = [make_batch(micro, world.device) for micro in micros]
    routed.begin(engine, batches, sum(len(ids) for ids, _ in documents), supervised)
    for number, micro in enumerate(micros):
        last = number == accumulation - 1
        scale = power
        if bug == "times world":
            scale *= world.size
        if bug == "mean of means":
            scale = 1.0 / (max(1, sum(c for _, c in micro)) * accumulation * world.size * rest)
        if bug == "last only" and not last:
            continue
        loss += engine.forward_backward(batches[number], scale, last).cpu()
    norm = engine.clip(case.get("max_norm"), rest)
    engine.step(case.get("rate", 1e-2))
    dist.all_reduce(loss)
    return loss.item() / supervised, float(norm)


def build(case: dict[str, Any], world):
    """Recipe, engine of a case."""
    from aifactory_train.model.precision import choose_precision
    from aifactory_train.parallel.build import build_engine

    recipe = make_recipe(case)
    precision, _ = choose_precision(recipe, "cpu")
    return build_engine(case["engine"], make_core(case, recipe, precision), recipe, precision, world)


def judge(engine, world) -> list[float]:
    """The loss on one step's documents at the weights, at their mean, and at the weights again."""
    import torch

    batch = make_batch(step_documents(0), world.device)

    def loss() -> float:
        with torch.no_grad():
            return float(engine.module(**batch.kwargs()))

    found = [loss()]
    with engine.averaged():
        found.append(loss())
    return [*found, loss()]


def four_bits_changed(engine, rank: int | None, world) -> str:
    """What the watch over a frozen base says when ``rank`` (None: no rank) holds another byte of one weight; otherwise
    its digest."""
    from aifactory_train.core.errors import RunFailed
    from aifactory_train.parallel.frozen import KEY, FrozenBase
    from aifactory_train.parallel.shards import local_of

    watched = FrozenBase(engine, engine.recipe, world)
    weight = next(p for name, p in watched.tensors if name.endswith("up_proj.base_layer.weight"))
    if rank == world.rank:
        local = local_of(weight.data)
        local[len(local) // 2] ^= 8
    try:
        return watched.check(7)[KEY]
    except RunFailed as error:
        return str(error)


def run_case(case: dict[str, Any], world) -> dict[str, Any]:
    import gpu_shaped
    import torch
    from torch._dynamo.utils import counters

    engine = build(case, world)
    torch._dynamo.reset()  # or a block that an earlier case compiled would be used again, and not counted
    counters.clear()
    points, collectives = [], []
    for step in range(case.get("steps", 20)):
        with gpu_shaped.Collectives() if case.get("count") else contextlib.nullcontext() as seen:
            points.append(train_step(engine, case, world, step))
        collectives.append(dict(seen.found) if seen is not None else {})
    judged = judge(engine, world) if case.get("judge") else []
    changed = four_bits_changed(engine, case["flip"], world) if "flip" in case else ""
    del engine
    gc.collect()  # DeepSpeed's engines are cycles: let every rank drop this one here, not in the middle of the next
    return {
        "losses": [p[0] for p in points],
        "norms": [p[1] for p in points],
        "judged": judged,
        "changed": changed,
        "collectives": collectives,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": dict(counters["graph_break"]),
    }


if __name__ == "__main__":
    import ranks

    ranks.main(run_case, 120)
