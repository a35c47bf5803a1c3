"""Puts the Triton operators into a transformers or PEFT model, by module structure, and says what was replaced, what
not, and why.

Only instances of the given model change: a replaced module gets a subclass of its own class with another ``forward``.
No library is patched, no parameter is moved or renamed, so checkpoints, adapters and sharding see the same model. A
module that is not recognised is left alone and listed.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections import Counter
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from aifactory_train.kernels import ops
from aifactory_train.kernels.registry import select

#: prefixes of transformers' class names whose modules have the structure below. EuroLLM, Viking, Salamandra and Teuken
#: are Llama.
FAMILIES = (
    "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Olmo", "Olmo2", "Olmo3", "Apertus", "SmolLM3",
)  # fmt: skip

#: the families whose RMSNorm multiplies by 1 + weight
ONE_PLUS_WEIGHT = ("Gemma", "Gemma2", "Gemma3")

#: activation class of transformers or torch -> kind of gated activation
ACTIVATIONS = {
    "SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "tanh", "PytorchGELUTanh": "tanh", "GELUActivation": "none",
}  # fmt: skip

_LAYER_SIGNATURE = [
    "self",
    "hidden_states",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "position_embeddings",
    "kwargs",
]


@dataclasses.dataclass
class AppliedOperators:
    """What happened to the model: ``replaced`` counts (operator, class), ``kept`` counts (class, reason),
    ``selections`` one line an op.
    """

    arch: str
    sku: str | None
    family: str | None
    replaced: Counter = dataclasses.field(default_factory=Counter)
    kept: Counter = dataclasses.field(default_factory=Counter)
    selections: list[str] = dataclasses.field(default_factory=list)
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "arch": self.arch, "sku": self.sku, "family": self.family, "note": self.note,
            "replaced": [{"op": op, "class": name, "count": n} for (op, name), n in sorted(self.replaced.items())],
            "kept": [{"class": name, "reason": why, "count": n} for (name, why), n in sorted(self.kept.items())],
            "selections": self.selections,
        }  # fmt: skip

    def __str__(self) -> str:
        where = f"{self.arch} {self.sku or ''}".strip()
        lines = [f"kernels on {where}: " + (f"family {self.family}" if self.family else "no known family")]
        if self.note:
            lines.append(f"  {self.note}")
        lines += [f"  replaced {n} x {name} by {op}" for (op, name), n in sorted(self.replaced.items())]
        lines += [f"  kept {n} x {name}: {why}" for (name, why), n in sorted(self.kept.items())]
        return "\n".join(lines + [f"  {line}" for line in self.selections])


def apply_kernels(
    model: nn.Module,
    *,
    arch: str,
    sku: str | None = None,
    dtype: str | torch.dtype = "bf16",
    enabled: bool = True,
    skip: Collection[str] = (),
) -> AppliedOperators:
    """Replace modules of ``model`` (a transformers model, PEFT-wrapped or not) by ones that call the operators.

    ``arch`` and ``sku`` name the device it will run on (``cpu`` changes nothing), ``dtype`` the activations.
    ``enabled=False`` switches everything off. ``skip`` names operators to leave out; where weights may only be read
    through their own module (DeepSpeed ZeRO-3), skip ``rms_norm_residual`` and ``lora_linear``, which read their
    children's. Adapted layers that belong together run as one operator (``lora_linears``, ``lora_gated_down``) where
    nothing speaks against it. Calling it twice changes nothing more.
    """
    kind = str(dtype).removeprefix("torch.")
    report = AppliedOperators(arch, sku, family_of(model))
    if not enabled:
        report.note = "switched off: nothing replaced"
        return report
    hidden = _hidden_size(model)
    chosen = select("rms_norm", arch, sku, kind, {"rows": 8192, "hidden": hidden})
    if chosen.implementation == "torch":
        report.note = f"nothing replaced: {chosen.reason}"
        return report
    if report.family is None:
        report.note = (
            f"{type(_unwrapped(model)).__name__} is of no known family ({', '.join(FAMILIES)}): only PEFT "
            f"layers can be replaced"
        )
    for module in list(model.modules()):
        name = _original_class(module).__name__
        outcome = _replace(module, name, report.family, skip)
        if outcome is None:
            continue
        op, why = outcome
        if op:
            report.replaced[op, name] += 1
        else:
            report.kept[name, why] += 1
    for op in sorted({op for op, _ in report.replaced}):
        report.selections.append(select(op, arch, sku, kind, _typical(op, model, hidden)).describe())
    return report


def family_of(model: nn.Module) -> str | None:
    """The longest known prefix whose decoder layers the model contains, or None."""
    names = {_original_class(m).__name__ for m in model.modules()}
    return next((f for f in sorted(FAMILIES, key=len, reverse=True) if f"{f}DecoderLayer" in names), None)


def _unwrapped(model: nn.Module) -> nn.Module:
    base: Any = getattr(model, "get_base_model", None)
    return base() if base else model


def _hidden_size(model: nn.Module) -> int:
    config = getattr(_unwrapped(model), "config", None)
    config = getattr(config, "text_config", config)
    return int(getattr(config, "hidden_size", 4096))


def _typical(op: str, model: nn.Module, hidden: int) -> dict[str, int]:
    """Sizes of the model for the operator's selection line."""
    config = getattr(_unwrapped(model), "config", None)
    config = getattr(config, "text_config", config)
    heads = int(getattr(config, "num_attention_heads", 32))
    return {
        "rows": 8192, "hidden": hidden, "width": int(getattr(config, "intermediate_size", 4 * hidden)), "heads": heads,
        "kv_heads": int(getattr(config, "num_key_value_heads", heads) or heads),
        "head_dim": int(getattr(config, "head_dim", None) or hidden // heads), "in": hidden, "out": hidden, "rank": 16,
    }  # fmt: skip


def _original_class(module: nn.Module) -> type:
    """The library's class of a module, also after replacement."""
    return getattr(type(module), "replaces", type(module))


def _replace(module: nn.Module, name: str, family: str | None, skip: Collection[str]) -> tuple[str | None, str] | None:
    """(operator, "") when the module was replaced, (None, reason) when it is one of ours to look at but was not, None
    otherwise.
    """
    if name == "Linear" and hasattr(module, "lora_A") and hasattr(module, "base_layer"):
        return _lora(module, skip)
    if not family or not name.startswith(family):
        if name.endswith(("RMSNorm", "LayerNorm", "MLP", "Attention", "DecoderLayer")) and not hasattr(
            module, "base_layer"
        ):
            return None, "not of a known family"
        return None
    part = name[len(family) :]
    if part == "RMSNorm":
        return _turn(module, "rms_norm", _rms_norm(family in ONE_PLUS_WEIGHT), skip)
    if part == "LayerNorm":
        return _turn(module, "layer_norm", _layer_norm(), skip)
    if part == "MLP":
        return _mlp(module, skip)
    if part == "Attention":
        return _attention(module, skip)
    if part == "DecoderLayer":
        return _layer(module, family, skip)
    return None


def _turn(module: nn.Module, op: str, forward, skip: Collection[str]) -> tuple[str | None, str]:
    """Give one instance a subclass of its class with another forward."""
    if op in skip:
        return None, f"{op} skipped on request"
    original = _original_class(module)
    module.__class__ = _subclass(original, op, forward)
    return op, ""


@lru_cache(None)
def _subclass(original: type, op: str, forward) -> type:
    return type(
        original.__name__,
        (original,),
        {"forward": forward, "replaces": original, "operator": op, "__module__": __name__},
    )


@lru_cache(None)
def _rms_norm(one_plus: bool):
    offset = 1.0 if one_plus else 0.0

    def forward(self, hidden_states):
        return ops.rms_norm(hidden_states, self.weight, _eps(self), offset)

    return forward


@lru_cache(None)
def _layer_norm():
    def forward(self, hidden_states):
        # OLMo's has no parameters and a fixed epsilon.
        return ops.layer_norm(hidden_states, None, None, 1e-5)

    return forward


def _eps(norm: nn.Module) -> float:
    value: Any = getattr(norm, "variance_epsilon", None)
    return float(norm.eps if value is None else value)  # type: ignore[arg-type]


def _mlp(module: nn.Module, skip: Collection[str]) -> tuple[str | None, str]:
    if not all(hasattr(module, n) for n in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return None, "its MLP has no gate"
    activation = type(module.act_fn).__name__
    kind = ACTIVATIONS.get(activation)
    if kind is None:
        return None, f"activation {activation} has no kernel"
    return _turn(module, "swiglu" if kind == "silu" else "geglu", _gated(kind), skip)


@lru_cache(None)
def _gated(kind: str):
    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(ops.swiglu(gate, up) if kind == "silu" else ops.geglu(gate, up, kind))

    return forward


def _attention(module: nn.Module, skip: Collection[str]) -> tuple[str | None, str]:
    forward: Any = _original_class(module).forward  # type: ignore[attr-defined]
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__"):
        return None, "its forward is wrapped by a decorator"
    if "apply_rotary_pos_emb" not in forward.__code__.co_names:
        return None, "its forward does not call apply_rotary_pos_emb"
    together = "lora_linears" not in skip and set(_QKV) <= set(forward.__code__.co_names)
    rotating = _with_rope(forward)
    return _turn(module, "rope", _projecting_together(rotating) if together else rotating, skip)


_QKV = ("q_proj", "k_proj", "v_proj")


class _Projected:
    """An attention module whose three projections are computed already; everything else is the module's own."""

    def __init__(self, module: nn.Module, results: dict[str, torch.Tensor]):
        self._module, self._results = module, results

    def __getattr__(self, name: str) -> Any:
        result = self._results.get(name)
        return getattr(self._module, name) if result is None else lambda _: result


@lru_cache(None)
def _projecting_together(forward: types.FunctionType):
    """``forward`` with query, key and value projected by one operator, where all three are plain adapted layers."""

    def together(self, hidden_states, *args, **kwargs):
        origin = kwargs.pop(ORIGIN, None)
        adapted = _adapted([getattr(self, name, None) for name in _QKV])
        if adapted is None:
            return forward(self, hidden_states, *args, **kwargs)
        results = dict(zip(_QKV, ops.lora_linears(hidden_states, *adapted, origin), strict=True))
        return forward(_Projected(self, results), hidden_states, *args, **kwargs)

    together.takes_origin = True  # type: ignore[attr-defined]
    return together


def _adapted(modules: list[Any]) -> tuple[list, list, list, float] | None:
    """(base weights, A, B, scaling) of layers that one operator can compute: each with the same one adapter of one rank
    and scaling, without bias, dropout or an adapter's variant, and frozen. None where one of them is none of that.
    """
    weights, lora_a, lora_b, kinds = [], [], [], set()
    for module in modules:
        if getattr(module, "operator", None) != "lora_linear" or module.disable_adapters or module.merged:
            return None
        names = [n for n in module.active_adapters if n in module.lora_A]
        if len(names) != 1 or module.lora_variant:
            return None
        (name,) = names
        a, b, base, dropout = (module.lora_A[name], module.lora_B[name], module.base_layer, module.lora_dropout[name])
        if (module.training and not isinstance(dropout, nn.Identity)) or base.weight.requires_grad:
            return None
        if a.bias is not None or b.bias is not None or base.bias is not None:
            return None
        weights.append(base.weight)
        lora_a.append(a.weight)
        lora_b.append(b.weight)
        kinds.add((a.weight.shape, module.scaling[name]))
    shapes = {shape[0] for shape, _ in kinds}
    scalings = {scaling for _, scaling in kinds}
    if len(shapes) != 1 or len(scalings) != 1:
        return None
    return weights, lora_a, lora_b, float(scalings.pop())


@lru_cache(None)
def _with_rope(forward: types.FunctionType) -> types.FunctionType:
    """The library's own forward with ours under the name ``apply_rotary_pos_emb``: a copy with its own globals, nothing
    is patched.
    """
    theirs = forward.__globals__["apply_rotary_pos_emb"]

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        if unsqueeze_dim != 1 or cos.dim() != 3 or cos.shape[-1] != q.shape[-1]:
            return theirs(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)  # partial rotation or another layout
        return ops.rope(q, k, cos, sin)

    copy = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, "apply_rotary_pos_emb": apply_rotary_pos_emb},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _layer(module: nn.Module, family: str, skip: Collection[str]) -> tuple[str | None, str] | None:
    """Fuse the residual addition after attention into the norm that follows, where the layer is of the plain pre-norm
    form.
    """
    # Unwrapped, because transformers wraps every layer's forward for activation checkpointing (our subclass's too).
    forward: Any = inspect.unwrap(_original_class(module).forward)  # type: ignore[attr-defined]
    pairs = [("input_layernorm", "post_attention_layernorm"), ("attention_layernorm", "feedforward_layernorm")]
    norms = next((p for p in pairs if all(hasattr(module, n) for n in p)), None)
    if norms is None or not _original_class(getattr(module, norms[1])).__name__.endswith("RMSNorm"):
        return None, "residual not fused: it is not followed by an RMSNorm"
    if (
        set(forward.__code__.co_names) != {*norms, "self_attn", "mlp"}
        or list(inspect.signature(forward).parameters) != _LAYER_SIGNATURE
    ):
        return None, "residual not fused: its forward does more than the pre-norm form"
    offset = 1.0 if family in ONE_PLUS_WEIGHT else 0.0
    return _turn(module, "rms_norm_residual", _pre_norm(*norms, offset, "lora_linears" not in skip), skip)


@lru_cache(None)
def _pre_norm(first: str, second: str, offset: float, fuses: bool):
    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
        position_embeddings=None, **kwargs,
    ):  # fmt: skip
        before = getattr(self, first)
        normed: dict[str, Any] | None = None
        if fuses and getattr(before, "operator", None) == "rms_norm":
            hidden_states, residual = ops.rms_norm_passing(hidden_states, before.weight, _eps(before), offset)
            if getattr(type(self.self_attn).forward, "takes_origin", False):
                normed = {ORIGIN: (residual, before.weight, _eps(before), offset)}
        else:
            residual, hidden_states = hidden_states, before(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, use_cache=use_cache, position_embeddings=position_embeddings, **kwargs,
            **(normed or {}),
        )  # fmt: skip
        norm = getattr(self, second)
        if hidden_states.dtype == residual.dtype:
            hidden_states, residual = ops.rms_norm_residual(hidden_states, residual, norm.weight, _eps(norm), offset)
        else:  # autocast: a half-precision branch on an fp32 stream
            residual = residual + hidden_states
            hidden_states = norm(residual)
        adapted = _adapted_mlp(self.mlp) if fuses and hidden_states.dtype == residual.dtype else None
        if adapted is None:
            return residual + self.mlp(hidden_states)
        (weights, a, b, scaling), kind = adapted
        origin = (residual, norm.weight, _eps(norm), offset)
        gate, up = ops.lora_linears(hidden_states, weights[:2], a[:2], b[:2], scaling, origin)
        del hidden_states  # nothing keeps it: its memory is free for what follows
        return ops.lora_gated_down(gate, up, residual, weights[2], a[2], b[2], scaling, kind)

    return forward


