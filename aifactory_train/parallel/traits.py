"""What each engine is and can do; without torch, for the planner, the checks before submission and the loop alike.

Whoever needs to know something about an engine asks its :class:`EngineTraits` and never compares its name. Adding an
engine is a file of its own with a class behind :class:`aifactory_train.parallel.engine.Engine`, and one row of
:data:`ENGINES` (for recipes that name it, also the literal of ``parallel.engine`` in ``config/schema.py``; a test holds
the two together).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from aifactory_train.core.errors import UserError

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe

#: The engine where neither the recipe nor a plan names one.
DEFAULT = "ddp"


@dataclass(frozen=True)
class EngineTraits:
    """One engine. The defaults are those of an engine that keeps everything on every rank.

    made_by: ``module:class``, built as ``class(name, core, recipe, precision, world)``.
    means: what it brings, for the plan's reasons; ``{shard}`` becomes the number of ranks that share a copy.
    """

    made_by: str
    means: str
    # ---- what is in shards, over which ranks, and how it is cut
    shards_parameters: bool = False
    shards_gradients: bool = False
    shards_optimizer: bool = False
    #: ranks that share one copy: 'none' (every rank has all), 'all', or 'chosen' (``parallel.shard_size``; copies of
    #: such groups)
    shard_group: Literal["none", "all", "chosen"] = "none"
    #: 'rows' of each tensor, 'elements' of each flattened tensor, or one flat 'buffer' of all tensors
    cuts: Literal["whole", "rows", "elements", "buffer"] = "whole"
    # ---- how weights are read
    #: when a weight is whole: 'always', while its 'block' runs, or only while the 'module' that owns it runs
    weights: Literal["always", "block", "module"] = "always"
    #: the forward pass reads copies in the compute type that we make (other engines cast what they gather)
    compute_copies: bool = False
    #: gradients lie in buffers that exist from the start (else they appear in the first backward)
    gradient_buffers: bool = False
    #: gradients travel with the 'last' micro-batch of a step, or with 'each'
    reduces: Literal["last", "each"] = "last"
    #: collectives run beside computation
    overlaps: bool = True
    #: it forms further groups of ranks on the devices, beside that of all ranks
    more_groups: bool = False
    # ---- what it can hold
    #: frozen weights in 4 bits, which must be neither cast nor laid among others
    holds_quantised: bool = False
    #: values of ``train.optimizer`` whose state it can keep, save and cut
    optimizers: tuple[str, ...] = ("adamw", "sgd")
    #: it can keep a mean of the weights beside them (``train.average``)
    keeps_mean: bool = False
    #: the model in training can be sampled from between steps, and score as it was (``methods.grpo``)
    samples: bool = True
    #: trained parameters are kept in fp32, whatever the precision policy says
    fp32_masters: bool = False
    # ---- compile, offload, packages
    #: why its blocks cannot be compiled; empty where they can
    cannot_compile: str = ""
    offloads_optimizer: bool = False
    #: offloading the optimizer state takes the shards of the parameters to the host, too
    offloads_parameters: bool = False
    #: the package that it needs beside torch
    package: str | None = None
    zero_stage: int | None = None

    @property
    def compiles(self) -> bool:
        return not self.cannot_compile

    def holds_four_bits(self, dora: bool) -> bool:
        """Whether it holds a 4-bit base below an adapter; DoRA (``dora``) unpacks weights itself, so they must be
        whole.
        """
        return self.holds_quantised and not (dora and self.shards_parameters)

    def load(self) -> Any:
        """The class of the engine; imports torch, and the engine's package where it has one."""
        module, _, name = self.made_by.partition(":")
        return getattr(importlib.import_module(module), name)


_FSDP: dict[str, Any] = {
    "made_by": "aifactory_train.parallel.fsdp:FSDPEngine",
    "shards_parameters": True,
    "shards_gradients": True,
    "shards_optimizer": True,
    "cuts": "rows",
    "keeps_mean": True,
    "holds_quantised": True,
    "optimizers": ("adamw", "sgd", "muon", "schedule_free_adamw", "adafactor"),
    "weights": "block",
    "offloads_optimizer": True,
    "offloads_parameters": True,
}
_ZERO: dict[str, Any] = {
    "made_by": "aifactory_train.parallel.deepspeed:DeepSpeedEngine",
    "shards_optimizer": True,
    "shard_group": "all",
    "cuts": "buffer",
    "gradient_buffers": True,
    "fp32_masters": True,
    "offloads_optimizer": True,
    "more_groups": True,  # DeepSpeed copies the group of all ranks
    "package": "deepspeed",
    "samples": False,  # not tried
}
#: Why an optimizer does not go with every cut.
NEEDS = {
    "adamw8bit": "keeps one scale for blocks of them",
    "muon": "works on whole matrices",
    "schedule_free_adamw": "keeps weights beside them, which DeepSpeed would not know",
    "adafactor": "keeps means of their rows and columns",
}
#: The engines by the name in ``parallel.engine``. Among equally fast ones the planner takes the earlier.
ENGINES: dict[str, EngineTraits] = {
    "ddp": EngineTraits(
        made_by="aifactory_train.parallel.ddp:DDPEngine",
        means="the whole model fits on each GPU, so only gradients have to travel",
        compute_copies=True,
        gradient_buffers=True,
        keeps_mean=True,
        holds_quantised=True,
        # Blocks of 256 elements share a scale: where a tensor is cut, blocks would follow the cut, and a checkpoint its
        # ranks.
        optimizers=("adamw", "adamw8bit", "sgd", "muon", "schedule_free_adamw", "adafactor"),
    ),
    "fsdp2": EngineTraits(means="one copy of the model over all GPUs", shard_group="all", **_FSDP),
    "hsdp": EngineTraits(
        means="copies of the model on {shard} GPUs each keep gathering on the fast links",
        shard_group="chosen",
        more_groups=True,
        **_FSDP,
    ),
    "zero1": EngineTraits(means="optimizer state in shards", zero_stage=1, **_ZERO),
    "zero2": EngineTraits(
        means="optimizer state and gradients in shards",
        **{**_ZERO, "zero_stage": 2, "shards_gradients": True, "reduces": "each"},
    ),
    "zero3": EngineTraits(
        means="everything in shards",
        **{
            **_ZERO,
            "zero_stage": 3,
            "shards_gradients": True,
            "shards_parameters": True,
            "cuts": "elements",
            "weights": "module",
            "gradient_buffers": False,
            "reduces": "each",
            "cannot_compile": "ZeRO-3 gathers parameters by hooks inside each block, which a compiled block cannot "
            "contain",
        },
    ),
}


