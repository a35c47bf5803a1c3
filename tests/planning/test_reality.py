"""Prediction against reality."""

from __future__ import annotations

from common import request

from aifactory_train import sites
from aifactory_train.planning import plan, reality


def test_compare():
    found, _ = plan.make(request(sites.load("leonardo-booster", overlay=False), "meta-llama/Llama-3.1-8B", 1))
    mid = found["tokens_per_s_per_gpu"]["mid"]
    same = reality.compare(found, mid, found["memory_gib"]["total"] - found["memory_gib"]["framework"])
    assert same["tokens_per_s_per_gpu"]["ratio"] == 1 and same["tokens_per_s_per_gpu"]["inside_interval"]
    assert abs(same["peak_gib"]["ratio"] - 1) < 1e-3
    assert not reality.compare(found, mid * 3, None)["tokens_per_s_per_gpu"]["inside_interval"]
    assert "ratio" not in reality.compare(found, None, None)["peak_gib"]
