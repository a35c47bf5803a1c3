"""Experts of a mixture: every routed token through the matrices of its expert, in one product for all of them.

transformers 5 keeps the matrices of all experts of a layer in one parameter and asks a registry how to compute them;
our function stands there. Tokens are sorted by expert (stably, on the device), multiplied by
:func:`aifactory_train.kernels.grouped_linear.op.grouped_linear`, and put back where they came from by the inverse
permutation: the sum over a token's experts has a fixed order, nothing is added by atomics, and the host waits for
nothing.

peft adapts such a parameter by making the whole product of the adapter's matrices beside it. Here the two matrices stay
what they are: names and shapes are peft's (``target_parameters``), so that any peft reads the export.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from aifactory_train.kernels.grouped_linear.op import grouped_linear

if TYPE_CHECKING:
    from aifactory_train.model.routing import Routing

#: our name in transformers' registry
NAME = "aifactory"

#: (A [E, R, K], B [E, M, R], scaling) of an adapted parameter [E, M, K]
Factors = tuple[torch.Tensor, torch.Tensor, float]


def fused(module: nn.Module) -> bool:
    """Whether ``module`` holds the matrices of many experts and asks transformers' registry how to compute them."""
    known = hasattr(module, "_is_expert_parallel") and hasattr(module, "is_transposed")
    return known and isinstance(module._parameters.get("down_proj"), nn.Parameter)


