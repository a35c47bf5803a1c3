"""Time of one optimizer step, as a roofline over what a rank computes and moves.

Every term has a physical meaning: matrix products at a share of the chip's peak, attention at another, pointwise work
and the optimizer at a share of the memory bandwidth, collectives at a share of the links, and the part of them that
computation hides. The shares are the calibrated constants (:class:`Constants`); ``data/calibration.json`` holds their
values and how they were obtained.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

from aifactory_train.core.errors import UserError
from aifactory_train.model import flops
from aifactory_train.planning.job import TrainingJob
from aifactory_train.planning.memory import NF4_BYTES, padded, trains_head

DATA = Path(__file__).resolve().parent / "data"

#: Between host and GPU, bytes per second of one rank: what a PCIe 4 x16 slot gives in practice (recalled; Grace and
#: MI250X are faster).
BUS_BYTES_PER_S = 20e9


@dataclass(frozen=True)
class Constants:
    """Calibrated constants. Efficiencies are shares of a peak; none depends on a model, a source or a number of GPUs.

    gemm: share of the dense bf16 peak that large matrix products reach, per architecture; an architecture without
    measurements takes ``gemm_default`` and a wider interval. attention_own: share of the peak that a flash-attention
    kernel written for the architecture reaches (FlashAttention-2 on sm_80, 3 or cuDNN on sm_90, 4 on sm_100);
    attention_ported: one written for an older architecture (FlashAttention-2, which torch's SDPA carries, on sm_90 and
    later) or for none. small: a product with as many rows as this runs at half of the large-product rate. pointwise:
    share of the memory bandwidth. links: share of the in-node and network bandwidth that ring collectives reach.
    hidden: share of collectives that computation can hide. low_power: exponent with which a power cap below the GPU's
    nominal power lowers the matrix rate. host_ns: nanoseconds per parameter of a rank when the optimizer runs on the
    host. launch_us: time that one kernel launch costs the host when nothing hides it (recalled, not fitted).
    """

    gemm: dict[str, float]
    gemm_default: float
    attention_own: float
    attention_ported: float
    small: float
    pointwise: float
    links: float
    hidden: float
    low_power: float
    host_ns: float
    launch_us: float
    measured: list[str]  # architectures that rows of the calibration ran on; the others of ``gemm`` are priors
    spread: float  # half-width of the interval, as a factor: [mid / (1 + spread), mid * (1 + spread)]
    spread_unmeasured: float  # the same for an architecture without measurements

    @classmethod
    def load(cls) -> Constants:
        return _load()


@functools.cache
def _load() -> Constants:
    values = json.loads((DATA / "calibration.json").read_text(encoding="utf-8"))["constants"]
    return Constants(**{f.name: values[f.name] for f in fields(Constants)})


@dataclass(frozen=True)
class Times:
    """Seconds per optimizer step of one rank."""

    matmul: float
    attention: float
    pointwise: float
    loss: float
    optimizer: float
    communication: float  # exposed
    communication_total: float
    host: float  # launches or host-side optimizer that nothing hides

    @property
    def step(self) -> float:
        return (
            self.matmul + self.attention + self.pointwise + self.loss + self.optimizer + self.communication + self.host
        )


# ---- work


def recomputed_share(job: TrainingJob) -> float:
    """Share of the blocks' forward matrix products that runs twice."""
    if job.checkpointing == "full":
        return 1.0
    if job.checkpointing == "none" or job.selective_every == 1:
        return 0.0
    every, kept = 0, 0
    for kind in job.shape.kinds:
        sizes = [a * b * times for a, b, times in kind.products.values()]
        every, kept = every + kind.layers * sum(sizes), kept + kind.layers * sum(sizes[:: job.selective_every])
    return 1 - kept / every


#: Passes over memory of a block's pointwise work, in units of (tokens x width x bytes): forward, backward.
#: Fused: kernels.md's floors (RMS norm with residual 8 and 8 bytes per element of the hidden size in bf16, SwiGLU 6 and
#: 10 of the MLP width, RoPE 4 and 4 of the heads). Eager: the same operations as separate kernels with fp32
#: intermediates, counted one by one.
_PASSES = {
    "fused": {"norm": (4, 4), "glu": (3, 5), "rope": (2, 2), "plain": (2, 3)},
    # a copy in, a weighted result out, and the same backward; the router's scores, softmax and choice in fp32
    "dealt": {"tokens": (4, 4), "scores": (6, 4)},
    "eager": {"norm": (13, 18), "glu": (5, 8), "rope": (9, 9), "plain": (2, 3)},
}


