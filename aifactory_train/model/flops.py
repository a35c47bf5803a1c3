"""How many floating-point operations a training step needs (*model* FLOPs) and how many it runs (*executed* FLOPs).

Counts are per token position, padding included, matrix products only (2 FLOPs per multiply-add; pointwise work, norms
and the optimizer are left out, as everywhere in the literature). Two attention counts are kept apart, because published
utilisations use both: *full* counts the whole score matrix (4 x context x width forward), *causal* the half that a
causal kernel has to compute.

Model FLOPs: forward, the gradient of the inputs, and the gradient of the weights that are trained (so 6 per parameter
and token for full fine-tuning and about 4 for adapters). Executed FLOPs add the second forward of recomputed blocks.
Attention's backward is 2.5 x its forward as flash-attention runs it (recomputation inside the kernel included) in the
executed count, and 2 x in the model count (PaLM, arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aifactory_train.model.shapes import ModelShape


@dataclass(frozen=True)
class ForwardFlops:
    """Forward FLOPs per token of the whole model, by kind. Of routed experts those count that a token is sent to."""

    linear: float  # projections and MLPs of all blocks
    adapters: float  # low-rank products
    head: float  # the output layer, at every supervised position counted
    attention_full: float
    attention_causal: float
    recurrent: float = 0.0  # states of recurrent layers, token by token
    recurrent_executed: float = 0.0  # the same as chunked kernels run it


@dataclass(frozen=True)
class StepFlops:
    """FLOPs per token of one optimizer step, forward and backward."""

    model: float  # attention as a causal kernel computes it
    model_full_attention: float  # attention over the whole score matrix, as most published utilisations count it
    executed: float  # with recomputation


def mean_context(sequence: float, window: int | None = None) -> float:
    """Keys that an average query of a causal sequence of ``sequence`` tokens sees (half of it; less in a window)."""
    if window is None or window >= sequence:
        return (sequence + 1) / 2
    # the first `window` queries see a triangle, the others a full window
    return (window * (window + 1) / 2 + (sequence - window) * window) / sequence


def forward(
    shape: ModelShape, sequence: float, *, adapter_parameters: int = 0, supervised: float = 1.0
) -> ForwardFlops:
    """Forward FLOPs per token. ``sequence``: tokens of a document (attention stays inside it); ``supervised``: share of
    the positions whose logits are computed; ``adapter_parameters``: those that a token meets."""
    linear = full = causal = recurrent = executed = 0.0
    for kind in shape.kinds:
        linear += 2.0 * kind.layers * kind.block_linear_parameters
        if kind.recurrence is not None:
            recurrent += kind.layers * kind.recurrence.flops
            executed += kind.layers * kind.recurrence.executed_flops
            continue
        plain = kind.layers - kind.window_layers
        context = plain * mean_context(sequence) + kind.window_layers * mean_context(sequence, kind.window)
        causal += 4.0 * kind.q_width * context
        full += 4.0 * kind.q_width * (plain * sequence + kind.window_layers * min(sequence, kind.window or sequence))
    return ForwardFlops(
        linear=linear,
        adapters=2.0 * adapter_parameters,
        head=2.0 * shape.vocab * shape.hidden * supervised,
        attention_full=full,
        attention_causal=causal,
        recurrent=recurrent,
        recurrent_executed=executed,
    )


def step(
    shape: ModelShape,
    sequence: float,
    *,
    trains_base: bool = True,
    trains_head: bool | None = None,
    adapter_parameters: int = 0,
    recomputed: float = 0.0,
    supervised: float = 1.0,
) -> StepFlops:
    """FLOPs per token of forward and backward.

    ``trains_base``: all weights are trained (else adapters only). ``recomputed``: share of the blocks' forward matrix
    products that runs a second time (1 for full activation checkpointing).
    """
    f = forward(shape, sequence, adapter_parameters=adapter_parameters, supervised=supervised)
    trains_head = trains_base if trains_head is None else trains_head
    linear = f.linear * (3 if trains_base else 2) + f.adapters * 3 + f.head * (3 if trains_head else 2)
    recompute = recomputed * (f.linear + f.adapters + f.attention_causal + f.recurrent_executed)
    return StepFlops(
        model=linear + 3 * f.attention_causal + 3 * f.recurrent,
        model_full_attention=linear + 3 * f.attention_full + 3 * f.recurrent,
        executed=linear + 3.5 * f.attention_causal + 3 * f.recurrent_executed + recompute,
    )


# ---- a step of real documents, counted exactly


@dataclass(frozen=True)
class Work:
    """FLOPs of one optimizer step over all ranks, from the documents that were in it.

    ``model`` is what the mathematics needs (real tokens, causal attention inside each document); ``executed`` is what
    runs: padding, recomputed blocks, and the recomputation inside flash attention's backward. ``*_full_attention``
    count the whole score matrix of each document, as most published utilisations and torch's ``FlopCounterMode`` do.
    """

    model: float
    model_full_attention: float
    executed: float
    executed_full_attention: float

    def __add__(self, other: Work) -> Work:
        return Work(
            self.model + other.model,
            self.model_full_attention + other.model_full_attention,
            self.executed + other.executed,
            self.executed_full_attention + other.executed_full_attention,
        )


@dataclass(frozen=True)
class Trained:
    """What is trained. ``rank`` 0: all weights; else adapters of this rank on ``targets``, everything else frozen.

    ``input_gradient``: the first block's input needs a gradient (trained embeddings).
    """

    rank: int = 0
    targets: str | list[str] = "all-linear"
    embeddings: bool = False
    recompute: str = "none"  # parallel.activation_checkpointing: none, selective (keeps products), full

    @property
    def full(self) -> bool:
        return self.rank == 0


#: Families whose block ends with a norm behind the last product; elsewhere recomputation stops short of that product,
#: because nothing that backward needs comes after it (torch.utils.checkpoint's early stop).
_NORM_AT_END = {"olmo2", "olmo3", "gemma3_text"}


@dataclass(frozen=True)
class Product:
    """A matrix product of a block. ``times``: how often a token goes through it (experts: the chosen ones);
    ``stage``: 0 reads the block's input, 1 leads back from attention or recurrence, 2 reads the MLP's input, 3 leads
    back from it. ``rank``: of its adapter, 0 for none."""

    inside: int
    outside: int
    times: float
    stage: int
    rank: int = 0

    @property
    def plain(self) -> float:
        """Forward FLOPs per token."""
        return 2.0 * self.inside * self.outside * self.times

    @property
    def adapter(self) -> float:
        return 2.0 * self.rank * (self.inside + self.outside) * self.times


@dataclass(frozen=True)
class BlockProducts:
    """``layers`` blocks alike. ``scores`` and ``values``: widths of all query heads in the two products of attention, 0
    without it; a token meets those of its ``window``, or of its ``chunk`` (positions cut every so many tokens)."""

    layers: int
    products: dict[str, Product]
    scores: int = 0
    values: int = 0
    window: int | None = None
    chunk: int | None = None
    recurrent: float = 0.0  # FLOPs per token of a state that runs along the document
    recurrent_executed: float = 0.0
    #: the product at which recomputation stops short, None where all are run again
    last: str | None = None

    def pairs(self, lengths: Sequence[int]) -> tuple[float, float]:
        """Pairs of query and key of documents of ``lengths``: (causal, whole score matrix)."""
        import numpy as np

        tokens = np.asarray(lengths, dtype=np.int64)
        n, often = tokens.astype(np.float64), np.ones(1, dtype=np.int64)
        if len(tokens) and int(tokens.max()) < 1 << 20:  # each length once
            counts = np.bincount(tokens)
            n = np.flatnonzero(counts).astype(np.float64)
            often = counts[counts > 0]
        if self.chunk is not None:
            whole, rest = np.divmod(n, self.chunk)
            square = whole * self.chunk**2 + rest**2
            causal = (square + n) / 2
        else:
            seen = n if self.window is None else np.minimum(n, self.window)
            square = n * seen
            # queries times mean_context: a triangle, and where there is a window full rows behind it
            causal = seen * (seen + 1) / 2 + (n - seen) * seen
        return float((causal * often).sum()), float((square * often).sum())


@dataclass(frozen=True)
class ModelProducts:
    """What is counted: the blocks, those of the first layer's kind first, and the output layer."""

    blocks: tuple[BlockProducts, ...]
    vocab: int
    hidden: int


