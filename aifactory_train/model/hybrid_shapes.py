"""Mixtures of experts and hybrids: from the keys of their ``config.json`` to the kinds of blocks that they have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aifactory_train.core.errors import UserError
from aifactory_train.model.blocks import Experts, Recurrence

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.model.shapes import ModelShape


class Dimensions:
    """The keys of a configuration, which say what is missing and where."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self.config, self.where = config, where

    def __getitem__(self, key: str) -> int:
        value = self.config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"the model's config lacks {key}", where=self.where, fix="complete the config.json")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        value = self.config.get(key)
        return default if value is None else value

    def kinds(self, layers: int) -> list[str]:
        """What stands in attention's place, layer by layer."""
        found = self.get("layer_types") or self.get("layers_block_type")
        if found is None:
            every = self.get("full_attention_interval", 4)
            return ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
        if len(found) != layers:
            raise UserError(
                f"layer_types names {len(found)} layers, num_hidden_layers is {layers}",
                where=self.where,
                fix="correct the config.json",
            )
        return ["linear_attention" if t == "mamba" else "full_attention" if t == "attention" else t for t in found]


def _experts(d: Dimensions, width: str, **more: Any) -> Experts:
    count = "num_experts" if d.get("num_experts") else "num_local_experts"  # transformers writes either
    found = Experts(d[count], d["num_experts_per_tok"], d[width], **more)
    if found.chosen > found.count:
        raise UserError(
            f"a token is sent to {found.chosen} experts of {found.count}",
            where=d.where,
            fix="correct num_experts_per_tok in the config.json",
        )
    return found


def _sparse_layers(d: Dimensions, layers: int) -> list[bool]:
    """Which layers have experts rather than a dense MLP (Qwen's keys)."""
    every, dense = d.get("decoder_sparse_step", 1), set(d.get("mlp_only_layers", []))
    return [i not in dense and (i + 1) % every == 0 for i in range(layers)]


def _delta_net(d: Dimensions, hidden: int, *, fused: bool) -> Recurrence:
    """Qwen's gated delta net; ``fused``: queries, keys, values and gate come from one product."""
    key_heads, heads = d["linear_num_key_heads"], d["linear_num_value_heads"]
    key, value = d["linear_key_head_dim"], d["linear_value_head_dim"]
    keys, values = key_heads * key, heads * value
    into = [("in_proj_qkvz", 2 * keys + 2 * values), ("in_proj_ba", 2 * heads)]
    if not fused:
        into = [("in_proj_qkv", 2 * keys + values), ("in_proj_z", values), ("in_proj_b", heads), ("in_proj_a", heads)]
    linears = (*((name, hidden, width) for name, width in into), ("out_proj", values, hidden))
    return Recurrence(
        "delta",
        linears,
        heads=heads,
        key=key,
        value=value,
        key_heads=key_heads,
        channels=2 * keys + values,
        taps=d.get("linear_conv_kernel_dim", 4),
        vectors=(heads, heads, value),  # step bias, decay, norm of a head
        gates=values + 4 * heads,
    )


def _mamba2(d: Dimensions, hidden: int) -> Recurrence:
    inside, heads = d.get("mamba_expand", 2) * hidden, d["mamba_n_heads"]
    groups, state = d.get("mamba_n_groups", 1), d["mamba_d_state"]
    if inside % heads:
        raise UserError(f"{heads} heads cannot share a width of {inside}", where=d.where, fix="correct mamba_n_heads")
    channels = inside + 2 * groups * state
    biases = (channels,) if d.get("mamba_conv_bias", True) else ()
    if d.get("mamba_proj_bias", False):
        biases += (inside + channels + heads, hidden)
    return Recurrence(
        "mamba2",
        (("in_proj", hidden, inside + channels + heads), ("out_proj", inside, hidden)),
        heads=heads,
        key=state,
        value=inside // heads,
        key_heads=groups,
        channels=channels,
        taps=d.get("mamba_d_conv", 4),
        chunk=d.get("mamba_chunk_size", 256),
        vectors=(heads, heads, heads, inside, *biases),  # step bias, decay, skip, norm
        gates=inside + 2 * heads,
    )


def _mixtral(d: Dimensions, base: ModelShape) -> list[ModelShape]:
    return [replace(base, ffn=0, experts=_experts(d, "intermediate_size"))] * base.layers


