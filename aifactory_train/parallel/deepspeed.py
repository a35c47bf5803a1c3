"""DeepSpeed ZeRO: stage 1 shards the optimizer state, 2 also the gradients, 3 also the parameters.

DeepSpeed is given its JSON by us and keeps three jobs: it owns the flattened partitions, moves gradients and
parameters, and calls torch's optimizer. What defines the curve stays ours, as for every engine: gradients are summed
(stage 3 can only average, so its loss is scaled up by the number of ranks first), the norm and the clipping are
computed here, the learning rate is set before each step. Checkpoints see the fp32 partitions as boxes of the parameters
(see ``parallel/state.py``); DeepSpeed's own checkpoint format is not used: it refuses another number of ranks and must
be unpickled.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from aifactory_train.core.errors import UserError
from aifactory_train.model import experts
from aifactory_train.model.weight_files import file_name_of, read_tensor, tensors_in
from aifactory_train.parallel.apply import block_modules
from aifactory_train.parallel.dims import ParallelDims
from aifactory_train.parallel.optim import build_optimizer, parameter_groups, treatment_of
from aifactory_train.parallel.state import Piece, Sharded, run_of
from aifactory_train.parallel.torch_engine import clip_to, sum_of_squares
from aifactory_train.parallel.traits import traits_of, zero_stage

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.model.causal_lm import CausalLM
    from aifactory_train.model.precision import Precision
    from aifactory_train.parallel.engine import DeviceBatch
    from aifactory_train.parallel.world import World

#: Elements of a gradient bucket: 50 M keeps the buffers of a 7B model at 200 MB in fp32.
BUCKET_ELEMENTS = 50_000_000


def state_keys(recipe: Recipe) -> tuple[str, ...]:
    """Moments that torch's optimizer keeps of each partition."""
    if recipe.train.optimizer == "sgd":
        return ("momentum_buffer",) if recipe.train.momentum else ()
    return ("exp_avg", "exp_avg_sq")


def deepspeed_json(
    recipe: Recipe, precision: Precision, world_size: int, stage: int, hidden_size: int, device: str = "cuda"
) -> dict[str, Any]:
    """DeepSpeed's configuration for our settings. Pure: also used to show it before a run.

    Micro-batch and accumulation are 1 because the loop decides what a micro-batch is and says which one is the last.
    Raises :class:`UserError` for a precision policy that DeepSpeed has no mode for.
    """
    if precision.parameters != torch.float32:
        raise UserError(
            "ZeRO keeps trained parameters in fp32",
            where="precision.parameters",
            fix="--set precision.parameters=fp32, or parallel.engine=fsdp2",
        )
    half = precision.compute == torch.bfloat16
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": device != "cpu",
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    if stage == 3:
        zero.pop("allgather_bucket_size")
        # Vectors of a few rows are kept whole on every rank: gathering them costs more than they weigh.
        zero["stage3_param_persistence_threshold"] = 10 * hidden_size
        zero["stage3_prefetch_bucket_size"] = BUCKET_ELEMENTS
    if recipe.parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device != "cpu"}
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "gradient_allreduce_op": "sum" if stage < 3 else "mean",
        "communication_data_type": "fp32" if precision.reduce == torch.float32 else "bf16",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": half},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "zero_optimization": zero,
    }


