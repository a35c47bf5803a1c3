"""A world larger than this machine: the sharded model, built for up to 4,096 ranks in one process, and its bytes
counted.

FSDP2 and HSDP: torch's fake process group and meta tensors; the model is wrapped by the same :func:`apply_fsdp` as in
training, the optimizer's state is made by the same optimizer, and bytes are read from the shards themselves. ZeRO-3:
DeepSpeed's own ``zero.Init`` partitions every parameter as it is created (real tensors on the CPU, one whole parameter
at a time), and the partitions are counted. It is the ground truth of the planner's static memory. torch is imported
only when a function is called.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from aifactory_train.core.errors import UserError
from aifactory_train.planning import memory, timing
from aifactory_train.planning.job import TrainingJob

if TYPE_CHECKING:
    import torch
    from torch import nn

    from aifactory_train.model.shapes import ModelShape

MOST_RANKS = 4096


@dataclass(frozen=True)
class Sharding:
    """Bytes of one rank, read from the built model."""

    engine: str
    world: int
    shard: int
    rank: int
    parameters: int  # what is kept between steps (ZeRO-3: the bf16 partitions)
    gradients: int
    optimizer: int  # moments, and under ZeRO the fp32 master
    gathered_per_step: int  # bytes that a rank receives in all-gathers of one step of one micro-batch
    reduced_per_step: int  # bytes that a rank receives in reduce-scatters of one step
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# ---- the model of a shape


def build_config(shape: ModelShape) -> Any:
    """The transformers config of a shape. Raises :class:`UserError` for a family without one."""
    import transformers

    if shape.config is not None:
        values = {k: v for k, v in shape.config.items() if k not in ("model_type", "transformers_version", "dtype")}
        ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        return transformers.AutoConfig.for_model(shape.family, **{**values, **ends})
    names = {
        "llama": "LlamaConfig",
        "mistral": "MistralConfig",
        "ministral": "MinistralConfig",
        "ministral3": "Ministral3Config",
        "smollm3": "SmolLM3Config",
        "qwen2": "Qwen2Config",
        "qwen3": "Qwen3Config",
        "olmo2": "Olmo2Config",
        "olmo3": "Olmo3Config",
        "apertus": "ApertusConfig",
        "gemma3_text": "Gemma3TextConfig",
    }
    kind = getattr(transformers, names.get(shape.family, ""), None)
    if kind is None:
        raise UserError(f"no transformers config for family '{shape.family}'", where="model.base")
    return kind(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=min(shape.max_positions or 4096, 4096),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def build_core(job: TrainingJob, device: str = "meta", working: bool = False) -> nn.Module:
    """The language model (with adapters where the job has them) inside :class:`CausalLM`, in the job's types, or all in
    the type that computes (``working``)."""
    import torch
    from transformers import AutoModelForCausalLM

    from aifactory_train.model.causal_lm import CausalLM

    types = {4: torch.float32, 2: torch.bfloat16}
    trained, frozen = types[int(job.bytes.parameters)], types[int(job.bytes.frozen)]
    if working:
        trained = frozen = types[int(job.bytes.compute)]
    config = build_config(job.shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=trained if job.method == "full" else frozen)
        if job.method == "qlora":
            _pack(model, frozen)
        if job.method != "full":
            model = _with_adapter(model, job)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != trained:
            parameter.data = parameter.data.to(trained)
    return CausalLM(model)


def _pack(model: Any, dtype: torch.dtype) -> None:
    """The linear layers but the output layer as runs of bytes, which a 4-bit base is; their content is not looked at,
    so bitsandbytes is not needed."""
    import torch
    from torch import nn

    from aifactory_train.model.packed import PackedLinear, Packing

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not model.get_output_embeddings():
            packing = Packing((module.out_features, module.in_features), dtype)
            model.set_submodule(
                name, PackedLinear(packing, torch.empty(packing.nbytes, dtype=torch.uint8), module.bias)
            )


def _with_adapter(model: nn.Module, job: TrainingJob) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    from aifactory_train.model import expert_targets, experts
    from aifactory_train.model.report import ModelReport

    targets = job.targets if isinstance(job.targets, str) else list(job.targets)
    routed = next((kind.experts for kind in job.shape.kinds if kind.experts is not None), None)
    asked: Any = SimpleNamespace(  # of a recipe what places adapters on experts
        adapter=SimpleNamespace(targets=targets, rank=job.lora_rank, kind="dora" if job.dora else "lora", dropout=0.0),
        experts=SimpleNamespace(
            adapt=None if routed is None or routed.adapters == "named" else routed.adapters,
            router="trained" if routed is not None and routed.router_adapted else None,
        ),
    )
    placed = expert_targets.choose(model, asked, ModelReport())
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=job.lora_rank,
        target_modules=targets if placed is None else placed.modules,
        target_parameters=None if placed is None else placed.parameters or None,
        use_dora=job.dora,
    )
    model = get_peft_model(model, settings, autocast_adapter_dtype=False, low_cpu_mem_usage=True)  # type: ignore[arg-type, assignment]
    experts.use_factors(model)
    return model


@contextlib.contextmanager
def fake_world(world: int, rank: int = 0) -> Iterator[None]:
    """A process group of ``world`` ranks whose collectives do nothing; this process is ``rank``."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError(
            "a process group exists already", where="--verify-sharding", fix="run it in a process of its own"
        )
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---- building and counting


