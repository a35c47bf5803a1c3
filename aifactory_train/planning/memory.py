"""Peak memory of one rank, component by component.

The peak is the largest of three moments: the loss (all kept activations and the logits' workspace, but with one
micro-batch per step no gradients yet), the start of backward (all kept activations and one recomputed block) and its
end (all gradients, one block and its transient gradients). In between, activations are freed while gradients grow, both
linearly, so nothing in between is higher.

Which tensors a block keeps for backward is counted in :mod:`aifactory_train.planning.activations`.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields

from aifactory_train.model.blocks import Tensors
from aifactory_train.model.shapes import ModelShape
from aifactory_train.planning.activations import activation_bytes as activation_bytes
from aifactory_train.planning.activations import block_kept as block_kept
from aifactory_train.planning.activations import kept_per_block as kept_per_block
from aifactory_train.planning.job import GIB, Layout, TrainingJob

#: GiB that the driver's context, the kernels' code, cuBLAS/hipBLASLt workspaces hold outside torch's allocator
#: (recalled; the device reading minus torch's reserved memory of small jobs). Several ranks add NCCL's or RCCL's
#: channels and rings.
CONTEXT_GIB = {"nvidia": 0.7, "amd": 1.0, None: 1.0}
FABRIC_GIB = {"nvidia": 0.8, "amd": 1.3, None: 1.3}

#: Share of the allocator's dynamic memory (activations, workspaces, buffers) lost to fragmentation: reserved minus
#: allocated at the peak.
FRAGMENTATION = 0.06

#: NF4 weights: 4 bits and an fp8-quantised scale per 64 values with an fp32 one per 256 of those (QLoRA,
#: arXiv:2305.14314, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)

#: DeepSpeed's default for stage3_max_live_parameters: elements that stay gathered.
ZERO_MAX_LIVE = 1e9


@dataclass(frozen=True)
class Memory:
    """GiB per rank by component, at the peak. ``total`` is what has to fit into ``capacity`` (see :func:`capacity`)."""

    parameters: float
    gradients: float
    optimizer: float
    adapters: float
    activations: float
    loss: float
    communication: float
    framework: float
    fragmentation: float
    host: float = field(
        default=0.0, metadata={"host": True}
    )  # host memory of this rank's offloaded state; not in the total

    @functools.cached_property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self) if not f.metadata.get("host"))

    def as_dict(self) -> dict[str, float]:
        out = {f.name: round(getattr(self, f.name), 3) for f in fields(self)}
        out["total"] = round(self.total, 3)
        return out


def loss_bytes(job: TrainingJob) -> float:
    """Logits and their copies at the peak, in bytes; chunked: one chunk, the hidden states' gradient, the weight's in
    fp32.
    """
    shape, e = job.shape, job.bytes.compute
    rows = job.tokens * job.supervised
    if job.loss_chunk is not None and job.stack.loss_bytes_per_logit:
        # the logits exist once in the compute type; their fp32 copies chunk by chunk
        return rows * shape.vocab * e + min(rows, job.loss_chunk) * shape.vocab * 4
    if job.loss_chunk is not None:
        chunk = min(rows, job.loss_chunk) * shape.vocab * (2 * e + 4)
        weight = 4 * shape.vocab * shape.hidden if trains_head(job) else 0
        return chunk + e * rows * shape.hidden + weight
    return rows * shape.vocab * job.stack.loss_bytes_per_logit * (e / 2 if e > 2 else 1)


def trains_head(job: TrainingJob) -> bool:
    return job.method == "full" or job.train_embeddings


# ---- state


#: Tensors of the blocks: how many blocks there are of a kind, and the tensors of one.
_Kinds = list[tuple[int, Tensors]]


@functools.lru_cache(maxsize=4096)
def _block_sizes(
    shape: ModelShape, method: str, rank: int, targets: str | tuple[str, ...], dora: bool, embeddings: bool
) -> tuple[_Kinds, Tensors, _Kinds, Tensors]:
    """Tensors of ``(the blocks, the root, the blocks' trained ones, the root's trained ones)``."""
    blocks, root = [(kind.layers, kind.block_tensors()) for kind in shape.kinds], shape.root_tensors()
    if method == "full":
        return blocks, root, blocks, root
    wanted = targets if isinstance(targets, str) else list(targets)
    trained = [(kind.layers, kind.lora_tensors(rank, wanted, dora)) for kind in shape.kinds]
    outside = [(shape.vocab, shape.hidden)] * (1 if shape.tied else 2) if embeddings else []
    return blocks, root, trained, outside


def _shard_rows(tensors: Tensors, shard: int) -> int:
    """Elements of the largest shard when every tensor is split along its rows (FSDP2 pads to the first rank)."""
    return sum(-(-rows // shard) * columns for rows, columns in tensors)


def _shard_flat(tensors: Tensors, shard: int) -> int:
    """Elements of a shard when every tensor is flattened and split (ZeRO-3)."""
    return sum(-(-(rows * columns) // shard) for rows, columns in tensors)


def _share(layout: Layout, blocks: _Kinds, outside: Tensors, sharded: bool) -> float:
    """Elements of one rank's share of the blocks and what lies outside them; of all of them unless ``sharded``."""

    def summed(share: Callable[[Tensors, int], int], ranks: int) -> int:
        return sum(layers * share(tensors, ranks) for layers, tensors in blocks) + share(outside, ranks)

    if not sharded:
        return summed(_shard_flat, 1)
    if layout.traits.cuts == "buffer":
        return math.ceil(summed(_shard_flat, 1) / layout.shard)
    return summed(_shard_flat if layout.traits.cuts == "elements" else _shard_rows, layout.shard)


