"""What vLLM would say of an export, from its configuration; and, where an interpreter with vLLM is named, what it
serves.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import helpers
import pytest
from test_export import Trained

from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.exporting import gate
from aifactory_train.exporting import vllm_check as vc
from aifactory_train.exporting.gate import plain_logits

ADAPTER = {
    "r": 16,
    "target_modules": ["model.layers.0.mlp.down_proj", "q_proj"],
    "bias": "none",
    "init_lora_weights": True,
}


def folder(path: Path, *, config=None, adapter=None, template=True) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    shown = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", **(config or {})}
    (path / "config.json").write_text(json.dumps(shown))
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text("{}")
    if template:
        (path / "chat_template.jinja").write_text("x")
    if adapter is not None:
        (path / "adapter_config.json").write_text(json.dumps({**ADAPTER, **adapter}))
    return path


def said(path: Path, base: Path | None = None) -> dict[str, vc.LoadFinding]:
    return {f.about: f for f in vc.static_findings(path, base)}


def test_merged_weights(tmp_path):
    found = said(folder(tmp_path / "a"))
    assert all(f.ok for f in found.values()) and set(found) == {"architecture", "dtype", "tokenizer"}
    assert said(folder(tmp_path / "b", config={"architectures": ["NewForCausalLM"]}))["architecture"].ok is None
    assert said(folder(tmp_path / "c", config={"dtype": "float64"}))["dtype"].ok is False
    assert "--dtype float32" in said(folder(tmp_path / "d", config={"dtype": "float32"}))["dtype"].said
    assert "no chat template" in said(folder(tmp_path / "e", template=False))["tokenizer"].said
    bare = folder(tmp_path / "f")
    (bare / "tokenizer.json").unlink()
    assert said(bare)["tokenizer"].ok is False
    # vLLM serves Falcon, but takes no adapters for it
    falcon = folder(tmp_path / "g", config={"architectures": ["FalconForCausalLM"]}, adapter={})
    assert said(falcon)["architecture"].ok and said(falcon, falcon)["architecture"].ok is False


@pytest.mark.parametrize(
    ("more", "about", "ok", "word"),
    [
        ({}, "rank", True, "16"),
        ({"r": 4}, "rank", True, "4"),
        ({"r": 24}, "rank", True, "--max-lora-rank 32"),
        ({"rank_pattern": {"q_proj": 300}}, "rank", True, "--max-lora-rank 320"),
        ({"r": 1024}, "rank", False, "at most 512"),
        ({"use_dora": True}, "adapter", False, "DoRA"),
        ({"modules_to_save": ["embed_tokens"]}, "adapter", False, "embed_tokens"),
        ({"modules_to_save": ["score"]}, "adapter", True, "plain"),
        ({"bias": "lora_only"}, "adapter", False, "biases"),
        ({"init_lora_weights": "pissa"}, "adapter", False, "changes the base"),
        ({"init_lora_weights": "gaussian"}, "adapter", True, "plain"),
        ({"trainable_token_indices": [1]}, "adapter", False, "trainable_token_indices"),
        ({"target_modules": ["router"]}, "layers", None, "router"),
    ],
)
def test_adapters(tmp_path, more, about, ok, word):
    base = folder(tmp_path, adapter=more)
    found = said(base, base)[about]
    assert found.ok is ok and word in found.said


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_static_part_is_said_and_the_rest_refused(tmp_path, tiny_model_dir):
    """One message that says how to install it; RUN/vllm.json has what was found. A DoRA adapter is named, exit 1."""
    case = Trained(tmp_path, tiny_model_dir)
    case.export(verify=False)
    env = helpers.environment()
    result = helpers.cli("export", case.run.path, "--check", "vllm", "--json", cwd=tmp_path, env=env)
    helpers.refused(result, "vLLM is not installed here", "vllm-env", "--python")
    stored = json.loads((case.run.path / "vllm.json").read_text())
    assert stored["kinds"]["adapter"]["load"] is None and stored["read_from"] == f"vLLM {vc.VERSION}, {vc.READ}"
    assert json.loads(result.stdout)["kinds"] == stored["kinds"]
    assert case.names() == ["adapter"]  # nothing below export/
    good = helpers.cli("export", case.run.path, "--check", "vllm-static", cwd=tmp_path, env=env)
    assert good.returncode == 0 and "plain LoRA" in good.stdout, good.stderr
    config = case.run.export / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    bad = helpers.cli("export", case.run.path, "--check", "vllm-static", cwd=tmp_path, env=env)
    assert bad.returncode == 1 and "export --merge" in bad.stdout, bad.stderr
    with pytest.raises(UserError, match="no vLLM"):
        vc.interpreter(sys.executable)
    with pytest.raises(UserError, match="no such interpreter"):
        vc.interpreter("/nowhere/python")


def test_what_serves_another_model_fails(tmp_path, tiny_model_dir, monkeypatch):
    """The verdict on a stand-in for vLLM: transformers' own greedy answers pass, others do not."""
    import torch
    from transformers import AutoModelForCausalLM

    case = Trained(tmp_path, tiny_model_dir)
    case.export(merge=True, dtype="fp32", verify=False)
    model = AutoModelForCausalLM.from_pretrained(case.run.export / "merged", dtype=torch.float32).eval()
    off = {"by": 0.0}

    @torch.no_grad()
    def serve(command, job, timeout_s):
        answers = []
        for prompt in job["prompts"]:
            ids, logprobs = list(prompt), []
            for _ in range(job["tokens"]):
                place = model(torch.tensor([ids])).logits[0, -1].log_softmax(0)
                ids.append(int(place.argmax()))
                logprobs.append(place.max().item() + off["by"])
            answers.append({"tokens": ids[len(prompt) :], "logprobs": logprobs})
        return {"version": "0", "device": "cpu", "dtype": "float32", "answers": answers}

    def in_this_process(checks, rows):
        with torch.no_grad():
            return {"plain": plain_logits(model, rows)}

    monkeypatch.setattr(vc, "serve", serve)
    monkeypatch.setattr(gate, "reload_logits", in_this_process)
    base = Path(case.recipe.model.base)
    verdict = vc.load_check(case.run, case.recipe, "merged", base, [], dtype="float32")
    assert verdict["passed"] and verdict["same_tokens"] == verdict["tokens"] == 4 * vc.TOKENS
    assert verdict["logprob_difference"] < 1e-4
    off["by"] = 0.1
    with pytest.raises(RunFailed, match="serves another model"):
        vc.load_check(case.run, case.recipe, "merged", base, [], dtype="float32")


def test_a_child_that_fails_is_quoted(tmp_path):
    job = {"model": "m", "adapter": None, "rank": 0, "dtype": "auto", "prompts": [[1]], "tokens": 1}
    with pytest.raises(RunFailed, match="No module named 'vllm'"):
        vc.serve([sys.executable], job, 60)


@pytest.mark.slow
def test_real_vllm(tmp_path):
    """Base and adapter, and merged weights, served by vLLM. AIFACTORY_VLLM_PYTHON: an interpreter that has it."""
    python = os.environ.get("AIFACTORY_VLLM_PYTHON")
    if not python:
        pytest.skip("AIFACTORY_VLLM_PYTHON names no interpreter with vLLM")
    # vLLM has kernels for heads of 64
    base = helpers.write_model(tmp_path / "base", hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    case = Trained(tmp_path, base)
    case.export(merge=True, dtype="fp32", verify=False)
    found = vc.check(case.run, case.recipe, load=True, python=python, dtype="float32")
    for kind in ("adapter", "merged"):
        assert found["kinds"][kind]["load"]["passed"], found
