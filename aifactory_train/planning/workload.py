"""What a recipe asks for, apart from how it is carried out; and what it has decided already."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aifactory_train.config.preference_block import OF_PAIRS
from aifactory_train.core.errors import UserError
from aifactory_train.model.hybrid_shapes import adapted_as
from aifactory_train.model.shapes import ModelShape
from aifactory_train.planning.job import Bytes

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe


def documents_of_a_row(preference: str | None) -> int:
    """Documents of a row of training data, by :func:`preference_of`: a pair has two (negatives are not counted)."""
    return 2 if preference in (*OF_PAIRS, "reward", "embedding") else 1


def preference_of(recipe: Recipe) -> str | None:
    """``methods.preference.kind``; ``reward`` and ``embedding`` where the pairs train one (``methods.head``), which
    has no reference. None where rows are no pairs and are not rated.
    """
    head, preference = recipe.methods.head, recipe.methods.preference
    if head is not None and head.kind in ("reward", "embedding"):
        return head.kind
    return preference.kind if preference else None


@dataclass(frozen=True)
class Workload:
    """What a recipe asks for, apart from how it is carried out."""

    shape: ModelShape
    sequence: int
    step_tokens: float  # token positions of one optimizer step over all ranks
    step_rows: float  # rows of one step: documents, or pairs of them
    document: float  # mean tokens of a document
    supervised: float
    method: str
    lora_rank: int
    targets: str | tuple[str, ...]
    dora: bool
    train_embeddings: bool
    bytes: Bytes
    kernels: str  # auto | on | off
    loss_chunk: int | None
    by_rows: bool  # the step is a number of rows (else of tokens)
    preference: str | None = None  # preference_of() the recipe
    optimizer: str = "adamw"
    dropout: float = 0.0  # of the adapters' inputs
    keeps_mean: bool = False  # train.average
    teacher: str | None = None  # methods.distill: whose stored log-probabilities a step reads

    @property
    def row_documents(self) -> int:
        """Documents of one row, which are never divided: a pair's two answers (DPO, IPO, ORPO), else one."""
        return documents_of_a_row(self.preference)

    @property
    def scored(self) -> float:
        """Forward passes over a step without a backward: KTO scores each question with another one's answer, and the
        texts of an embedding are read before their gradient is known.
        """
        return 1.0 if self.preference in ("kto", "embedding") else 0.0

    @property
    def reference_passes(self) -> int:
        """Forward passes over the run's documents before the first step; KTO's also over the exchanged answers."""
        return {"dpo": 1, "kto": 2}.get(self.preference or "", 0)

    def with_rows(self, rows: int) -> Workload:
        """The same with steps of at least so many rows."""
        if self.step_rows >= rows:
            return self
        return replace(self, step_rows=float(rows), step_tokens=self.step_tokens * rows / self.step_rows)

    def busiest(self, world: int) -> float:
        """Positions of the rank that has most of a step: rows are whole, and the others wait for it."""
        if self.by_rows:
            return math.ceil(self.step_rows / world - 1e-9) * self.step_tokens / self.step_rows
        return self.step_tokens / world


@dataclass(frozen=True)
class Fixed:
    """What the recipe or the command line already decided; ``None`` is open."""

    engine: str | None = None
    shard_size: int | None = None
    #: of ``parallel.dims``: they leave out engines that would have others
    dp_replicate: int | None = None
    dp_shard: int | None = None
    checkpointing: str | None = None
    offload: bool | None = None
    compile: bool | None = None
    micro_tokens: int | None = None
    grad_accum: int | None = None

    def takes(self, replicate: int, shard: int) -> bool:
        """Whether ``replicate`` copies on ``shard`` ranks each are what was decided, or are left open."""
        return self.dp_replicate in (None, replicate) and self.dp_shard in (None, shard)


