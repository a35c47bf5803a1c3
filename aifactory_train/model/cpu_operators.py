"""The torch path of norms, gated MLPs and (LoRA) linear layers where no Triton kernel runs: less memory, fewer passes.

What a layer keeps for its backward pass is what costs memory. Written out in plain torch, a norm keeps four tensors of
the size of its input, a LoRA layer three. Here a norm keeps its input and one number per row, a gated MLP its two
projections, a LoRA layer next to nothing: its input is *remembered by recipe* (the norm's or the MLP's own inputs,
which are kept anyway) and made again in the backward pass for the price of one pointwise pass. The arithmetic of the
forward pass is transformers' and peft's, in the same order, so that logits stay the same to the last bits of fp32
(:mod:`aifactory_train.model.cpu_matmul` may sum a product in another order).

:func:`apply_cpu_operators` replaces ``forward`` on module instances whose structure is known; everything else stays as
it is and is named in the report.
"""

from __future__ import annotations

import ctypes
import functools
import types
from collections import Counter
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from aifactory_train.model.cpu_matmul import by_columns, by_rows

Recipe = tuple[str, tuple]  # how to make a tensor again: ("norm", (x, rstd, weight)) or ("swiglu", (gate, up))

#: Attribute by which a tensor carries its recipe to the linear layers that read it.
_RECIPE = "_aifactory_recipe"


def _make_again(kind: str, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    if kind == "norm":
        x, rstd, weight = parts
        return weight * (x * rstd)
    gate, up = parts
    return F.silu(gate) * up


class _RMSNorm(torch.autograd.Function):
    """``weight * (x * rsqrt(mean(x^2) + eps))`` over the last dimension, keeping ``x`` and ``rstd``."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, rstd, weight)
        return weight * (x * rstd), rstd

    @staticmethod
    def backward(ctx, grad, _):
        x, rstd, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * (x * rstd)).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            # with n = x * rstd and g = weight * grad:  dx = rstd * (g - n * mean(g * n))
            scaled = grad * weight
            mean = (scaled * x).mean(-1, keepdim=True).mul_(rstd).mul_(rstd)
            grad_x = scaled.addcmul_(x, mean, value=-1.0).mul_(rstd)
        return grad_x, grad_weight, None


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) * up``, keeping ``gate`` and ``up``."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, grad_up


class _Linear(torch.autograd.Function):
    """``x W^T + b`` (+ ``scale * (x A^T) B^T``), keeping the input's recipe where it has one, else the input (and ``x
    A^T``).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale, in_place, kind, *parts):
        flat = x.reshape(-1, x.shape[-1])
        out = by_rows(flat, weight)
        if bias is not None:
            out = out.add_(bias) if in_place else out + bias
        inner: tuple[torch.Tensor, ...] = ()
        if a is not None:
            inner = (by_rows(flat, a),)  # [rows, r]: kept, because it is small and the backward pass needs it
            branch = (inner[0], b.t())
            out = out.addmm_(*branch, alpha=scale) if in_place else torch.addmm(out, *branch, alpha=scale)
        needs_input = weight.requires_grad or a is not None
        ctx.kind, ctx.scale, ctx.shape = kind, scale, x.shape
        kept = parts if kind is not None else ((x,) if needs_input else ())
        ctx.has_lora, ctx.has_bias = a is not None, bias is not None
        ctx.save_for_backward(weight, *((a, b, *inner) if a is not None else ()), *(kept if needs_input else ()))
        # as torch's own linear layers: not a view for autograd, so that a model may add to it in place (Llama 4 does)
        return torch.ops.aten._unsafe_view(out, [*x.shape[:-1], weight.shape[0]])

    @staticmethod
    def backward(ctx, grad):
        weight, *rest = ctx.saved_tensors
        if ctx.has_lora:
            a, b, inner, *rest = rest
        grad = grad.reshape(-1, grad.shape[-1])
        needs = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = grad_a = grad_b = None
        if rest:
            x = (_make_again(ctx.kind, tuple(rest)) if ctx.kind is not None else rest[0]).reshape(-1, ctx.shape[-1])
        if needs[0]:
            grad_x = by_columns(grad, weight)
        if needs[1]:
            grad_weight = torch.mm(grad.t(), x)
        if needs[2]:
            grad_bias = grad.sum(0)
        if ctx.has_lora:
            through_b = by_columns(grad, b).mul_(ctx.scale)  # [rows, r]
            if needs[3]:
                grad_a = torch.mm(through_b.t(), x)
            if needs[4]:
                grad_b = torch.mm(grad.t(), inner).mul_(ctx.scale)
            if grad_x is not None:
                grad_x.addmm_(through_b, a)
        grad_x = grad_x.view(ctx.shape) if grad_x is not None else None
        return (grad_x, grad_weight, grad_bias, grad_a, grad_b, *[None] * (len(ctx.needs_input_grad) - 5))


def linear(
    x: torch.Tensor, weight, bias=None, a=None, b=None, scale: float = 1.0, in_place: bool = True
) -> torch.Tensor:
    """Linear layer with an optional LoRA branch: x ``[..., D]``, weight ``[O, D]``, a ``[r, D]``, b ``[O, r]``.

    ``in_place``: bias and branch are added to the product itself, see :func:`apply_cpu_operators`.
    """
    kind, parts = getattr(x, _RECIPE, (None, ()))
    return _Linear.apply(x, weight, bias, a, b, scale, in_place, kind, *parts)


