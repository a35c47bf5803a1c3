"""Tiny mixtures of experts of the families that the tests of experts share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "qwen3_5_moe")


def config(family: str, *, experts: int = 4, vocabulary: int = 400, layers: int = 2, **more: Any) -> Any:
    """The transformers configuration of a mixture with about 100,000 parameters, two experts a token."""
    import transformers as tf

    shape: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "num_experts_per_tok": 2, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 2,
        "pad_token_id": 3,
    }  # fmt: skip
    if family == "mixtral":
        return tf.MixtralConfig(**{**shape, "num_local_experts": experts, "sliding_window": None, **more})
    if family == "gpt_oss":
        kinds = ["sliding_attention", "full_attention"] * layers
        more = {"layer_types": kinds[:layers], "sliding_window": 16, "rope_parameters": {"rope_type": "default",
                "rope_theta": 10000.0}, **more}  # fmt: skip
        return tf.GptOssConfig(**{**shape, "num_local_experts": experts, **more})
    shape |= {"num_experts": experts, "moe_intermediate_size": 48, "norm_topk_prob": True}
    if family == "qwen3_moe":
        return tf.Qwen3MoeConfig(**{**shape, **more})
    if family == "deepseek_v3":
        shape |= {"n_routed_experts": experts, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
                  "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                  "v_head_dim": 8, "num_key_value_heads": 4}  # fmt: skip
        return tf.DeepseekV3Config(**{**shape, **more})
    if family == "olmoe":
        return tf.OlmoeConfig(**{**shape, **more})
    if family == "qwen3_5_moe":
        kinds = ["linear_attention", "full_attention"] * layers
        shape |= {"shared_expert_intermediate_size": 24, "layer_types": kinds[:layers], "linear_key_head_dim": 8,
                  "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}  # fmt: skip
        return tf.Qwen3_5MoeTextConfig(**{**shape, **more})
    raise ValueError(family)


def model(family: str, *, seed: int = 0, **more: Any) -> Any:
    """A randomly initialised ``...ForCausalLM`` in fp32 on the CPU whose routers tell tokens apart."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    found = AutoModelForCausalLM.from_config(config(family, **more), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
            elif "router" in name or "gate.weight" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
            elif "embed" not in name:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return found.eval()


def write(folder: Path, family: str, **more: Any) -> Path:
    """A model folder with a tokenizer."""
    import helpers

    model(family, **more).save_pretrained(folder)
    return helpers.write_tokenizer(folder)


def recipe(**blocks: Any) -> Any:
    """A recipe that trains an adapter of rank 4, with these blocks."""
    from aifactory_train.config.schema import Recipe

    adapter = {"kind": "lora", "rank": 4, "alpha": 8, **blocks.pop("adapter", {})}
    return Recipe.model_validate({"model": {"base": "x"}, "data": {"train": ["x.jsonl"]}, "adapter": adapter, **blocks})


def adapted(family: str, settings: Any, report: Any = None, **more: Any) -> Any:
    """A tiny mixture with adapters that do something, computed as in a training."""
    import torch

    from aifactory_train.model import experts
    from aifactory_train.model.adapters import apply_adapter
    from aifactory_train.model.report import ModelReport

    found = model(family, **more)
    experts.use(found)
    found = apply_adapter(found, settings, report or ModelReport())
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return found
