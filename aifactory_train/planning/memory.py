"""Peak memory of one rank, component by component.

The peak is the largest of three moments: the loss (all kept activations and the logits' workspace, but with one
micro-batch per step no gradients yet), the start of backward (all kept activations and one recomputed block) and its
end (all gradients, one block and its transient gradients). In between, activations are freed while gradients grow, both
linearly, so nothing in between is higher.

Which tensors a block keeps for backward is counted operation by operation (:func:`block_kept`), per token, from what
autograd saves; ``tests/planning/test_memory_tracker.py`` holds the counts against torch's own memory tracker.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Hashable
from dataclasses import dataclass, field, fields

from aifactory_train.model.shapes import ModelShape, is_target
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


# ---- what a block keeps


def _norm(job: TrainingJob, width: int, rows: int = 1) -> float:
    """Bytes that one RMS norm over ``width`` elements in ``rows`` groups keeps per token."""
    e = job.bytes.compute
    if job.stack.norm == "fused":
        return e * width + 4 * rows
    trained = job.method == "full"
    if job.shape.family in ("olmo2", "olmo3", "gemma3_text"):  # they multiply by the weight in fp32
        kept = 4.0 * width
    else:
        kept = e * width
    return 4 * width + 4 * rows + (kept if trained else 0)  # the fp32 copy (in fp32 the input itself)


def _remade(job: TrainingJob, *names: str) -> bool:
    """Whether the layers ``names`` of a block are adapted and run together, so that their common input is not kept: all
    of them plain (no bias, DoRA or 4-bit base), between an RMS norm before and a gated MLP."""
    shape = job.shape
    targets = job.targets if isinstance(job.targets, str) else list(job.targets)
    plain = job.method == "lora" and not (job.dora or job.compiled or shape.qkv_bias or shape.linear_bias)
    pre_norm = shape.mlp == "gated" and shape.family not in ("olmo2", "olmo3", "gemma3_text")
    whole = job.layout.traits.weights != "module"
    return job.stack.remakes and plain and pre_norm and whole and all(is_target(n, targets) for n in names)


def _linear_inputs(job: TrainingJob) -> float:
    """Bytes of the inputs that linear layers keep: for their own weight's gradient, or for an adapter's."""
    shape, e = job.shape, job.bytes.compute
    targets = job.targets if isinstance(job.targets, str) else list(job.targets)
    total = 0.0
    for group, width in ((("q", "k", "v"), shape.hidden), (("gate", "up"), shape.hidden), (("down",), shape.ffn)):
        names = [n for n in group if n in shape.linears()]
        if job.method == "full":
            after_norm = "down" not in group and shape.family not in ("olmo2", "olmo3")
            total += 0 if after_norm and job.stack.recomputes_norm else e * width
        else:
            hit = [n for n in names if is_target(n, targets)]
            copies = len(hit) if job.stack.casts_adapter_input else min(1, len(hit))
            if _remade(job, *(("q", "k", "v") if "q" in group else ("gate", "up", "down"))):
                copies = 0
            total += e * width * copies + sum(e * job.lora_rank for _ in hit)
    if job.method != "full" and is_target("o", targets):
        # the input itself is attention's output and counted there
        total += e * (shape.q_width if job.stack.casts_adapter_input else 0) + e * job.lora_rank
    return total


def _attention(job: TrainingJob) -> float:
    """Query, key, value, output and the log-sum-exp of flash attention; the score matrix too where it exists."""
    shape, e = job.shape, job.bytes.compute
    # torch's CPU kernel wants key and value repeated for every query head; GPU kernels read them as they are
    kv = shape.q_width if job.attention == "repeated" else shape.kv_width
    kept = e * (2 * shape.q_width + 2 * kv) + 4 * shape.heads
    if job.attention == "eager":
        kept += shape.heads * job.sequence * (e + 4)
    if shape.qk_norm == "head":
        kept += _norm(job, shape.q_width, shape.heads) + _norm(job, shape.kv_width, shape.kv_heads)
    elif shape.qk_norm == "full":
        kept += _norm(job, shape.q_width) + _norm(job, shape.kv_width)
    return kept


def _mlp(job: TrainingJob) -> float:
    """What the MLP keeps between its linear layers (their inputs apart)."""
    e, ffn = job.bytes.compute, job.shape.ffn
    if job.shape.mlp == "gated":
        return e * ffn * (3 if job.stack.glu == "eager" else 2)
    if job.shape.family == "apertus" and job.stack.glu == "eager":
        return e * ffn * 4 + ffn  # transformers' Python xIELU: input, two branches' factors, and the mask
    return e * ffn


def block_kept(job: TrainingJob) -> float:
    """Bytes per token that one block keeps for backward without checkpointing."""
    norms = job.shape.norms * _norm(job, job.shape.hidden)
    return norms + _linear_inputs(job) + _attention(job) + _mlp(job)


def block_kept_selective(job: TrainingJob) -> float:
    """Selective checkpointing keeps the block's input, attention's output and the output of every n-th linear layer."""
    shape, e = job.shape, job.bytes.compute
    kept = e * shape.hidden + e * shape.q_width + 4 * shape.heads
    targets = job.targets if isinstance(job.targets, str) else list(job.targets)
    outputs: list[int] = []
    for name, (_, out) in shape.linears().items():
        outputs.append(out)
        if job.method != "full" and is_target(name, targets):
            outputs += [job.lora_rank, out]
    return kept + e * sum(outputs[:: job.selective_every])


def kept_per_block(job: TrainingJob) -> float:
    """Bytes per token of one block under the job's checkpointing."""
    if job.checkpointing == "none":
        return block_kept(job)
    if job.checkpointing == "selective":
        return block_kept_selective(job)
    return job.bytes.compute * job.shape.hidden


