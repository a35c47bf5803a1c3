"""``model.rope_scaling``: the positions are transformers' own for such a configuration and the papers', the export says
it, and what cannot be scaled is refused.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from pydantic import ValidationError

from aifactory_train.config.rope_block import RopeScalingConfig
from aifactory_train.config.schema import ModelConfig, Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.planning import dimensions
from aifactory_train.sources import resolve_model

ORIGINAL, FACTOR = 64, 4.0
KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "dynamic": {},
    "yarn": {"beta_fast": 16.0},
    "llama3": {"high_freq_factor": 8.0},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIFACTORY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.write_model(tmp_path_factory.mktemp("rope") / "model", max_position_embeddings=ORIGINAL)


def asked(base: Path, kind: str, **more: Any) -> ModelConfig:
    return ModelConfig.model_validate({"base": str(base), "rope_scaling": {"kind": kind, "factor": FACTOR, **more}})


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_transformers_computes_from_such_a_configuration(kind: str, base: Path) -> None:
    """Logits of 200 tokens, three times what the base was made for."""
    import transformers as tf

    folder = resolve_model(asked(base, kind, **KINDS[kind]))
    config = tf.AutoConfig.from_pretrained(base)
    theta = config.rope_parameters["rope_theta"]
    own = {"linear": {}, "dynamic": {}, "yarn": {"beta_fast": 16.0, "original_max_position_embeddings": ORIGINAL}}
    own["llama3"] = {"low_freq_factor": 1.0, "high_freq_factor": 8.0, "original_max_position_embeddings": ORIGINAL}
    config.rope_parameters = {"rope_type": kind, "rope_theta": theta, "factor": FACTOR, **own[kind]}
    reference = tf.LlamaForCausalLM(config).eval()
    reference.load_state_dict(plain(base).state_dict())
    tokens = torch.arange(200)[None] % 300 + 10
    with torch.no_grad():
        found, expected, before = (model(tokens).logits for model in (plain(folder), reference, plain(base)))
    assert torch.equal(found, expected)
    assert not torch.allclose(found, before, atol=1e-3), "the scaling changed nothing"


def test_frequencies_are_the_papers(base: Path) -> None:
    """Linear: positions over the factor. YaRN (arXiv:2309.00071, equations 19 to 23) and Llama 3: fast rotations stay,
    slow ones are stretched by the factor, and between lies a ramp."""
    dim, theta = 16, 10_000.0
    plain_freq = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turns = ORIGINAL * plain_freq / (2 * math.pi)

    def frequencies(kind: str, **more: Any) -> torch.Tensor:
        return plain(resolve_model(asked(base, kind, **more))).model.rotary_emb.inv_freq.double()

    torch.testing.assert_close(frequencies("linear"), plain_freq / FACTOR, rtol=1e-6, atol=0)
    share = ((turns - 1) / (4 - 1)).clamp(0, 1)  # of the original frequency
    expected = (1 - share) * plain_freq / FACTOR + share * plain_freq
    torch.testing.assert_close(frequencies("llama3"), expected, rtol=1e-6, atol=0)
    yarn = frequencies("yarn")
    assert torch.allclose(yarn[turns > 32], plain_freq[turns > 32]) and torch.allclose(
        yarn[-1], plain_freq[-1] / FACTOR
    )
    assert ((yarn <= plain_freq * 1.000001) & (yarn >= plain_freq / FACTOR * 0.999999)).all()
    attention = plain(resolve_model(asked(base, "yarn"))).model.rotary_emb.attention_scaling
    assert attention == pytest.approx(0.1 * math.log(FACTOR) + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_longer_texts_may_be_trained_on_but_for_dynamic(kind: str, base: Path) -> None:
    from aifactory_train.model.loading import load_config

    model = asked(base, kind)
    longest = ORIGINAL if kind == "dynamic" else int(ORIGINAL * FACTOR)
    assert dimensions.of_model(model).max_positions == longest
    data = {"train": [{"source": "rows.jsonl", "licence": "MIT"}], "sequence_length": longest}
    tree = {"model": model.model_dump(), "data": data, "adapter": {"kind": "none"}}
    load_config(resolve_model(model), Recipe.model_validate(tree))
    data["sequence_length"] = longest + 1
    with pytest.raises(UserError, match=f"built for {longest} positions"):
        load_config(resolve_model(model), Recipe.model_validate(tree))


def test_the_folder_is_made_once_and_the_base_stays_as_it_is(base: Path) -> None:
    before = (base / "config.json").read_bytes()
    first = resolve_model(asked(base, "yarn"))
    assert resolve_model(asked(base, "yarn")) == first != resolve_model(asked(base, "yarn", beta_slow=2.0))
    assert (base / "config.json").read_bytes() == before
    assert (first / "model.safetensors").is_symlink() and not [p for p in first.parent.iterdir() if p.name[0] == "."]


def test_a_base_with_a_scaling_of_its_own_keeps_it(base: Path, tmp_path: Path) -> None:
    own = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": FACTOR, "original_max_position_embeddings": ORIGINAL}
    there = helpers.write_model(tmp_path / "own", max_position_embeddings=256, rope_parameters=own)
    assert resolve_model(asked(there, "yarn")) == there
    for kind, more in (("linear", {}), ("yarn", {"factor": 2.0}), ("yarn", {"beta_fast": 16.0})):
        with pytest.raises(UserError, match=r'the base has a scaling of its own: \{.*"rope_type": "yarn"') as no:
            resolve_model(asked(there, kind, **more))
        assert no.value.where == "model.rope_scaling"


def test_models_without_rotary_positions_are_refused(tmp_path: Path) -> None:
    import transformers as tf

    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 400}
    tf.GPT2LMHeadModel(tf.GPT2Config(**shape)).save_pretrained(tmp_path / "gpt2")
    helpers.write_tokenizer(tmp_path / "gpt2")
    with pytest.raises(UserError, match="a model of type gpt2 has no rotary positions"):
        resolve_model(asked(tmp_path / "gpt2", "linear"))
    gemma = helpers.write_model(tmp_path / "gemma", "gemma3")
    with pytest.raises(UserError, match="other positions in each kind of layer"):
        resolve_model(asked(gemma, "linear"))


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"kind": "linear", "factor": 1}, "greater than 1"),
        ({"kind": "linear", "factor": 2, "beta_fast": 16}, "beta_fast belongs to kind yarn, not linear"),
        ({"kind": "yarn", "factor": 2, "low_freq_factor": 1}, "low_freq_factor belongs to kind llama3, not yarn"),
        ({"kind": "llama3", "factor": 2, "low_freq_factor": 4}, "must be less than high_freq_factor"),
        ({"kind": "yarn", "factor": 2, "beta_slow": 64}, "must be less than beta_fast"),
        ({"kind": "longrope", "factor": 2}, "linear"),
    ],
)
def test_values_that_contradict_each_other_are_refused(block: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        RopeScalingConfig.model_validate(block)


def test_an_adapter_alone_cannot_be_exported() -> None:
    data = {"train": [{"source": "rows.jsonl", "licence": "MIT"}]}
    model = {"base": "unused", "rope_scaling": {"kind": "linear", "factor": 2}}
    with pytest.raises(ValidationError, match=r"model\.rope_scaling: an adapter does not fit the original base"):
        Recipe.model_validate({"model": model, "data": data})
    Recipe.model_validate({"model": model, "data": data, "export": {"merge": True}})
    with pytest.raises(ValidationError, match=r"model\.rope_scaling: the earlier run"):
        Recipe.model_validate({"model": {**model, "start_from": "runs/x"}, "data": data, "adapter": {"kind": "none"}})


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_trained_model_is_exported_with_its_positions(adapter: str, base: Path, tmp_path: Path) -> None:
    settings = {
        "model.rope_scaling": {"kind": "yarn", "factor": FACTOR},
        "adapter.kind": adapter,
        "export.merge": adapter != "none",
        "parallel.threads": 1,
    }
    recipe = helpers.write_recipe(tmp_path, base, settings=settings)
    result = helpers.cli("train", recipe, "--name", "long", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    export = tmp_path / "runs/long/export" / ("model" if adapter == "none" else "merged")
    config = json.loads((export / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "yarn" and config["max_position_embeddings"] == 256
    assert config["rope_parameters"]["original_max_position_embeddings"] == ORIGINAL
