"""A small copy of a model: the same classes and every kind of layer, random weights, fp32, on the CPU."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from aifactory_train.model.attention import PER_DOCUMENT
from aifactory_train.model.causal_lm import CausalLM

#: Tokens of the two documents that are compared.
LENGTHS = (13, 24)
VOCABULARY, FIRST_TOKEN = 128, 8
#: A copy with more parameters than this is not small.
MOST_PARAMETERS = 100_000_000

_LAYERS = re.compile(r"(num_(hidden_|decoder_|encoder_)?layers|n_layers?|(decoder|encoder)_layers|depth|num_blocks)$")
_HEADS = re.compile(r"(.*_)?(n_heads?|num_heads|num_attention_heads|attention_heads)$")
_MORE_HEADS = re.compile(
    r"(.*_)?(num_key_value_heads|num_kv_heads|n_head_kv|n_heads_kv|kv_heads|num_key_heads|num_value_heads|n_mamba_heads"
    r"|n_groups|ngroups)$"
)
_WIDTHS = re.compile(
    r"(hidden_size|n_embd|d_model|dim|embed_dim|embedding_size|hidden_dim|word_embed_proj_dim|lru_width|attention_hidden_size"
    r"|dim_model|d_embed|emb_dim|embedding_dim|mamba_d_ssm|mamba_intermediate_size|hidden_size_per_layer_input)$"
)
_INNER = re.compile(r".*(intermediate|ffn_dim|n_inner|d_ff|dim_ff|feed_forward|ffn_hidden|d_inner|mlp_hidden|dff).*")
_EXPERTS = re.compile(r"(moe_)?(num_experts|num_local_experts|n_routed_experts|num_routed_experts|n_experts)$")
_CHOSEN = re.compile(r"(moe_)?(num_experts_per_tok|top_?k|topk|num_experts_per_token|k)$")
WINDOWS = re.compile(r".*(window|chunk_size|local_attention|attention_span).*")


class NotSmallError(Exception):
    """No small copy of the configuration could be built and run."""


def small_plain(config: Any, trust: bool) -> tuple[Any, nn.Module, list[torch.Tensor], list[torch.Tensor]]:
    """(small configuration, its model, tokens of each document, their logits) by transformers' own eager attention.

    Few layers if they hold every kind, else all; widths divided by the number of heads, else as they are.
    """
    kinds, _ = _kinds(config, trust)
    layers = len(kinds)
    prefix = next((n for n in range(1, layers) if set(kinds[:n]) == set(kinds)), layers)
    reasons = []
    tries = [(prefix, 2), (min(4 * prefix, layers), 2), (layers, 2), (prefix, 4), (prefix, 0), (layers, 0)]
    for count, heads in dict.fromkeys(tries):
        try:
            small = shrunken(config, count, heads)
            fewer, parameters = _kinds(small, trust)
            if parameters > MOST_PARAMETERS:
                raise NotSmallError(f"{parameters / 1e6:.0f} M parameters are not few")
            if not {_coarse(k) for k in kinds} <= {_coarse(k) for k in fewer}:
                raise NotSmallError(f"{count} layers do not hold every kind of layer")
            plain, tokens, expected = plain_and_logits(small, trust)
            return small, plain, tokens, expected
        except Exception as error:  # whatever a configuration that does not fit together raises
            reasons.append(one_line(error))
    raise NotSmallError(reasons[0])


def plain_and_logits(small: Any, trust: bool) -> tuple[nn.Module, list[torch.Tensor], list[torch.Tensor]]:
    plain = build(small, "eager", trust)
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(FIRST_TOKEN, VOCABULARY, (n,), generator=generator) for n in LENGTHS]
    expected = [plain(input_ids=t[None], use_cache=False).logits[0].float() for t in tokens]
    if not all(bool(e.isfinite().all()) and float(e.std()) > 0 for e in expected):
        raise ValueError("random weights give no usable logits")
    return plain, tokens, expected


def as_trained(small: Any, plain: nn.Module, trust: bool, *, own: bool = False) -> CausalLM:
    """The model as training builds it, with the weights of ``plain``; ``own``: with ``model.attention: own``."""
    model = build(small, "eager" if own else PER_DOCUMENT, trust)
    model.load_state_dict(plain.state_dict())
    return CausalLM(model, own=own).eval()


def build(config: Any, attention: str, trust: bool, *, meta: bool = False) -> Any:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    with torch.device("meta") if meta else contextlib.nullcontext():
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=trust
        )
    if meta:
        return model
    embeddings = {id(model.get_input_embeddings().weight)}
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() > 1 and id(parameter) not in embeddings:
            parameter.mul_(2.0)  # scores spread enough for mistakes to show
        step = torch.randn(parameter.shape, generator=generator)
        parameter.add_(step, alpha=0.05 if parameter.dim() < 2 else 0.02)  # no zeros that hide a path
    return model.eval()


def text_part(config: Any) -> Any:
    """The part of ``config`` that describes the language model."""
    return config.get_text_config(decoder=True)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _kinds(config: Any, trust: bool) -> tuple[list[tuple], int]:
    """(a description of each layer of ``config``'s model: classes and switches of its modules; its parameters), without
    memory.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = build(config, "eager", trust, meta=True)
        except Exception as error:
            raise NotSmallError(one_line(error)) from None
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise NotSmallError("it has no list of layers")
    wanted = next((v for k, v in vars(text_part(config)).items() if _LAYERS.fullmatch(k) and is_count(v)), None)
    blocks = next((m for m in lists if len(m) == wanted), max(lists, key=len))
    return [tuple(sorted(set(_describe(block)))) for block in blocks], sum(p.numel() for p in model.parameters())


def _describe(block: nn.Module) -> Iterator[tuple[str, str, tuple]]:
    for name, module in block.named_modules():
        switches = tuple(
            sorted(
                (key, "set" if value is not None and not isinstance(value, (str, bool)) else str(value))
                for key, value in vars(module).items()
                if not key.startswith("_")
                and key != "training"
                and (
                    value is None or isinstance(value, (str, bool)) or "window" in key or key in ("use_rope", "no_rope")
                )
            )
        )
        yield re.sub(r"\d+", "#", name), type(module).__name__, switches


def _coarse(kind: tuple) -> tuple:
    """A layer's kind without the switches that sizes decide."""
    return tuple((name, module) for name, module, _ in kind)


def shrunken(config: Any, layers: int, least_heads: int) -> Any:
    """A copy of ``config`` with ``layers`` layers, a small vocabulary, few experts, and few and narrow heads (at least
    ``least_heads``; 0 leaves them as they are).
    """
    small = copy.deepcopy(config)
    text = text_part(small)
    whole = next((v for k, v in vars(text).items() if _LAYERS.fullmatch(k) and is_count(v)), None)
    parts = [small] + [v for v in vars(small).values() if hasattr(v, "to_dict") and hasattr(v, "model_type")]
    width = next(
        (v for k, v in vars(text).items() if k in ("hidden_size", "n_embd", "d_model", "dim") and is_count(v)), 0
    )
    for part in dict.fromkeys(map(id, parts)):
        one = next(p for p in parts if id(p) == part)
        _shrink(one, whole if one is text else None, layers if one is text or one is small else 2, least_heads)
    new_width = next(
        (v for k, v in vars(text).items() if k in ("hidden_size", "n_embd", "d_model", "dim") and is_count(v)), 0
    )
    for one in parts:
        if one is not text:
            for key, value in list(vars(one).items()):
                if value == width and width and key.startswith(("out_", "projection", "output_dim", "text_")):
                    setattr(one, key, new_width)
    return small


def _shrink(part: Any, whole: int | None, layers: int, least_heads: int) -> None:
    narrow = least_heads > 0
    values = {k: v for k, v in vars(part).items() if not k.startswith("_")}
    lists = {k: v for k, v in values.items() if isinstance(v, (list, tuple))}
    whole = whole or next((v for k, v in values.items() if _LAYERS.fullmatch(k) and is_count(v)), None)
    if whole is None:
        whole = max((len(v) for k, v in lists.items() if "layer" in k), default=None)
    heads = next((v for k, v in values.items() if _HEADS.fullmatch(k) and is_count(v)), 1)
    width = next((v for k, v in values.items() if _WIDTHS.fullmatch(k) and is_count(v)), heads)
    # a width whose rows are aligned: torch's grouped products (experts) ask for it
    divisors = [h for h in range(max(2, least_heads), heads + 1) if heads % h == 0]
    kept = next((h for h in divisors if (width * h // heads) % 8 == 0), divisors[0] if divisors else 1)
    factor = heads // kept if narrow else 1
    new: dict[str, Any] = {}
    for key, value in values.items():
        if key in lists:
            if "heads" in key and factor > 1 and all(map(is_count, value)):
                new[key] = value = [max(1, v // factor) for v in value]
            elif narrow and _INNER.fullmatch(key) and all(map(is_count, value)):
                new[key] = value = [_inner(v, factor) for v in value]
            if whole and len(value) == whole and layers < whole:
                new[key] = value[:layers]
        elif key == "quantization_config":
            new[key] = None
        elif key.endswith("token_id") and isinstance(value, int) and value >= VOCABULARY:
            new[key] = 0
        elif not is_count(value):
            continue
        elif "vocab_size" in key:
            new[key] = VOCABULARY
        elif _LAYERS.fullmatch(key):
            new[key] = min(value, layers)
        elif _EXPERTS.fullmatch(key):
            new[key] = min(value, 8)
        elif _CHOSEN.fullmatch(key) or key in ("n_group", "num_expert_group"):
            new[key] = min(value, 2)
        elif key == "topk_group":
            new[key] = 1
        elif key == "first_k_dense_replace":
            new[key] = min(value, max(1, layers - 1))
        elif WINDOWS.fullmatch(key):
            new[key] = max(value, 64) if "chunk_size" not in key or "attention" in key else value
        elif narrow and _INNER.fullmatch(key) and not _WIDTHS.fullmatch(key):
            new[key] = _inner(value, factor)
        elif factor > 1 and (_HEADS.fullmatch(key) or _MORE_HEADS.fullmatch(key) or _WIDTHS.fullmatch(key)):
            new[key] = max(1, value // factor)
    if "n_mamba_heads" in new and "mamba_headdim" in values:  # Zamba 2 has few and wide ones
        new["mamba_headdim"] = values["mamba_expand"] * new.get("hidden_size", 0) // new["n_mamba_heads"]
    for key, value in new.items():
        with contextlib.suppress(AttributeError):  # computed by the class from the others
            setattr(part, key, value)


def _inner(value: int, factor: int) -> int:
    """A small width of a feed-forward layer, aligned."""
    return max(16, min(value // factor, 256) // 16 * 16)


def one_line(error: BaseException) -> str:
    if isinstance(error, NotSmallError):
        return str(error)
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' warnings: they speak of a configuration that the user does not have."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
