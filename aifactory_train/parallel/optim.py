"""Which optimizer steps which parameters, and at what share of the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aifactory_train.config.schema import TrainConfig

if TYPE_CHECKING:
    from aifactory_train.parallel.shards import Shards

#: In the names of embeddings; those of GPT-2 (GPT-SW3 and others) are ``wte`` and ``wpe``.
EMBEDDINGS = ("embed", ".wte.", ".wpe.")
#: In the names of the second matrix of an adapter, which starts at zero.
ADAPTER_B = ("lora_B", "lora_embedding_B")

#: What else is set for a parameter: its group has these entries beside ``weight_decay``.
Treatment = Callable[[str, nn.Parameter], dict[str, Any]]


def is_embedding(name: str) -> bool:
    """Whether the parameter ``name`` is an embedding."""
    return any(word in name for word in EMBEDDINGS)


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, treatment: Treatment | None = None
) -> list[dict[str, Any]]:
    """Trained parameters in groups: matrices decay; vectors (norms, biases) and embeddings (by name) do not. Those that
    ``treatment`` treats otherwise are groups of their own.

    Each group carries ``names`` in the order of its ``params``.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim >= 2 and not is_embedding(name)
        more = treatment(name, parameter) if treatment is not None else {}
        key = (not decays, *more.items())
        decay = weight_decay if decays else 0.0
        group = groups.setdefault(key, {"params": [], "names": [], **more, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups, key=lambda key: bool(key[0]))]


def treatment_of(core: nn.Module, blocks: list[nn.Module], settings: TrainConfig) -> Treatment:
    """What ``settings`` say of single parameters of ``core``, whose transformer blocks are ``blocks``.

    ``rate``: the share of the learning rate (LoRA+, arXiv:2402.12354; layer-wise decay, arXiv:2003.10555, table 7).
    ``orthogonal``: stepped by Muon, a matrix of a block that is no embedding (or a stack of them, one an expert).
    """
    depth = {id(p): i for i, block in enumerate(blocks, 1) for p in block.parameters()}
    names = [name for name, p in core.named_parameters() if id(p) in depth]
    order = {name: i for i, (name, _) in enumerate(core.named_parameters())}
    first = order[names[0]] if names else 0

    def rate(name: str, parameter: nn.Parameter) -> float:
        share = 1.0
        if settings.lora_plus_ratio is not None and any(word in name for word in ADAPTER_B):
            share *= settings.lora_plus_ratio
        if settings.layer_decay is not None:
            # from the bottom: what comes before the blocks is layer 0, what comes after the last one has the full rate
            outside = 0 if order.get(name, first) < first else len(blocks) + 1
            share *= settings.layer_decay ** (len(blocks) + 1 - depth.get(id(parameter), outside))
        return share

    def treat(name: str, parameter: nn.Parameter) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if settings.lora_plus_ratio is not None or settings.layer_decay is not None:
            more["rate"] = rate(name, parameter)
        if settings.optimizer == "muon":
            matrix = parameter.ndim in (2, 3) and min(parameter.shape[-2:]) > 1
            more["orthogonal"] = matrix and id(parameter) in depth and not is_embedding(name)
        return more

    return treat


def build_optimizer(
    groups: list[dict[str, Any]],
    settings: TrainConfig,
    compute: torch.dtype = torch.float32,
    shards: Shards | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of ``settings`` for ``groups``: torch's AdamW (its fused implementation, on CPU and GPU) or SGD,
    AdamW with 8-bit moments (our kernel on a GPU, plain torch on a CPU), Muon, schedule-free AdamW or Adafactor; the
    loop sets the learning rate before each step.

    compute: what Muon multiplies matrices in. shards: where the rows of each parameter lie, if not all here.
    """
    groups = [{k: v for k, v in group.items() if k != "names"} for group in groups]
    rate, betas, eps = settings.learning_rate, settings.betas, settings.eps
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=settings.momentum)
    if settings.optimizer == "adamw8bit":
        from aifactory_train.kernels.adamw8bit.op import AdamW8bit

        # Without an fp32 master a small update would be rounded away; the kernel then rounds by chance (from a seed
        # that the step gives).
        lowest = any(p.dtype == torch.bfloat16 for group in groups for p in group["params"])
        return AdamW8bit(groups, lr=rate, betas=betas, eps=eps, stochastic_rounding=lowest)
    if settings.optimizer == "muon":
        from aifactory_train.parallel.muon import Muon

        return Muon(groups, lr=rate, betas=betas, eps=eps, compute=compute, shards=shards)
    if settings.optimizer == "schedule_free_adamw":
        from aifactory_train.parallel.schedule_free import ScheduleFreeAdamW

        return ScheduleFreeAdamW(groups, lr=rate, betas=betas, eps=eps)
    if settings.optimizer == "adafactor":
        from aifactory_train.parallel.adafactor import Adafactor

        return Adafactor(groups, lr=rate, shards=shards)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=eps, fused=True)


def new_moments(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """What ``optimizer`` keeps of ``parameter`` (of its ``group``) once a step was made, all zero."""
    own = getattr(optimizer, "new_state", None)
    if own is not None:
        return own(group, parameter)
    from aifactory_train.kernels.adamw8bit.op import AdamW8bit, new_state

    if isinstance(optimizer, AdamW8bit):
        return {**new_state(parameter), "step": 0}
    if isinstance(optimizer, torch.optim.SGD):
        return {"momentum_buffer": torch.zeros_like(parameter)} if group["momentum"] else {}
    return adamw_moments(parameter)


def adamw_moments(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state of torch's AdamW."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return {
        # torch's fused and capturable implementations want the count beside the parameter
        "step": torch.tensor(0.0, dtype=torch.float32, device=local.device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }
