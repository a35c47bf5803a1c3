"""The matrix products of any decoder of transformers, read from its modules: for the FLOPs of models whose dimensions
no formula covers. The model is built on the meta device, so that this costs neither memory nor time worth naming."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from aifactory_train.model.blocks import Recurrence
from aifactory_train.model.flops import BlockProducts, ModelProducts, Product, Trained
from aifactory_train.parallel.apply import block_modules

#: Keys under which configurations say how many experts a token is sent to.
_CHOSEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k",
    "top_k_experts",
    "moe_num_active_experts",
)
#: Parts of names of modules in which attention or a recurrence stands, and of layers that lead back to the hidden size.
_MIXER = re.compile(r"att|mixer|mamba|conv|ssm|rec|time_mix|temporal", re.IGNORECASE)
_BACK = re.compile(r"(o_proj|out|out_proj|c_proj|dense|wo|output|down_proj|fc2|w2|fc_out|dense_4h_to_h|output_linear)$")


def of_config(config: Mapping[str, Any], trained: Trained) -> ModelProducts:
    """The products of the model that ``config`` (a transformers configuration as a dict) describes.

    Adapters are found by name on linear layers; those of stacked experts are not counted. Raises what transformers
    raises for a configuration that it cannot build.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {k: v for k, v in config.items() if k not in ("model_type", "quantization_config", "transformers_version")}
    built = AutoConfig.for_model(str(config["model_type"]), **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(built)
    return of_model(model, trained)


def of_model(model: Any, trained: Trained) -> ModelProducts:
    """The same of a model that exists already (without adapters)."""
    text = model.config.get_text_config()
    found: dict[tuple[Any, ...], BlockProducts] = {}
    for number, block in enumerate(block_modules(model)):
        one = _block(block, number, text, trained)
        key = (tuple(one.products.items()), replace(one, products={}).__repr__())
        known = found.get(key)
        found[key] = one if known is None else replace(known, layers=known.layers + 1)
    head = model.get_output_embeddings()
    vocab, hidden = head.weight.shape if head is not None else (text.vocab_size, text.hidden_size)
    return ModelProducts(tuple(found.values()), int(vocab), int(hidden))


def _block(block: nn.Module, number: int, text: Any, trained: Trained) -> BlockProducts:
    products: dict[str, Product] = {}
    scores = values = 0
    window = chunk = None
    states = executed = 0.0
    for name, module in block.named_modules():
        own = _products(name, module, text)
        stage = (0 if _MIXER.search(name) else 2) + (1 if _BACK.search(name) else 0)
        for part, (inside, outside, times) in own.items():
            adapted = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            rank = trained.rank if adapted and _is_named(name, trained) else 0
            products[part] = Product(inside, outside, times, stage, rank)
        recurrence = _recurrence(module)
        if recurrence is not None:
            states, executed = states + recurrence.flops, executed + recurrence.executed_flops
        elif isinstance(module, nn.Conv1d):
            convolved = 2.0 * module.weight.numel()
            states, executed = states + convolved, executed + convolved
        elif _attends(module):
            scores, values = _widths(module, text)
            window, chunk = _limits(module, number, text)
    last = next(reversed(products), None) if products else None
    routed = any(p.times != 1 for p in products.values())
    if last is not None and (routed or products[last].stage != 3):
        last = None
    return BlockProducts(1, products, scores, values, window, chunk, states, executed, last)


def _is_named(name: str, trained: Trained) -> bool:
    if trained.full:
        return False
    if trained.targets == "all-linear":
        return True
    wanted = [trained.targets] if isinstance(trained.targets, str) else trained.targets
    return any(name == target or name.endswith(f".{target}") for target in wanted)


def _products(name: str, module: nn.Module, text: Any) -> dict[str, tuple[int, int, float]]:
    """name -> (inputs, outputs, times) of the products that ``module`` itself runs."""
    if isinstance(module, nn.Linear):
        listed = re.search(r"experts\.\d+\.", name)  # experts as modules of their own: each token meets some of them
        share = _chosen(text) / max(1, _count(text)) if listed else 1.0
        return {name: (module.in_features, module.out_features, share)}
    if type(module).__name__ == "Conv1D":  # transformers' linear layer of GPT-2, stored transposed
        inside, outside = module.weight.shape  # type: ignore[union-attr, misc]
        return {name: (int(inside), int(outside), 1.0)}  # type: ignore[call-overload, arg-type]
    found: dict[str, tuple[int, int, float]] = {}
    for part, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3 and not isinstance(module, nn.Conv1d) and parameter.shape[1] > 1:
            count, a, b = parameter.shape
            found[f"{name}.{part}"] = (int(b), int(a), min(float(_chosen(text)), float(count)))
        elif parameter.dim() == 2 and re.search(r"Router|Gate$|TopK", type(module).__name__):
            outside, inside = parameter.shape
            found[f"{name}.{part}"] = (int(inside), int(outside), 1.0)
    return found


def _first(place: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(place, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _chosen(text: Any) -> int:
    return _first(text, _CHOSEN) or 1


def _count(text: Any) -> int:
    return _first(text, ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")) or 1


def _attends(module: nn.Module) -> bool:
    """Whether ``module`` multiplies queries with keys: an attention class that owns layers and is no wrapper of
    another."""
    if "attention" not in type(module).__name__.lower() or not any(isinstance(m, nn.Module) for m in module.children()):
        return False
    inner = [m for m in module.modules() if m is not module]
    wraps = any("attention" in type(m).__name__.lower() and any(True for _ in m.children()) for m in inner)
    return not wraps or any(isinstance(m, nn.Linear) for m in module.children())


def _widths(module: nn.Module, text: Any) -> tuple[int, int]:
    """All query heads together in the product with the keys, and in that with the values."""
    heads = _first(module, ("num_heads", "num_attention_heads", "n_heads", "n_head")) or text.num_attention_heads
    hidden = text.hidden_size
    size = (
        _first(module, ("head_dim", "head_size", "attn_head_size"))
        or getattr(text, "head_dim", None)
        or hidden // heads
    )
    scores = _first(module, ("qk_head_dim", "q_head_dim", "key_head_dim")) or size
    values = _first(module, ("v_head_dim", "value_head_dim")) or size
    return heads * scores, heads * values


def _limits(module: nn.Module, number: int, text: Any) -> tuple[int | None, int | None]:
    """``(window, chunk)`` of the attention of layer ``number``."""
    kinds = getattr(text, "layer_types", None) or []
    kind = kinds[number] if number < len(kinds) else ""
    if kind == "chunked_attention":
        return None, _first(text, ("attention_chunk_size",))
    if kind and "sliding" not in kind and "local" not in kind:
        return None, None
    window = _first(module, ("sliding_window", "window_size", "attention_window_size"))
    return window or (_first(text, ("sliding_window", "attention_window_size")) if kind else None), None


def _recurrence(module: nn.Module) -> Recurrence | None:
    """The state of a recurrent layer by the names that transformers' classes use, without its convolution; None where
    there is none."""
    delta = ("num_v_heads", "num_k_heads", "head_k_dim", "head_v_dim")
    if all(_first(module, (name,)) for name in delta):
        heads, keys, key, value = (_first(module, (name,)) or 0 for name in delta)
        return Recurrence("delta", (), heads=heads, key=key, value=value, key_heads=keys)
    state = _first(module, ("ssm_state_size",))
    if state is not None:
        many, size = _first(module, ("num_heads", "n_heads")), _first(module, ("head_dim",))
        if many and size:
            groups, chunk = _first(module, ("n_groups", "num_groups")) or 1, _first(module, ("chunk_size",)) or 256
            return Recurrence("mamba2", (), heads=many, key=state, value=size, key_heads=groups, chunk=chunk)
        width = _first(module, ("intermediate_size",)) or 0
        return Recurrence("mamba2", (), heads=width, key=state, value=1, key_heads=0, chunk=0)  # token by token
    if "lightning" in type(module).__name__.lower():
        heads, size = _first(module, ("num_attention_heads", "num_heads")) or 0, _first(module, ("head_dim",)) or 0
        chunk = _first(module, ("block_size",)) or 256
        return Recurrence("lightning", (), heads=heads, key=size, value=size, key_heads=heads, chunk=chunk)
    return None
