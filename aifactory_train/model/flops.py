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
    """Forward FLOPs per token of the whole model, by kind."""

    linear: float  # projections and MLPs of all blocks
    adapters: float  # low-rank products
    head: float  # the output layer, at every supervised position counted
    attention_full: float
    attention_causal: float


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
    the positions whose logits are computed."""
    plain = shape.layers - shape.window_layers
    context = plain * mean_context(sequence) + shape.window_layers * mean_context(sequence, shape.window)
    full = plain * sequence + shape.window_layers * min(sequence, shape.window or sequence)
    return ForwardFlops(
        linear=2.0 * shape.layers * shape.block_linear_parameters,
        adapters=2.0 * adapter_parameters,
        head=2.0 * shape.vocab * shape.hidden * supervised,
        attention_full=4.0 * full * shape.q_width,
        attention_causal=4.0 * context * shape.q_width,
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
    recompute = recomputed * (f.linear + f.adapters + f.attention_causal)
    return StepFlops(
        model=linear + 3 * f.attention_causal,
        model_full_attention=linear + 3 * f.attention_full,
        executed=linear + 3.5 * f.attention_causal + recompute,
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
_STAGES = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


def documents(
    shape: ModelShape,
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

    from aifactory_train.model.shapes import is_target

    run = lengths if segments is None else segments
    real, positions = float(np.sum(lengths)), float(np.sum(run))
    linears = shape.linears()
    adapters = {
        name: 2.0 * trained.rank * (a + b) if not trained.full and is_target(name, trained.targets) else 0.0
        for name, (a, b) in linears.items()
    }
    plain = {name: 2.0 * a * b for name, (a, b) in linears.items()}
    head = 2.0 * shape.vocab * shape.hidden * supervised

    # The mathematics: every product forward, its input's gradient, and the gradient of what is trained.
    per_token = shape.layers * (sum(plain.values()) * (3 if trained.full else 2) + 3 * sum(adapters.values()))
    head_work = head * (3 if trained.full or trained.embeddings else 2)
    causal, square = _attention(shape, lengths)
    model = per_token * real + head_work

    # What runs: the first block of a frozen model passes no gradient on to the embeddings.
    executed = per_token * positions + head_work
    run_causal, run_square = (causal, square) if segments is None else _attention(shape, run)
    flash_layers = square_layers = float(shape.layers)  # whose attention has a backward
    if not (trained.full or trained.embeddings):
        needed = False
        saved = 0.0
        for stage in _STAGES:
            for name in stage:
                if name in plain and not needed:
                    saved += plain[name] + 2.0 * trained.rank * linears[name][0] * bool(adapters[name])
            if stage[0] == "q":
                # Written out, attention's backward is four products (dV, dP, dQ, dK); those that nobody asks for are
                # not run. A flash kernel runs all of them, or none.
                q, k, v = (bool(adapters[n]) for n in stage)
                square_layers -= 1 - (q + k + v + (q or k)) / 4
                flash_layers -= not (q or k or v)
            needed = needed or any(adapters.get(name) for name in stage)
        executed -= saved * positions
    full_run = executed + run_square * (1 + 2 * square_layers / shape.layers)
    executed += run_causal * (1 + 2.5 * flash_layers / shape.layers)
    if trained.recompute == "full":
        last = 0.0 if shape.family in _NORM_AT_END else plain["down"]
        if adapters["down"] and shape.family not in _NORM_AT_END:
            # the base product runs before the adapter's second one, at which recomputation stops
            last = 2.0 * trained.rank * linears["down"][1]
        again = shape.layers * (sum(plain.values()) + sum(adapters.values()) - last) * positions
        executed += again + run_causal
        full_run += again + run_square
    return Work(model + 3 * causal, model + 3 * square, executed, full_run)


def _attention(shape: ModelShape, lengths: Sequence[int]) -> tuple[float, float]:
    """Forward FLOPs of all layers' attention over documents of ``lengths``: (causal, whole score matrix)."""
    import numpy as np

    windowed, plain = shape.window_layers, shape.layers - shape.window_layers
    tokens = np.asarray(lengths, dtype=np.int64)
    n, often = tokens.astype(np.float64), np.ones(1, dtype=np.int64)
    if len(tokens) and int(tokens.max()) < 1 << 20:  # each length once
        counts = np.bincount(tokens)
        n = np.flatnonzero(counts).astype(np.float64)
        often = counts[counts > 0]
    seen = n if shape.window is None else np.minimum(n, shape.window)
    square = plain * n * n + windowed * n * seen
    # queries times mean_context: a triangle, and where there is a window full rows behind it
    causal = plain * n * (n + 1) / 2 + windowed * (seen * (seen + 1) / 2 + (n - seen) * seen)
    return 4.0 * shape.q_width * float((causal * often).sum()), 4.0 * shape.q_width * float((square * often).sum())
