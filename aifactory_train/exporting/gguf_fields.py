"""The fields of a GGUF file: what the computation depends on, what the file is called, its tokenizer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aifactory_train.core.errors import UserError
from aifactory_train.core.output import note
from aifactory_train.exporting.gguf_tokenizer import WAY_OUT, GgufTokenizer


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_fields(config: Any) -> dict[str, Any]:
    """``rope.*`` fields; Llama 3's scaling is a tensor (:func:`extra_tensors`). Refuses a scaling that has no fields
    here.
    """
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    out: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if float(rope.get("partial_rotary_factor", 1.0) or 1.0) != 1.0:
        raise UserError("GGUF export does not write partial rotation", where="config.json", fix=WAY_OUT)
    if kind == "linear":
        out.update({"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])})
    elif kind == "yarn" and not {"mscale", "mscale_all_dim", "attention_factor", "truncate"} & {
        k for k, v in rope.items() if v is not None
    }:
        out.update(
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": float(rope["factor"]),
                "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
            }
        )
        for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if rope.get(ours) is not None:
                out[f"rope.scaling.{theirs}"] = float(rope[ours])
    elif kind not in ("default", "llama3"):
        raise UserError(f"GGUF export does not write the rotary scaling '{kind}'", where="config.json", fix=WAY_OUT)
    return out


def extra_tensors(config: Any) -> dict[str, np.ndarray[Any, Any]]:
    """``rope_freqs.weight`` ``[head_dim / 2]`` of Llama 3: what each frequency is divided by (Llama 3.1's own
    formula).
    """
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return {}
    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    before = float(rope["original_max_position_embeddings"])
    places = torch.arange(0, head_dim(config), 2, dtype=torch.float64) / head_dim(config)
    waves = 2 * math.pi * float(rope["rope_theta"]) ** places
    smooth = ((before / waves - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).numpy().astype(np.float32)}


def context_length(config: Any) -> int:
    """Positions for which llama.cpp computes what the model does: it has no sliding window for these architectures."""
    longest = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return min(longest, int(window)) if window else longest


def model_fields(arch: str, config: Any, rows: int) -> dict[str, Any]:
    """Fields that the computation depends on: ``int`` is uint32 in the file, ``float`` float32."""
    size = head_dim(config)
    fields: dict[str, Any] = {
        "block_count": int(config.num_hidden_layers),
        "context_length": context_length(config),
        "embedding_length": int(config.hidden_size),
        "feed_forward_length": int(config.intermediate_size),
        "attention.head_count": int(config.num_attention_heads),
        "attention.head_count_kv": int(config.num_key_value_heads),
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": rows,
        "rope.dimension_count": size,
        **rope_fields(config),
    }
    return {f"{arch}.{name}": value for name, value in fields.items()}


def unread_settings(config: Any) -> dict[str, Any]:
    """Settings that are in the file and that transformers' reader leaves out."""
    out: dict[str, Any] = {"head_dim": head_dim(config)}
    if config.rope_parameters.get("rope_type", "default") != "default":
        out["rope_parameters"] = dict(config.rope_parameters)
    return out


def add_model(writer: Any, arch: str, config: Any, rows: int) -> None:
    longest = int(config.max_position_embeddings)
    if context_length(config) < longest:
        note(
            f"context length {context_length(config)} instead of {longest}: llama.cpp attends to everything, this "
            f"model only to a "
            "sliding window of that length"
        )
    for name, value in model_fields(arch, config, rows).items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)


def add_general(writer: Any, file: Path, parameters: int, kind: str) -> None:
    """``general.*`` from the model card beside ``file``: name, licence, base model, data sets, languages, tags."""
    import gguf

    card = gguf.Metadata.load_model_card(file.parent)
    found = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, None, None, parameters)
    if found.size_label is None:
        found.size_label = gguf.size_label(parameters, 0, 0, 0)
    found.name = found.name or file.stem
    writer.add_type("model")
    found.set_gguf_meta_model(writer)
    name = {"f32": "ALL_F32"}.get(kind, f"MOSTLY_{kind.upper()}")
    writer.add_file_type(int(gguf.LlamaFileType[name]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_tokenizer(writer: Any, tokenizer: GgufTokenizer) -> None:
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    if tokenizer.scores is not None:
        writer.add_token_scores(tokenizer.scores)
    writer.add_token_types(tokenizer.types)
    if tokenizer.merges is not None:
        writer.add_token_merges(tokenizer.merges)
    for kind, number in tokenizer.special.items():
        getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(tokenizer.add_eos)
    writer.add_add_space_prefix(tokenizer.add_space_prefix)
    if tokenizer.template is not None:
        writer.add_chat_template(tokenizer.template)