def pointwise_bytes(job: TrainingJob) -> float:
    """Bytes per token that the pointwise work of one block moves, forward and backward and recomputation; of a hybrid
    the mean over its blocks."""
    return sum(kind.shape.layers * _pointwise_bytes(kind) for kind in job.kinds) / max(1, job.shape.layers)


def _pointwise_bytes(job: TrainingJob) -> float:
    shape, e = job.shape, job.bytes.compute
    norm = _PASSES["eager" if job.stack.norm == "eager" else "fused"]
    rope = _PASSES["eager" if job.stack.name in ("eager", "native") else "fused"]
    glu = _PASSES["eager" if job.stack.glu == "eager" else "fused"]
    again = 0.0 if job.checkpointing == "none" else 1.0
    act = glu["glu"] if shape.mlp == "gated" else glu["plain"]

    def passes(pair: tuple[int, int]) -> float:
        return pair[0] * (1 + again + job.scored) + pair[1]

    total = shape.norms * shape.hidden * passes(norm["norm"]) + shape.ffn * passes(act)
    if shape.experts is not None:
        # each chosen expert's copy of the token and its result are dealt out and gathered by index
        routed = shape.experts.chosen * (
            shape.experts.ffn * passes(act) + shape.hidden * passes(_PASSES["dealt"]["tokens"])
        )
        total += routed + shape.experts.count * passes(_PASSES["dealt"]["scores"])
    if shape.recurrence is not None:
        recurrence = shape.recurrence
        total += (recurrence.channels + recurrence.heads * recurrence.value) * passes(glu["glu"])
    else:
        if not shape.learned_positions:
            total += (shape.q_width + shape.kv_width) * passes(rope["rope"])
        if shape.qk_norm != "none":
            total += (shape.q_width + shape.kv_width) * passes(norm["norm"])
        if shape.gated_attention:
            total += shape.q_width * passes(glu["glu"])
    if job.method != "full":
        # the adapter's small products and the addition of its output are bound by memory
        extra = job.active_adapter_parameters / max(1, shape.layers) / max(1, job.lora_rank)
        total += (6.0 + 2.0 * job.scored) * extra
    return e * total


def logit_passes(job: TrainingJob) -> float:
    """Bytes that the loss moves per logit."""
    if job.loss_chunk is not None or job.stack.name == "fused":
        # kept on chip as far as the row allows: three passes, see docs/planning.md; 4 for logits that are made once
        # more and only read
        return 8.0 + 4.0 * (job.preference + job.scored)
    return 16.0 if job.compiled else 44.0


def collectives(job: TrainingJob) -> tuple[float, float]:
    """Bytes that a rank receives per step: ``(per micro-batch gathers and reductions, once per step)``, over its shard
    group, plus the all-reduce between replicas counted in the second."""
    layout, b, shape = job.layout, job.bytes, job.shape
    if layout.world == 1:
        return 0.0, 0.0
    share = (layout.shard - 1) / layout.shard
    whole, _, grads = padded(job)
    outside = shape.embedding_parameters + shape.head_parameters
    weights = whole * b.compute
    if job.method != "full":
        packed = shape.packed_parameters if job.method == "qlora" else 0
        frozen = (whole - shape.root_parameters - packed) * b.compute + packed * NF4_BYTES
        weights = frozen + outside * b.compute + grads * b.compute
    each = layout.traits.reduces == "each"
    if layout.traits.shards_parameters:
        # forward and backward gather the weights; gradients are reduce-scattered once a step, by ZeRO-3 for every
        # micro-batch
        scatter = grads * b.reduce * share
        if each:
            return (2 + job.scored) * weights * share + scatter, 0.0
        return (2 + job.scored) * weights * share, scatter
    if layout.traits.shards_optimizer:
        gather = grads * b.compute * share  # the updated weights, once a step
        scatter = grads * b.reduce * share
        return (scatter, gather) if each else (0.0, gather + scatter)
    return 0.0, 2 * grads * b.gradients * (layout.world - 1) / layout.world