def traits_of(name: str) -> EngineTraits:
    """The traits of engine ``name`` (``auto``: of the default). Raises :class:`UserError` for an unknown one."""
    name = DEFAULT if name == "auto" else name
    if name not in ENGINES:
        raise UserError(f"unknown engine '{name}'", where="parallel.engine", fix=f"one of {', '.join(ENGINES)}")
    return ENGINES[name]


def zero_stage(asked: int, *, bf16: bool, offload_optimizer: bool) -> int:
    """The ZeRO stage that runs where stage ``asked`` is wanted; the engine and the planner both ask here.

    In bf16, DeepSpeed hands its stage 1 to another optimizer, which keeps no partitions that norms and checkpoints
    could be read from: stage 2 runs instead. With the optimizer state in host memory stage 1 is DeepSpeed's own.
    """
    return 2 if asked == 1 and bf16 and not offload_optimizer else asked


def engine_that_runs(name: str, *, bf16: bool, offload_optimizer: bool) -> str:
    """``name``, but for a ZeRO stage that DeepSpeed runs as another one (:func:`zero_stage`)."""
    stage = traits_of(name).zero_stage
    if stage is None:
        return name
    runs = zero_stage(stage, bf16=bf16, offload_optimizer=offload_optimizer)
    return next(other for other, traits in ENGINES.items() if traits.zero_stage == runs)


def refuse_what_it_cannot_do(recipe: Recipe, name: str) -> None:
    """Raise :class:`UserError` where ``recipe`` asks for what engine ``name`` (``auto``: the default) cannot hold or
    do.
    """
    name = DEFAULT if name == "auto" else name
    traits = traits_of(name)
    refuse_quantised(recipe, name)
    refuse_optimizer(recipe, name)
    if recipe.methods.grpo is not None and not traits.samples:
        first, *others = (other for other, found in ENGINES.items() if found.samples)
        raise UserError(
            f"GRPO has not been tried with answers sampled under engine {name}",
            where="parallel.engine",
            fix=f"--set parallel.engine={first}; also {', '.join(others)}",
        )
    if recipe.parallel.compile and not traits.compiles:
        raise UserError(
            traits.cannot_compile,
            where="parallel.compile",
            fix="--set parallel.engine=fsdp2 (the same memory), or parallel.compile=false",
        )
    if recipe.parallel.offload_optimizer and not traits.offloads_optimizer:
        raise UserError(
            f"engine {name} keeps the optimizer state beside the parameters",
            where="parallel.offload_optimizer",
            fix="--set parallel.engine=fsdp2 (or zero2, zero3), or parallel.offload_optimizer=false",
        )


def refuse_optimizer(recipe: Recipe, name: str) -> None:
    """Raise :class:`UserError` for an optimizer whose state engine ``name`` (``auto``: the default) cannot keep, and
    for a mean of the weights where it keeps none."""
    wanted, traits = recipe.train.optimizer, traits_of(name)
    if recipe.train.average is not None and not traits.keeps_mean:
        others = ", ".join(other for other, found in ENGINES.items() if found.keeps_mean)
        raise UserError(
            f"engine {name} keeps no mean of the weights beside them",
            where="train.average",
            fix=f"--set parallel.engine={others}, or leave train.average out",
        )
    if wanted not in traits.optimizers:
        others = ", ".join(other for other, found in ENGINES.items() if wanted in found.optimizers)
        raise UserError(
            f"engine {name} cannot keep the state of {wanted}: it cuts tensors, and {wanted} {NEEDS[wanted]}",
            where="train.optimizer",
            fix=f"--set parallel.engine={others}, or train.optimizer={traits.optimizers[0]}",
        )


def refuse_quantised(recipe: Recipe, name: str) -> None:
    """Raise :class:`UserError` for a 4-bit base with an engine (``auto``: the default) that cannot hold one."""
    if recipe.adapter.quantise_base == "none":
        return
    traits = traits_of(name)
    if not traits.holds_quantised:
        raise UserError(
            f"engine {name} cannot hold a 4-bit base",
            where="adapter.quantise_base",
            fix="--set parallel.engine=fsdp2 (in shards) or ddp (on every rank), or adapter.quantise_base=none",
        )
    if not traits.holds_four_bits(recipe.adapter.kind == "dora"):
        raise UserError(
            f"engine {name} cuts a 4-bit base, and DoRA needs the norms of its whole weights in every step",
            where="adapter.kind",
            fix="--set parallel.engine=ddp, or adapter.kind=lora",
        )
