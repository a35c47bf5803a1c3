"""Dimensions: the shipped ones reproduce published totals, the formulae reproduce real models, anything else is refused
by name.
"""

from __future__ import annotations

import json

import helpers
import pytest

from aifactory_train.config.loading import load_recipe
from aifactory_train.core.errors import UserError
from aifactory_train.model import hybrid_shapes, shapes

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
    biased = {"attention_bias": True} if family == "llama" and not tied else {}  # of all four projections
    model = helpers.tiny_model(family, tied=tied, **biased)
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


#: mixtures of experts and hybrids; all sizes different, so that none can stand for another
SMALL = {
    "hidden_size": 64, "vocab_size": 400, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
DELTA = {
    "head_dim": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 40,
}  # fmt: skip
ROUTED = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [1]},
    "gpt_oss": {"head_dim": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "qwen3_next": DELTA,
    "qwen3_5_moe_text": DELTA,
    "qwen3_5_text": {**DELTA, "attention_bias": True},
    "granitemoehybrid": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 40, "mamba_n_heads": 8,
        "mamba_d_head": 16, "mamba_d_state": 24, "layer_types": ["mamba", "mamba", "attention", "mamba"],
    },
}  # fmt: skip


@pytest.mark.parametrize("family", ROUTED)
def test_experts_and_hybrids_equal_the_real_model(family):
    """Every tensor, and every adapter that training makes, with the dimension along which engines cut it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from aifactory_train.model.adapters import apply_adapter
    from aifactory_train.model.report import ModelReport

    written = {**SMALL, **ROUTED[family]}
    config = AutoConfig.for_model(family, **written)

    def tensors(model, trained=False):
        return sorted((p.shape[0], p[0].numel()) for p in model.parameters() if p.requires_grad or not trained)

    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    for tree in (config.to_dict(), {"model_type": family, **written}):
        shape = shapes.from_config(tree, family)
        mine = [t for kind in shape.kinds for t in kind.block_tensors() * kind.layers] + shape.root_tensors()
        assert sorted(mine) == tensors(plain)
        assert shape.parameters == sum(p.numel() for p in plain.parameters())
        assert sum(kind.layers for kind in shape.kinds) == shape.layers == 4
    every = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    for targets, asked in (
        ("all-linear", {}),
        ("all-linear", {"adapt": "none"}),
        (["q_proj", "v_proj"], {"adapt": "all"}),
        (["q_proj", "v_proj"], {}),
        (every, {}),
    ):
        recipe = load_recipe("education/word-problems", ["adapter.rank=3"])
        recipe.adapter.targets = targets
        recipe.experts.adapt = asked.get("adapt")
        with torch.device("meta"):
            adapted = apply_adapter(AutoModelForCausalLM.from_config(config), recipe, ModelReport())
        mine = [
            t
            for kind in hybrid_shapes.adapted_as(shape, recipe).kinds
            for t in kind.lora_tensors(3, targets) * kind.layers
        ]
        assert sorted(mine) == tensors(adapted, trained=True), (targets, asked)


def test_each_base_is_shipped_once():
    table = json.loads((shapes.DATA / "models.json").read_text(encoding="utf-8"))
    names = [name for entry in table["models"] for name in entry["ids"]]
    assert sorted(names) == sorted(TABLE)


def test_a_quantised_base_names_its_copy():
    assert shapes.load("openai/gpt-oss-20b").quantised == "mxfp4"
    assert shapes.copies_of(shapes.load("openai/gpt-oss-20b")) == ["unsloth/gpt-oss-20b-BF16"]


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
        ({"num_local_experts": 8, "model_type": "jetmoe"}, "mixture of experts"),
        ({"num_local_experts": 8, "model_type": "mixtral"}, "lacks num_experts_per_tok"),
        ({"num_local_experts": 8, "num_experts_per_tok": 9, "model_type": "mixtral"}, "9 experts of 8"),
        ({"model_type": "granitemoehybrid", "shared_intermediate_size": 8, "layer_types": ["mamba"]}, "names 1 layers"),
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