#: Microseconds that a collective takes beside the time of its bytes: to begin, and for every step of a ring or tree to
#: the next GPU of a node and to the next node. NCCL's own tuning tables (src/graph/tuning.cc at 5067397, June 2026,
#: protocol LL128): ring 14, 1.9 and 4.0; tree 14, 1.25 and 8.5. Not fitted: no measurement of the calibration is bound
#: by them.
START_US, RING_US, TREE_US = 14.0, (1.9, 4.0), (1.25, 8.5)
#: Bytes of a bucket of DDP's gradients.
DDP_BUCKET = 25 * 2**20


def ring_seconds(ranks: int, per_node: int) -> float:
    """Seconds that a gather or a reduction over ``ranks`` neighbouring ranks takes before its first byte is through: a
    ring has a step for every rank, so that it grows with their number."""
    if ranks <= 1:
        return 0.0
    nodes = -(-ranks // per_node)
    return 1e-6 * (START_US + (ranks - nodes) * RING_US[0] + (nodes - 1) * RING_US[1])


def tree_seconds(nodes: int, in_node: int) -> float:
    """The same of a sum that everybody gets, over ``in_node`` ranks of each of ``nodes`` nodes: up and down a tree."""
    if nodes * in_node <= 1:
        return 0.0
    return 1e-6 * (START_US + 2 * ((in_node - 1) * TREE_US[0] + math.log2(max(1, nodes)) * TREE_US[1]))


def latency(job: TrainingJob) -> tuple[float, float]:
    """Seconds that the collectives of :func:`collectives` take beside their bytes: ``(per micro-batch, once per
    step)``."""
    layout, per_node = job.layout, job.links.gpus_per_node
    traits, units = layout.traits, job.shape.layers + 1  # blocks and the root
    ring = ring_seconds(layout.shard, per_node)
    buckets = math.ceil(job.trained_parameters / job.zero_bucket)
    if layout.world == 1:
        return 0.0, 0.0
    if traits.weights == "block":
        copies = min(layout.replicas, -(-layout.world // per_node))
        summed = units * tree_seconds(copies, layout.replicas // copies) if layout.replicas > 1 else 0.0
        # a block is gathered for forward and for backward, the root once
        return ((2 + job.scored) * (units - 1) + 1) * ring, units * ring + summed
    if traits.shards_parameters:
        return (2 + job.scored) * (units - 1) * ring + buckets * ring, 0.0
    if traits.shards_optimizer:
        return (buckets * ring, buckets * ring) if traits.reduces == "each" else (0.0, 2 * buckets * ring)
    sums = math.ceil(job.trained_parameters * job.bytes.gradients / DDP_BUCKET)
    return 0.0, sums * tree_seconds(-(-layout.world // per_node), min(layout.world, per_node))


def _rate(job: TrainingJob, constants: Constants, ranks: int) -> float:
    """Bytes per second at which a ring over ``ranks`` neighbouring ranks delivers data to each of them.

    Inside a node the slower of a GPU's links; across nodes every byte also enters each node once, over all NICs
    together.
    """
    inside = (job.links.in_node_gb_s or 0) * 1e9 * constants.links
    if ranks <= job.links.gpus_per_node:
        return _needed(inside, "in-node link bandwidth", job)
    across = (job.links.node_gb_s or 0) * 1e9 * constants.links
    if job.links.gpus_per_node == 1:  # nothing travels inside a node
        return _needed(across, "network bandwidth of a node", job)
    return min(_needed(inside, "in-node link bandwidth", job), _needed(across, "network bandwidth of a node", job))


def _needed(value: float, what: str, job: TrainingJob) -> float:
    if not value:
        raise UserError(
            f"the {what} is not published for {job.gpu.sku}", fix="give it in an overlay of the site profile"
        )
    return value


def matrix_rate(job: TrainingJob, constants: Constants, tokens: float) -> float:
    """FLOP/s of a block's matrix products over ``tokens`` rows."""
    gpu = job.gpu
    if not gpu.bf16_tflops:
        raise UserError(
            f"{gpu.sku} has no bf16 peak", where="precision.compute", fix="choose another partition or site"
        )
    share = constants.gemm.get(gpu.arch or "", constants.gemm_default)
    if gpu.power_cap_w and gpu.tdp_w and gpu.power_cap_w < gpu.tdp_w:
        share *= (gpu.power_cap_w / gpu.tdp_w) ** constants.low_power
    return gpu.bf16_tflops * 1e12 * share * tokens / (tokens + constants.small)


def executed_beside(job: TrainingJob, document: float, supervised: float) -> float:
    """FLOPs per token that a preference method runs beside training's own (:func:`aifactory_train.model.flops.step`):
    forward passes without a backward, and the output layer once more in backward."""
    f = flops.forward(job.shape, document, adapter_parameters=job.active_adapter_parameters, supervised=supervised)
    forward = f.linear + f.adapters + f.attention_causal + f.recurrent_executed
    return job.scored * forward + (job.preference + job.scored) * f.head


def kernel_launches(job: TrainingJob) -> float:
    """Kernels of one micro-batch. Per block and forward about 60 in eager code and 30 with fused or compiled blocks, 6
    more for each adapter (counted in transformers' Llama and peft); backward launches 1.5 times as many, recomputation
    runs forward again. Experts are one grouped product each way, not a loop."""
    targets = job.targets if isinstance(job.targets, str) else list(job.targets)
    passes = (2.5 if job.checkpointing == "none" else 3.5) + job.scored
    total = 0.0
    for kind in job.shape.kinds:
        adapters = 0 if job.method == "full" else len(kind.adapted(targets))
        per_block = (60 if job.stack.name in ("eager", "native") else 30) + 6 * adapters
        # router, choice, sorting and dealing out; a recurrence's convolution, gates and passes over chunks
        per_block += (15 if kind.experts is not None else 0) + (15 if kind.recurrence is not None else 0)
        total += kind.layers * per_block * passes
    return total


def attention_rate(job: TrainingJob, constants: Constants) -> float:
    """FLOP/s of flash attention over the causal half of the score matrix."""
    own = {
        "sm_80": ("flash", "flash2", "sdpa"),
        "sm_86": ("flash", "flash2", "sdpa"),
        "sm_89": ("flash", "flash2", "sdpa"),
    }
    own |= {
        "sm_90": ("flash3", "te", "cudnn"),
        "sm_100": ("flash4", "te", "cudnn"),
        "sm_103": ("flash4", "te", "cudnn"),
    }
    share = constants.attention_own if job.attention in own.get(job.gpu.arch or "", ()) else constants.attention_ported
    power = (
        (job.gpu.power_cap_w / job.gpu.tdp_w) ** constants.low_power if job.gpu.power_cap_w and job.gpu.tdp_w else 1.0
    )
    return (job.gpu.bf16_tflops or 0) * 1e12 * share * min(1.0, power)


def _compute_seconds(
    job: TrainingJob, c: Constants, rate: float, bandwidth: float
) -> tuple[float, float, float, float]:
    """Seconds of one micro-batch: ``(matrix products, attention, pointwise work, loss)``."""
    shape, tokens = job.shape, job.tokens
    context = min(job.document or job.sequence, job.sequence)
    f = flops.forward(shape, context, adapter_parameters=job.active_adapter_parameters, supervised=job.supervised)
    trains_base = job.method == "full"
    again = recomputed_share(job)
    matmul = 0.0
    passes = (3 if trains_base else 2) + again + job.scored
    for kind in shape.kinds:
        routed = 0
        if kind.experts is not None:
            # each expert multiplies the tokens that were sent to it: fewer rows, a lower rate
            routed = kind.experts.chosen * kind.experts.weights(kind.hidden)
            rows = tokens * kind.experts.chosen / kind.experts.count
            matmul += tokens * 2.0 * kind.layers * routed * passes / matrix_rate(job, c, rows)
        matmul += tokens * 2.0 * kind.layers * (kind.block_linear_parameters - routed) * passes / rate
    adapters = f.adapters * (3 + (1 if job.checkpointing == "full" else 0) + job.scored)
    matmul += tokens * adapters / rate
    head = f.head * ((3 if trains_head(job) else 2) + job.preference + job.scored)
    # selective checkpointing keeps attention's output and does not run it again
    attention_flops = f.attention_causal * (3.5 + (1 if job.checkpointing == "full" else 0) + job.scored)
    attention_flops += f.recurrent_executed * (3 + (0 if job.checkpointing == "none" else 1) + job.scored)
    attention = tokens * attention_flops / attention_rate(job, c)
    pointwise = tokens * shape.layers * pointwise_bytes(job) / bandwidth
    if job.method == "qlora":
        # every product unpacks its weight first, forward, backward and recomputation
        pointwise += (
            shape.packed_parameters * (NF4_BYTES + 2 * job.bytes.compute) * (2 + again + job.scored) / bandwidth
        )
    loss = tokens * (head / rate + job.supervised * shape.vocab * logit_passes(job) / bandwidth)
    return matmul, attention, pointwise, loss


def _collective_seconds(job: TrainingJob, c: Constants) -> tuple[float, float]:
    """Seconds of :func:`collectives` with nothing hidden: ``(per micro-batch, once per step)``, the sum over copies and
    every collective's :func:`latency` included.
    """
    per_micro, per_step = collectives(job)
    shard_rate = (
        _rate(job, c, job.layout.shard if job.layout.shard > 1 else job.layout.world) if job.layout.world > 1 else 1.0
    )
    waits = latency(job)
    gather = per_micro / shard_rate + waits[0]
    reduce = per_step / shard_rate + waits[1]
    if job.layout.replicas > 1 and job.layout.shard > 1:
        # each rank reduces its own shard with its peers in the other replicas; the ranks of a node share the NICs
        piece = 2 * job.trained_parameters * job.bytes.reduce / job.layout.shard
        peers = min(job.layout.shard, job.links.gpus_per_node)
        reduce += piece * peers / _rate(job, c, job.layout.world)
    return gather, reduce


def predict(job: TrainingJob, constants: Constants | None = None) -> Times:
    """Seconds of one optimizer step. Raises :class:`UserError` where the GPU or the links lack a constant."""
    c = constants or Constants.load()
    gpu, micro = job.gpu, job.grad_accum
    rate = matrix_rate(job, c, job.tokens)
    bandwidth = (gpu.bandwidth_gb_s or 0) * 1e9 * c.pointwise
    if not bandwidth:
        raise UserError(
            f"the memory bandwidth of {gpu.sku} is not known", fix="give it in an overlay of the site profile"
        )

    matmul, attention, pointwise, loss = _compute_seconds(job, c, rate, bandwidth)
    local = job.trained_parameters / (job.layout.shard if job.layout.traits.shards_optimizer else 1)
    host = 0.0
    state = 2 * (job.bytes.optimizer + job.bytes.parameters) + job.bytes.gradients + job.bytes.compute
    if job.layout.offload_optimizer:
        optimizer, host = 0.0, local * c.host_ns * 1e-9
    else:
        optimizer = local * state / bandwidth

    gather, reduce = _collective_seconds(job, c)
    compute = matmul + attention + pointwise + loss
    # what the other micro-batches and the last backward can hide
    hidden = c.hidden if job.overlaps else 0.0
    exposed = max(gather - hidden * compute, (1 - hidden) * gather)
    exposed_step = max(reduce - hidden * compute * 2 / 3, (1 - hidden) * reduce)
    if job.layout.offload_parameters:
        # a rank's shard crosses the bus for every gather, and its gradients come back once
        packed = job.shape.packed_parameters if job.method == "qlora" else 0
        frozen = (job.frozen_parameters - packed) * job.bytes.frozen + packed * NF4_BYTES
        shard = (frozen + job.trained_parameters * job.bytes.parameters) / job.layout.shard
        host += (
            (2 + job.scored) * micro * shard + job.trained_parameters * job.bytes.gradients / job.layout.shard
        ) / BUS_BYTES_PER_S

    # a launch-bound step cannot run faster than its kernels are launched
    launches = kernel_launches(job) * c.launch_us * 1e-6
    idle = max(0.0, launches - compute)
    return Times(
        matmul=micro * matmul,
        attention=micro * attention,
        pointwise=micro * pointwise,
        loss=micro * loss,
        optimizer=optimizer,
        communication=micro * exposed + exposed_step,
        communication_total=micro * gather + reduce,
        host=host + micro * idle,
    )


def tokens_per_s(job: TrainingJob, constants: Constants | None = None) -> float:
    """Token positions per second of one rank."""
    return job.tokens * job.grad_accum / predict(job, constants).step


def interval(job: TrainingJob, mid: float, constants: Constants | None = None) -> tuple[float, float]:
    """``(low, high)`` around ``mid`` from the spread of the calibration; wider where the architecture was not measured
    or a link is assumed.
    """
    c = constants or Constants.load()
    known = (job.gpu.arch or "") in c.measured and not (job.links.assumed and job.layout.world > 1)
    width = c.spread if known else max(c.spread, c.spread_unmeasured)
    return mid / (1 + width), mid * (1 + width)
