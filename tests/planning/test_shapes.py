"""Dimensions: the shipped ones reproduce published totals, the formulae reproduce real models, anything else is refused
by name.
"""

from __future__ import annotations

import json

import helpers
import pytest

from aifactory_train.core.errors import UserError
from aifactory_train.model import shapes

TABLE = shapes.known()
GOOD = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "max_position_embeddings": 256,
}


@pytest.mark.parametrize("name", sorted(TABLE))
def test_shipped_dimensions_reproduce_the_published_total(name):
    shape = TABLE[name]
    assert shape.published_parameters is not None and shape.source and shape.confidence
    assert shape.parameters == pytest.approx(shape.published_parameters, rel=0.0015)


@pytest.mark.parametrize("family", helpers.FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_equal_the_real_model(family, tied):
    model = helpers.tiny_model(family, tied=tied)
    shape = shapes.from_config(model.config.to_dict(), family)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    tensors = shape.block_tensors() * shape.layers + shape.root_tensors()
    assert sorted(rows * columns for rows, columns in tensors) == sorted(p.numel() for p in model.parameters())


def test_apertus_has_plain_mlp_and_activation_scalars():
    from transformers import ApertusConfig, AutoModelForCausalLM

    config = ApertusConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=400,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert shapes.from_config(config.to_dict(), "a").parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"]])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_adapter_parameters_equal_peft(family, targets):
    from peft import LoraConfig, get_peft_model

    model = helpers.tiny_model(family)
    shape = shapes.from_config(model.config.to_dict(), family)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=targets))
    assert shape.lora_parameters(3, targets) == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ({"vocab_size": 0}, "lacks vocab_size"),
        ({"num_experts": 8}, "mixture of experts"),
        ({"num_local_experts": 8, "model_type": "mixtral"}, "mixture of experts"),
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": None}, "do not cover"),
        ({"num_key_value_heads": 3}, "cannot share"),
    ],
)
def test_other_architectures_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        shapes.from_config({**GOOD, **change}, "somebody/model")


def test_unknown_base_suggests_and_names_the_fix(tmp_path):
    with pytest.raises(UserError) as caught:
        shapes.load("Qwen/Qwen3-8b-base-x")
    assert "--model-config" in str(caught.value)
    with pytest.raises(UserError, match="not shipped"):
        shapes.load("LumiOpen/Viking-33B")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(GOOD), encoding="utf-8")
    assert shapes.load("LumiOpen/Viking-33B", config_file=str(file)).layers == 2
    file.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read"):
        shapes.load("x/y", config_file=str(file))


def test_vision_language_configs_use_the_language_model():
    nested = {"model_type": "mistral3", "text_config": {**GOOD, "model_type": "mistral"}, "vision_config": {}}
    assert shapes.from_config(nested, "vl").parameters == shapes.from_config(GOOD, "text").parameters