def find(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, module) of all experts that :func:`fused` holds for, in the order of the layers."""
    return [(name, module) for name, module in model.named_modules() if fused(module)]


def use(model: nn.Module) -> list[tuple[str, Any]]:
    """Let the experts of ``model`` be computed by :func:`forward`; returns :func:`find` of it."""
    found = find(model)
    if found:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
        for _, module in found:
            module.config._experts_implementation_internal = NAME
    return found


def without_kernels(model: nn.Module) -> None:
    """Leave the products to torch, one for each expert that has tokens (``kernels.enabled: off``)."""
    for _, module in find(model):
        module.by_kernels = False


# ---- order of tokens: permutations whose gradient is a permutation, not a sum by atomics


class _Sorted(torch.autograd.Function):
    """``x[perm // k]``: each token once for each of its k experts, in the order of experts."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, perm: torch.Tensor, inverse: torch.Tensor, k: int) -> torch.Tensor:
        ctx.k = k
        ctx.save_for_backward(inverse)
        return x.index_select(0, perm // k)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse).view(-1, ctx.k, grad.shape[1]).sum(1), None, None, None


class _Back(torch.autograd.Function):
    """``y[inverse]``: the order of tokens again."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, perm: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(perm)
        return y.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (perm,) = ctx.saved_tensors
        return grad.index_select(0, perm), None, None


def by_expert(indices: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(permutation that sorts by expert, its inverse, int32 bounds [E + 1]) of int64 ``indices`` [N] below
    ``experts``.
    """
    ordered, perm = torch.sort(indices, stable=True)
    places = torch.arange(len(indices), device=indices.device)
    inverse = torch.empty_like(perm).scatter_(0, perm, places)
    numbers = torch.arange(experts + 1, device=indices.device, dtype=ordered.dtype)
    return perm, inverse, torch.searchsorted(ordered, numbers).to(torch.int32)


def forward(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    adapters: dict[str, Factors] | None = None,
) -> torch.Tensor:
    """What transformers' experts return: ``hidden_states`` [T, H] through the experts ``top_k_index`` [T, k], summed
    with ``top_k_weights`` [T, k]. An index that is no expert's gives nothing (Zaya's skipped tokens).
    """
    tokens, k = top_k_index.shape
    routing: Routing | None = getattr(module, "routing", None)
    if routing is not None:
        top_k_weights = routing.seen(module, top_k_index, top_k_weights)
    experts = module.down_proj.shape[0]
    nobody = top_k_index >= experts
    indices = top_k_index.clamp(max=experts - 1)
    top_k_weights = top_k_weights.masked_fill(nobody, 0.0)
    perm, inverse, bounds = by_expert(indices.reshape(-1), experts)

    def product(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = getattr(module, name)
        if module.is_transposed:
            weight = weight.transpose(1, 2)
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        a, b, scaling = (adapters or {}).get(name, (None, None, 1.0))
        return grouped_linear(x, weight, bounds, a, b, scaling, bias, getattr(module, "by_kernels", True))

    inner = product(_Sorted.apply(hidden_states, perm, inverse, k), "gate_up_proj" if module.has_gate else "up_proj")
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    out = product(inner, "down_proj")
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)
    out = _Back.apply(out, perm, inverse).view(tokens, k, -1)
    return (out * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


# ---- adapters


def wrappers(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, module) of peft's wrappers around parameters: one for each parameter, those of one module nested."""
    try:
        from peft.tuners.lora.layer import ParamWrapper
    except ImportError:  # an older peft has none
        return []
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ParamWrapper)]


def use_factors(model: nn.Module) -> int:
    """Let adapted parameters keep their two matrices instead of peft's product of them; returns the parameters."""
    for module in outermost(model):
        module.forward = types.MethodType(_adapted, module)
    return len(wrappers(model))


def outermost(model: nn.Module) -> list[Any]:
    """Of the wrappers those that no other one wraps: what the model calls."""
    found = [module for _, module in wrappers(model)]
    inside = {id(module.base_layer) for module in found}
    return [module for module in found if id(module) not in inside]


def read_by(wrapper: Any) -> Iterator[nn.Parameter]:
    """The parameters that an outermost wrapper's forward reads of modules below it that it does not call."""
    layer = wrapper
    while hasattr(layer, "parameter_name"):
        yield from layer.lora_A.parameters()
        yield from layer.lora_B.parameters()
        layer = layer.base_layer
    if not fused(layer):
        yield from layer.parameters(recurse=False)


def factors(wrapper: Any) -> Factors:
    """The adapter of one of peft's wrappers; of a matrix, which has no experts, [1, R, K] and [1, M, R]."""
    adapter = wrapper.active_adapters[0]
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    experts = wrapper.num_experts
    a = a.view(experts, -1, a.shape[1])
    b = b.view(b.shape[0], -1, experts).permute(2, 0, 1)
    return a, b.contiguous(), float(wrapper.scaling[adapter])


def delta(wrapper: Any) -> torch.Tensor:
    """What the adapter adds to the parameter, in the parameter's shape: all of it, for merging."""
    a, b, scaling = factors(wrapper)
    product = torch.matmul(b, a) * scaling
    shape = wrapper.get_param().shape
    if len(shape) == 2:
        return product[0]
    return product if tuple(product.shape) == tuple(shape) else product.transpose(1, 2)


def _adapted(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """The forward of the outermost wrapper."""
    on: dict[str, Any] = {}
    layer = self
    while hasattr(layer, "parameter_name"):
        if not layer.disable_adapters and not layer.merged:
            on[layer.parameter_name] = layer
        layer = layer.base_layer
    if not on:
        return layer(x, *args, **kwargs)
    if fused(layer) and layer.config._experts_implementation == NAME:
        return layer(x, *args, adapters={name: factors(wrapper) for name, wrapper in on.items()}, **kwargs)
    if isinstance(layer, nn.Linear) and set(on) == {"weight"}:
        a, b, scaling = factors(on["weight"])
        return layer(x, *args, **kwargs) + F.linear(F.linear(x, a[0]), b[0]) * scaling
    with _in_place_of(layer, {name: getattr(layer, name) + delta(wrapper) for name, wrapper in on.items()}):
        return layer(x, *args, **kwargs)


@contextlib.contextmanager
def _in_place_of(module: nn.Module, values: dict[str, torch.Tensor]) -> Iterator[None]:
    """While active, parameters of ``module`` read as ``values``: what stands in the instance is found first."""
    before = {name: module.__dict__[name] for name in values if name in module.__dict__}
    module.__dict__.update(values)
    try:
        yield
    finally:
        for name in values:
            module.__dict__.pop(name, None)
        module.__dict__.update(before)
