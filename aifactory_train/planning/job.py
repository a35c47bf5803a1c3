"""What a prediction needs to know: the GPU, the links, how the model is spread, and what one step computes."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

from aifactory_train.core.errors import UserError
from aifactory_train.model.shapes import ModelShape
from aifactory_train.parallel.traits import DEFAULT, ENGINES, EngineTraits, traits_of

GIB = 2**30

#: The default engine on one rank, which has nothing to spread.
SINGLE = "single"
CHECKPOINTING = ("none", "selective", "full")


@dataclass(frozen=True)
class GpuRates:
    """Constants of one GPU as the scheduler counts it. ``None`` = not known, and what depends on it is then refused."""

    sku: str
    arch: str | None = None
    vendor: str | None = None
    memory_gib: float | None = None  # what the driver shows where known, else nominal
    bandwidth_gb_s: float | None = None
    bf16_tflops: float | None = None  # dense peak
    link_gb_s: float | None = None  # all in-node links together, one direction
    tdp_w: float | None = None
    unified_memory: bool = False
    power_cap_w: float | None = None

    @property
    def ridge(self) -> float:
        """Machine balance: bf16 FLOPs per byte of memory traffic."""
        return (self.bf16_tflops or 0) * 1e3 / (self.bandwidth_gb_s or 1)


@dataclass(frozen=True)
class Links:
    """Bandwidths in GB/s, one direction."""

    gpus_per_node: int
    in_node_gb_s: float | None  # one GPU to the others of its node
    node_gb_s: float | None  # a node to the others, all NICs together
    assumed: tuple[str, ...] = ()  # which of them nobody published


@dataclass(frozen=True)
class Layout:
    """How parameters, gradients and optimizer state are spread over ``world`` ranks.

    ``shard``: ranks that share one copy of what the engine shards (1: every rank has all). ``world / shard`` copies
    exist.
    """

    engine: str
    world: int
    shard: int
    offload_optimizer: bool = False
    offload_parameters: bool = False

    def __post_init__(self) -> None:
        traits_of(self.setting)  # refuses an unknown one
        if self.world < 1 or self.shard < 1 or self.world % self.shard:
            raise UserError(
                f"{self.world} ranks cannot be divided into groups of {self.shard}",
                where="parallel.shard_size",
                fix="choose a divisor of the number of ranks",
            )

    @property
    def setting(self) -> str:
        """The engine as ``parallel.engine`` names it."""
        return DEFAULT if self.engine == SINGLE else self.engine

    @property
    def traits(self) -> EngineTraits:
        return ENGINES[self.setting]

    @property
    def replicas(self) -> int:
        return self.world // self.shard

    @property
    def deepspeed(self) -> bool:
        return self.traits.zero_stage is not None


@dataclass(frozen=True)
class Bytes:
    """Bytes per element of each kind of state.

    ``parameters``: trained parameters as the optimizer sees them (the master copy). ``working``: a second,
    lower-precision copy that computes (DeepSpeed keeps one; FSDP2 makes one per block while it computes; autocast makes
    one under DDP); 0 = none. ``optimizer``: bytes of optimizer state per trained parameter, without the master copy.
    """

    parameters: float = 4
    working: float = 2
    gradients: float = 4
    optimizer: float = 8
    frozen: float = 2
    compute: float = 2
    reduce: float = 4


@dataclass(frozen=True)
class Stack:
    """Which tensors the blocks keep for backward and how often they touch memory.

    norm: 'eager' (an fp32 copy and the normalised values are kept) or 'fused' (input and one statistic per row).
    glu: 'eager' (both halves, the activation, their product) or 'fused' (both halves and the product).
    loss: bytes per logit at the peak of an unchunked loss; 0 = the logits never exist as a whole.
    """

    name: str = "fused"
    norm: str = "fused"
    glu: str = "fused"
    loss_bytes_per_logit: float = 0.0
    casts_adapter_input: bool = False  # peft with fp32 adapters over a bf16 base copies each adapter's input
    #: adapted layers run together (our kernels/lora_linear/several.py): what follows a norm or the activation is made
    #: again in backward rather than kept
    remakes: bool = False
    recomputes_norm: bool = (
        False  # the norm's output is computed again in backward rather than kept (torch.compile's partitioner)
    )


#: Loss at its peak, bytes per logit, when the logits exist as a whole. eager: bf16 logits (2), their fp32 copy (4),
#: log-softmax (4), the fp32 gradient (4). compiled: fitted (data/calibration.json), between the bf16 logits with their
#: fp32 log-softmax (6) and what else is not fused away.
LOGIT_BYTES = {"eager": 14.0, "compiled": 7.0, "fused": 6.0, "chunked": 0.0}

STACKS = {
    "eager": Stack("eager", "eager", "eager", LOGIT_BYTES["eager"]),
    "native": Stack("native", "fused", "eager", LOGIT_BYTES["eager"]),
    "compiled": Stack("compiled", "fused", "fused", LOGIT_BYTES["compiled"]),
    # torch's own RMS norm under torch.compile: its output follows from what it keeps; a hand-written one with casts
    # keeps its output
    "compiled_native": Stack("compiled_native", "fused", "fused", LOGIT_BYTES["compiled"], recomputes_norm=True),
    "fused": Stack("fused", "fused", "fused", LOGIT_BYTES["fused"]),
}


@functools.lru_cache(maxsize=1024)
def _adapter_parameters(shape: ModelShape, rank: int, targets: str | tuple[str, ...], dora: bool) -> int:
    return shape.lora_parameters(rank, targets if isinstance(targets, str) else list(targets), dora)


@dataclass(frozen=True)
class TrainingJob:
    """Everything one prediction depends on. Sequences and micro-batches are per rank; one *micro-batch* is
    ``micro_batch * sequence`` token positions."""

    shape: ModelShape
    gpu: GpuRates
    links: Links
    layout: Layout
    sequence: int
    micro_batch: float
    grad_accum: int = 1
    method: str = "full"  # full | lora | qlora
    lora_rank: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    dora: bool = False
    train_embeddings: bool = False
    bytes: Bytes = field(default_factory=Bytes)
    checkpointing: str = "none"
    selective_every: int = 1  # selective keeps the output of every n-th linear layer
    stack: Stack = field(default_factory=lambda: STACKS["fused"])
    document: float | None = None  # mean tokens of a document; attention stays inside it. None: the whole sequence
    supervised: float = 1.0  # share of positions that carry loss
    loss_chunk: int | None = None  # rows of logits that exist at once; None: all of them (Stack.loss_bytes_per_logit)
    gradient_in_backward: bool = False  # the optimizer steps inside backward: gradients never exist as a whole
    offload_activations: bool = False
    attention: str = "flash"
    compiled: bool = False
    #: FSDP2 as our engine accumulates: no reduction per micro-batch, so whole gradients live on every rank until the
    #: last one
    accumulates_whole: bool = False
    overlaps: bool = True  # collectives run beside computation
    zero_bucket: float = 5e7  # elements of DeepSpeed's gradient and gather buckets; its own default is ten times ours
    preference: bool = (
        False  # a preference loss of whole answers: backward makes the logits again (methods/preference_loss.py)
    )
    scored: float = 0.0  # forward passes over the step's positions without a backward (KTO's exchanged answers: 1)

    def __post_init__(self) -> None:
        if self.checkpointing not in CHECKPOINTING:
            raise UserError(
                f"unknown activation checkpointing '{self.checkpointing}'", where="parallel.activation_checkpointing"
            )
        if self.shape.max_positions and self.sequence > self.shape.max_positions:
            raise UserError(
                f"sequences of {self.sequence} tokens are longer than the {self.shape.max_positions} positions of "
                f"{self.shape.name}",
                where="data.sequence_length",
                fix=f"--set data.sequence_length={self.shape.max_positions}",
            )

    @property
    def tokens(self) -> float:
        """Token positions of one micro-batch of one rank."""
        return self.micro_batch * self.sequence

    @property
    def adapter_parameters(self) -> int:
        if self.method == "full":
            return 0
        return _adapter_parameters(self.shape, self.lora_rank, self.targets, self.dora)

    @property
    def active_adapter_parameters(self) -> int:
        """Those of :attr:`adapter_parameters` that one token meets: of experts' adapters, those of its experts."""
        if self.method == "full":
            return 0
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        return self.shape.active_lora_parameters(self.lora_rank, targets)

    @property
    def kinds(self) -> list[TrainingJob]:
        """This job for each kind of block of the model: ``shape`` is then the kind's."""
        return [self] if not self.shape.parts else [replace(self, shape=kind) for kind in self.shape.parts]

    @property
    def trained_parameters(self) -> int:
        if self.method == "full":
            return self.shape.parameters
        extra = self.shape.embedding_parameters + self.shape.head_parameters if self.train_embeddings else 0
        return self.adapter_parameters + extra

    @property
    def frozen_parameters(self) -> int:
        """Parameters that are not trained (a trained copy of the embeddings exists beside the frozen one under
        peft).
        """
        return 0 if self.method == "full" else self.shape.parameters

    def with_(self, **changes) -> TrainingJob:
        return replace(self, **changes)
