"""Prediction against reality, and what to change when memory ran out all the same."""

from __future__ import annotations

from common import request

from aifactory_train import config, sites
from aifactory_train.planning import plan, reality


def test_compare():
    found, _ = plan.make(request(sites.load("leonardo-booster", overlay=False), "meta-llama/Llama-3.1-8B", 1))
    mid = found["tokens_per_s_per_gpu"]["mid"]
    same = reality.compare(found, mid, found["memory_gib"]["total"] - found["memory_gib"]["framework"])
    assert same["tokens_per_s_per_gpu"]["ratio"] == 1 and same["tokens_per_s_per_gpu"]["inside_interval"]
    assert abs(same["peak_gib"]["ratio"] - 1) < 1e-3
    assert not reality.compare(found, mid * 3, None)["tokens_per_s_per_gpu"]["inside_interval"]
    assert "ratio" not in reality.compare(found, None, None)["peak_gib"]


def test_advice_leads_somewhere():
    """Following the advice again and again ends with less memory each time."""
    site = sites.load("leonardo-booster", overlay=False)
    found, _ = plan.make(request(site, "meta-llama/Llama-3.1-8B", 4, "none"))
    advice = reality.advice_when_out_of_memory(found)
    assert "--set" in advice or "--nodes" in advice
    found["micro_batch"], found["activation_checkpointing"] = 1, "full"
    assert reality.advice_when_out_of_memory(found)
    key = "train.micro_batch_tokens"
    assert key.split(".")[1] in config.TrainConfig.model_fields