def stage_of(name: str) -> int:
    """Where in a block the product ``name`` of a shape stands (:class:`Product`)."""
    if name in ("o", "out_proj"):
        return 1
    if name in ("down", "output_linear", "experts_down"):
        return 3
    return 2 if name in ("gate", "up", "input_linear", "shared_gate", "router", "experts_gate_up") else 0


def of_shape(shape: ModelShape, trained: Trained) -> ModelProducts:
    """The products of a model by its dimensions."""
    blocks: list[BlockProducts] = []
    for kind in shape.kinds:
        chosen = set() if trained.full else kind.adapted(trained.targets)
        products = {}
        for name, (inside, outside, times) in kind.products.items():
            rank = trained.rank if name in chosen else 0
            products[name] = Product(inside, outside, times, stage_of(name), rank)
        last = next((name for name in ("down", "output_linear") if name in products), None)
        if kind.experts is not None or shape.family in _NORM_AT_END:
            last = None  # a norm, or the router's weights, read its result
        width = 0 if kind.recurrence is not None else kind.q_width
        states = (0.0, 0.0) if kind.recurrence is None else (kind.recurrence.flops, kind.recurrence.executed_flops)
        for layers, window in ((kind.layers - kind.window_layers, None), (kind.window_layers, kind.window)):
            if layers:
                blocks.append(BlockProducts(layers, products, width, width, window, None, *states, last=last))
    return ModelProducts(tuple(blocks), shape.vocab, shape.hidden)


