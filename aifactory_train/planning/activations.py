"""Which tensors the blocks keep for backward, counted operation by operation, per token, from what autograd saves.

:func:`block_kept` is one block's; ``tests/planning/test_memory_tracker.py`` holds the counts against torch's own memory
tracker. Of a hybrid every kind of block is counted by itself (:attr:`TrainingJob.kinds`).
"""

from __future__ import annotations

from aifactory_train.model.shapes import is_target
from aifactory_train.planning.job import TrainingJob

#: Families whose norm multiplies by one plus the weight, in fp32.
_UNIT_OFFSET = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")


def _norm(job: TrainingJob, width: int, rows: int = 1) -> float:
    """Bytes that one RMS norm over ``width`` elements in ``rows`` groups keeps per token."""
    e = job.bytes.compute
    if job.stack.norm == "fused":
        return e * width + 4 * rows
    trained = job.method == "full"
    if job.shape.family in ("olmo2", "olmo3", "gemma3_text", *_UNIT_OFFSET):  # they multiply by the weight in fp32
        kept = 4.0 * width
    else:
        kept = e * width
    return 4 * width + 4 * rows + (kept if trained else 0)  # the fp32 copy (in fp32 the input itself)


def _remade(job: TrainingJob, *names: str) -> bool:
    """Whether the layers ``names`` of a block are adapted and run together, so that their common input is not kept: all
    of them plain (no bias, DoRA or 4-bit base), between an RMS norm before and a gated MLP."""
    shape = job.shape
    targets = job.targets if isinstance(job.targets, str) else list(job.targets)
    routed = shape.experts is not None and "gate" in names  # what experts share is run by itself
    plain = (
        job.method == "lora" and not routed and not (job.dora or job.compiled or shape.qkv_bias or shape.linear_bias)
    )
    pre_norm = shape.mlp == "gated" and shape.family not in ("olmo2", "olmo3", "gemma3_text")
    whole = job.layout.traits.weights != "module"
    return job.stack.remakes and plain and pre_norm and whole and all(is_target(n, targets) for n in names)


def _linear_inputs(job: TrainingJob) -> float:
    """Bytes of the inputs that linear layers keep: for their own weight's gradient, or for an adapter's."""
    shape, e = job.shape, job.bytes.compute
    adapted = _adapted(job)
    total = 0.0
    into: tuple[str, ...] = ("q", "k", "v")
    if shape.recurrence is not None:
        into = tuple(name for name, inside, _ in shape.recurrence.linears[:-1])
    for group, width in (
        (into, shape.hidden),
        (("gate", "up", "input_linear"), shape.hidden),
        (("down", "output_linear"), shape.ffn),
    ):
        names = [n for n in group if n in shape.linears()]
        if not names:
            continue
        if job.method == "full":
            if "gate" in group and shape.experts is not None:
                continue  # the router keeps the same input: :func:`_experts`
            after_norm = "down" not in group and shape.family not in ("olmo2", "olmo3")
            total += 0 if after_norm and job.stack.recomputes_norm else e * width
        else:
            hit = [n for n in names if n in adapted]
            copies = len(hit) if job.stack.casts_adapter_input else min(1, len(hit))
            if shape.recurrence is None and _remade(
                job, *(("q", "k", "v") if "q" in group else ("gate", "up", "down"))
            ):
                copies = 0
            total += e * width * copies + sum(e * job.lora_rank for _ in hit)
    if shape.recurrence is not None:
        return total + _recurrence_output(job)
    if "o" in adapted:
        # the input itself is attention's output and counted there
        total += e * (shape.q_width if job.stack.casts_adapter_input else 0) + e * job.lora_rank
    if shape.gated_attention:
        total += 2 * e * shape.q_width  # the gate after its sigmoid, and what leads back to the hidden size
    return total


def _adapted(job: TrainingJob) -> set[str]:
    """Products of a block that carry adapters."""
    if job.method == "full":
        return set()
    return job.shape.adapted(job.targets if isinstance(job.targets, str) else list(job.targets))


def _recurrence_output(job: TrainingJob) -> float:
    """Bytes of the input of the layer behind a recurrence, where its gradient or an adapter's needs it."""
    shape, e = job.shape, job.bytes.compute
    assert shape.recurrence is not None
    name, inside, _ = shape.recurrence.linears[-1]
    adapted = name in _adapted(job)
    kept = e * inside if job.method == "full" or adapted else 0.0
    return kept + (e * job.lora_rank if adapted else 0.0)