def padded(job: TrainingJob) -> tuple[float, float, float]:
    """Elements that collectives over the shard group move: ``(the whole model, its largest block, what is trained)``.

    More than there are where a tensor's rows do not divide: FSDP2 fills every rank's shard up to the first one's. Of 8
    experts on 64 ranks each rank sends one, and 56 of them are padding.
    """
    shape, layout = job.shape, job.layout
    if layout.traits.cuts != "rows" or layout.shard == 1:
        return shape.parameters, shape.largest_block, job.trained_parameters
    blocks, root, trained, trained_root = _block_sizes(
        shape, job.method, job.lora_rank, job.targets, job.dora, job.train_embeddings
    )
    every = [layout.shard * _shard_rows(tensors, layout.shard) for _, tensors in blocks]
    whole = sum(layers * size for (layers, _), size in zip(blocks, every, strict=True))
    outside = layout.shard * _shard_rows(root, layout.shard)
    return whole + outside, max(every), layout.shard * _share(layout, trained, trained_root, True)


@dataclass(frozen=True)
class State:
    """Elements and bytes of one rank's share of the model's state."""

    parameters: float  # bytes: master and frozen weights
    working: float  # bytes of the second copy that lives all the time
    gradients: float
    optimizer: float
    adapters: float  # bytes of the adapters' parameters
    host: float = 0.0


def static_state(job: TrainingJob) -> State:
    """Bytes per rank that exist all the time (gradients: when they all exist)."""
    shape, b, layout = job.shape, job.bytes, job.layout
    blocks, root, trained_blocks, trained_root = _block_sizes(
        shape, job.method, job.lora_rank, job.targets, job.dora, job.train_embeddings
    )
    traits = layout.traits

    def elements(blocks: _Kinds, outside: Tensors, sharded: bool) -> float:
        return _share(layout, blocks, outside, sharded)

    def quantised() -> float:
        """Bytes of frozen weights: under nf4 the linear layers', not embeddings, vectors and stacked experts."""
        if job.method != "qlora":
            return elements(blocks, root, traits.shards_parameters) * b.frozen
        linear = [(kind.layers, [(o, i) for i, o in kind.linears().values()]) for kind in shape.kinds]
        rest = elements(blocks, root, traits.shards_parameters) - elements(linear, [], traits.shards_parameters)
        # cut as the bytes that they are, not by rows
        shards = layout.shard if traits.shards_parameters else 1
        packed = sum(layers * _shard_flat(tensors, shards) for layers, tensors in linear)
        return packed * NF4_BYTES + rest * b.frozen

    frozen_bytes = quantised() if job.method != "full" else 0.0
    here = elements(trained_blocks, trained_root, layout.traits.shards_parameters)
    for_optimizer = elements(trained_blocks, trained_root, layout.traits.shards_optimizer)
    gradients = elements(trained_blocks, trained_root, layout.traits.shards_gradients) * b.gradients
    late = traits.shards_gradients and traits.reduces == "last" and job.accumulates_whole
    if late and job.grad_accum > 1 and layout.shard > 1:
        gradients = max(gradients, elements(trained_blocks, trained_root, False) * b.reduce)
    optimizer = for_optimizer * b.optimizer
    if layout.deepspeed:
        # DeepSpeed computes with the working copy; the fp32 master belongs to the optimizer's partition
        parameters = here * (b.working or b.parameters)
        optimizer += for_optimizer * (b.parameters if b.working else 0)
        working = 0.0
    else:
        parameters = here * b.parameters
        # compute copies live from a block's forward to its backward: all of them without checkpointing and where a
        # compiled block takes them as arguments, else one block's
        copies = here if job.checkpointing == "none" or job.compiled else here / max(1, shape.layers)
        working = copies * b.working if traits.compute_copies else 0.0
    host = 0.0
    if layout.offload_optimizer:
        host += optimizer
        optimizer = 0.0
        # gradients leave the GPU bucket by bucket (DeepSpeed) or block by block (FSDP2)
        host += gradients
        gradients = 0.0
    if layout.offload_parameters:
        host += parameters + frozen_bytes
        parameters = frozen_bytes = 0.0
    adapters = parameters if job.method != "full" else 0.0
    return State(
        parameters=frozen_bytes + (0.0 if job.method != "full" else parameters),
        working=working,
        gradients=gradients,
        optimizer=optimizer,
        adapters=adapters,
        host=host,
    )