def documents(
    shape: ModelShape,
    lengths: Sequence[int],
    supervised: int,
    trained: Trained,
    *,
    segments: Sequence[int] | None = None,
) -> Work:
    """:func:`count` of a model by its dimensions."""
    return count(of_shape(shape, trained), lengths, supervised, trained, segments=segments)


def count(
    model: ModelProducts,
    lengths: Sequence[int],
    supervised: int,
    trained: Trained,
    *,
    segments: Sequence[int] | None = None,
) -> Work:
    """FLOPs of a step whose documents have ``lengths`` tokens, with ``supervised`` positions behind the output layer.

    ``segments``: tokens of what the attention kernel was given, where that is more than the documents (padded rows).
    Left out, as everywhere: embedding look-up, norms, activations, optimizer; also the weight norm that DoRA computes.
    """
    import numpy as np  # a step of thousands of ranks has 100,000 documents; planning comes without numpy

    run = lengths if segments is None else segments
    real, positions = float(np.sum(lengths)), float(np.sum(run))
    head = 2.0 * model.vocab * model.hidden * supervised
    whole = trained.full or trained.embeddings
    head_work = head * (3 if whole else 2)
    mathematics = with_squares = executed = full_run = head_work
    for number, block in enumerate(model.blocks):
        width = 2.0 * (block.scores + block.values) * block.layers
        causal, square = (width * pairs for pairs in block.pairs(lengths))
        run_causal, run_square = (causal, square) if segments is None else (width * p for p in block.pairs(run))
        plain = sum(p.plain for p in block.products.values())
        adapters = sum(p.adapter for p in block.products.values())
        # The mathematics: every product forward, its input's gradient, and the gradient of what is trained.
        per_token = block.layers * (plain * (3 if trained.full else 2) + 3 * adapters)
        states = block.layers * block.recurrent
        mathematics += per_token * real + 3 * states * real + 3 * causal
        with_squares += per_token * real + 3 * states * real + 3 * square
        # What runs: the first block of a frozen model passes no gradient on to the embeddings.
        first = _first_block(block) if number == 0 and not whole else _First()
        products = per_token * positions - first.saved * positions
        scanned = block.recurrent_executed * positions
        back = block.layers - first.scan
        run_states = scanned * (block.layers + 2 * back)
        executed += products + run_states + run_causal * (1 + 2.5 * (1 - first.flash / block.layers))
        full_run += products + run_states + run_square * (1 + 2 * (1 - first.square / block.layers))
        if trained.recompute == "full":
            again = block.layers * (plain + adapters - _not_run_again(block) + block.recurrent_executed) * positions
            executed += again + run_causal
            full_run += again + run_square
        elif trained.recompute == "selective":  # products are kept, states are not
            executed += block.layers * scanned
            full_run += block.layers * scanned
    return Work(mathematics, with_squares, executed, full_run)


def forward_of(model: ModelProducts, length: int) -> float:
    """Forward FLOPs per token of documents of ``length``, logits at every token, adapters left out."""
    total = 2.0 * model.vocab * model.hidden
    for block in model.blocks:
        causal, _ = block.pairs([length])
        attended = 2.0 * (block.scores + block.values) * causal / length
        total += block.layers * (sum(p.plain for p in block.products.values()) + attended + block.recurrent)
    return total


@dataclass(frozen=True)
class _First:
    """What the first block leaves out: FLOPs per token of products, backward passes of attention (a flash kernel's and
    written out, as shares of one layer) and of the recurrence."""

    saved: float = 0.0
    flash: float = 0.0
    square: float = 0.0
    scan: float = 0.0


def _first_block(block: BlockProducts) -> _First:
    saved, flash, square, scan = 0.0, 0.0, 0.0, 0.0
    asked = False  # somebody needs the gradient of what the stage reads
    for stage in range(4):
        here = [p for p in block.products.values() if p.stage == stage]
        if not asked:
            saved += sum(p.plain + 2.0 * p.rank * p.inside * p.times for p in here)
        adapted = any(p.rank for p in here)
        if stage == 0 and not adapted:
            scan = flash = 1.0
        if stage == 0 and {"q", "k", "v"} <= block.products.keys():
            # Written out, attention's backward is four products (dV, dP, dQ, dK); those that nobody asks for are not
            # run. A flash kernel runs all of them, or none.
            q, k, v = (bool(block.products[name].rank) for name in ("q", "k", "v"))
            square = 1 - (q + k + v + (q or k)) / 4
        elif stage == 0 and not adapted:
            square = 1.0
        asked = asked or adapted
    return _First(saved, flash, square, scan)


def _not_run_again(block: BlockProducts) -> float:
    """FLOPs per token of the product at which recomputation stops short."""
    if block.last is None:
        return 0.0
    last = block.products[block.last]
    # the base product runs before the adapter's second one, at which recomputation stops
    return 2.0 * last.rank * last.outside * last.times if last.rank else last.plain
