"""The one-third verdict: the published table, both tests, unknown bases, the sum over the lineage."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aifactory_train.core.figures import significant
from aifactory_train.record import aiact

# base, pretraining FLOP, GPAI by 1e23, third, H100 hours at 40 % of 989 TFLOP/s
TABLE = [
    ("HuggingFaceTB/SmolLM2-135M", 1.6e21, False, 5.4e20, 380),
    ("LumiOpen/Viking-7B", 8.4e22, False, 2.8e22, 20e3),
    ("HuggingFaceTB/SmolLM3-3B", 2.1e23, True, 6.9e22, 48e3),
    ("utter-project/EuroLLM-9B", 2.2e23, True, 7.3e22, 51e3),
    ("BSC-LT/salamandra-7b", 6.0e23, True, 2.0e23, 141e3),
    ("swiss-ai/Apertus-8B-2509", 7.2e23, True, 2.4e23, 170e3),
    ("swiss-ai/Apertus-70B-2509", 6.4e24, True, 2.1e24, 1.5e6),
]

#: What an H100 does in an hour at 40 % of its dense bf16 peak of 989 TFLOP/s; for a feeling of size only.
H100_HOUR = 0.4 * 989e12 * 3600


def rounded(value: float) -> float:
    return float(f"{value:.1e}")


@pytest.mark.parametrize(("name", "flop", "gpai", "third", "hours"), TABLE)
def test_table(name, flop, gpai, third, hours):
    base = aiact.base_of(name)
    limit, rule = aiact.threshold(base)
    assert rounded(base.flop) == flop
    assert rounded(limit) == third
    assert rule == "pt60"
    assert limit / H100_HOUR == pytest.approx(hours, rel=0.02)
    assert aiact.verdict(base, 1e18)["base_is_gpai"] is gpai


def test_lora_on_an_8b_is_a_millionth():
    found = aiact.verdict(aiact.base_of("swiss-ai/Apertus-8B-2509"), 30e6 * 4 * 8.05e9)
    assert found["ratio_this"] == pytest.approx(1.3e-6, rel=0.05)
    assert found["provider_flag"] is False
    continued = aiact.verdict(aiact.base_of("swiss-ai/Apertus-8B-2509"), 6 * 8.05e9 * 10e9)
    assert continued["ratio_this"] == pytest.approx(7e-4, rel=0.06)


def test_small_base_is_judged_by_the_sum():
    viking = aiact.base_of("LumiOpen/Viking-7B")
    assert aiact.verdict(viking, 1e22)["provider_flag"] is False
    crossing = aiact.verdict(viking, 1.7e22)
    assert crossing["over_one_third"] is False  # and yet the chain becomes a general-purpose model
    assert crossing["base_and_modifications_cross_gpai"] and crossing["provider_flag"] and crossing["gpai_flag"]
    # more than a third of a small model is no general-purpose model as long as the sum stays below the indicator
    tiny = aiact.verdict(aiact.base_of("HuggingFaceTB/SmolLM2-135M"), 1e21)
    assert tiny["over_one_third"] and not tiny["provider_flag"]


def test_unknown_base_uses_point_61():
    base = aiact.base_of("someone/unheard-of")
    assert base.flop is None
    found = aiact.verdict(base, 1e18)
    assert found["rule"] == "pt61"
    assert found["threshold_flop"] == pytest.approx(3.3e22, rel=0.02)
    assert found["original_flop"] is None and found["ratio_this"] is None
    assert "unknown" in found["reasoning"]
    systemic = aiact.Base("big", None, "said so", systemic=True)
    assert aiact.threshold(systemic)[0] == pytest.approx(1e25 / 3)


def test_lineage_adds_up_and_both_are_shown():
    base = aiact.base_of("swiss-ai/Apertus-8B-2509")
    found = aiact.verdict(base, 1.5e23, earlier=1.5e23)
    assert found["modification_flop_this"] == 1.5e23
    assert found["modification_flop_lineage"] == 3e23
    assert found["provider_flag"] and not aiact.verdict(base, 1.5e23)["provider_flag"]
    assert "together" in found["reasoning"]


@given(st.floats(1e15, 1e27), st.floats(1e10, 1e26), st.floats(0, 1e26))
def test_more_compute_never_takes_the_flag_away(flop, this, more):
    base = aiact.Base("any", flop, "test", flop > aiact.SYSTEMIC_FLOP)
    before, after = aiact.verdict(base, this), aiact.verdict(base, this, more)
    assert after["provider_flag"] >= before["provider_flag"]
    assert after["share_of_threshold"] >= before["share_of_threshold"]


def test_bins():
    assert [aiact.bin_parameters(n) for n in (1.35e8, 3e9, 8e9, 7e10, 2e12)] == [
        "1-500M",
        "500M-5B",
        "5-15B",
        "50-100B",
        ">1T",
    ]
    assert aiact.bin_tokens(3e6).startswith("Less") and aiact.bin_tokens(2e13).startswith("More")
    assert aiact.bin_months(3) == "<1 month" and aiact.bin_months(200) == ">6 months"
    assert significant(1234.5) == "1200" and significant(1.234e20) == "1.2e+20"