def verify(job: TrainingJob, rank: int = 0) -> Sharding:
    """Build the job's model for its world and count ``rank``'s bytes. Raises :class:`UserError` for a world that is too
    large.
    """
    layout = job.layout
    if layout.world > MOST_RANKS:
        raise UserError(f"at most {MOST_RANKS} ranks can be built in one process", where="--verify-sharding")
    started = time.perf_counter()
    count = {"whole": _replicated, "rows": _fsdp, "elements": _zero3, "buffer": _flat}[layout.traits.cuts]
    counted = count(job, rank)
    gc.collect()
    return Sharding(layout.engine, layout.world, layout.shard, rank, *counted, seconds=time.perf_counter() - started)


def _optimizer_bytes(parameters: list[nn.Parameter], job: TrainingJob) -> int:
    """Bytes of the state that the recipe's optimizer really makes, one step on gradients of the parameters' type."""
    import torch

    if not job.bytes.optimizer:
        return 0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=False)
    optimizer.step()
    total = 0
    for state in optimizer.state.values():
        for name, value in state.items():
            if name != "step":
                total += _local_bytes(value)
    return total


def _local_bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def _replicated(job: TrainingJob, rank: int) -> tuple[int, int, int, int, int]:
    core = build_core(job)
    trained = [p for p in core.parameters() if p.requires_grad]
    gradients = sum(map(_local_bytes, trained))
    reduced = 2 * gradients * (job.layout.world - 1) // job.layout.world
    return sum(map(_local_bytes, core.parameters())), gradients, _optimizer_bytes(trained, job), 0, reduced


