"""FSDP2: parameters, gradients and optimizer state in shards; HSDP: shards within a group of ranks, copies of the
groups.

Every transformer block is one shard group. What lies outside the blocks (embedding, final norm, output layer) is the
root group, gathered for the whole forward, because :class:`aifactory_train.model.causal_lm.CausalLM` reads the output
weight itself and a tied embedding must be one parameter of one group.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from aifactory_train.core import compat
from aifactory_train.parallel.apply import block_modules
from aifactory_train.parallel.dims import ParallelDims
from aifactory_train.parallel.shards import Shards
from aifactory_train.parallel.state import Piece, rows_of
from aifactory_train.parallel.torch_engine import TorchEngine
from aifactory_train.parallel.traits import traits_of

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.model.causal_lm import CausalLM
    from aifactory_train.model.precision import Precision
    from aifactory_train.parallel.engine import DeviceBatch
    from aifactory_train.parallel.world import World


def build_mesh(device: str, dims: ParallelDims, *, copies: bool) -> DeviceMesh:
    """``(shard,)`` over all ranks, or where there may be ``copies`` ``(replicate, shard)``; names are the
    dimensions'.
    """
    if not copies:
        return init_device_mesh(device, (dims.dp_shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (dims.dp_replicate, dims.dp_shard), mesh_dim_names=("replicate", "shard"))


def apply_fsdp(
    core: nn.Module,
    mesh: DeviceMesh,
    *,
    compute: torch.dtype,
    reduce: torch.dtype,
    offload: bool = False,
) -> None:
    """Shard ``core`` in place over ``mesh``: each block of :func:`block_modules`, then the rest as the root group.

    Works on meta tensors and with a fake process group. Gradients are summed in ``reduce``.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
    where: OffloadPolicy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for block in block_modules(core):
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=where, reshard_after_forward=True)
    # The root is needed again at once by the backward: resharding it would only gather it twice.
    fully_shard(core, mesh=mesh, mp_policy=policy, offload_policy=where, reshard_after_forward=False)
    compat.sum_gradients(core)