def import_deepspeed() -> Any:
    """The package, with its start-up chatter kept off standard output (which may carry JSON)."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
    except ImportError:
        raise UserError(
            "DeepSpeed is not installed",
            where="parallel.engine",
            fix="pip install 'aifactory-train[deepspeed]', or --set parallel.engine=fsdp2",
        ) from None
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed would compile a shared-memory all-reduce on CPU machines; only its inference code calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def partition_while_reading(
    core: CausalLM, folder: Path, config: dict[str, Any], precision: Precision, world: World
) -> None:
    """Make ZeRO-3 partitions of a model without weights, one parameter after the other; collective.

    Rank 0 reads a tensor of ``folder``, DeepSpeed broadcasts it and every rank keeps its share: no rank ever holds more
    than its partitions and one tensor. (``deepspeed.zero.Init`` on a loaded model, which DeepSpeed would do by itself,
    starts from the whole model on every rank.)
    """
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(dist_init_required=False, verbose=False)  # takes up torch's process group
    half = precision.compute == torch.bfloat16
    init = deepspeed.zero.Init(
        module=nn.Module(), config_dict_or_path=config, dtype=torch.bfloat16 if half else torch.float32
    )
    places = tensors_in(folder)
    stored = {n: file_name_of(n) for n, _ in core.named_parameters()}
    # One buffer for all tensors of the files: Gloo's threads let go of what they sent some time after the broadcast,
    # and on busy cores a tensor of its own for each parameter added up to most of a small model.
    largest = max(p.numel() for n, p in core.named_parameters() if stored[n] is not None)
    dtypes = {n: torch.bfloat16 if half else p.dtype for n, p in core.named_parameters()}
    buffers = {d: torch.empty(largest, dtype=d, device=world.device) for d in {dtypes[n] for n in stored if stored[n]}}
    for name, parameter in core.named_parameters():
        file_name = stored[name]
        if file_name is None:  # an adapter: small, and already here
            parameter.data = parameter.data.to(world.device, dtypes[name])
        else:
            whole = buffers[dtypes[name]][: parameter.numel()].view(parameter.shape)
            if world.is_main:
                whole.copy_(read_tensor(places[file_name], file_name, tuple(parameter.shape)))
            parameter.data = whole
        init._convert_to_zero_parameters([parameter])


class DeepSpeedEngine:
    """See :class:`aifactory_train.parallel.Engine`."""

    def __init__(self, name: str, core: CausalLM, recipe: Recipe, precision: Precision, world: World):
        deepspeed = import_deepspeed()
        self.name, self.dims = name, ParallelDims.of(name, recipe, world.size, world.local_size)
        stage = traits_of(name).zero_stage
        assert stage is not None, f"{name} is no stage of ZeRO"
        half = precision.compute == torch.bfloat16
        runs = zero_stage(stage, bf16=half, offload_optimizer=recipe.parallel.offload_optimizer)
        self.instead = runs != stage
        self.stage = stage = runs
        self.core, self.recipe, self.precision, self.world = core, recipe, precision, world
        self.updates = 0
        hidden = core.language_model.config.get_text_config().hidden_size
        self.config = deepspeed_json(recipe, precision, world.size, stage, hidden, world.device)
        self.files: dict[str, Any] = {"deepspeed.json": self.config}
        #: full shapes by name: ZeRO-3 empties the parameters themselves
        self.shapes = {n: tuple(p.shape) for n, p in core.named_parameters()}
        self.named = [(n, p) for n, p in core.named_parameters() if p.requires_grad]
        settings = recipe.train
        treatment = treatment_of(core, block_modules(core), settings)
        optimizer = build_optimizer(parameter_groups(self.named, settings.weight_decay, treatment), settings)
        buffers = {name: buffer.clone() for name, buffer in core.named_buffers()}
        if core.unread is not None:
            partition_while_reading(core, core.unread, self.config, precision, world)
            core.unread = None
        if stage == 3:
            # CausalLM reads the output layer itself, outside the forward of the layer that owns it.
            for parameter in (core.output_weight, core.output_bias):
                if parameter is not None:
                    deepspeed.zero.register_external_parameter(core, parameter)
            # ... and experts read the matrices of their adapters, outside of the layers that own them.
            for wrapper in experts.outermost(core):
                for parameter in experts.read_by(wrapper):
                    deepspeed.zero.register_external_parameter(wrapper, parameter)
        self.engine, *_ = deepspeed.initialize(
            model=core, optimizer=optimizer, config=self.config, dist_init_required=False
        )
        self.zero = self.engine.optimizer
        # DeepSpeed's bf16 mode also casts buffers; rotary frequencies in bf16 would bend the positions.
        for name, buffer in core.named_buffers():
            # ... and leaves those of a model that it partitioned itself on the host, where each forward would fetch
            # them anew.
            buffer.data = buffers[name].to(world.device)
        self.module: nn.Module = self.engine
        #: stage 3 divides the sum of gradients by the number of ranks and cannot be told not to
        self.undo_mean = float(world.size) if stage == 3 else 1.0

    # ---- one step

    def forward_backward(self, batch: DeviceBatch, scale: float, last: bool) -> torch.Tensor:
        self.engine.set_gradient_accumulation_boundary(last)
        loss = self.engine(**batch.kwargs())
        self.engine.backward(loss * (scale * self.undo_mean), scale_wrt_gas=False)
        return loss.detach()

    def _gradients(self) -> list[torch.Tensor]:
        """This rank's partition of the summed gradients (views; padding is zero)."""
        if self.recipe.parallel.offload_optimizer:
            if self.world.device != "cpu":
                torch.cuda.synchronize(self.world.device)  # DeepSpeed copies them to pinned memory without waiting
            flats = (
                self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
            )
            return [flat.grad for flat in flats if flat.grad is not None]
        return [tensor for group in self.zero.averaged_gradients.values() if group is not None for tensor in group]

    def clip(self, max_norm: float | None, rest: float = 1.0) -> torch.Tensor:
        gradients = self._gradients()
        square = sum_of_squares(gradients, self.world.device)
        dist.all_reduce(square)
        return clip_to(gradients, square, max_norm, rest)

    def step(self, learning_rate: float) -> None:
        for group in self.zero.param_groups:
            group["lr"] = learning_rate * group.get("rate", 1.0)
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()
        self.updates += 1

    def discard(self) -> None:
        self.zero.zero_grad(set_to_none=True)
        self.zero.averaged_gradients = {}
        if self.stage < 3:
            self.zero.all_grad_tensors = {}
            for _, parameter in self.named:
                parameter.grad_accum = None  # type: ignore[attr-defined]
        if self.recipe.parallel.offload_optimizer:
            self.zero.reset_cpu_buffers()
            for gradient in self._gradients():
                gradient.zero_()

    # ---- state

    def _fragments(self) -> Iterator[tuple[str, nn.Parameter, torch.Tensor, int, int, int]]:
        """``(name, parameter, flat fp32 partition, offset in it, first element of the parameter, count)``."""
        if self.stage == 3:
            names = {id(p): n for n, p in self.named}
            rank = dist.get_rank()
            for flat, group in zip(self.zero.fp32_partitioned_groups_flat, self.zero.fp16_groups, strict=True):
                offset = 0
                for parameter in group:
                    share = parameter.partition_numel()
                    start = min(rank * share, parameter.ds_numel)
                    count = min(share, parameter.ds_numel - start)
                    yield names[id(parameter)], parameter, flat, offset, start, count
                    offset += share
            return
        for name, parameter in self.named:
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is None:  # this rank's partition holds nothing of it
                continue
            flat = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield name, parameter, flat, here.start, there.start, here.numel

    def state(self) -> dict[str, dict[str, Sharded]]:
        found = {name: (flat, at, start, count) for name, _, flat, at, start, count in self._fragments()}
        state: dict[str, dict[str, Sharded]] = {"model": {}, "optimizer": {}}
        keys = state_keys(self.recipe) if self.updates else ()
        for name, _ in self.named:
            shape = self.shapes[name]
            for key in (None, *keys):
                pieces: list[Piece] = []
                if name in found:
                    flat, offset, start, count = found[name]
                    whole = flat if key is None else self.zero.optimizer.state[flat][key]
                    pieces = run_of(shape, start, whole.detach().narrow(0, offset, count))
                entry = Sharded(shape, torch.float32, pieces)
                if key is None:
                    state["model"][name] = entry
                else:
                    state["optimizer"][f"{key}/{name}"] = entry
        return state

    def prepare_state(self, updates: int) -> None:
        self.updates = updates
        flats = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        for flat in flats:
            if not updates:
                self.zero.optimizer.state.pop(flat, None)
                continue
            moments = {key: torch.zeros_like(flat).detach() for key in state_keys(self.recipe)}
            if self.recipe.train.optimizer == "adamw":
                moments["step"] = torch.tensor(float(updates), dtype=torch.float32, device=flat.device)
            if moments:
                self.zero.optimizer.state[flat] = moments

    def finish_load(self, updates: int) -> None:
        self.updates = updates
        self.discard()
        if self.stage < 3:
            self.zero.update_lp_params()
            self.zero._hp_optimizer_states_linked = False  # the moments are new tensors
            return
        # Parameters that are gathered right now hold the old values.
        self.zero._partition_all_parameters()
        for number in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(number)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def full_parameters(self, trained_only: bool = True) -> Iterator[tuple[str, torch.Tensor | None]]:
        deepspeed = import_deepspeed()
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.core.named_parameters():
            if parameter.requires_grad:
                whole = safe_get_full_fp32_param(parameter)  # the master, not its bf16 copy
                yield name, whole.detach().cpu().view(self.shapes[name]) if self.world.is_main else None
            elif not trained_only:
                if self.stage == 3:
                    with deepspeed.zero.GatheredParameters([parameter]):
                        yield name, parameter.detach().cpu().clone() if self.world.is_main else None
                else:
                    yield name, parameter.detach().cpu() if self.world.is_main else None

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # refused with these engines

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        deepspeed = import_deepspeed()
        inside = {id(p) for block in block_modules(self.core) for p in block.parameters()}
        outside = [p for p in self.core.parameters() if id(p) not in inside]
        with deepspeed.zero.GatheredParameters(outside):
            yield

    def describe(self) -> list[tuple[str, str, str]]:
        what = {
            1: "optimizer state",
            2: "optimizer state and gradients",
            3: "parameters, gradients and optimizer state",
        }
        import json

        lines = [("engine", self.name, f"DeepSpeed; {what[self.stage]} in {self.world.size} shards, gradients summed")]
        if self.instead:
            lines.append(
                ("ZeRO stage", "2 instead of 1", "DeepSpeed's stage 1 cannot be checkpointed per parameter in bf16")
            )
        if self.stage > 1:
            lines.append(("accumulation", "reduced per micro-batch", f"ZeRO-{self.stage} keeps no whole gradient"))
        lines.append(("DeepSpeed JSON", json.dumps(self.config, separators=(",", ":")), "generated from this recipe"))
        if self.recipe.parallel.offload_optimizer:
            lines.append(("offload", "host memory", "optimizer state, stepped by torch on the CPU"))
        return lines