def _flat(job: TrainingJob, rank: int) -> tuple[int, int, int, int, int]:
    """ZeRO-1 and 2: weights on every rank; the optimizer's groups flattened, padded to an even share per rank and
    split.

    The padding is DeepSpeed's (stage_1_and_2.py: NCCL's 4-byte alignment, so two bf16 elements per rank).
    """
    from aifactory_train.parallel.optim import parameter_groups

    core, world = build_core(job), job.layout.shard
    groups = parameter_groups(core.named_parameters(), weight_decay=0.1)
    share = sum(-(-sum(p.numel() for p in group["params"]) // (2 * world)) * 2 for group in groups)
    trained = sum(p.numel() for p in core.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in core.parameters() if not p.requires_grad)
    b = job.bytes
    parameters = trained * int(b.working or b.parameters) + frozen * int(b.frozen)
    gradients = (share if job.layout.traits.shards_gradients else trained) * int(b.gradients)
    optimizer = share * (int(b.optimizer) + (int(b.parameters) if b.working else 0))
    others = share * (world - 1)
    return parameters, gradients, optimizer, others * int(b.compute), others * int(b.reduce)


def _fsdp(job: TrainingJob, rank: int) -> tuple[int, int, int, int, int]:
    import torch
    from torch.distributed.fsdp import FSDPModule

    from aifactory_train.parallel.dims import ParallelDims
    from aifactory_train.parallel.fsdp import apply_fsdp, build_mesh

    types = {4: torch.float32, 2: torch.bfloat16}
    layout = job.layout
    with fake_world(layout.world, rank):
        core = build_core(job)
        copies = layout.traits.shard_group == "chosen"
        mesh = build_mesh("cpu", ParallelDims(layout.replicas, layout.shard), copies=copies)
        apply_fsdp(core, mesh, compute=types[int(job.bytes.compute)], reduce=types[int(job.bytes.reduce)])
        parameters = list(core.parameters())
        trained = [p for p in parameters if p.requires_grad]
        gathered = reduced = 0
        for module in core.modules():
            if not isinstance(module, FSDPModule):
                continue
            for group in _groups_of(module):
                # padded shards travel; a group that is freed after forward is gathered again in backward
                times = 2 if group._reshard_after_forward else 1
                for held in group.fsdp_params:
                    elements = held.padded_sharded_param_size.numel() * (layout.shard - 1)
                    floating = held.sharded_param.is_floating_point()
                    gathered += times * elements * (int(job.bytes.compute) if floating else 1)
                    if held.sharded_param.requires_grad:
                        reduced += elements * int(job.bytes.reduce)
        return (
            sum(map(_local_bytes, parameters)),
            sum(map(_local_bytes, trained)),
            _optimizer_bytes(trained, job),
            gathered,
            reduced,
        )


def _groups_of(module: Any) -> list[Any]:
    """The parameter groups that FSDP2 keeps of a wrapped module."""
    state = module._get_fsdp_state()
    many = getattr(state, "_fsdp_param_groups", None)
    one = getattr(state, "_fsdp_param_group", None)
    return list(many) if many else [one] if one is not None else []


def _zero3(job: TrainingJob, rank: int) -> tuple[int, int, int, int, int]:
    import torch

    from aifactory_train.parallel.deepspeed import import_deepspeed
    from aifactory_train.planning.settings import deepspeed_json

    deepspeed = import_deepspeed()
    layout = job.layout
    build_core(job)  # imports what the model needs: zero.Init replaces torch's constructors, which some imports inspect
    with fake_world(layout.world, rank), _single_writer():
        deepspeed.init_distributed(dist_backend="fake", dist_init_required=False, verbose=False)
        config = deepspeed_json(job)
        with (
            deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.bfloat16, remote_device="cpu"),
            _empty_weights(),
        ):
            core = build_core(job, device="cpu", working=True)
        parameters = gradients = optimizer = gathered = reduced = 0
        working, compute = int(job.bytes.working or job.bytes.parameters), int(job.bytes.compute)
        for parameter in cast("Any", core.parameters()):
            partition = parameter.ds_tensor.ds_numel  # elements of this rank's partition
            persistent = getattr(parameter, "ds_persist", False)
            others = partition * (layout.shard - 1)
            kept = parameter.ds_numel if persistent else partition
            if parameter.requires_grad:
                parameters += kept * working
                gradients += partition * int(job.bytes.gradients)
                master = int(job.bytes.parameters) if job.bytes.working else 0
                optimizer += partition * (int(job.bytes.optimizer) + master)
                reduced += others * int(job.bytes.reduce)
            else:
                parameters += kept * int(job.bytes.frozen)
            gathered += (1 if persistent else 2) * others * compute
        return parameters, gradients, optimizer, gathered, reduced


@contextlib.contextmanager
def _empty_weights() -> Iterator[None]:
    """Weights keep whatever memory holds: their values are not looked at, and drawing 8 billion random numbers takes
    minutes.
    """
    from torch import nn

    names = [n for n in dir(nn.init) if n.endswith("_") and callable(getattr(nn.init, n))]
    saved = {n: getattr(nn.init, n) for n in names}

    def untouched(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor

    for name in names:
        setattr(nn.init, name, untouched)
    try:
        yield
    finally:
        for name, function in saved.items():
            setattr(nn.init, name, function)


@contextlib.contextmanager
def _single_writer() -> Iterator[None]:
    """DeepSpeed reads rank and size from the environment too; they are restored afterwards."""
    import os

    import torch.distributed as dist

    values = {
        "RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    saved = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# ---- against the planner


def planned(job: TrainingJob) -> dict[str, float]:
    """The planner's closed forms of the same quantities, bytes."""
    state = memory.static_state(job.with_(grad_accum=1))
    gathered, reduced = timing.collectives(job.with_(grad_accum=1))
    kept = state.parameters + state.adapters
    cuts = job.layout.traits.cuts
    if cuts == "elements":
        scatter = job.trained_parameters * job.bytes.reduce * (job.layout.shard - 1) / job.layout.shard
        gathered, reduced = gathered - scatter, scatter
    elif cuts == "buffer":
        share = (job.layout.shard - 1) / job.layout.shard
        gathered, reduced = (
            job.trained_parameters * job.bytes.compute * share,
            job.trained_parameters * job.bytes.reduce * share,
        )
    elif cuts == "rows":
        # the root stays gathered from forward to backward
        share = (job.layout.shard - 1) / job.layout.shard
        gathered -= job.shape.root_parameters * job.bytes.compute * share
    return {
        "parameters": kept,
        "gradients": state.gradients,
        "optimizer": state.optimizer,
        "gathered_per_step": gathered,
        "reduced_per_step": reduced,
    }


def compare(job: TrainingJob, rank: int = 0) -> dict[str, Any]:
    """Built against planned, one row a quantity, with the relative difference."""
    built, expected = verify(job, rank), planned(job)
    rows = []
    for name, value in expected.items():
        found = getattr(built, name)
        difference = (found - value) / found if found else (0.0 if not value else 1.0)
        rows.append({"what": name, "built": found, "planned": value, "difference": difference})
    return {**built.as_dict(), "rows": rows, "largest_difference": max(abs(r["difference"]) for r in rows)}
