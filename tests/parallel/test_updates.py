"""``train.freeze``, ``lora_plus_ratio``, ``layer_decay``, ``average``: which weights move, how fast, and which mean is
kept."""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import torch
from curves import make_recipe
from pydantic import ValidationError
from torch import nn

from aifactory_train.config.schema import Recipe, TrainConfig, VocabularyConfig
from aifactory_train.config.update_block import AverageConfig
from aifactory_train.core.errors import UserError
from aifactory_train.model.adapters import apply_adapter
from aifactory_train.model.causal_lm import CausalLM
from aifactory_train.model.report import ModelReport
from aifactory_train.parallel.apply import block_modules
from aifactory_train.parallel.averaging import Average, share_of
from aifactory_train.parallel.optim import build_optimizer, parameter_groups, treatment_of
from aifactory_train.parallel.traits import ENGINES, refuse_what_it_cannot_do


def tiny() -> Any:
    return helpers.tiny_model("llama", vocabulary=50, tied=False, hidden_size=16, intermediate_size=32, layers=3)


def model_of(adapter: str = "none", **train: Any) -> tuple[CausalLM, Recipe, ModelReport]:
    recipe = make_recipe({"engine": "ddp", "adapter": adapter, "train": {"weight_decay": 0.0, **train}})
    report = ModelReport()
    return CausalLM(apply_adapter(tiny(), recipe, report)), recipe, report


def rates(core: CausalLM, settings: TrainConfig) -> dict[str, float]:
    treatment = treatment_of(core, block_modules(core), settings)
    groups = parameter_groups(core.named_parameters(), settings.weight_decay, treatment)
    build_optimizer(groups, settings)  # torch takes such groups
    return {name: group["rate"] for group in groups for name in group["names"]}


# ---- freezing


def test_what_matches_is_frozen_and_said() -> None:
    core, _, report = model_of(freeze=["model.embed_tokens.*", "*.layers.[01].*"])
    trained = [n for n, p in core.named_parameters() if p.requires_grad]
    assert len(trained) > 2 and {"model.model.norm.weight", "model.lm_head.weight"} < set(trained)
    assert all("layers.2." in name for name in trained if ".layers." in name)
    assert not any("embed_tokens" in name for name in trained)
    assert report.trainable == sum(p.numel() for p in core.parameters() if p.requires_grad) < report.parameters
    assert any(line[0] == "frozen" and "train.freeze" in line[2] for line in report.lines)


def test_adapters_of_some_blocks_can_be_frozen() -> None:
    core, _, _ = model_of("lora", freeze=["*.layers.0.*"])
    trained = [n for n, p in core.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n and "layers.0." not in n for n in trained)


def test_a_pattern_without_a_match_is_refused_with_the_names() -> None:
    with pytest.raises(UserError, match=r"'\*\.attention\.\*' is the name of no parameter") as no:
        model_of(freeze=["model.norm.weight", "*.attention.*"])
    assert no.value.where == "train.freeze"
    for name in ("model.embed_tokens.weight", "model.layers.*.self_attn.q_proj.weight", "lm_head.weight"):
        assert name in str(no.value.fix)
    with pytest.raises(UserError, match="is the name of no parameter that would be trained"):
        model_of("lora", freeze=["*embed_tokens*"])  # exists, but an adapter does not train it
    with pytest.raises(UserError, match="nothing would be trained"):
        model_of(freeze=["*"])


def test_new_tokens_cannot_be_frozen() -> None:
    for pattern in ("*embed_tokens*", "*lm_head*"):
        recipe = make_recipe({"engine": "ddp", "train": {"weight_decay": 0.0, "freeze": [pattern]}})
        recipe.model.vocabulary = VocabularyConfig(text="new.txt")
        with pytest.raises(UserError, match="the embeddings are frozen"):
            apply_adapter(tiny(), recipe, ModelReport())


# ---- rates