class FSDPEngine(TorchEngine):
    """See :class:`aifactory_train.parallel.Engine`."""

    def __init__(self, name: str, core: CausalLM, recipe: Recipe, precision: Precision, world: World):
        super().__init__(name, core, recipe, precision, world)
        copies = traits_of(name).shard_group == "chosen"
        self.mesh = build_mesh(torch.device(world.device).type, self.dims, copies=copies)
        # On CPU ranks the state already lies in host memory.
        self.offload = recipe.parallel.offload_optimizer and world.device != "cpu"
        from aifactory_train.parallel import materialise

        if core.unread is not None:
            materialise.to_meta(core)
        agree_on_trained(core)
        apply_fsdp(core, self.mesh, compute=precision.compute, reduce=precision.reduce, offload=self.offload)
        if core.unread is not None:
            materialise.to_memory(core, "cpu" if self.offload else world.device)
            materialise.load_rows(core, core.unread, world.device)
            core.unread = None
        self.module: nn.Module = core
        self._build_optimizer()

    # ---- one step

    def forward_backward(self, batch: DeviceBatch, scale: float, last: bool) -> torch.Tensor:
        self.core.set_requires_gradient_sync(last)  # type: ignore[operator]
        loss = self.module(**batch.kwargs())
        (loss * scale).backward()
        return loss.detach()

    # ---- where the shards lie

    def _local(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def _norm_group(self) -> dist.ProcessGroup:
        return self.mesh.get_group("shard")

    def _shards(self) -> Shards:
        return Shards(self.mesh.get_group("shard"), self.world.device)

    def _first_byte(self, tensor: torch.Tensor) -> int:
        if self._uncut(tensor):
            return 0
        return first_row(tensor.shape[0], self.mesh) * math.prod(tensor.shape[1:]) * tensor.element_size()

    def _pieces(self, tensor: torch.Tensor) -> list[Piece]:
        if self._uncut(tensor):
            return [Piece((0,) * tensor.dim(), tensor)]
        first = first_row(tensor.shape[0], self.mesh)
        return rows_of(tuple(tensor.shape), first, self._local(tensor))

    def _uncut(self, tensor: torch.Tensor) -> bool:
        return not isinstance(tensor, DTensor)  # a figure of all rows

    def _owned(self, number: int) -> bool:
        if self.mesh.ndim == 1:
            return True
        copies, mine = self.mesh.size(0), self.mesh.get_local_rank("replicate")
        return number % copies == mine

    def full_parameters(self, trained_only: bool = True) -> Iterator[tuple[str, torch.Tensor | None]]:
        for name, parameter in self.core.named_parameters():
            if parameter.requires_grad or not trained_only:
                whole = gather_rows(parameter, self.mesh, self.world)
                yield name, whole

    def _weights_changed(self) -> None:
        # After a forward without a backward the root group is still whole, as it was gathered then.
        self.core.reshard()  # type: ignore[operator]

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        self.core.unshard()  # type: ignore[operator]
        try:
            yield
        finally:
            self.core.reshard()  # type: ignore[operator]

    def describe(self) -> list[tuple[str, str, str]]:
        shards = self.mesh.size(-1)
        how = f"{self.mesh.size(0)} copies of {shards} shards each" if self.mesh.ndim == 2 else f"{shards} shards"
        lines = [
            (
                "engine",
                self.name,
                f"{how}; {len(block_modules(self.core))} blocks and the root; gradients summed in "
                f"{self.precision.reduce}",
            )
        ]
        if self.recipe.parallel.offload_optimizer:
            lines.append(
                ("offload", "host memory", "parameters and optimizer state")
                if self.offload
                else ("offload", "no effect", "CPU ranks hold their state in host memory already")
            )
        return lines


def first_row(rows: int, mesh: DeviceMesh) -> int:
    """Where this rank's rows of a tensor with ``rows`` rows begin (FSDP2 splits as ``torch.chunk`` does)."""
    shards = mesh.size(-1)
    return min(mesh.get_local_rank("shard") * -(-rows // shards), rows)


def agree_on_trained(core: nn.Module) -> None:
    """Every rank starts from rank 0's trained parameters (frozen ones are read from the same files)."""
    for parameter in core.parameters():
        if parameter.requires_grad and not parameter.is_meta:  # meta: read from the same files
            dist.broadcast(parameter.data, 0)


#: Bytes that rank 0 receives at once when a whole parameter is gathered: evaluation and export come when a GPU is full.
GATHER_BYTES = 256 * 2**20


def gather_rows(parameter: nn.Parameter, mesh: DeviceMesh, world: World) -> torch.Tensor | None:
    """The whole of a row-sharded parameter in rank 0's host memory; the others send their rows and get None."""
    if not isinstance(parameter, DTensor):
        return parameter.detach().cpu() if world.is_main else None
    local = parameter.to_local().detach()
    group, shards = mesh.get_group("shard"), mesh.size(-1)
    if shards == 1:
        return local.cpu() if world.is_main else None
    receives = mesh.get_local_rank("shard") == 0
    whole = collect_rows(local, parameter.shape, shards, group, dist.get_global_rank(group, 0), receives)
    return whole if world.is_main else None


def collect_rows(
    local: torch.Tensor, shape: torch.Size, shards: int, group: Any, first: int, receives: bool
) -> torch.Tensor | None:
    """The tensor of ``shape`` whose rows are dealt to ``shards`` ranks as torch.chunk does, in host memory of rank
    ``first``.

    No more than :data:`GATHER_BYTES` are on its way at once, on the sender's and the receiver's device.
    """
    rows, each = shape[0], -(-shape[0] // shards)
    whole = torch.empty(shape, dtype=local.dtype) if receives else None
    step = max(1, GATHER_BYTES // max(1, shards * math.prod(shape[1:]) * local.element_size()))
    for start in range(0, each, step):
        part = local.new_zeros((min(step, each - start), *shape[1:]))
        mine = local[start : start + len(part)]
        part[: len(mine)] = mine
        parts = [torch.empty_like(part) for _ in range(shards)] if receives else None
        dist.gather(part, parts, dst=first, group=group)
        if whole is not None and parts is not None:
            for shard, got in enumerate(parts):
                begin = shard * each + start
                count = max(0, min(rows - begin, len(got)))
                whole[begin : begin + count] = got[:count]
    return whole
