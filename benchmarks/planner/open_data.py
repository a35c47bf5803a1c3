"""Published measurements as :class:`TrainingJob` objects: which rows the planner is meant for, and how their columns
are read.

The columns are those of ``data/throughput_open.csv`` (its README explains them). A row outside the planner's scope is
not an error: :func:`read_row` returns the reason instead of a job. Nothing here looks at the measured value to decide
how a row is read.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.model import shapes
from aifactory_train.model.shapes import ModelShape
from aifactory_train.planning import memory
from aifactory_train.planning.job import STACKS, Bytes, GpuRates, Layout, Links, TrainingJob
from aifactory_train.planning.timing import DATA

COLUMNS = [
    "id",
    "gpu",
    "n_gpus",
    "gpus_per_node",
    "model",
    "params_total_B",
    "layers",
    "hidden",
    "heads",
    "kv_heads",
    "ffn",
    "vocab",
    "method",
    "lora_rank",
    "seq_len",
    "micro_batch",
    "grad_accum",
    "precision",
    "optimizer",
    "act_ckpt",
    "compile",
    "parallel",
    "kernels",
    "tokens_per_s_per_gpu",
    "tflops_per_gpu_reported",
    "mfu_reported",
    "peak_mem_GiB",
    "source",
    "date",
    "notes",
    "confidence",
]

#: Optimizers whose name contains "adam" without being Adam: their state or step differs.
_NOT_ADAM = ("adamax", "adamini", "adammini", "ademamix", "nadam", "radam", "adafactor", "adam2sgd")


def adam_state(name: str) -> tuple[bool, float | None]:
    """``(of the Adam family, bytes of both moments per parameter where they are not in the parameter's own type)``."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    if "adam" not in plain or any(other in plain for other in _NOT_ADAM):
        return False, None
    return True, 2.0 if "8bit" in plain else 1.0 if "4bit" in plain else None


@dataclass(frozen=True)
class Row:
    """One published measurement and how it was read. ``why`` is set when the row is outside the planner's scope."""

    id: str
    source: str
    tier: str | None
    job: TrainingJob | None
    why: str | None
    tokens_per_s: float | None
    tokens_derived: str | None  # how tokens/s follow from the printed TFLOP/s, where only those are printed
    memory_gib: float | None
    device_reading: bool = False  # the memory figure is the device's, context included
    reserved_reading: bool = False  # torch's reserved rather than allocated memory
    assumed: tuple[str, ...] = ()


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV with the columns of :data:`COLUMNS` (others are ignored, missing ones are empty).

    Raises :class:`UserError` for a file that cannot be read or lacks an ``id`` column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            if not reader.fieldnames or "id" not in reader.fieldnames:
                raise UserError(
                    "not a table of measurements: there is no column 'id'",
                    where=f"{path}:1",
                    fix=f"columns: {', '.join(COLUMNS)}",
                )
            return [
                {k: (v or "").strip() for k, v in row.items() if isinstance(k, str) and not isinstance(v, list)}
                for row in reader
            ]
    except FileNotFoundError:
        raise UserError("no such file", where=str(path)) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot be read as CSV: {error}", where=str(path)) from None


def number(text: str | None) -> float | None:
    """A finite positive number, or ``None``."""
    try:
        value = float((text or "").replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


class _Outside(Exception):
    """The row is outside the planner's scope; the message says why."""


@functools.cache
def _gpu_table() -> dict[str, Any]:
    return json.loads((DATA / "measured_gpus.json").read_text(encoding="utf-8"))


def find_gpu(name: str) -> tuple[GpuRates, Links] | None:
    """GPU and node of a measurement by the name in its ``gpu`` column, or ``None`` for one we know nothing of."""
    table = _gpu_table()
    entry = table["gpus"].get(table["aliases"].get(name.lower(), name.lower()))
    if entry is None:
        return None
    gpu = GpuRates(**{k: v for k, v in entry.items() if k not in ("node", "source")})
    node = entry["node"]
    return gpu, Links(node["gpus_per_node"], node["in_node_gb_s"], node["node_gb_s"])


def _shape(row: Mapping[str, str], needed: bool = True) -> ModelShape:
    """Dimensions from the columns; what they leave open (gated or plain MLP, tied, head size) is what reproduces the
    total.
    """
    values = {k: number(row.get(k)) for k in ("layers", "hidden", "heads", "ffn", "vocab")}
    missing = [k for k, v in values.items() if v is None]
    if missing:
        raise _Outside(f"dimension not stated: {', '.join(missing)}")
    ints: dict[str, Any] = {k: int(v) for k, v in values.items() if v is not None}
    kv = int(number(row.get("kv_heads")) or ints["heads"])
    notes = row.get("notes", "")
    total = number(row.get("params_total_B"))
    plain_hint = bool(re.search(r"2-matrix|GELU|xIELU", notes))
    name = row.get("model", "")
    options = []
    for mlp in ("plain",) if plain_hint else ("gated", "plain"):
        for tied in (True, False):
            for head_dim in dict.fromkeys((ints["hidden"] // ints["heads"], 128, 256, 64)):
                options.append((mlp, tied, head_dim))
    qwen3 = "qwen3" in name.lower()

    def build(mlp: str, tied: bool, head_dim: int) -> ModelShape:
        return ModelShape(
            name=name, kv_heads=kv, head_dim=head_dim, mlp=mlp, tied=tied, qk_norm="head" if qwen3 else "none", **ints
        )

    standard = ints["hidden"] // ints["heads"]
    if total is None:
        return build("plain" if plain_hint else "gated", "tied" in notes and "untied" not in notes, standard)

    def cost(option: tuple[str, bool, int]) -> tuple[float, bool]:
        # within 1 % the standard head size wins: rounding of the stated total must not decide
        off = abs(build(*option).parameters / (total * 1e9) - 1)
        return (round(off, 2), option[2] != standard)

    best = min(options, key=cost)
    if cost(best)[0] > 0.10:
        raise _Outside(f"the stated dimensions do not reproduce the stated {total:g} B parameters")
    return build(*best)


def _routed(row: Mapping[str, str]) -> bool:
    """Whether the row's model sends tokens to experts."""
    name = row.get("model", "")
    named = "moe" in name.lower() or re.search(r"\bA\d+(\.\d+)?B\b", name) is not None
    return named or "MoE" in row.get("notes", "")


def _routed_shape(row: Mapping[str, str]) -> ModelShape:
    """The dimensions of a mixture of experts: no column has them, so they are those of the shipped model of that
    name."""
    name = row.get("model", "").partition(" (")[0].lower()
    for base, shape in shapes.known().items():
        if shape.has_experts and base.rpartition("/")[2].lower() in (name, f"{name}-bf16"):
            stated = {k: number(row.get(k)) for k in ("layers", "hidden", "heads", "vocab")}
            if any(v is not None and v != getattr(shape, k) for k, v in stated.items()):
                raise _Outside(f"the stated dimensions are not those of {base}")
            return shape
    raise _Outside("mixture of experts whose dimensions are not shipped")


def _experts_over_ranks(row: Mapping[str, str], world: int, per_node: int) -> tuple[dict[str, str], tuple[str, ...]]:
    """The row with its experts spread as FSDP2 spreads them, where they lie on the ranks of one node: a rank holds
    the same bytes, and the links of a node carry weights or tokens. Across nodes the two differ too much."""
    text = row.get("parallel", "")
    found = re.search(r"\+?ep(\d+)", text)
    if found is None:
        return dict(row), ()
    if world > per_node:
        raise _Outside("expert parallelism across nodes")
    return {**row, "parallel": text.replace(found.group(0), "")}, ("experts over the ranks of a node read as FSDP2",)


def _layout(row: Mapping[str, str], world: int, per_node: int) -> tuple[Layout, bool]:
    text = row.get("parallel", "").lower().replace(" ", "")
    for kind, what in (("tp", "tensor"), ("pp", "pipeline"), ("cp", "context"), ("ep", "expert")):
        found = re.search(rf"(?<![a-z]){kind}(\d+)", text)
        if found and int(found.group(1)) > 1:
            raise _Outside(f"{what} parallelism")
    if "sp" in re.split(r"[^a-z]+", text):
        raise _Outside("sequence parallelism")
    offload = "offload" in text or "cpu" in row.get("optimizer", "").lower()
    if not text or text == "none":
        if world > 1:
            raise _Outside("the parallel layout is not stated")
        return Layout("single", 1, 1, offload_optimizer=offload), False
    keep_gathered = False
    if found := re.search(r"hsdp(?:\(rep(\d+),shard(\d+)\))?", text):
        shard = int(found.group(2)) if found.group(2) else min(per_node, world)
        return Layout("hsdp", world, shard, offload), False
    if found := re.search(r"zero-?([123])(?:\((\d+)\))?", text):
        stage = int(found.group(1))
        shard = int(found.group(2)) if found.group(2) else world
        if "fsdp" in text and stage == 3:
            return Layout("fsdp2", world, world, offload, "offload" in text and "optim" not in text), False
        keep_gathered = "fsdp" in text
        engine = f"zero{stage}"
        return Layout(engine, world, min(shard, world), offload), keep_gathered
    if "fsdp" in text:
        return Layout("fsdp2", world, world, "optim" in text and offload, offload and "optim" not in text), False
    if "ddp" in text or re.fullmatch(r"dp\d+", text):
        return Layout("ddp" if world > 1 else "single", world, 1, offload), False
    raise _Outside(f"parallel layout '{row.get('parallel')}' is not one of DDP, FSDP, HSDP, ZeRO")


def _stack(row: Mapping[str, str]) -> str:
    kernels = row.get("kernels", "").lower()
    if "te" in re.split(r"[^a-z]+", kernels) or any(
        k in kernels for k in ("fused", "liger", "megatron", "triton", "nvfuser", "unsloth")
    ):
        return "fused"
    own_norm = (
        "torchtitan" in (row.get("source", "") + row.get("notes", "")).lower()
    )  # its blocks use torch's own RMS norm
    if row.get("compile", "").lower() == "yes":
        return "compiled_native" if own_norm else "compiled"
    if own_norm:
        return "native"
    return "eager" if row.get("compile", "").lower() == "no" else "native"


def _attention(row: Mapping[str, str]) -> str:
    """Which attention kernel the row used, as far as its ``kernels`` column says."""
    words = re.split(r"[^a-z0-9]+", row.get("kernels", "").lower())
    for name, spellings in (
        ("flash4", ("flash4", "fa4")),
        ("flash3", ("flash3", "fa3")),
        ("te", ("te",)),
        ("cudnn", ("cudnn",)),
        ("flash", ("flash", "flash2", "fa2")),
    ):
        if any(word in words for word in spellings):
            return name
    return "sdpa"


def _bytes(row: Mapping[str, str], layout: Layout) -> tuple[Bytes, bool]:
    """Bytes per element of the model's state, and whether the row says so (else: fp32 master, as mixed precision has
    it).
    """
    notes = row.get("notes", "").lower()
    pure = any(k in notes for k in ("pure bf16", "bf16-true", "training.dtype=bfloat16"))
    pure = pure or "torchtune" in row.get("source", "").lower()  # its recipes keep every state in bf16
    _, each = adam_state(row.get("optimizer", ""))
    if row.get("method", "").lower() in ("lora", "qlora", "rslora", "dora") or pure:
        # adapters are so few that their type hardly counts
        return Bytes(parameters=2, working=0, gradients=2, optimizer=each or 4), True
    stated = "fp32" in notes
    if layout.deepspeed and layout.traits.shards_gradients:
        return Bytes(parameters=4, working=2, gradients=2, optimizer=each or 8), stated
    return Bytes(optimizer=each or 8), stated


def _node(row: Mapping[str, str], links: Links) -> tuple[Links, tuple[str, ...]]:
    """The node's links; the notes' own figures win over what is usual for the GPU."""
    notes = row.get("notes", "")
    per_node = int(number(row.get("gpus_per_node")) or links.gpus_per_node)
    node_gb_s = links.node_gb_s
    assumed: tuple[str, ...] = ("node_gb_s",)
    if found := re.search(r"(\d+)\s*x\s*(?:OPA |HDR |NDR )?(\d+) Gb/s", notes):
        node_gb_s, assumed = int(found.group(1)) * int(found.group(2)) / 8, ()
    elif found := re.search(r"(\d+) Gb/s per GPU", notes):
        node_gb_s, assumed = int(found.group(1)) / 8 * per_node, ()
    elif found := re.search(r"(?:RoCE|InfiniBand|RDMA|Slingshot)\D{0,12}(\d+) Gb/s", notes):
        node_gb_s, assumed = int(found.group(1)) / 8, ()
    elif node_gb_s:
        node_gb_s = node_gb_s * per_node / links.gpus_per_node
    return Links(per_node, links.in_node_gb_s, node_gb_s), assumed


def _tokens(row: Mapping[str, str], shape: ModelShape, sequence: int) -> tuple[float | None, str | None]:
    """Measured tokens/s; from TFLOP/s only where the notes state the convention they follow."""
    measured = number(row.get("tokens_per_s_per_gpu"))
    if measured is not None:
        return measured, None
    tflops = number(row.get("tflops_per_gpu_reported"))
    notes = row.get("notes", "")
    if tflops is None:
        return None, None
    linear = 6.0 * (shape.linear_parameters + shape.vocab * shape.hidden)
    attention = 12.0 * shape.layers * shape.q_width * sequence
    if re.search(r"6N\(non-emb\)\s*\+\s*12\*L\*H", notes):
        return tflops * 1e12 / (linear + attention), "6N(non-emb) + 12 L H d s per token"
    if re.search(r"causal attention \(6\*L\*h\*s\^2", notes):
        return tflops * 1e12 / (linear + attention / 2), "6N + 6 L h s per token"
    return None, None


def read_row(row: Mapping[str, str]) -> Row:
    """One row as a job, or the reason why the planner has nothing to say about it. Never raises for the row's
    content.
    """
    notes = row.get("notes", "")
    tier = re.search(r"tier=([A-Z])", notes)
    base: dict[str, Any] = {
        "id": row.get("id", ""),
        "source": row.get("source", ""),
        "tier": tier.group(1) if tier else None,
        "tokens_per_s": number(row.get("tokens_per_s_per_gpu")),
        "tokens_derived": None,
        "memory_gib": number(row.get("peak_mem_GiB")),
    }
    try:
        job, extra = _job(row)
    except _Outside as reason:
        return Row(**base, job=None, why=str(reason))
    except UserError as error:
        return Row(**base, job=None, why=error.what)
    tokens, derived = _tokens(row, job.shape, job.sequence)
    text = notes.lower()
    device = any(k in text for k in ("nvidia-smi", "device reading", "rocm-smi"))
    return Row(
        **{**base, "tokens_per_s": tokens, "tokens_derived": derived},
        job=job,
        why=None,
        device_reading=device,
        reserved_reading="reserved" in text or device,
        assumed=extra,
    )


def _job(row: Mapping[str, str]) -> tuple[TrainingJob, tuple[str, ...]]:
    precision = row.get("precision", "").lower()
    if precision != "bf16":
        raise _Outside(f"precision {precision or 'not stated'}; bf16 only")
    optimizer = row.get("optimizer", "").lower()
    if optimizer and not adam_state(optimizer)[0]:
        raise _Outside(f"optimizer {row['optimizer']} is not of the Adam family")
    assumed: list[str] = [] if optimizer else ["optimizer: adam"]
    method = row.get("method", "").lower()
    method = {"sft": "full", "cpt": "full", "pretraining": "full", "rslora": "lora", "dora": "lora"}.get(method, method)
    if method not in ("full", "pretrain", "lora", "qlora"):
        raise _Outside(f"method '{row.get('method')}'")
    found = find_gpu(row.get("gpu", ""))
    if found is None:
        raise _Outside(f"unknown GPU '{row.get('gpu')}'")
    gpu, links = found
    world = int(number(row.get("n_gpus")) or 0)
    if world < 1:
        raise _Outside("the number of GPUs is not stated")
    sequence, micro = number(row.get("seq_len")), number(row.get("micro_batch"))
    if sequence is None or micro is None:
        raise _Outside("sequence length not stated" if sequence is None else "micro-batch not stated")
    links, guessed = _node(row, links)
    if world > links.gpus_per_node:
        assumed += guessed
    shape = _routed_shape(row) if _routed(row) else _shape(row)
    if shape.has_experts:
        row, spread = _experts_over_ranks(row, world, links.gpus_per_node)
        assumed += spread
    layout, _keep_gathered = _layout(row, world, links.gpus_per_node)
    checkpointing = row.get("act_ckpt", "").lower()
    checkpointing = {"yes": "full", "no": "none", "per-op": "selective", "op": "selective"}.get(
        checkpointing, checkpointing
    )
    if checkpointing not in ("none", "selective", "full"):
        if checkpointing:
            raise _Outside(f"activation checkpointing '{row.get('act_ckpt')}'")
        raise _Outside("activation checkpointing not stated")
    stack = STACKS[_stack(row)]
    flags = _flags(row)
    if "fused_linear_loss" in flags:
        stack = replace(stack, loss_bytes_per_logit=0.0)
    if checkpointing == "selective" and (
        {"te", "megatron"} & set(re.split(r"[^a-z]+", row.get("kernels", "").lower()))
    ):
        # Megatron's "selective" runs core attention again, which flash attention does in any case
        checkpointing = "none"
        assumed.append("selective as in Megatron: attention alone")
    b, stated = _bytes(row, layout)
    if b.optimizer == 2 and method not in ("lora", "qlora"):
        # bitsandbytes' rule for 8-bit moments: embeddings keep theirs in 32 bits
        share = shape.embedding_parameters / shape.parameters
        b = replace(b, optimizer=2 * (1 - share) + 8 * share)
    if "paged" in optimizer and not layout.offload_optimizer:
        layout = replace(layout, offload_optimizer=True)  # paged state lives in host memory and moves page by page
    job = TrainingJob(
        shape=shape,
        gpu=gpu,
        links=links,
        layout=layout,
        sequence=int(sequence),
        micro_batch=micro,
        grad_accum=int(number(row.get("grad_accum")) or 1),
        method="full" if method == "pretrain" else method,
        lora_rank=int(number(row.get("lora_rank")) or 16),
        bytes=b,
        checkpointing=checkpointing,
        selective_every=2,
        stack=stack,
        loss_chunk=4096
        if "fused_linear_loss" in flags
        else int(micro * sequence / 8)
        if "chunked_loss" in flags
        else None,
        gradient_in_backward="optimizer_in_backward" in flags,
        offload_activations="offload_activations" in flags,
        compiled=row.get("compile", "").lower() == "yes",
        attention=_attention(row),
        zero_bucket=5e8,
    )
    job, reading = _fitting(job, stated)
    if reading:
        assumed.append(reading)
    return job, tuple(assumed)


def _fitting(job: TrainingJob, stated: bool) -> tuple[TrainingJob, str | None]:
    """The reading of what the columns leave open with which the job fits: it was published as run.

    Open are the types of the states (unless ``stated``), whether DDP keeps a distributed optimizer, and how lean the
    blocks and the loss are. The reading that is usual in mixed precision comes first; the measured values play no part.
    """
    capacity = job.gpu.memory_gib
    if capacity is None or memory.predict(job).total <= capacity:
        return job, None
    readings: list[tuple[str, TrainingJob]] = []
    if not stated:
        pure = replace(job.bytes, parameters=2, working=0, gradients=2, optimizer=min(job.bytes.optimizer, 4))
        readings.append(("gradients in bf16", replace(job, bytes=replace(job.bytes, gradients=2))))
        if job.layout.world > 1 and job.layout.traits.shard_group == "none":
            sharded = replace(job.layout, engine="zero1", shard=job.layout.world)
            readings.append(("a distributed optimizer", replace(job, layout=sharded)))
        readings.append(("states in bf16", replace(job, bytes=pure)))
    lean = STACKS["fused"]
    for name, reading in [("", job), *readings]:
        leaner = replace(
            reading,
            stack=replace(lean, loss_bytes_per_logit=min(lean.loss_bytes_per_logit, job.stack.loss_bytes_per_logit)),
        )
        readings.append((f"{name}, fused blocks and loss".lstrip(", "), leaner))
    for name, reading in readings:
        if memory.predict(reading).total <= capacity:
            return reading, name
    return job, None


#: torchtune's table adds one technique per row ("flags cumulative"): a row has all that stand before it.
_LADDER = (
    "packed",
    "compile",
    "chunked",
    "activation checkpointing",
    "optimizer step into backward",
    "activation offloading",
    "8-bit",
)


def _flags(row: Mapping[str, str]) -> set[str]:
    """Techniques that the notes name."""
    notes = row.get("notes", "").lower()
    kernels = row.get("kernels", "").lower()
    found = set()
    if "flags cumulative" in notes and row.get("method") == "full":
        last = max((i for i, name in enumerate(_LADDER) if name in notes), default=0)
        found |= {
            name
            for at, name in ((2, "chunked_loss"), (4, "optimizer_in_backward"), (5, "offload_activations"))
            if last >= at
        }
    if "same flags as lora row" in notes:
        found |= {"chunked_loss", "offload_activations"}
    if "chunked cross entropy" in notes or "chunked ce" in notes:
        found.add("chunked_loss")
    if "liger" in kernels + notes or "cut-ce" in kernels + notes or "linear-cut" in notes:
        found.add("fused_linear_loss")
    if "optimizer_in_bwd" in notes:
        found.add("optimizer_in_backward")
    if "activation offload" in notes:
        found.add("offload_activations")
    return found
