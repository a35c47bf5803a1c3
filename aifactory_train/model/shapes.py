"""The dimensions of a decoder-only transformer, and what follows from them alone: how many parameters, in which
tensors.

Dimensions come from a ``config.json`` (a local folder or the cache) or, without any network, from ``data/models.json``.
A model whose dimensions are not known, or whose architecture these formulae do not cover (mixture of experts, encoders,
state-space layers), is refused by name: a plan from guessed dimensions would be a confident wrong number.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aifactory_train.config.quantised_base import quantisation
from aifactory_train.core.errors import UserError, did_you_mean
from aifactory_train.core.files import read_json

DATA = Path(__file__).resolve().parent / "data"

#: model_type of ``config.json`` -> how its block differs from Llama's. Only these are covered.
#: mlp: gated = three matrices (SwiGLU), plain = two. norms: RMS norms per block over the hidden size. qk_norm: 'head' =
#: one weight of head_dim for all heads, 'full' = a weight over all heads.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "ministral": {},
    "ministral3": {},
    "smollm3": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "olmo2": {"qk_norm": "full"},
    "olmo3": {"qk_norm": "full"},
    "apertus": {"qk_norm": "head", "mlp": "plain", "mlp_scalars": 2},
    "gemma3_text": {"qk_norm": "head", "norms": 4},
}


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of one dense decoder-only model. All counts are exact integers; a *block* is one transformer layer."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int | None = None
    mlp: str = "gated"
    tied: bool = False
    norms: int = 2  # per block, over the hidden size
    norm_bias: bool = False  # LayerNorm with a bias
    qk_norm: str = "none"
    qkv_bias: bool = False
    linear_bias: bool = False  # every other linear layer too
    mlp_scalars: int = 0  # learned scalars of the activation (xIELU has two)
    learned_positions: bool = False
    window: int | None = None  # tokens that a windowed layer attends to
    window_layers: int = 0  # how many layers are windowed
    quantised: str | None = None  # how the weights are quantised, by the configuration's own words
    family: str = "llama"
    source: str = ""
    confidence: str = ""
    published_parameters: float | None = None

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block: name -> (inputs, outputs)."""
        return self._linears

    @functools.cached_property
    def _linears(self) -> dict[str, tuple[int, int]]:
        found = {
            "q": (self.hidden, self.q_width),
            "k": (self.hidden, self.kv_width),
            "v": (self.hidden, self.kv_width),
            "o": (self.q_width, self.hidden),
        }
        if self.mlp == "gated":
            found["gate"] = (self.hidden, self.ffn)
        found["up"] = (self.hidden, self.ffn)
        found["down"] = (self.ffn, self.hidden)
        return found

    @functools.cached_property
    def block_linear_parameters(self) -> int:
        return sum(a * b for a, b in self.linears().values())

    @functools.cached_property
    def block_parameters(self) -> int:
        """All parameters of one block."""
        count = (
            self.block_linear_parameters + self.norms * self.hidden * (2 if self.norm_bias else 1) + self.mlp_scalars
        )
        if self.qk_norm == "head":
            count += 2 * self.head_dim
        elif self.qk_norm == "full":
            count += self.q_width + self.kv_width
        if self.qkv_bias or self.linear_bias:
            count += self.q_width + 2 * self.kv_width
        if self.linear_bias:
            count += self.hidden + self.ffn * (2 if self.mlp == "gated" else 1) + self.hidden
        return count

    @functools.cached_property
    def embedding_parameters(self) -> int:
        positions = (self.max_positions or 0) * self.hidden if self.learned_positions else 0
        return self.vocab * self.hidden + positions

    @property
    def head_parameters(self) -> int:
        """The output layer's own parameters: none where it is tied to the embedding."""
        return 0 if self.tied else self.vocab * self.hidden

    @functools.cached_property
    def root_parameters(self) -> int:
        """What lies outside the blocks: embedding, last norm, output layer."""
        return self.embedding_parameters + self.head_parameters + self.hidden * (2 if self.norm_bias else 1)

    @functools.cached_property
    def parameters(self) -> int:
        return self.layers * self.block_parameters + self.root_parameters

    def block_tensors(self) -> list[tuple[int, int]]:
        """Shapes (rows, columns) of the parameters of one block; vectors have one column. Engines shard along the
        rows.
        """
        found = [(b, a) for a, b in self.linears().values()]
        found += [(self.hidden, 1)] * (self.norms * (2 if self.norm_bias else 1))
        if self.qk_norm == "head":
            found += [(self.head_dim, 1)] * 2
        elif self.qk_norm == "full":
            found += [(self.q_width, 1), (self.kv_width, 1)]
        if self.qkv_bias or self.linear_bias:
            found += [(self.q_width, 1), (self.kv_width, 1), (self.kv_width, 1)]
        if self.linear_bias:
            found += [(self.hidden, 1)] + [(self.ffn, 1)] * (2 if self.mlp == "gated" else 1) + [(self.hidden, 1)]
        found += [(1, 1)] * self.mlp_scalars
        return found

    def root_tensors(self) -> list[tuple[int, int]]:
        """Shapes of the parameters outside the blocks."""
        found = [(self.vocab, self.hidden)]
        if self.learned_positions:
            found.append((self.max_positions or 0, self.hidden))
        if not self.tied:
            found.append((self.vocab, self.hidden))
        return found + [(self.hidden, 1)] * (2 if self.norm_bias else 1)

    def lora_tensors(
        self, rank: int, targets: str | list[str] = "all-linear", dora: bool = False
    ) -> list[tuple[int, int]]:
        """Shapes of the adapters of one block."""
        found: list[tuple[int, int]] = []
        for name, (a, b) in self.linears().items():
            if is_target(name, targets):
                found += [(rank, a), (b, rank)] + ([(b, 1)] if dora else [])
        return found

    def lora_parameters(self, rank: int, targets: str | list[str] = "all-linear", dora: bool = False) -> int:
        """Adapter parameters: rank x (inputs + outputs) of every target in every block; DoRA adds one magnitude per
        output.
        """
        return self.layers * sum(
            rank * (a + b) + (b if dora else 0) for name, (a, b) in self.linears().items() if is_target(name, targets)
        )


