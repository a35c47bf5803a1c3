"""The dimensions of a decoder, and what follows from them alone: how many parameters, in which tensors.

Dimensions come from a ``config.json`` (a local folder or the cache) or, without any network, from ``data/models.json``.
A model whose dimensions are not known, or whose architecture these formulae do not cover, is refused by name: a plan
from guessed dimensions would be a confident wrong number.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aifactory_train.config.quantised_base import quantisation
from aifactory_train.core.errors import UserError, did_you_mean
from aifactory_train.core.files import read_json
from aifactory_train.model.blocks import Experts, Recurrence, Tensors
from aifactory_train.model.hybrid_shapes import READERS, with_kinds

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

#: every model_type whose dimensions are understood
COVERED = frozenset({*FAMILIES, *READERS})


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of one decoder. All counts are exact integers; a *block* is one layer.

    Where the blocks are of several kinds (attention here, a recurrence there; experts here, a dense MLP there),
    ``parts`` holds one shape a kind, in the order in which the kinds first appear, with ``layers`` blocks of it each;
    what describes one block is then asked of :attr:`kinds`, and the shape itself answers for the whole model.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int  # width of the MLP that every token takes; 0: there are routed experts alone
    vocab: int
    max_positions: int | None = None
    mlp: str = "gated"
    tied: bool = False
    norms: int = 2  # per block, over the hidden size
    norm_bias: bool = False  # LayerNorm with a bias
    qk_norm: str = "none"
    qkv_bias: bool = False
    o_bias: bool = False
    linear_bias: bool = False  # every other linear layer too
    mlp_scalars: int = 0  # learned scalars of the activation (xIELU has two)
    learned_positions: bool = False
    window: int | None = None  # tokens that a windowed layer attends to
    window_layers: int = 0  # how many layers are windowed
    sinks: bool = False  # a learned score per head that no token gets
    gated_attention: bool = False  # the query's product has a gate beside it for attention's output
    fused_gate: bool = False  # both halves of the MLP's gate are one linear layer (Granite's names)
    shared_gate: bool = False  # the MLP that every token takes is weighed by a product of its own
    experts: Experts | None = None
    recurrence: Recurrence | None = None  # in attention's place
    parts: tuple[ModelShape, ...] = ()
    quantised: str | None = None  # how the weights are quantised, by the configuration's own words
    family: str = "llama"
    source: str = ""
    confidence: str = ""
    published_parameters: float | None = None
    #: transformers' own keys, kept for the families that are built from them (planning/verify_sharding.py)
    config: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def kinds(self) -> tuple[ModelShape, ...]:
        """The kinds of blocks; of a model whose blocks are alike, itself."""
        return self.parts or (self,)

    @property
    def has_experts(self) -> bool:
        """Whether some block routes tokens to experts."""
        return any(kind.experts is not None for kind in self.kinds)

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block that every token takes: name -> (inputs, outputs)."""
        return self._linears

    @functools.cached_property
    def _linears(self) -> dict[str, tuple[int, int]]:
        if self.parts:
            raise ValueError(f"{self.name} has several kinds of blocks: ask one of them")
        found: dict[str, tuple[int, int]] = {}
        if self.recurrence is not None:
            found |= {name: (inside, outside) for name, inside, outside in self.recurrence.linears}
        else:
            found["q"] = (self.hidden, self.q_width * (2 if self.gated_attention else 1))
            found["k"] = found["v"] = (self.hidden, self.kv_width)
            found["o"] = (self.q_width, self.hidden)
        if self.ffn:
            if self.fused_gate:
                found |= {"input_linear": (self.hidden, 2 * self.ffn), "output_linear": (self.ffn, self.hidden)}
            else:
                found |= {"gate": (self.hidden, self.ffn)} if self.mlp == "gated" else {}
                found |= {"up": (self.hidden, self.ffn), "down": (self.ffn, self.hidden)}
        if self.shared_gate:
            found["shared_gate"] = (self.hidden, 1)
        return found

    @functools.cached_property
    def products(self) -> dict[str, tuple[int, int, int]]:
        """All matrix products of one block: name -> (inputs, outputs, times that a token goes through it)."""
        found = {name: (inside, outside, 1) for name, (inside, outside) in self.linears().items()}
        return found | (self.experts.products(self.hidden) if self.experts else {})

    @functools.cached_property
    def block_linear_parameters(self) -> int:
        """Weights of one block's products that a token meets: of experts, those that it is sent to."""
        return sum(a * b * times for a, b, times in self.products.values())

    @functools.cached_property
    def block_parameters(self) -> int:
        """All parameters of one block."""
        return sum(rows * columns for rows, columns in self.block_tensors())

    @property
    def largest_block(self) -> int:
        """Parameters of the largest block."""
        return max(kind.block_parameters for kind in self.kinds)

    @property
    def blocks_parameters(self) -> int:
        """Parameters of all blocks."""
        return sum(kind.layers * kind.block_parameters for kind in self.kinds)

    @property
    def linear_parameters(self) -> int:
        """Weights of all blocks' products that a token meets."""
        return sum(kind.layers * kind.block_linear_parameters for kind in self.kinds)

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
        return self.blocks_parameters + self.root_parameters

    @functools.cached_property
    def active_parameters(self) -> int:
        """Parameters that one token meets: all but those of the experts that it is not sent to."""
        idle = 0
        for kind in self.kinds:
            if kind.experts is not None:
                idle += kind.layers * (kind.experts.count - kind.experts.chosen) * kind.experts.weights(kind.hidden)
        return self.parameters - idle

    @property
    def packed_parameters(self) -> int:
        """Weights that a 4-bit base holds packed: those of linear layers. Stacked experts are none, and stay as they
        are."""
        return sum(kind.layers * sum(a * b for a, b in kind.linears().values()) for kind in self.kinds)

    def block_tensors(self) -> Tensors:
        """Shapes (rows, columns) of the parameters of one block; vectors have one column. Engines shard along the
        rows.
        """
        found = [(b, a) for a, b in self.linears().values()]
        found += [(self.hidden, 1)] * (self.norms * (2 if self.norm_bias else 1))
        if self.recurrence is not None:
            # its linear layers are counted above
            found += self.recurrence.tensors()[len(self.recurrence.linears) :]
        else:
            found += self._attention_vectors()
        if self.linear_bias and self.ffn:
            found += [(self.ffn, 1)] * (2 if self.mlp == "gated" else 1) + [(self.hidden, 1)]
        found += self.experts.tensors(self.hidden) if self.experts is not None else []
        return found + [(1, 1)] * self.mlp_scalars

    def _attention_vectors(self) -> Tensors:
        found: Tensors = []
        if self.qk_norm == "head":
            found += [(self.head_dim, 1)] * 2
        elif self.qk_norm == "full":
            found += [(self.q_width, 1), (self.kv_width, 1)]
        if self.qkv_bias or self.linear_bias:
            found += [(self.linears()["q"][1], 1), (self.kv_width, 1), (self.kv_width, 1)]
        if self.o_bias or self.linear_bias:
            found.append((self.hidden, 1))
        return found + ([(self.heads, 1)] if self.sinks else [])

    def root_tensors(self) -> Tensors:
        """Shapes of the parameters outside the blocks."""
        found = [(self.vocab, self.hidden)]
        if self.learned_positions:
            found.append((self.max_positions or 0, self.hidden))
        if not self.tied:
            found.append((self.vocab, self.hidden))
        return found + [(self.hidden, 1)] * (2 if self.norm_bias else 1)

    def adapted(self, targets: str | list[str]) -> set[str]:
        """Which of :attr:`products` of a block carry adapters."""
        found = {name for name in self.linears() if is_target(name, targets)}
        return found | (self.experts.adapted(targets) if self.experts is not None else set())

    def lora_tensors(self, rank: int, targets: str | list[str] = "all-linear", dora: bool = False) -> Tensors:
        """Shapes of the adapters of one block."""
        found: Tensors = []
        chosen = self.adapted(targets)
        for name, (a, b) in self.linears().items():
            if name in chosen:
                found += [(rank, a), (b, rank)] + ([(b, 1)] if dora else [])
        return found + (self.experts.adapter_tensors(self.hidden, rank, targets) if self.experts is not None else [])

    def lora_parameters(self, rank: int, targets: str | list[str] = "all-linear", dora: bool = False) -> int:
        """Adapter parameters: rank x (inputs + outputs) of every target in every block; DoRA adds one magnitude per
        output.
        """
        return sum(
            kind.layers * sum(rows * columns for rows, columns in kind.lora_tensors(rank, targets, dora))
            for kind in self.kinds
        )

    def active_lora_parameters(self, rank: int, targets: str | list[str] = "all-linear") -> int:
        """Adapter parameters that one token meets (DoRA's magnitudes left out)."""
        return sum(kind.layers * sum(kind.adapter_products(rank, targets).values()) for kind in self.kinds)

    def adapter_products(self, rank: int, targets: str | list[str] = "all-linear") -> dict[str, int]:
        """Adapter parameters that a token meets in one block, by product."""
        found = {}
        chosen = self.adapted(targets)
        for name, (a, b, times) in self.products.items():
            if name in chosen:
                found[name] = rank * (a + b) * times
        return found


