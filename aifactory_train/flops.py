"""How many floating-point operations a training step needs (*model* FLOPs) and how many it runs (*executed* FLOPs).

Counts are per token position, padding included, matrix products only (2 FLOPs per multiply-add; pointwise work, norms and the
optimizer are left out, as everywhere in the literature). Two attention counts are kept apart, because published utilisations use
both: *full* counts the whole score matrix (4 x context x width forward), *causal* the half that a causal kernel has to compute.

Model FLOPs: forward, the gradient of the inputs, and the gradient of the weights that are trained (so 6 per parameter and
token for full fine-tuning and about 4 for adapters). Executed FLOPs add the second forward of recomputed blocks. Attention's
backward is 2.5 x its forward as flash-attention runs it (recomputation inside the kernel included) in the executed count, and
2 x in the model count (PaLM, arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aifactory_train.planning.shapes import Shape


@dataclass(frozen=True)
class Forward:
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


def forward(shape: Shape, sequence: float, *, adapter_parameters: int = 0, supervised: float = 1.0) -> Forward:
    """Forward FLOPs per token. ``sequence``: tokens of a document (attention stays inside it); ``supervised``: share of the
    positions whose logits are computed."""
    plain = shape.layers - shape.window_layers
    context = plain * mean_context(sequence) + shape.window_layers * mean_context(sequence, shape.window)
    full = plain * sequence + shape.window_layers * min(sequence, shape.window or sequence)
    return Forward(
        linear=2.0 * shape.layers * shape.block_linear_parameters,
        adapters=2.0 * adapter_parameters,
        head=2.0 * shape.vocab * shape.hidden * supervised,
        attention_full=4.0 * full * shape.q_width,
        attention_causal=4.0 * context * shape.q_width,
    )


def step(
    shape: Shape,
    sequence: float,
    *,
    trains_base: bool = True,
    trains_head: bool | None = None,
    adapter_parameters: int = 0,
    recomputed: float = 0.0,
    supervised: float = 1.0,
) -> StepFlops:
    """FLOPs per token of forward and backward.

    ``trains_base``: all weights are trained (else adapters only). ``recomputed``: share of the blocks' forward matrix products
    that runs a second time (1 for full activation checkpointing).
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
