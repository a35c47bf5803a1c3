"""Jobs and requests that the planning tests share."""

from __future__ import annotations

from typing import Any

from aifactory_train.config import schema as config
from aifactory_train.model import shapes
from aifactory_train.planning import plan
from aifactory_train.planning.job import STACKS, Bytes, GpuRates, Layout, Links, TrainingJob
from aifactory_train.planning.size import Size

H100 = GpuRates("h100-80", "sm_90", "nvidia", 79.6, 3350.0, 989.4, 450.0, 700.0)
LINKS = Links(8, 450.0, 400.0)


def job(
    base: str | shapes.ModelShape = "meta-llama/Meta-Llama-3-8B",
    engine: str = "fsdp2",
    world: int = 8,
    shard: int | None = None,
    **more: Any,
) -> TrainingJob:
    shape = shapes.load(base) if isinstance(base, str) else base
    group = shard or (1 if engine in ("single", "ddp") else world)
    values: dict[str, Any] = {"sequence": 2048, "micro_batch": 1.0, "stack": STACKS["fused"], "loss_chunk": 2048}
    values["bytes"] = Bytes() if engine.startswith("zero") else Bytes(working=2 if engine in ("single", "ddp") else 0)
    return TrainingJob(shape=shape, gpu=H100, links=LINKS, layout=Layout(engine, world, group), **{**values, **more})


def recipe(base: str, kind: str = "lora", rows: int = 1024, length: int = 2048, **more: Any) -> config.Recipe:
    tree: dict[str, Any] = {
        "id": "local/test",
        "model": {"base": base},
        "adapter": {"kind": kind},
        "data": {"train": "rows.jsonl", "sequence_length": length},
        "train": {"batch_rows": rows},
    }
    for key, value in more.items():
        block, _, name = key.partition("__")
        tree.setdefault(block, {})[name] = value
    return config.Recipe.model_validate(tree)


def request(
    system: Any, base: str, nodes: int | None, kind: str = "lora", tokens: float | None = 1e8, **more: Any
) -> plan.PlanRequest:
    limits = {
        k: more.pop(k)
        for k in ("deadline_hours", "budget_gpu_hours", "partition", "qos", "gpus_per_node", "given")
        if k in more
    }
    size = Size(tokens, None, None, None, "test")
    return plan.PlanRequest(recipe(base, kind, **more), shapes.load(base), system, nodes, size=size, **limits)