def test_lora_plus_gives_b_its_own_rate() -> None:
    core, recipe, _ = model_of("lora", lora_plus_ratio=16)
    found = rates(core, recipe.train)
    assert {rate for name, rate in found.items() if "lora_B" in name} == {16.0}
    assert {rate for name, rate in found.items() if "lora_A" in name} == {1.0}
    with pytest.raises(ValidationError, match=r"train\.lora_plus_ratio: adapter\.kind none has no adapters"):
        model_of(lora_plus_ratio=16)


def test_lower_layers_learn_more_slowly() -> None:
    core, recipe, _ = model_of(layer_decay=0.5)
    found = rates(core, recipe.train)
    assert found["model.lm_head.weight"] == found["model.model.norm.weight"] == 1.0
    assert [found[f"model.model.layers.{i}.mlp.up_proj.weight"] for i in range(3)] == [0.125, 0.25, 0.5]
    assert found["model.model.embed_tokens.weight"] == 0.0625


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "sgd", "muon", "schedule_free_adamw", "adafactor"])
def test_every_optimizer_moves_a_group_by_its_rate(name: str) -> None:
    """Two equal matrices with equal gradients, one at half the rate: it moves half as far."""
    weights = [nn.Parameter(torch.zeros(4, 6)) for _ in range(2)]
    more: dict[str, Any] = {"orthogonal": True} if name == "muon" else {}
    groups = [{"params": [w], "rate": rate, **more} for w, rate in zip(weights, (1.0, 0.5), strict=True)]
    optimizer = build_optimizer(groups, TrainConfig.model_validate({"optimizer": name, "schedule": "constant"}))
    torch.manual_seed(0)
    gradient = torch.randn(4, 6)
    for weight in weights:
        weight.grad = gradient.clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group["rate"]
    optimizer.step()
    assert float(weights[0].detach().abs().sum()) > 0
    torch.testing.assert_close(weights[1].detach(), 0.5 * weights[0].detach())


# ---- the mean


def test_a_mean_is_that_of_the_steps() -> None:
    weight = nn.Parameter(torch.zeros(3))
    average = Average(AverageConfig(kind="mean", start_step=2), [("w", weight)])
    seen = []
    for step in range(1, 7):
        weight.data.fill_(step**2)
        seen.append(float(step**2))
        average.take_up(step)
        expected = seen[-1] if step <= 2 else sum(seen[2:]) / len(seen[2:])
        torch.testing.assert_close(average.kept["w"], torch.full((3,), expected))


def test_a_short_runs_ema_forgets_its_start_and_a_long_ones_follows_the_decay() -> None:
    settings = AverageConfig(decay=0.99)
    left = 1.0  # of the first step's weights, after so many
    for updates in range(2, 51):
        left *= 1 - share_of(settings, updates)
    assert left < 1e-6, "with a fixed decay 60 % would still be left"
    assert share_of(settings, 5000) == pytest.approx(0.01)


def test_bf16_weights_have_an_fp32_mean() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    average = Average(AverageConfig(), [("w", weight)])
    average.take_up(1)
    weight.data.fill_(2)
    average.take_up(2)
    assert average.kept["w"].dtype == torch.float32 and 1 < float(average.kept["w"][0]) < 2


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_that_keep_no_mean_refuse_it(engine: str) -> None:
    recipe = make_recipe({"engine": engine, "train": {"average": {}}})
    if ENGINES[engine].keeps_mean:
        refuse_what_it_cannot_do(recipe, engine)
        return
    with pytest.raises(UserError, match=f"engine {engine} keeps no mean of the weights") as no:
        refuse_what_it_cannot_do(recipe, engine)
    assert no.value.where == "train.average" and "ddp, fsdp2, hsdp" in str(no.value.fix)


def test_schedule_free_keeps_one_already() -> None:
    train = {"optimizer": "schedule_free_adamw", "schedule": "constant", "average": {}}
    with pytest.raises(ValidationError, match=r"train\.average: schedule_free_adamw"):
        make_recipe({"engine": "ddp", "train": train})
