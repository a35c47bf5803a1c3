"""Tokens/s, utilisation and peak memory of a model of about a billion parameters, against what the plan says."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from aifactory_train.acceptance import small
from aifactory_train.acceptance.report import NotHere, Report

TOKENS, LENGTH = 8192, 2048
SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
         "num_hidden_layers": 16, "vocab_size": 128_256, "max_position_embeddings": 4096}  # fmt: skip
WARM, TIMED = 2, 5
#: How far the peak may be off the plan's; the trial before the first step must see at least this share of it.
PEAK_OFF, PROBE_SEES = 0.10, 0.97
#: Bytes a parameter of a full fine-tuning with fp32 masters, two moments and copies in bf16, and of its activations.
BYTES_A_PARAMETER = 28


def check(report: Report) -> None:
    """All weights, then LoRA."""
    import torch

    from aifactory_train.core import compat
    from aifactory_train.parallel.world import join_world

    torch.cuda.set_device(report.device)
    if not compat.supports_bf16(report.device):
        raise NotHere("this GPU has no bf16, and the planner covers bf16 only")
    world = join_world(60)
    shape = fitting(torch.cuda.get_device_properties(report.device).total_memory)
    report.figures["layers"] = shape["num_hidden_layers"]
    for adapter in ("none", "lora"):
        with report.part("full" if adapter == "none" else adapter):
            one(report, world, shape, adapter)


def fitting(memory: int) -> dict[str, Any]:
    """The shape, with fewer layers where the memory would not hold it."""
    shape = dict(SHAPE)
    while parameters(shape) * BYTES_A_PARAMETER > 0.8 * memory and shape["num_hidden_layers"] > 2:
        shape["num_hidden_layers"] -= 2
    return shape


def parameters(shape: dict[str, Any]) -> int:
    hidden, ffn = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    block = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * ffn
    return shape["num_hidden_layers"] * block + shape["vocab_size"] * hidden


def one(report: Report, world: Any, shape: dict[str, Any], adapter: str) -> None:
    """Warm steps, timed steps, and the peak of both and of the trial before them."""
    import gc

    import torch

    from aifactory_train.model import flops
    from aifactory_train.training.probe import try_step

    settings = small.recipe(adapter=adapter, tokens=TOKENS, length=LENGTH)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(world.device)
    running = small.engine_of(settings, world, shape)
    batch = small.full_batch(TOKENS, LENGTH, world.device, shape["vocab_size"])
    try_step(running, batch, accumulates=False)
    probe = torch.cuda.max_memory_allocated(world.device)
    torch.cuda.reset_peak_memory_stats(world.device)
    for _ in range(WARM):
        step(running, batch)
    torch.cuda.synchronize(world.device)
    began = time.perf_counter()
    for _ in range(TIMED):
        step(running, batch)
    torch.cuda.synchronize(world.device)
    seconds = (time.perf_counter() - began) / TIMED
    peak = torch.cuda.max_memory_allocated(world.device)
    dimensions = model_shape(report.work, shape)
    trained = flops.Trained(rank=0 if adapter == "none" else settings.adapter.rank)
    work = flops.documents(dimensions, [LENGTH] * (TOKENS // LENGTH), len(batch.targets), trained)
    figures: dict[str, Any] = {"tokens_per_s": TOKENS / seconds, "step_ms": seconds * 1e3, "peak_gib": peak / 2**30,
                               "probe_gib": probe / 2**30, "tflops": work.model / seconds / 1e12}  # fmt: skip
    name = "full" if adapter == "none" else adapter
    report.figures[name] = figures
    saw = f"{name}: the trial before the first step saw {probe / 2**30:.2f} GiB, the steps took {peak / 2**30:.2f}"
    report.expect(probe >= PROBE_SEES * peak, saw)
    against(report, name, planned(report, adapter), work.model / seconds)
    del running
    gc.collect()


def against(report: Report, name: str, plan: dict[str, Any] | str, rate: float) -> None:
    """Utilisation from ``rate`` (FLOP/s), and what the GPU held against what the plan said. The plan counts the
    driver's context and fragmentation, which torch's own count leaves out, so the driver is asked."""
    import torch

    if isinstance(plan, str):
        report.figures[name]["plan"] = plan
        return
    free, whole = torch.cuda.mem_get_info(report.device)
    held, total = (whole - free) / 2**30, float(plan["memory_gib"]["total"])
    report.figures[name] |= {
        "mfu": rate / plan["peak"],
        "held_gib": held,
        "planned_gib": total,
        "planned_tokens_per_s": plan["tokens_per_s_per_gpu"],
    }
    off = abs(total - held) / total
    report.expect(off <= PEAK_OFF, f"{name}: the plan says {total:.1f} GiB, the GPU held {held:.1f} ({off:.0%} off)")


def step(running: Any, batch: Any) -> None:
    running.forward_backward(batch, 1.0 / len(batch.targets), last=True)
    running.clip(1.0)
    running.step(1e-5)


def model_shape(work: Path, shape: dict[str, Any]) -> Any:
    """The planner's view of the model, from its configuration as a file."""
    from aifactory_train.model import shapes

    return shapes.load("acceptance", config_file=str(config_file(work, shape)))


def config_file(work: Path, shape: dict[str, Any]) -> Path:
    work.mkdir(parents=True, exist_ok=True)
    path = work / "config.json"
    path.write_text(json.dumps(small.config(**shape).to_dict()), encoding="utf-8")
    return path


def planned(report: Report, adapter: str) -> dict[str, Any] | str:
    """The plan for the same batch at this machine (or the site that it belongs to), with the GPU's peak in FLOP/s; or
    why there is none."""
    from aifactory_train import sites
    from aifactory_train.core.errors import UserError
    from aifactory_train.planning import plan_for

    try:
        system = sites.load(report.site) if report.site else sites.detect()
        settings = small.recipe(adapter=adapter, tokens=TOKENS, length=LENGTH)
        tree = settings.model_dump(by_alias=True, exclude_unset=True)
        tree["train"] |= {"batch_rows": TOKENS // LENGTH, "micro_batch_tokens": TOKENS}
        tree["model"]["base"] = "acceptance"
        given = {"parallel.engine", "parallel.activation_checkpointing", "train.micro_batch_tokens", "parallel.compile"}
        recipe = type(settings).model_validate(tree)
        plan, _ = plan_for(recipe, system, 1, gpus_per_node=1, tokens=1e6,
                           model_config=str(report.work / "config.json"), given=given)  # fmt: skip
    except UserError as error:
        return f"no plan: {error.what}"
    return {**plan, "peak": system.gpu.peak_tflops["bf16"] * 1e12}