#: What HF calls the projections, per short name.
TARGET_NAMES = {
    "q": ("q_proj", "query", "wq", "q"),
    "k": ("k_proj", "key", "wk", "k"),
    "v": ("v_proj", "value", "wv", "v"),
    "o": ("o_proj", "out_proj", "wo", "output_proj", "o"),
    "gate": ("gate_proj", "w1", "gate"),
    "up": ("up_proj", "w3", "fc1", "up"),
    "down": ("down_proj", "w2", "fc2", "down"),
    "shared_gate": ("shared_expert_gate",),
}


def is_target(name: str, targets: str | list[str]) -> bool:
    """Whether the linear layer ``name`` (q, k, v, o, gate, up, down; others by their own names) carries an adapter."""
    if targets == "all-linear":
        return True
    wanted = [targets] if isinstance(targets, str) else targets
    return any(w in TARGET_NAMES.get(name, (name,)) for w in wanted)


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
    if kind not in READERS:
        for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"):
            if config.get(key):
                raise UserError(
                    f"'{name}' is a mixture of experts ({key} = {config[key]}) of model_type '{kind}', which the "
                    f"planner's formulae do not cover",
                    where=where,
                    fix=f"covered: {', '.join(sorted(READERS))}; or measure a short run instead of planning",
                )
    if kind not in COVERED:
        raise UserError(
            f"the planner's formulae do not cover model_type '{kind}'",
            where=where,
            fix=f"covered: {', '.join(sorted(COVERED))}",
        )
    needed = {ours: theirs for ours, theirs in _NEEDED.items() if ours != "ffn" or kind not in READERS}
    missing = [key for key in needed.values() if not isinstance(config.get(key), int) or config[key] < 1]
    if missing:
        raise UserError(f"the model's config lacks {', '.join(missing)}", where=where, fix="complete the config.json")
    values = {"ffn": 0} | {ours: config[theirs] for ours, theirs in needed.items()}
    heads = values["heads"]
    head_dim = config.get("head_dim") or values["hidden"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise UserError(f"{heads} attention heads cannot share {kv_heads} key-value heads", where=where)
    types = config.get("layer_types") or []
    uses_window = config.get("use_sliding_window", kind != "qwen3_moe")
    window = config.get("sliding_window", 128 if kind == "gpt_oss" else None) if uses_window else None
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern")
    pattern = pattern or (2 if kind == "gpt_oss" else None)
    if types:
        windowed = sum(t == "sliding_attention" for t in types)
    elif window and pattern:
        windowed = values["layers"] - values["layers"] // pattern
    else:
        windowed = values["layers"] if window else 0
    options = dict(FAMILIES.get(kind, {}).items())
    if config.get("attention_bias"):
        options |= {"qkv_bias": True, "o_bias": True}
    shape = ModelShape(
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
    return with_kinds(config, shape, where) if kind in READERS else shape


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads((DATA / "models.json").read_text(encoding="utf-8"))


def known() -> dict[str, ModelShape]:
    """The bases whose dimensions ship with the package, by Hugging Face id."""
    found = {}
    for entry in _table()["models"]:
        entry = dict(entry)
        ids = entry.pop("ids")
        if "config" in entry:  # experts and hybrids: in transformers' own keys
            base = replace(from_config(entry.pop("config"), ids[0]), **entry)
        else:
            family = entry["family"]
            head_dim = entry.pop("head_dim", entry["hidden"] // entry["heads"])
            base = ModelShape(name=ids[0], head_dim=head_dim, **{**FAMILIES.get(family, {}), **entry})
        for name in ids:
            found[name] = replace(base, name=name)
    return found


def copies_of(shape: ModelShape) -> list[str]:
    """Shipped bases with the same dimensions whose weights are not quantised."""
    bare: dict[str, Any] = {"name": "", "quantised": None, "source": "", "confidence": "", "max_positions": None}
    wanted = replace(shape, **bare)
    return [name for name, other in known().items() if not other.quantised and replace(other, **bare) == wanted]


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