#: What HF calls the projections, per short name.
TARGET_NAMES = {
    "q": ("q_proj", "query", "wq", "q"),
    "k": ("k_proj", "key", "wk", "k"),
    "v": ("v_proj", "value", "wv", "v"),
    "o": ("o_proj", "out_proj", "wo", "output_proj", "o"),
    "gate": ("gate_proj", "w1", "gate"),
    "up": ("up_proj", "w3", "fc1", "up"),
    "down": ("down_proj", "w2", "fc2", "down"),
}


def is_target(name: str, targets: str | list[str]) -> bool:
    """Whether the linear layer ``name`` (q, k, v, o, gate, up, down) carries an adapter."""
    if targets == "all-linear":
        return True
    wanted = [targets] if isinstance(targets, str) else targets
    return any(w in TARGET_NAMES[name] for w in wanted)


# ---- reading dimensions

_NEEDED = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
}


def from_config(config: Mapping[str, Any], name: str, where: str | None = None) -> ModelShape:
    """A :class:`ModelShape` from the content of a ``config.json``.

    Raises :class:`UserError` for an architecture that is not covered or a dimension that is missing.
    """
    where = where or name
    kind, quantised = config.get("model_type"), quantisation(config)
    inner = config.get("text_config")
    if isinstance(inner, Mapping):  # a vision-language model: the language model is what is trained here
        kind, config = (
            inner.get("model_type", kind),
            {
                **inner,
                "tie_word_embeddings": config.get("tie_word_embeddings", inner.get("tie_word_embeddings", False)),
            },
        )
    for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"):
        if config.get(key):
            raise UserError(
                f"'{name}' is a mixture of experts ({key} = {config[key]}); the planner's formulae cover dense "
                f"decoders only",
                where=where,
                fix="choose a dense base model, or measure a short run instead of planning",
            )
    if kind not in FAMILIES:
        raise UserError(
            f"the planner's formulae do not cover model_type '{kind}'",
            where=where,
            fix=f"covered: {', '.join(sorted(FAMILIES))}",
        )
    missing = [key for key in _NEEDED.values() if not isinstance(config.get(key), int) or config[key] < 1]
    if missing:
        raise UserError(f"the model's config lacks {', '.join(missing)}", where=where, fix="complete the config.json")
    values = {ours: config[theirs] for ours, theirs in _NEEDED.items()}
    heads = values["heads"]
    head_dim = config.get("head_dim") or values["hidden"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise UserError(f"{heads} attention heads cannot share {kv_heads} key-value heads", where=where)
    types = config.get("layer_types") or []
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern")
    if types:
        windowed = sum(t == "sliding_attention" for t in types)
    elif window and pattern:
        windowed = values["layers"] - values["layers"] // pattern
    else:
        windowed = values["layers"] if window else 0
    options = dict(FAMILIES[kind].items())
    if config.get("attention_bias"):
        options["qkv_bias"] = True
    return ModelShape(
        name=name,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=config.get("max_position_embeddings"),
        tied=bool(config.get("tie_word_embeddings", kind == "gemma3_text")),
        window=window if windowed else None,
        window_layers=windowed,
        quantised=quantised,
        family=kind,
        source=where,
        confidence="config.json",
        **values,
        **options,
    )


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads((DATA / "models.json").read_text(encoding="utf-8"))


def known() -> dict[str, ModelShape]:
    """The bases whose dimensions ship with the package, by Hugging Face id."""
    found = {}
    for entry in _table()["models"]:
        entry = dict(entry)
        ids = entry.pop("ids")
        family = entry["family"]
        head_dim = entry.pop("head_dim", entry["hidden"] // entry["heads"])
        base = ModelShape(name=ids[0], head_dim=head_dim, **{**FAMILIES.get(family, {}), **entry})
        for name in ids:
            found[name] = replace(base, name=name)
    return found


def load(base: str, folders: list[Path] | None = None, config_file: str | None = None) -> ModelShape:
    """Dimensions of ``base``: an explicit ``config_file``, a local folder, the cache (``folders``), or the shipped
    table.

    Raises :class:`UserError` when they cannot be had without the network.
    """
    if config_file:
        return _read(Path(config_file), base)
    if Path(base).is_dir():
        return _read(Path(base) / "config.json", base)
    for folder in folders or []:
        if (folder / "config.json").is_file():
            return _read(folder / "config.json", base)
    table = known()
    if base in table:
        return table[base]
    folded = {key.lower(): key for key in table}
    if base.lower() in folded:
        return table[folded[base.lower()]]
    for entry in _table()["missing"]:
        if base in entry["ids"]:
            raise UserError(
                f"the dimensions of '{base}' are not shipped: {entry['why']}",
                where="model.base",
                fix="give its config.json with --model-config FILE, or run 'aifactory fetch' first",
            )
    raise UserError(
        f"the dimensions of '{base}' are not known here{did_you_mean(base, table)}",
        where="model.base",
        fix="give its config.json with --model-config FILE, or run 'aifactory fetch' first",
    )


def _read(path: Path, name: str) -> ModelShape:
    if not path.exists():
        raise UserError("no config.json here", where=str(path))
    config = read_json(path, dict)
    return from_config(config, name, str(path))