def communication_bytes(job: TrainingJob) -> tuple[float, float]:
    """Buffers that hold gathered parameters, and gradients on their way: ``(in forward, in backward)``, bytes."""
    shape, b, layout = job.shape, job.bytes, job.layout
    traits = layout.traits
    if layout.world == 1 or (layout.shard == 1 and traits.shards_optimizer):
        return 0.0, 0.0
    # NF4 blocks are gathered packed and unpacked block by block into the compute type
    largest = padded(job)[1]
    packed = shape.packed_parameters / shape.layers if job.method == "qlora" else 0.0
    block = (largest - packed) * b.compute + packed * NF4_BYTES
    unpacked = packed * b.compute
    root = (shape.embedding_parameters + shape.head_parameters) * b.compute
    if traits.weights == "block":
        gathered = 2 * block + unpacked + root  # this block and the prefetched one; the root stays gathered
        # unsharded gradients of one block and their copy in the reduction's type, and the root's gradients
        grads = largest * (b.compute + b.reduce) + root if job.method == "full" else 0.0
        return gathered, gathered + grads
    if traits.weights == "module":
        live = max(min(ZERO_MAX_LIVE, shape.parameters) * b.compute, root + block) + unpacked
        if job.method == "full":
            live += 2 * job.zero_bucket * b.compute  # allocated from the start
        return live, live + (root if job.method == "full" else 0.0)
    if traits.shards_optimizer:
        bucket = min(2 * job.zero_bucket, 2.0 * job.trained_parameters) * b.compute
        return 0.0, bucket
    bucket = min(25 * 2**20 * 2, job.trained_parameters * b.gradients)  # DDP: gradients live in the buckets
    return bucket, bucket


#: What memory depends on: everything of a job but the machine, of which only the vendor counts.
_COUNTED = operator.attrgetter(*(f.name for f in fields(TrainingJob) if f.name not in ("gpu", "links")), "gpu.vendor")
_MOST_KEPT = 50_000
_kept: dict[Hashable, Memory] = {}


def predict(job: TrainingJob, *, context: bool = True, fragmentation: float = FRAGMENTATION) -> Memory:
    """Peak GiB of one rank. ``context``: count what lies outside torch's allocator (what has to fit on the device).

    The same job on another machine is counted once: many sites are asked with one recipe.
    """
    key = (_COUNTED(job), context, fragmentation)
    if key not in _kept:
        if len(_kept) >= _MOST_KEPT:
            _kept.clear()
        _kept[key] = _predict(job, context, fragmentation)
    return _kept[key]


def _predict(job: TrainingJob, context: bool, fragmentation: float) -> Memory:
    state = static_state(job)
    kept, backward = activation_bytes(job)
    loss = loss_bytes(job)
    communication = communication_bytes(job)
    gradients = state.gradients
    if job.gradient_in_backward:
        gradients = job.shape.largest_block * job.bytes.gradients
    buffers = job.layout.world > 1 and job.layout.traits.gradient_buffers
    early = gradients if job.grad_accum > 1 or buffers else 0.0
    checkpointed = job.checkpointing != "none"
    blocks = max(job.shape.layers, 1)
    forward_buffers, backward_buffers = communication
    moments = (
        (early, kept, loss, forward_buffers),
        (early, kept + (backward if checkpointed else 0.0), 0.0, backward_buffers),
        (gradients, kept / blocks + backward, 0.0, backward_buffers),
    )
    gradient, activations, workspace, buffer = max(moments, key=sum)
    dynamic = activations + workspace + buffer
    outside = 0.0
    if context:
        outside = CONTEXT_GIB[job.gpu.vendor] + (FABRIC_GIB[job.gpu.vendor] if job.layout.world > 1 else 0.0)
    return Memory(
        parameters=(state.parameters + state.working) / GIB,
        gradients=gradient / GIB,
        optimizer=state.optimizer / GIB,
        adapters=state.adapters / GIB,
        activations=activations / GIB,
        loss=workspace / GIB,
        communication=buffer / GIB,
        framework=outside,
        fragmentation=fragmentation * dynamic / GIB,
        host=state.host / GIB,
    )


def capacity(job: TrainingJob) -> float | None:
    """GiB of the GPU as the driver shows it, or ``None`` where nobody published it."""
    return job.gpu.memory_gib
