"""QLoRA: what is asked of bitsandbytes, what is refused, and (where bitsandbytes is installed) a training on a 4-bit
base.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import curves
import helpers
import pytest
import torch

from aifactory_train.config.loading import load_recipe
from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.data import load_tokenizer
from aifactory_train.model import quantise
from aifactory_train.model.loading import build_model
from aifactory_train.model.precision import choose_precision
from aifactory_train.model.report import ModelReport


def recipe(kind: str = "nf4") -> Recipe:
    return curves.make_recipe({"engine": "ddp", "adapter": "lora", "adapter_more": {"quantise_base": kind}})


def stand_in(monkeypatch: pytest.MonkeyPatch, dequantize) -> None:
    functional = ModuleType("bitsandbytes.functional")
    functional.quantize_4bit = lambda tensor, quant_type: (tensor, quant_type)  # type: ignore[attr-defined]
    functional.dequantize_4bit = dequantize  # type: ignore[attr-defined]
    package = ModuleType("bitsandbytes")
    package.functional = functional  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functional)
    monkeypatch.setitem(sys.modules, "accelerate", ModuleType("accelerate"))


def test_without_a_quantised_base_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert quantise.loading(recipe("none"), "cpu", torch.float32) == {}


def test_a_missing_bitsandbytes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="needs bitsandbytes") as caught:
        quantise.loading(recipe(), "cpu", torch.float32)
    assert "aifactory-train[qlora]" in str(caught.value) and "adapter.quantise_base" in str(caught.value)


def test_a_bitsandbytes_for_another_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(packed, state):
        raise RuntimeError("Configured CUDA binary not found\nmore")

    stand_in(monkeypatch, broken)
    with pytest.raises(UserError, match="cannot quantise on cpu: Configured CUDA binary not found"):
        quantise.loading(recipe(), "cpu", torch.float32)
    stand_in(monkeypatch, lambda packed, state: packed * 0)
    with pytest.raises(UserError, match="wrong values"):
        quantise.loading(recipe(), "cpu", torch.float32)


def test_what_transformers_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    asked = {}
    monkeypatch.setattr(transformers, "BitsAndBytesConfig", lambda **settings: asked.update(settings) or "config")
    stand_in(monkeypatch, lambda packed, state: packed)
    found = quantise.loading(recipe(), "cpu", torch.bfloat16)
    assert found == {"quantization_config": "config", "device_map": {"": "cpu"}}
    assert asked == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }


def test_a_four_bit_base_trains_and_its_adapter_is_exported(tmp_path: Path, tiny_model_dir: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")
    settings = {"adapter.quantise_base": "nf4", "train.max_steps": 6, "eval.before": False, "parallel.threads": 1}
    path = helpers.write_recipe(tmp_path / "data", tiny_model_dir, settings=settings)
    tiny = load_recipe(str(path))
    precision, _ = choose_precision(tiny, "cpu")
    core = build_model(
        tiny, tiny_model_dir, load_tokenizer(tiny), device="cpu", precision=precision, report=ModelReport()
    )
    kinds = {type(module).__name__ for module in core.modules()}
    assert "PackedLinear" in kinds and "Linear4bit" not in kinds
    assert {p.dtype for p in core.parameters() if p.requires_grad} == {torch.float32}
    done = helpers.cli("train", path, "--run-dir", tmp_path / "run", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "export" / "adapter" / "adapter_model.safetensors").is_file()
