"""The numbers of docs/planning.md are the program's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from common import request

from aifactory_train import sites
from aifactory_train.planning import activations, memory, plan, timing
from aifactory_train.planning.timing import Constants

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
STATED = re.findall(r"`([a-z_0-9.]+)` = (-?[0-9]+(?:[.][0-9]+)?)( %)?", PAGE)


@pytest.fixture(scope="module")
def values() -> dict[str, float]:
    found, job = plan.make(
        request(
            sites.load("lumi-g", overlay=False),
            "mistralai/Mistral-7B-v0.3",
            2,
            "none",
            tokens=1e8,
            rows=256,
            parallel__engine="fsdp2",
            parallel__activation_checkpointing="full",
            train__micro_batch_tokens=32768,
            given=frozenset({"train.micro_batch_tokens"}),
        )
    )
    c = Constants.load()
    shape = job.shape
    kept, _ = memory.activation_bytes(job)
    out: dict[str, float] = {
        "block_linear": shape.block_linear_parameters,
        "block": shape.block_parameters,
        "parameters": shape.parameters,
        "micro_tokens": job.tokens,
        "capacity": found["capacity_gib"],
        "kept_per_block": memory.kept_per_block(job),
        "outside": kept / job.tokens - shape.layers * memory.kept_per_block(job),
        "norms": 2 * activations._norm(job, shape.hidden),
        "linear_inputs": activations._linear_inputs(job),
        "attention_kept": activations._attention(job),
        "mlp_kept": activations._mlp(job),
        "block_kept": memory.block_kept(job),
        "transient": memory.activation_bytes(job)[1] / job.tokens - memory.block_kept(job) + 2 * shape.hidden,
        "matrix_tflops": timing.matrix_rate(job, c, job.tokens) / 1e12,
        "model_gflops": found["flops_per_token"]["model"] / 1e9,
        "tokens_per_s": found["tokens_per_s_per_gpu"]["mid"],
        "gemm_default": c.gemm_default,
    }
    out |= {f"memory.{k}": v for k, v in found["memory_gib"].items()}
    out |= {f"time.{k}": v for k, v in found["step_seconds"].items()}
    out |= {k: found[k] for k in ("steps", "hours", "gpu_hours", "kwh", "mfu", "hfu")}
    out |= {f"gemm.{k}": v for k, v in c.gemm.items()}
    out |= {
        k: getattr(c, k)
        for k in ("attention_own", "attention_ported", "small", "pointwise", "links", "hidden", "low_power", "host_ns")
    }
    script = ROOT / "benchmarks" / "planner_accuracy.py"
    report = json.loads(
        subprocess.run([sys.executable, str(script), "--json"], capture_output=True, text=True, check=True).stdout
    )
    out |= {
        "accuracy.median_tokens": 100 * report["median_abs_err_tokens"],
        "accuracy.p90_tokens": 100 * report["p90_abs_err_tokens"],
        "accuracy.coverage": 100 * report["coverage"],
        "accuracy.median_memory": 100 * report["median_abs_err_memory"],
        "accuracy.median_tokens_b": 100 * report["tier_b"]["median_abs_err_tokens"],
    }
    return out


def test_every_number_on_the_page(values):
    assert len(STATED) > 55
    for name, text, _ in STATED:
        assert name in values, f"docs/planning.md states {name}, which this test does not compute"
        digits = len(text.partition(".")[2])
        assert round(values[name], digits) == pytest.approx(float(text), abs=0.51 * 10**-digits), name


def test_the_page_adds_up():
    """By hand, from the page's own numbers: no program involved."""
    n = {name: float(text) for name, text, _ in STATED}
    h, kv, i, v, layers = 4096, 1024, 14336, 32768, 32
    assert n["block_linear"] == 2 * h * h + 2 * h * kv + 3 * h * i
    assert n["parameters"] == layers * n["block"] + 2 * v * h + h
    gib = 2**30
    assert n["memory.parameters"] == pytest.approx(4 * n["parameters"] / 16 / gib, abs=6e-4)
    assert n["memory.optimizer"] == pytest.approx(8 * n["parameters"] / 16 / gib, abs=6e-4)
    per_token = layers * n["kept_per_block"] + n["outside"] + n["block_kept"] - n["kept_per_block"] + n["transient"]
    assert n["memory.activations"] == pytest.approx(n["micro_tokens"] * per_token / gib, abs=6e-4)
    root = 2 * v * h * 2
    communication = 2 * 2 * n["block"] + root + (2 + 4) * n["block"] + root
    assert n["memory.communication"] == pytest.approx(communication / gib, abs=6e-4)
    parts = sum(
        n[f"memory.{k}"]
        for k in ["parameters", "gradients", "optimizer", "activations", "communication", "framework", "fragmentation"]
    )
    assert n["memory.total"] == pytest.approx(parts, abs=2e-3)
    matmul = n["micro_tokens"] * 2 * layers * n["block_linear"] * 4 / (n["matrix_tflops"] * 1e12)
    assert n["time.matmul"] == pytest.approx(matmul, rel=1e-3)
    step = sum(n[f"time.{k}"] for k in ["matmul", "attention", "pointwise", "loss", "optimizer", "communication"])
    assert n["time.total"] == pytest.approx(step, abs=2e-3)
    assert n["tokens_per_s"] == pytest.approx(256 * 2048 / 16 / n["time.total"], rel=1e-4)
    assert n["hours"] == pytest.approx(n["steps"] * n["time.total"] / 3600, rel=1e-3)
    assert n["kwh"] == pytest.approx(n["gpu_hours"] * 280 * 0.85 / 1000, rel=1e-3)