# ---- memory that stays with the process

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
#: Blocks below this are taken from the heap, and the heap is kept: a step's tensors find memory that was touched
#: before.
_KEPT_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what a step frees for the next step; whether this C library could be told.

    By default a large tensor is mapped and unmapped each time, and each first touch of a page is a fault (measured: 16
    % of a step's CPU time with micro-batches of 2,048 tokens, 2 % with 512; peak memory 3 % higher or less).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))


# ---- applying it to modules


def _norm_forward(self, hidden_states):
    if not _plain(hidden_states, self.weight):
        return type(self).forward(self, hidden_states)
    out, rstd = _RMSNorm.apply(hidden_states, self.weight, _eps(self))
    setattr(out, _RECIPE, ("norm", (hidden_states.detach(), rstd, self.weight.detach())))
    return out


def _mlp_forward(self, x):
    gate, up = self.gate_proj(x), self.up_proj(x)
    if not _plain(gate, up):
        return self.down_proj(self.act_fn(gate) * up)
    out = _SwiGLU.apply(gate, up)
    setattr(out, _RECIPE, ("swiglu", (gate.detach(), up.detach())))
    return self.down_proj(out)


def _linear_forward(self, input, *, in_place):
    if not _plain(input, self.weight):
        return type(self).forward(self, input)
    return linear(input, self.weight, self.bias, in_place=in_place)


def _lora_forward(self, x, *args, in_place, **kwargs):
    adapters = self.active_adapters
    if args or kwargs or self.disable_adapters or self.merged or len(adapters) != 1 or not _plain(x):
        return type(self).forward(self, x, *args, **kwargs)
    name = adapters[0]
    base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
    return linear(x, base.weight, base.bias, a, b, self.scaling[name], in_place)


def _plain(*tensors: torch.Tensor) -> bool:
    """Whether this is ordinary fp32 work: autocast and mixed types keep transformers' own path."""
    return all(t.dtype == torch.float32 for t in tensors) and not torch.is_autocast_enabled("cpu")


def _eps(module: nn.Module) -> float:
    return float(cast(Any, module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps))


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether the module computes exactly ``weight * x * rsqrt(mean(x^2) + eps)``: by its output, not by its name."""
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or weight is None or weight.dim() != 1:
        return False
    if not (hasattr(module, "variance_epsilon") or hasattr(module, "eps")) or weight.dtype != torch.float32:
        return False
    if len(list(module.children())) or weight.device.type != "cpu":
        return False
    with torch.no_grad():
        x = torch.linspace(-2.0, 3.0, 2 * weight.numel()).view(2, -1)
        ours = weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + _eps(module)))
        return bool(torch.equal(type(module).forward(module, x), ours))


def _is_gated_mlp(module: nn.Module) -> bool:
    if not all(hasattr(module, n) for n in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return False
    return isinstance(module.act_fn, nn.SiLU) or type(module.act_fn).__name__ == "SiLUActivation"


def _is_plain_lora(module: Any) -> bool:
    """A peft LoRA layer over ``nn.Linear`` without dropout, DoRA, bias or other variants."""
    names = list(getattr(module, "lora_A", {}))
    if len(names) != 1 or type(getattr(module, "base_layer", None)) is not nn.Linear:
        return False
    name = names[0]
    dropout = module.lora_dropout[name]
    without_dropout = isinstance(dropout, nn.Identity) or getattr(dropout, "p", 1.0) == 0.0
    variant = getattr(module, "lora_variant", {})
    return (
        without_dropout
        and name not in variant
        and not getattr(module, "use_dora", {}).get(name, False)
        and module.lora_A[name].bias is None
        and module.lora_B[name].bias is None
        and not getattr(module, "fan_in_fan_out", False)
    )


def apply_cpu_operators(model: nn.Module, *, in_place: bool = True) -> tuple[Counter, Counter]:
    """Replace ``forward`` on the instances below ``model`` that are understood.

    ``in_place=False`` where selective checkpointing keeps the products of linear layers: it must find them as they were
    made.

    Returns (replaced, left) counts by class name; ``left`` holds norms, MLPs and LoRA layers whose structure is
    unknown.
    """
    replaced: Counter[str] = Counter()
    left: Counter[str] = Counter()
    inside_lora: set[int] = set()
    forwards: list[tuple[nn.Module, Any]] = []
    for module in model.modules():
        kind = type(module).__name__
        if hasattr(module, "parameter_name"):
            continue  # of experts: theirs already (model/experts.py)
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            inside_lora.update(id(child) for child in module.modules() if child is not module)
            if _is_plain_lora(module):
                forwards.append((module, functools.partial(_lora_forward, in_place=in_place)))
            else:
                left[f"{kind} of peft"] += 1
        elif _is_rms_norm(module):
            forwards.append((module, _norm_forward))
        elif kind.endswith("Norm"):
            left[kind] += 1
        elif _is_gated_mlp(module):
            forwards.append((module, _mlp_forward))
        elif kind.endswith("MLP"):
            left[kind] += 1
        elif type(module) is nn.Linear and id(module) not in inside_lora and module.weight.requires_grad:
            forwards.append((module, functools.partial(_linear_forward, in_place=in_place)))
    for module, function in forwards:
        module.forward = types.MethodType(function, module)  # type: ignore[method-assign]
        replaced[type(module).__name__] += 1
    return replaced, left
