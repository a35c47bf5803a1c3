"""The step audit of a plan (``aifactory plan RECIPE --audit``), run where torch is and kept in the cache by everything
that it depends on, so that a login node without torch reads it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train import __version__
from aifactory_train.audit.floor import step_bytes
from aifactory_train.config.loading import cache_dir
from aifactory_train.config.update_block import UpdateConfig
from aifactory_train.core.errors import UserError
from aifactory_train.core.files import write_json
from aifactory_train.core.output import console, table

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.planning.job import TrainingJob

#: Raised when what is counted changes: older audits are then made anew.
FORMAT = 2
GIB = 2**30


def settings_of(job: TrainingJob, recipe: Recipe) -> dict[str, Any]:
    """Everything that the audit of a plan depends on, as plain values."""
    tokens = max(1, round(job.tokens))
    count = max(1, round(tokens / (job.document or job.sequence)))
    lengths = [tokens // count + (1 if i < tokens % count else 0) for i in range(count)]
    return {
        "format": FORMAT,
        "version": __version__,
        "model": dataclasses.asdict(job.shape),
        "adapter": recipe.adapter.model_dump(mode="json"),
        "precision": recipe.precision.model_dump(mode="json"),
        "kernels": recipe.kernels.model_dump(mode="json"),
        "optimizer": recipe.train.optimizer,
        "momentum": recipe.train.momentum,
        "update": recipe.train.model_dump(mode="json", include={*UpdateConfig.model_fields}),
        "clips": recipe.train.max_grad_norm is not None,
        "checkpointing": job.checkpointing,
        "engine": job.layout.setting,
        "world": job.layout.world,
        "shard": job.layout.shard,
        "offload": job.layout.offload_optimizer,
        "lengths": lengths,
        "micro_batches": job.grad_accum,
        "loss_rows": job.loss_chunk,
        "chip": [job.gpu.arch, job.gpu.sku],
    }


def place(settings: dict[str, Any]) -> Path:
    """The file of an audit with these settings."""
    text = json.dumps(settings, sort_keys=True)
    return cache_dir() / "audits" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def of_plan(job: TrainingJob, recipe: Recipe) -> dict[str, Any]:
    """The audit as plain values: of the cache, else made and kept. Raises :class:`UserError` where it is in no cache
    and torch is missing, and for what cannot be audited."""
    settings = settings_of(job, recipe)
    file = place(settings)
    if file.is_file():
        return {**json.loads(file.read_text(encoding="utf-8")), "from_cache": str(file)}
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            "the step audit runs the model's operators and needs torch, which is not installed here; the cache holds "
            "no audit of this plan",
            where="--audit",
            fix="run the same command once where torch is installed, with AIFACTORY_CACHE in a folder that both see "
            f"(this one looked for {file})",
        )
    found = _run(job, recipe, settings)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, found)
    return {**found, "from_cache": None}


def _run(job: TrainingJob, recipe: Recipe, settings: dict[str, Any]) -> dict[str, Any]:
    from aifactory_train.audit import step
    from aifactory_train.planning.verify_sharding import build_config

    _refuse(job, recipe)
    given = recipe.model_copy(deep=True)
    given.parallel.activation_checkpointing = job.checkpointing  # type: ignore[assignment]
    given.parallel.compile = False
    if job.layout.traits.shard_group == "chosen":
        given.parallel.shard_size = job.layout.shard
    spec = step.StepSpec(
        build_config(job.shape), given, str(job.gpu.arch), job.gpu.sku, tuple(settings["lengths"]), settings["engine"],
        job.grad_accum, job.loss_chunk, job.layout.world,
    )  # fmt: skip
    rank = None if recipe.adapter.kind == "none" else recipe.adapter.rank
    lowest = None
    if all(kind.mlp == "gated" for kind in job.shape.kinds):
        one = step_bytes(job.shape, spec.tokens, spec.targets, rank=rank, adapted=recipe.adapter.targets)
        lowest = one * job.grad_accum
    return {"settings": settings, **step.run(spec).as_dict(), "floor_bytes": lowest}


def _refuse(job: TrainingJob, recipe: Recipe) -> None:
    if job.method == "qlora":
        raise UserError(
            "a 4-bit base needs bitsandbytes and a GPU to be built",
            where="--audit",
            fix="audit the plan of adapter.quantise_base=none",
        )
    if job.layout.offload_optimizer:
        raise UserError(
            "the step audit counts what the GPU does, not what the host does of an offloaded optimizer",
            where="--audit",
            fix="--set parallel.offload_optimizer=false",
        )
    methods = recipe.methods
    if methods.preference is not None or methods.head is not None or methods.grpo is not None:
        raise UserError(
            "the step audit runs supervised steps; the loss of preferences, of a head or of GRPO is not in it",
            where="--audit",
            fix="plan without --audit",
        )


def show(audit: dict[str, Any]) -> None:
    """Print it for people."""
    out = console()
    out.print()
    source = f" (from {audit['from_cache']})" if audit.get("from_cache") else ""
    lines = [
        ["FLOPs", f"{audit['flops'] / 1e12:.1f} TFLOP"],
        ["bytes moved", f"{audit['bytes'] / 1e9:.1f} GB ({audit['bytes_read'] / 1e9:.1f} read)"],
        ["kernel launches", f"{audit['launches']}"],
        ["host waits for the device", f"{audit['syncs']}"],
        ["peak", f"{audit['peak_gib']:.2f} GiB, of them weights {audit['weights_gib']:.2f}"],
        ["", ", ".join(f"{n} {v:.2f}" for n, v in audit["peak_by_component_gib"].items() if v)],
    ]
    if audit["floor_bytes"]:
        ratio = audit["bytes"] / audit["floor_bytes"]
        lines.append(["floor", f"{audit['floor_bytes'] / 1e9:.1f} GB; the step moves {ratio:.2f} times as much"])
    for name, row in audit["collectives"].items():
        lines.append([f"collective {name}", f"{row['count']} a step, {row['bytes'] / 1e9:.3f} GB"])
    table(f"One step of one rank, counted on the meta device{source}", ["what", "counted"], lines)
    rows = [
        [name, row["launches"], f"{row['bytes'] / 1e9:.1f}", f"{row['flops'] / 1e12:.1f}"]
        for name, row in list(audit["operators"].items())[:12]
    ]
    table("By operator", ["operator", "launches", "GB", "TFLOP"], rows, right=(1, 2, 3))
