"""A base whose weights are quantised is refused by name, by whatever reads its configuration or its files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aifactory_train.config.quantised_base import FOUR_BIT, check_quantised, quantisation
from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.model.loading import load_config
from aifactory_train.planning import plan_for
from aifactory_train.sites import load
from aifactory_train.sources import resolve_model

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
OTHERS: list[Any] = [
    *({"quant_method": name, "bits": 4} for name in ("gptq", "awq", "fp8", "compressed-tensors", "mxfp4", "foo")),
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
    {"bits": 4},
    "int4",
]


def recipe(folder: Path, **adapter: Any) -> Recipe:
    data = {"train": "rows.jsonl", "sequence_length": 64}
    model = {"base": str(folder), "licence": "own"}
    return Recipe.model_validate({"model": model, "data": data, "adapter": adapter, "train": {"batch_rows": 64}})


def stated(tmp_path: Path, source: Path, **more: Any) -> Path:
    folder = tmp_path / "base"
    shutil.copytree(source, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    return folder


def test_weights_that_are_said_to_be_quantised(tmp_path, tiny_model_dir):
    folder = stated(tmp_path, tiny_model_dir)
    file, plain = folder / "config.json", json.loads((folder / "config.json").read_text())
    asked, site = recipe(folder, kind="lora", quantise_base="nf4"), load("leonardo-booster", overlay=False)
    for how in OTHERS:
        named = how.get("quant_method", "not named") if isinstance(how, dict) else "int4"
        for more in (
            {"quantization_config": how},
            {"compression_config": how},
            {"text_config": {**plain, "quantization_config": how}},
        ):
            file.write_text(json.dumps({**plain, **more}))
            with pytest.raises(UserError, match=f"quantised.*{named}") as refused:
                resolve_model(asked.model)
            assert refused.value.where == str(file) and refused.value.exit_code == 2
            with pytest.raises(UserError, match=f"quantised.*{named}"):
                plan_for(asked, site, tokens=1e6)


def test_four_bits_of_bitsandbytes_need_the_key_that_says_so(tmp_path, tiny_model_dir):
    folder, site = stated(tmp_path, tiny_model_dir, quantization_config=NF4), load("leonardo-booster", overlay=False)
    assert quantisation({"quantization_config": {"load_in_4bit": True}}) == FOUR_BIT  # as older versions wrote it
    asked = recipe(folder, kind="lora", quantise_base="nf4")
    assert load_config(resolve_model(asked.model), asked).quantization_config["load_in_4bit"] is True
    plan, _ = plan_for(asked, site, tokens=1e6)
    assert plan["overrides"]
    for adapter in ({"kind": "lora"}, {"kind": "none"}):
        plain = recipe(folder, **adapter)
        for call in (
            lambda plain=plain: load_config(folder, plain),
            lambda plain=plain: plan_for(plain, site, tokens=1e6),
        ):
            with pytest.raises(UserError) as refused:
                call()
            assert "adapter.quantise_base=nf4" in refused.value.fix


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_of_few_bits_without_a_word_in_the_configuration(tmp_path, tiny_model_dir, dtype):
    folder = stated(tmp_path, tiny_model_dir, quantization_config=None)
    assert resolve_model(recipe(folder).model) == folder
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith("q_proj.weight"))
    save_file(weights | {"buffer": torch.zeros(2, dtype=torch.int64)}, folder / "model.safetensors")
    assert resolve_model(recipe(folder).model) == folder
    save_file(weights | {name: weights[name].to(dtype)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=name):
        resolve_model(recipe(folder).model)


def test_no_quantisation_is_no_matter():
    for nothing in (None, {}, []):
        assert quantisation({"quantization_config": nothing, "text_config": None}) is None
    check_quantised(None, "model.base", "none")
