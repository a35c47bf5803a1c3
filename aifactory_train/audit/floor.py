"""What no implementation of a step can avoid moving, from the dimensions alone. Knows nothing of the recorder.

Every operand and every result of each matrix product and of attention is moved once: in forward, for the gradient of
the input (dX), for that of the weight (dW) where it is trained. Norms, rotation and gated activation read each of their
inputs once and write each of their results once, in each direction. Nothing is computed again, added, cast or copied.
An adapter's products are products like others: ``x A``, ``(x A) B``, and their gradients.

Routed experts: the load is even, so that every expert has tokens where there are enough, and its matrices are read. A
token's hidden state is read once, however many experts it is sent to, and the sum of what they give is written once:
sorting, gathering and weighing are work of an implementation. Of a recurrence: its linear layers, its convolution, and
the scan, which reads queries, keys and values and writes their result; what it carries stays on the chip.
"""

from __future__ import annotations

from collections.abc import Sequence

from aifactory_train.model.blocks import Experts
from aifactory_train.model.shapes import ModelShape


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
    Raises ``ValueError`` for a shape whose MLP is not gated: no reference is written for it.
    """
    if shape.mlp != "gated":
        raise ValueError(f"no floor is written for the MLP of {shape.name} ({shape.mlp})")
    names = adapted if isinstance(adapted, str) else list(adapted)
    whole = rank is None
    elements = 0
    for number, kind in enumerate(shape.kinds):
        for layer in range(kind.layers):
            first = not whole and number == layer == 0
            elements += _linears(kind, tokens, rank, names, first)
            elements += _block_without_products(kind, tokens, first)
            if kind.experts is not None:
                elements += _experts(kind.experts, kind.hidden, tokens, rank, kind.adapted(names))
    elements += 5 * tokens * shape.hidden  # the last norm: read, write; two read, one written
    elements += _product(targets, shape.hidden, shape.vocab, dx=True, dw=whole)
    elements += 2 * tokens * shape.hidden * (2 if whole else 1)  # rows of the embedding, and of its gradient
    return elements * item


def _linears(shape: ModelShape, tokens: int, rank: int | None, names: str | list[str], first: bool) -> int:
    """Elements of the layers of a block that every token takes. ``first``: nothing is trained before the block."""
    elements = 0
    adapted = shape.adapted(names)
    for name, (inside, outside) in shape.linears().items():
        needs_x = not (first and name in _reads_the_embedding(shape))
        elements += _product(tokens, inside, outside, dx=needs_x, dw=rank is None)
        if rank is not None and name in adapted:
            elements += _product(tokens, inside, rank, dx=needs_x, dw=True)
            elements += _product(tokens, rank, outside, dx=True, dw=True)
    return elements


def _reads_the_embedding(shape: ModelShape) -> tuple[str, ...]:
    """The layers whose input is the first norm's: where the embedding is frozen nobody needs its gradient."""
    if shape.recurrence is None:
        return ("q", "k", "v")
    return tuple(name for name, _, _ in shape.recurrence.linears[:-1])  # the last leads back


def _product(rows: int, inside: int, outside: int, *, dx: bool, dw: bool) -> int:
    """Elements of ``[rows, inside] @ [inside, outside]`` and of its gradients: three matrices each."""
    return (rows * inside + inside * outside + rows * outside) * (1 + dx + dw)


def _experts(experts: Experts, hidden: int, tokens: int, rank: int | None, adapted: set[str]) -> int:
    """Elements of the router and the routed experts of a block."""
    whole, rows = rank is None, tokens * experts.chosen
    many = min(experts.count, rows)

    def product(read: int, inside: int, outside: int, written: int, dw: bool) -> int:
        return (read * inside + many * inside * outside + written * outside) * (2 + dw)

    elements = _product(tokens, hidden, experts.count, dx=True, dw=whole)
    if rank is not None and "router" in adapted:
        elements += _product(tokens, hidden, rank, dx=True, dw=True)
        elements += _product(tokens, rank, experts.count, dx=True, dw=True)
    sides = {"experts_gate_up": (tokens, hidden, 2 * experts.ffn, rows)}
    sides["experts_down"] = (rows, experts.ffn, hidden, tokens)
    for name, (read, inside, outside, written) in sides.items():
        elements += product(read, inside, outside, written, whole)
        if rank is not None and name in adapted:
            elements += product(read, inside, rank, rows, True) + product(rows, rank, outside, written, True)
    return elements + rows * (3 + 5) * experts.ffn  # gate, up, product; three read, two written


def _block_without_products(shape: ModelShape, tokens: int, first: bool) -> int:
    """Elements of a block's norms, rotation, attention (or recurrence) and activation, both directions. ``first``: a
    block before which nothing is trained, whose first norm has no backward."""
    norm = 2 + 3  # x, y; dy, x, dx
    each = shape.norms * norm * shape.hidden - (3 * shape.hidden if first else 0)
    each += (3 + 5) * shape.ffn  # activation: gate, up, product; three read, two written
    return tokens * (each + (_attention(shape) if shape.recurrence is None else _recurrence(shape)))


def _attention(shape: ModelShape) -> int:
    """Elements a token."""
    both = shape.q_width + shape.kv_width
    attended = 2 * both  # q, k, v, result
    elements = attended + (attended + shape.q_width) + (shape.q_width + 2 * shape.kv_width)  # dO; dq, dk, dv
    elements += 4 * int(both * _rotated(shape))
    if shape.qk_norm != "none":
        elements += 5 * both
    return elements + ((3 + 5) * shape.q_width if shape.gated_attention else 0)


def _rotated(shape: ModelShape) -> float:
    """The part of queries and keys that their position rotates."""
    config = shape.config or {}
    if config.get("position_embedding_type") == "nope":
        return 0.0
    rope = config.get("rope_parameters") or {}
    usual = 0.25 if shape.gated_attention else 1.0  # transformers' default of those families
    return float(config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or usual)


def _recurrence(shape: ModelShape) -> int:
    """Elements a token: convolution, scan, and the gated norm of what comes out."""
    found = shape.recurrence
    assert found is not None
    keys, values = found.key_heads * found.key, found.heads * found.value
    scan = 2 * keys + 2 * values  # queries, keys, values, result
    backward = scan + (2 * keys + values)  # with the result's gradient in its place; those of the others
    gated = (3 + 5) * values if values else 0
    return 5 * found.channels + scan + backward + gated
