"""The CPU operators compute what the model computes, and keep less for the backward pass."""

from __future__ import annotations

import platform
import subprocess
import sys

import helpers
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from aifactory_train.config.schema import Recipe
from aifactory_train.core import compat
from aifactory_train.model import attention, cpu_matmul
from aifactory_train.model.attention import decoding
from aifactory_train.model.causal_lm import CausalLM
from aifactory_train.model.cpu_operators import apply_cpu_operators
from aifactory_train.model.objective import TokenNLL
from aifactory_train.model.operators import apply_operators
from aifactory_train.model.report import ModelReport
from aifactory_train.parallel.apply import apply_activation_checkpointing, keeps
from aifactory_train.parallel.batches import CPU_MICRO_BATCH, micro_limit

LENGTHS = [20, 7, 13]


def build(family: str, lora: bool, saving: bool, **settings):
    attention.register()
    model = helpers.tiny_model(family)
    model.config._attn_implementation = attention.PER_DOCUMENT
    torch.manual_seed(0)
    if lora:
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    counts = apply_cpu_operators(model) if saving else None
    return CausalLM(model), counts


def recipe_of(mode: str) -> Recipe:
    tree = {"model": {"base": "m"}, "data": {"train": "t"}, "parallel": {"activation_checkpointing": mode}}
    return Recipe.model_validate(tree)