def _gpt_oss(d: Dimensions, base: ModelShape) -> list[ModelShape]:
    experts = _experts(d, "intermediate_size", bias=True, router_bias=True)
    biased = bool(d.get("attention_bias", True))
    return [replace(base, ffn=0, experts=experts, sinks=True, qkv_bias=biased, o_bias=biased)] * base.layers


def _olmoe(d: Dimensions, base: ModelShape) -> list[ModelShape]:
    experts = _experts(d, "intermediate_size")
    return [replace(base, ffn=0, qk_norm="full", experts=experts)] * base.layers


def _qwen3_moe(d: Dimensions, base: ModelShape) -> list[ModelShape]:
    base = replace(base, qk_norm="head")
    sparse = replace(base, ffn=0, experts=_experts(d, "moe_intermediate_size"))
    return [sparse if at else replace(base, ffn=d["intermediate_size"]) for at in _sparse_layers(d, base.layers)]


def _qwen_hybrid(d: Dimensions, base: ModelShape) -> list[ModelShape]:
    """Qwen3-Next, Qwen3.5 and Qwen3.5-MoE: three gated delta nets, then attention with a gate."""
    base = replace(base, qk_norm="head", gated_attention=True)
    recurrence = _delta_net(d, base.hidden, fused=base.family == "qwen3_next")
    experts = None
    if base.family != "qwen3_5_text":
        experts = _experts(d, "moe_intermediate_size")
    sparse = _sparse_layers(d, base.layers)
    found = []
    for mixer, at in zip(d.kinds(base.layers), sparse, strict=True):
        kind = replace(base, recurrence=recurrence if mixer == "linear_attention" else None)
        if experts is not None and at:
            shared = d["shared_expert_intermediate_size"]
            found.append(replace(kind, ffn=shared, shared_gate=True, experts=experts))
        else:
            found.append(replace(kind, ffn=d["intermediate_size"]))
    return found


def _granite(d: Dimensions, base: ModelShape) -> list[ModelShape]:
    """Granite 4: Mamba-2 and a few attention layers, experts (or none) beside an MLP that every token takes."""
    base = replace(base, ffn=d["shared_intermediate_size"], fused_gate=True)
    if d.get("num_local_experts", 0):
        base = replace(base, experts=_experts(d, "intermediate_size"))
    mixers = d.kinds(base.layers)
    recurrence = _mamba2(d, base.hidden) if "linear_attention" in mixers else None
    return [replace(base, recurrence=recurrence if m == "linear_attention" else None) for m in mixers]


READERS: dict[str, Callable[[Dimensions, ModelShape], list[ModelShape]]] = {
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
    "olmoe": _olmoe,
    "qwen3_moe": _qwen3_moe,
    "qwen3_next": _qwen_hybrid,
    "qwen3_5_text": _qwen_hybrid,
    "qwen3_5_moe_text": _qwen_hybrid,
    "granitemoehybrid": _granite,
}


def with_kinds(config: Mapping[str, Any], base: ModelShape, where: str) -> ModelShape:
    """``base`` with the kinds of blocks that the configuration describes. Raises :class:`UserError` for a dimension
    that is missing or does not fit."""
    each = READERS[base.family](Dimensions(config, where), base)
    kept = dict(config)
    kept.pop("quantization_config", None)
    types = config.get("layer_types") or []
    kinds: list[ModelShape] = []
    for kind in dict.fromkeys(each):
        at = [i for i, other in enumerate(each) if other == kind]
        windowed = (
            base.window_layers if len(at) == base.layers else sum(types[i] == "sliding_attention" for i in at if types)
        )
        kinds.append(replace(kind, layers=len(at), window_layers=windowed, window=base.window if windowed else None))
    if len(kinds) == 1:
        return replace(kinds[0], config=kept)
    widest = max(kind.ffn for kind in kinds)
    return replace(base, ffn=widest, parts=tuple(kinds), config=kept)


def adapted_as(shape: ModelShape, recipe: Recipe) -> ModelShape:
    """``shape`` with the experts and routers that the recipe's adapter goes on (`model/expert_targets.py`)."""
    adapter, asked = recipe.adapter, recipe.experts
    refused = adapter.kind == "dora" or adapter.dropout  # peft puts neither on a parameter
    how = "none" if asked.adapt == "none" or refused else "all" if asked.adapt == "all" else "named"
    settings: dict[str, Any] = {"adapters": how, "router_adapted": asked.router == "trained"}

    def one(kind: ModelShape) -> ModelShape:
        return kind if kind.experts is None else replace(kind, experts=replace(kind.experts, **settings))

    return replace(one(shape), parts=tuple(one(part) for part in shape.parts))
