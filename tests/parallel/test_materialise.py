"""The skeleton of a model: shapes, types, buffers and ties without memory for the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from aifactory_train.model.weight_files import file_name_of, skeleton, tensors_in, why_not


@pytest.fixture
def config(tiny_model_dir: Path):
    return AutoConfig.from_pretrained(tiny_model_dir, local_files_only=True)


def test_the_skeleton_has_everything_but_the_weights(config, tiny_model_dir: Path) -> None:
    empty = skeleton(config, "sdpa", torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model_dir, local_files_only=True, dtype=torch.float32)
    shape = lambda model: [(n, p.shape, p.dtype) for n, p in model.named_parameters()]  # noqa: E731
    assert shape(empty) == shape(loaded)
    assert empty.lm_head.weight is empty.model.embed_tokens.weight  # tied, as the configuration says
    assert sum(p.untyped_storage().nbytes() for p in empty.parameters()) == 4 * len(list(empty.parameters()))
    for (name, one), (_, other) in zip(empty.named_buffers(), loaded.named_buffers(), strict=True):
        assert torch.equal(one, other), name
    assert why_not(config, tiny_model_dir, "sdpa", torch.float32) is None


def test_files_that_name_other_tensors_are_told(config, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    assert "no safetensors" in str(why_not(config, tmp_path, "sdpa", torch.float32))
    save_file({"transformer.wte": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight" in str(why_not(config, tmp_path, "sdpa", torch.float32))
    assert list(tensors_in(tmp_path)) == ["transformer.wte"]


def test_names_of_files_and_parameters() -> None:
    assert file_name_of("model.model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    peft = "model.base_model.model.model."
    assert file_name_of(peft + "layers.0.mlp.up_proj.base_layer.weight") == "model.layers.0.mlp.up_proj.weight"
    assert file_name_of(peft + "layers.0.mlp.up_proj.lora_A.default.weight") is None
    assert file_name_of(peft + "embed_tokens.modules_to_save.default.weight") == "model.embed_tokens.weight"
    assert file_name_of(peft + "embed_tokens.original_module.weight") == "model.embed_tokens.weight"