#: Under this name a layer tells its attention what the hidden states were normalised from.
ORIGIN = "normalised_from"

#: kinds of gated activation in the order of the operators' numbers
_KINDS = ("silu", "tanh", "none")


def _adapted_mlp(module: Any) -> tuple[tuple, int] | None:
    """What the operators need of a gated MLP whose three layers are plain adapted ones; None for another."""
    if getattr(module, "operator", None) not in ("swiglu", "geglu"):
        return None
    parts = _adapted([module.gate_proj, module.up_proj, module.down_proj])
    return None if parts is None else (parts, _KINDS.index(ACTIVATIONS[type(module.act_fn).__name__]))


def _lora(module: nn.Module, skip: Collection[str]) -> tuple[str | None, str]:
    if type(module.base_layer) is not nn.Linear:
        return None, f"LoRA on {type(module.base_layer).__name__}: only nn.Linear has the epilogue"
    if getattr(module, "lora_variant", None):
        return None, "a LoRA variant (DoRA and the like)"
    return _turn(module, "lora_linear", _lora_forward(_original_class(module)), skip)


@lru_cache(None)
def _lora_forward(original: type):
    def forward(self, x, *args, **kwargs):
        names = [n for n in self.active_adapters if n in self.lora_A]
        if args or kwargs or self.disable_adapters or self.merged or len(names) != 1 or self.lora_variant:
            return original.forward(self, x, *args, **kwargs)  # type: ignore[attr-defined]
        (name,) = names
        a, b, base = self.lora_A[name], self.lora_B[name], self.base_layer
        if a.bias is not None or b.bias is not None:
            return original.forward(self, x)  # type: ignore[attr-defined]
        dropout = self.lora_dropout[name]
        dropped = dropout(x) if self.training and not isinstance(dropout, nn.Identity) else None
        return ops.lora_linear(x, base.weight, a.weight, b.weight, self.scaling[name], base.bias, dropped)

    return forward