def _experts(job: TrainingJob) -> float:
    """Bytes that router and routed experts keep per token: the router's probabilities and choice; for each chosen
    expert both halves of its gate and its result, which the router's weight multiplies; the inputs of its products
    where weights or adapters need them. Tokens are dealt out by index, without room for more than there are."""
    shape, e = job.shape, job.bytes.compute
    experts = shape.experts
    if experts is None:
        return 0.0
    whole, every = job.method == "full", _adapted(job)
    adapted = every & experts.products(shape.hidden).keys()
    halves = 3 if job.stack.glu == "eager" else 2
    each = e * (halves * experts.ffn + shape.hidden)
    if whole or "experts_gate_up" in adapted:
        each += e * shape.hidden
    if whole or "experts_down" in adapted:
        each += e * experts.ffn
    each += e * job.lora_rank * len(adapted - {"router"})
    kept = experts.chosen * (each + 8 + 8 + e) + 4 * experts.count  # expert, place, weight; probabilities in fp32
    if whole or "router" in adapted:
        kept += e * shape.hidden
    return kept


def _mixer(job: TrainingJob) -> float:
    """Bytes per token that attention keeps, or what stands in its place."""
    recurrence = job.shape.recurrence
    return _attention(job) if recurrence is None else job.bytes.compute * recurrence.kept


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
    return norms + _linear_inputs(job) + _mixer(job) + _mlp(job) + _experts(job)


def block_kept_selective(job: TrainingJob) -> float:
    """Selective checkpointing keeps the block's input, attention's output and the output of every n-th matrix product;
    recurrences are run again."""
    shape, e = job.shape, job.bytes.compute
    kept: float = e * shape.hidden + (e * shape.q_width + 4 * shape.heads if shape.recurrence is None else 0)
    adapted = _adapted(job)
    outputs: list[int] = []
    for name, (_, out, times) in shape.products.items():
        outputs.append(out * times)
        if name in adapted:
            outputs += [job.lora_rank * times, out * times]
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
    kinds = job.kinds
    if job.offload_activations:
        blocks = 2 * max(kept_per_block(kind) for kind in kinds)  # the one in use and the one being copied
    else:
        blocks = sum(kind.shape.layers * kept_per_block(kind) for kind in kinds)
    outside = (
        2 * e * shape.head_dim + _norm(job, shape.hidden) + 16
    )  # cos and sin, the last norm, token ids and positions
    return tokens * (blocks + outside), tokens * max(map(_more_in_backward, kinds))


def _more_in_backward(job: TrainingJob) -> float:
    """Bytes per token that backward needs beside what is kept, in one block."""
    shape, e = job.shape, job.bytes.compute
    routed = shape.experts.chosen * shape.experts.ffn if shape.experts is not None else 0
    if job.checkpointing == "none":
        # gradients on their way through the loss, the last norm and the MLP's two halves
        widest = max(shape.ffn, shape.recurrence.widest // 2 if shape.recurrence is not None else shape.q_width, routed)
        return 2 * e * widest + e * shape.hidden
    shared = e * shape.hidden if job.checkpointing == "full" else _kept_and_recomputed(job)
    transient = e * shape.hidden
    if job.stack.glu == "fused":
        transient += 2 * e * max(shape.ffn, routed)  # both halves' gradients beside both halves
    return block_kept(job) - shared + transient


def _kept_and_recomputed(job: TrainingJob) -> float:
    """Bytes per token that selective checkpointing keeps and that backward reads as they are: recomputation adds
    nothing there.

    The outputs of q and k (without a norm of their own), of o and of down are kept too, but backward reads what follows
    from them.
    """
    shape, e = job.shape, job.bytes.compute
    shared = e * (shape.hidden + shape.q_width) + 4 * shape.heads if shape.recurrence is None else e * shape.hidden
    if job.selective_every != 1 or shape.recurrence is not None:
        return shared
    if job.attention != "repeated":
        shared += e * shape.kv_width  # v
    if shape.qk_norm != "none" and e > 2:
        shared += e * (shape.q_width + shape.kv_width)
    return shared + e * shape.ffn * (2 if shape.mlp == "gated" else 1)