def of_recipe(recipe: Recipe, shape: ModelShape, document: float | None, supervised: float | None) -> Workload:
    """The recipe's demand. ``document``: mean tokens of a document where known (else every row is taken to fill the
    sequence).
    """
    data, train, shape = recipe.data, recipe.train, adapted_as(shape, recipe)
    if shape.max_positions and data.sequence_length > shape.max_positions:
        raise UserError(
            f"sequences of {data.sequence_length} tokens are longer than the {shape.max_positions} positions of "
            f"{shape.name}",
            where="data.sequence_length",
            fix=f"--set data.sequence_length={shape.max_positions}",
        )
    mean = min(document or data.sequence_length, data.sequence_length)
    preference = preference_of(recipe)
    per_row = documents_of_a_row(preference) * (data.sequence_length if data.batching == "padded" else mean)
    if train.batch_tokens:
        tokens, rows = float(train.batch_tokens), train.batch_tokens / per_row
    else:
        rows = float(train.batch_rows or 16)
        tokens = rows * per_row
    adapter = recipe.adapter
    if adapter.kind != "none" and not shape.lora_parameters(adapter.rank, adapter.targets):
        raise UserError(
            f"none of these names a linear layer of {shape.name}: {adapter.targets}",
            where="adapter.targets",
            fix="--set adapter.targets=all-linear, or names such as q_proj, v_proj, down_proj",
        )
    method = "full" if adapter.kind == "none" else ("qlora" if adapter.quantise_base == "nf4" else "lora")
    return Workload(
        shape=shape,
        sequence=data.sequence_length,
        step_tokens=tokens,
        step_rows=rows,
        document=mean,
        supervised=1.0 if supervised is None else supervised,
        method=method,
        lora_rank=adapter.rank,
        targets=adapter.targets if isinstance(adapter.targets, str) else tuple(adapter.targets),
        dora=adapter.kind == "dora",
        train_embeddings=adapter.train_embeddings,
        bytes=_bytes(recipe, shape),
        kernels=recipe.kernels.enabled,
        loss_chunk=train.loss_chunk_tokens,
        by_rows=train.batch_tokens is None,
        preference=preference,
        optimizer=train.optimizer,
        keeps_mean=train.average is not None,
        teacher=recipe.methods.distill.teacher if recipe.methods.distill is not None else None,
        dropout=adapter.dropout if adapter.kind != "none" else 0.0,
    )


def _moments(recipe: Recipe, shape: ModelShape, master: int) -> float:
    """Bytes of optimizer state per trained parameter."""
    name, adapter = recipe.train.optimizer, recipe.adapter
    if name == "sgd":
        return master if recipe.train.momentum else 0
    if name == "adamw8bit":
        return 2 + 2 * 4 / 256  # two codes of a byte, and two fp32 scales for 256 of them
    if name not in ("muon", "adafactor"):
        return 2 * master
    if adapter.kind == "none":
        block, outside = shape.block_tensors(), shape.root_tensors()
    else:
        block = shape.lora_tensors(adapter.rank, adapter.targets, adapter.kind == "dora")
        outside = [(shape.vocab, shape.hidden)] * (1 if shape.tied else 2) if adapter.train_embeddings else []
    total = shape.layers * sum(r * c for r, c in block) + sum(r * c for r, c in outside)
    if name == "muon":  # of matrices in the blocks one moment, of the rest AdamW's two
        matrices = shape.layers * sum(r * c for r, c in block if c > 1)
        return master * (2 - matrices / total)
    kept = [(r + c if c > 1 else r) for r, c in block], [(r + c if c > 1 else r) for r, c in outside]
    return 4 * (shape.layers * sum(kept[0]) + sum(kept[1])) / total


def _bytes(recipe: Recipe, shape: ModelShape) -> Bytes:
    """The precision policy (see ``model.choose_precision``): fp32 master and moments, bf16 arithmetic, unless the
    recipe differs.
    """
    p = recipe.precision
    size = {"fp32": 4, "bf16": 2}
    if p.compute == "fp32":
        raise UserError(
            "the planner's speed figures are for bf16 arithmetic",
            where="precision.compute",
            fix="--set precision.compute=bf16 (or auto)",
        )
    master = size.get(p.parameters, 4)
    moments = _moments(recipe, shape, master) + (4 if recipe.train.average is not None else 0)
    return Bytes(
        parameters=master,
        working=2 if master != 2 else 0,
        gradients=master,
        optimizer=moments,
        frozen=size.get(p.frozen, 2),
        compute=2,
        reduce=size.get(p.reduce, 4),
    )


def fixed_by(recipe: Recipe, given_now: frozenset[str] = frozenset()) -> Fixed:
    """What is decided already: the recipe's own ``parallel`` keys, and of ``train`` what was given for this plan
    (``given_now``, the keys of ``--set``). A recipe's micro-batch suits the machine that it was written on; here it is
    the plan's to choose."""
    parallel, train = recipe.parallel, recipe.train
    given = parallel.model_fields_set
    return Fixed(
        engine=parallel.engine if parallel.engine != "auto" else None,
        shard_size=parallel.copy_ranks,
        dp_replicate=parallel.dims.replicate,
        dp_shard=parallel.dims.shard,
        checkpointing=parallel.activation_checkpointing if "activation_checkpointing" in given else None,
        offload=parallel.offload_optimizer if "offload_optimizer" in given else None,
        compile=parallel.compile if "compile" in given else None,
        micro_tokens=train.micro_batch_tokens if "train.micro_batch_tokens" in given_now else None,
        grad_accum=train.grad_accum if train.grad_accum != "auto" and "train.grad_accum" in given_now else None,
    )