def activation_bytes(job: TrainingJob) -> tuple[float, float]:
    """``(kept at the end of forward, more during backward)`` of one micro-batch, in bytes."""
    shape, e, tokens = job.shape, job.bytes.compute, job.tokens
    per_block = kept_per_block(job)
    blocks = 0.0 if job.offload_activations else shape.layers * per_block
    if job.offload_activations:
        blocks = 2 * per_block  # the one in use and the one being copied
    outside = (
        2 * e * shape.head_dim + _norm(job, shape.hidden) + 16
    )  # cos and sin, the last norm, token ids and positions
    kept = tokens * (blocks + outside)
    if job.checkpointing == "none":
        # gradients on their way through the loss, the last norm and the MLP's two halves
        return kept, tokens * (2 * e * max(shape.ffn, shape.q_width) + e * shape.hidden)
    shared = e * shape.hidden if job.checkpointing == "full" else _kept_and_recomputed(job)
    transient = e * shape.hidden
    if job.stack.glu == "fused":
        transient += 2 * e * shape.ffn  # both halves' gradients beside both halves
    return kept, tokens * (block_kept(job) - shared + transient)


def _kept_and_recomputed(job: TrainingJob) -> float:
    """Bytes per token that selective checkpointing keeps and that backward reads as they are: recomputation adds
    nothing there.

    The outputs of q and k (without a norm of their own), of o and of down are kept too, but backward reads what follows
    from them.
    """
    shape, e = job.shape, job.bytes.compute
    shared = e * (shape.hidden + shape.q_width) + 4 * shape.heads
    if job.selective_every != 1:
        return shared
    if job.attention != "repeated":
        shared += e * shape.kv_width  # v
    if shape.qk_norm != "none" and e > 2:
        shared += e * (shape.q_width + shape.kv_width)
    return shared + e * shape.ffn * (2 if shape.mlp == "gated" else 1)


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


@functools.lru_cache(maxsize=4096)
def _block_sizes(
    shape: ModelShape, method: str, rank: int, targets: str | tuple[str, ...], dora: bool, embeddings: bool
) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]]]:
    """Tensors of ``(a block, the root, a block's trained ones, the root's trained ones)``."""
    block, root = shape.block_tensors(), shape.root_tensors()
    if method == "full":
        return block, root, block, root
    trained = shape.lora_tensors(rank, targets if isinstance(targets, str) else list(targets), dora)
    outside = [(shape.vocab, shape.hidden)] * (1 if shape.tied else 2) if embeddings else []
    return block, root, trained, outside


def _shard_rows(tensors: list[tuple[int, int]], shard: int) -> int:
    """Elements of the largest shard when every tensor is split along its rows (FSDP2 pads to the first rank)."""
    return sum(-(-rows // shard) * columns for rows, columns in tensors)


def _shard_flat(tensors: list[tuple[int, int]], shard: int) -> int:
    """Elements of a shard when every tensor is flattened and split (ZeRO-3)."""
    return sum(-(-(rows * columns) // shard) for rows, columns in tensors)


def _share(
    layout: Layout, block: list[tuple[int, int]], outside: list[tuple[int, int]], layers: int, sharded: bool
) -> float:
    """Elements of one rank's share of ``layers`` blocks and what lies outside them; of all of them unless
    ``sharded``.
    """
    if not sharded:
        return _shard_flat(block, 1) * layers + _shard_flat(outside, 1)
    if layout.traits.cuts == "buffer":
        return math.ceil((_shard_flat(block, 1) * layers + _shard_flat(outside, 1)) / layout.shard)
    shard = _shard_flat if layout.traits.cuts == "elements" else _shard_rows
    return shard(block, layout.shard) * layers + shard(outside, layout.shard)


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
    block, root, trained_block, trained_root = _block_sizes(
        shape, job.method, job.lora_rank, job.targets, job.dora, job.train_embeddings
    )
    traits = layout.traits

    def elements(per_block: list[tuple[int, int]], outside: list[tuple[int, int]], sharded: bool) -> float:
        return _share(layout, per_block, outside, shape.layers, sharded)

    def quantised() -> float:
        """Bytes of frozen weights: under nf4 the blocks' matrices, not embeddings and vectors."""
        if job.method != "qlora":
            return elements(block, root, layout.traits.shards_parameters) * b.frozen
        matrices = [t for t in block if t[1] > 1]
        vectors = [t for t in block if t[1] == 1]
        packed = elements(matrices, [], layout.traits.shards_parameters) * NF4_BYTES
        return packed + elements(vectors, root, layout.traits.shards_parameters) * b.frozen

    frozen_bytes = quantised() if job.method != "full" else 0.0
    here = elements(trained_block, trained_root, layout.traits.shards_parameters)
    for_optimizer = elements(trained_block, trained_root, layout.traits.shards_optimizer)
    gradients = elements(trained_block, trained_root, layout.traits.shards_gradients) * b.gradients
    late = traits.shards_gradients and traits.reduces == "last" and job.accumulates_whole
    if late and job.grad_accum > 1 and layout.shard > 1:
        gradients = max(gradients, elements(trained_block, trained_root, False) * b.reduce)
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
    block = shape.block_parameters * (NF4_BYTES if job.method == "qlora" else b.compute)
    unpacked = shape.block_parameters * b.compute if job.method == "qlora" else 0.0
    root = (shape.embedding_parameters + shape.head_parameters) * b.compute
    if traits.weights == "block":
        gathered = 2 * block + unpacked + root  # this block and the prefetched one; the root stays gathered
        # unsharded gradients of one block and their copy in the reduction's type, and the root's gradients
        grads = shape.block_parameters * (b.compute + b.reduce) + root if job.method == "full" else 0.0
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
        gradients = job.shape.block_parameters * job.bytes.gradients
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
