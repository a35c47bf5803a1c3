"""What no implementation of a step can avoid moving, from the dimensions alone. Knows nothing of the recorder.

Every operand and every result of each matrix product and of attention is moved once: in forward, for the gradient of
the input (dX), for that of the weight (dW) where it is trained. Norms, rotation and gated activation read each of their
inputs once and write each of their results once, in each direction. Nothing is computed again, added, cast or copied.
An adapter's products are products like others: ``x A``, ``(x A) B``, and their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

from aifactory_train.core.errors import UserError
from aifactory_train.model.shapes import ModelShape, is_target


def step_bytes(
    shape: ModelShape,
    tokens: int,
    targets: int,
    *,
    rank: int | None = None,
    adapted: str | Sequence[str] = "all-linear",
    item: int = 2,
) -> int:
    """Bytes of the forward and backward of one micro-batch of ``tokens`` positions, ``targets`` of them supervised.

    ``rank``: of LoRA adapters on the ``adapted`` layers; None: all weights are trained. ``item``: bytes of an element.
    Raises :class:`UserError` for experts and recurrent layers, which the audit does not run yet, and ``ValueError``
    for a shape whose MLP is not gated: no reference is written for it.
    """
    if shape.has_experts or any(kind.recurrence is not None for kind in shape.kinds):
        raise UserError(
            f"{shape.name} has experts or recurrent layers, and the step audit runs attention and dense MLPs alone: "
            "which rows an expert gets follows from data, and meta tensors have none",
            where="--audit",
            fix="plan without --audit: memory, FLOPs and time of such models are planned by formulae",
        )
    if shape.mlp != "gated":
        raise ValueError(f"no floor is written for the MLP of {shape.name} ({shape.mlp})")
    names = adapted if isinstance(adapted, str) else list(adapted)
    whole = rank is None
    elements = 0
    first = next(iter(shape.linears()))
    for layer in range(shape.layers):
        for name, (inside, outside) in shape.linears().items():
            needs_x = whole or layer > 0 or name not in _reads_the_embedding(first)
            elements += _product(tokens, inside, outside, dx=needs_x, dw=whole)
            if rank is not None and is_target(name, names):
                elements += _product(tokens, inside, rank, dx=needs_x, dw=True)
                elements += _product(tokens, rank, outside, dx=True, dw=True)
        elements += _block_without_products(shape, tokens, first=not whole and layer == 0)
    elements += 5 * tokens * shape.hidden  # the last norm: read, write; two read, one written
    elements += _product(targets, shape.hidden, shape.vocab, dx=True, dw=whole)
    elements += 2 * tokens * shape.hidden * (2 if whole else 1)  # rows of the embedding, and of its gradient
    return elements * item


def _reads_the_embedding(first: str) -> tuple[str, ...]:
    """The layers whose input is the first norm's: where the embedding is frozen nobody needs its gradient."""
    return ("q", "k", "v") if first == "q" else (first,)


def _product(rows: int, inside: int, outside: int, *, dx: bool, dw: bool) -> int:
    """Elements of ``[rows, inside] @ [inside, outside]`` and of its gradients: three matrices each."""
    return (rows * inside + inside * outside + rows * outside) * (1 + dx + dw)


def _block_without_products(shape: ModelShape, tokens: int, first: bool) -> int:
    """Elements of a block's norms, rotation, attention and activation, both directions. ``first``: a block before
    which nothing is trained, whose first norm has no backward."""
    norm = 2 + 3  # x, y; dy, x, dx
    norms = shape.norms * norm * shape.hidden - (3 * shape.hidden if first else 0)
    if shape.qk_norm != "none":
        norms += norm * (shape.q_width + shape.kv_width)
    rotated = shape.q_width + shape.kv_width
    rotation = 2 * rotated + 2 * rotated
    attended = 2 * shape.q_width + 2 * shape.kv_width  # q, k, v, result
    attention = attended + (attended + shape.q_width) + (shape.q_width + 2 * shape.kv_width)  # dO; dq, dk, dv
    activation = (3 + 5) * shape.ffn  # gate, up, product; three read, two written
    return tokens * (norms + rotation + attention + activation)