def backward(core: CausalLM) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients and the bytes that autograd kept (each storage once)."""
    total = sum(LENGTHS)
    ids = (torch.arange(total) * 7 % 400)[None]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    documents = attention.Documents.of(torch.tensor([0, *LENGTHS]).cumsum(0), "cpu")
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in core.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = core(ids, positions, documents, torch.arange(total - 1), ids[0, 1:])
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in core.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("family", helpers.FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
def test_same_loss_and_gradients_with_less_kept(family: str, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_matmul, "library", lambda: ("torch", "so that products are the model's own, bit by bit"))
    loss, gradients, kept = backward(build(family, lora, saving=False)[0])
    core, counts = build(family, lora, saving=True)
    lean_loss, lean_gradients, lean_kept = backward(core)
    assert torch.equal(loss, lean_loss)  # the forward pass has the same operations in the same order
    assert gradients.keys() == lean_gradients.keys()
    for name, gradient in gradients.items():
        error = (lean_gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < 2e-6, (name, float(error))
    replaced, left = counts
    if family == "gemma3":  # (1 + weight) norms and GELU: not this structure, so left alone and named
        assert left["Gemma3RMSNorm"] and left["Gemma3MLP"]
    else:
        assert not left and any(name.endswith("RMSNorm") for name in replaced)
        # The rest is what any implementation keeps: the residual stream, the two projections, attention's own tensors.
        assert lean_kept < 0.8 * kept, (lean_kept, kept)


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_variants_of_lora_keep_their_own_code(settings: dict) -> None:
    _, (replaced, left) = build("llama", True, True, **settings)
    assert not replaced.get("Linear")
    assert left["Linear of peft"] == 14


def test_merged_and_disabled_adapters_still_work() -> None:
    plain, saving = build("llama", True, False)[0], build("llama", True, True)[0]
    ids = (torch.arange(12) * 5 % 400)[None]
    with torch.no_grad(), decoding(plain.model), decoding(saving.model):
        with plain.model.disable_adapter(), saving.model.disable_adapter():
            assert torch.equal(plain.model(input_ids=ids).logits, saving.model(input_ids=ids).logits)
        plain.model.merge_adapter(), saving.model.merge_adapter()
        assert torch.equal(plain.model(input_ids=ids).logits, saving.model(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # qwen2: with biases
@pytest.mark.parametrize("settings", [None, {}, {"lora_dropout": 0.3}])
def test_recomputation_finds_the_products_as_they_were_made(family: str, settings: dict | None) -> None:
    def gradients(mode: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        core, _ = build(family, settings is not None, saving=False, **(settings or {}))
        apply_operators(core, recipe_of(mode), device="cpu", engine="ddp", weights="always", report=ModelReport())
        apply_activation_checkpointing(core, mode)
        core.train()
        torch.manual_seed(1)
        return backward(core)[:2]

    loss, wanted = gradients("none")
    for mode in ("selective", "full"):
        again, found = gradients(mode)
        assert torch.equal(loss, again) and found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


def test_selective_recomputation_keeps_what_costs_most() -> None:
    import aifactory_train.kernels.lora_linear.op  # noqa: F401 - registers the operator

    assert keeps(torch.ops.aifactory.lora_linear_fwd.default, ())
    if compat.varlen_attention() is not None:
        assert keeps(torch.ops.torch_attn._varlen_attn.default, ())
    square, vector = torch.zeros(2, 2), torch.zeros(2)
    assert keeps(torch.ops.aten.addmm.default, (vector, square, square))  # a linear layer with its bias
    assert not keeps(torch.ops.aten.addmm.default, (square, square, square))  # an adapter's branch
    assert not keeps(torch.ops.aten.silu.default, (square,))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """In a process of its own: a large tensor comes from the heap, and the heap does not shrink when it is freed."""
    script = (
        "import re, torch\n"
        "from aifactory_train.model.cpu_operators import keep_freed_memory\n"
        "def heap():\n"
        "    line = next(l for l in open('/proc/self/maps') if l.rstrip().endswith('[heap]'))\n"
        "    return [int(part, 16) for part in re.match('([0-9a-f]+)-([0-9a-f]+)', line).groups()]\n"
        "size = 64 * 2**20\n"
        "assert keep_freed_memory()\n"
        "tensor = torch.empty(size // 4)\n"
        "start = tensor.data_ptr()\n"
        "assert heap()[0] <= start and start + size <= heap()[1]\n"
        "del tensor\n"
        "assert start + size <= heap()[1]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_micro_batches_on_a_cpu_stay_small_and_hold_the_longest_document() -> None:
    lengths = np.asarray([40, 1900, 7])
    assert micro_limit(4096, lengths, "cpu") == 1900
    assert micro_limit(4096, lengths[[0, 2]], "cpu") == CPU_MICRO_BATCH
    assert micro_limit(64, lengths, "cpu") == 64  # what was asked for is the upper limit
    assert micro_limit(4096, lengths, "cuda:0") == 4096


@pytest.mark.parametrize("enabled", ["auto", "off"])
def test_on_a_gpu_supervised_training_goes_through_the_fused_loss(monkeypatch, enabled):
    """The device is a name here, and the kernels take their torch path; which operator is asked does not depend on
    that.
    """
    from aifactory_train.kernels import ops, runtime
    from aifactory_train.model import causal_lm

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(runtime, "device_of", lambda index: ("sm_90", "H100-80", 132))
    monkeypatch.setattr(runtime, "trouble", lambda device: "")
    plain, _ = build("llama", lora=False, saving=False)
    core, _ = build("llama", lora=False, saving=False)
    asked = []
    fused = ops.linear_cross_entropy
    monkeypatch.setattr(ops, "linear_cross_entropy", lambda *a, **how: asked.append(how) or fused(*a, **how))
    recipe = recipe_of("none")
    recipe.kernels.enabled = enabled
    report = ModelReport()
    apply_operators(core, recipe, device="cuda", engine="ddp", weights="always", report=report)
    loss, gradients, _ = backward(core)
    assert len(asked) == (enabled == "auto") and core.kernels is (enabled == "auto")
    assert any("fused" in what for _, what, _ in report.lines) is (enabled == "auto")
    wanted, expected, _ = backward(plain)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    # likelihoods of tokens (evaluation, preferences) take its sibling
    scored = []
    monkeypatch.setattr(ops, "linear_logps", lambda h, w, t, **how: scored.append(how) or torch.zeros(len(t)))
    ids, documents = torch.arange(5)[None], attention.Documents.of(torch.tensor([0, 5]), "cpu")
    places = torch.arange(4)
    core(ids, ids, documents, places, ids[0, 1:], objective=TokenNLL())
    assert len(scored) == (enabled == "auto")
    with pytest.raises(TypeError):
        core(ids, ids, documents, places, task=causal_lm.Forward.LOSS)
