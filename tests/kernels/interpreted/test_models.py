"""A two-layer model of every supported family, patched and interpreted, against the same model unpatched."""

import copy
from collections import Counter

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from aifactory_train.kernels import ops
from aifactory_train.model.gpu_operators import apply_kernels
from aifactory_train.parallel.apply import apply_activation_checkpointing

SMALL = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "attn_implementation": "eager",
}  # fmt: skip
#: family -> (configuration class, extra settings, operators that must be in the model)
NORM, MLP, ROPE, ADD = "rms_norm", "swiglu", "rope", "rms_norm_residual"
FAMILIES = {
    "Llama": ("LlamaConfig", {}, {NORM, MLP, ROPE, ADD}),  # EuroLLM, Viking, Salamandra, Teuken too
    "Mistral": ("MistralConfig", {"head_dim": 16}, {NORM, MLP, ROPE, ADD}),
    "Qwen2": ("Qwen2Config", {}, {NORM, MLP, ROPE, ADD}),
    "Qwen3": ("Qwen3Config", {"head_dim": 16}, {NORM, MLP, ROPE, ADD}),
    "Gemma": ("GemmaConfig", {"head_dim": 16}, {NORM, "geglu", ROPE, ADD}),
    "Gemma2": ("Gemma2Config", {"head_dim": 16}, {NORM, "geglu", ROPE}),
    "Gemma3": ("Gemma3TextConfig", {"head_dim": 16}, {NORM, "geglu", ROPE}),
    "Olmo": ("OlmoConfig", {}, {"layer_norm", MLP, ROPE}),
    "Olmo2": ("Olmo2Config", {}, {NORM, MLP, ROPE}),
    "Olmo3": ("Olmo3Config", {}, {NORM, MLP, ROPE}),
    "Apertus": ("ApertusConfig", {}, {NORM, ROPE, ADD}),
    "SmolLM3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}, {NORM, MLP, ROPE, ADD}),
}


def build(family):
    name, extra, _ = FAMILIES[family]
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**SMALL, **extra))
    for p in model.parameters():  # norm weights off their initial ones and zeros, or a wrong offset would not show
        p.data.add_(0.05 * torch.randn_like(p))
    return model.train()


def loss_and_gradients(model, dtype):
    model = model.to(dtype)
    model.zero_grad()
    ids = torch.randint(3, 160, (2, 7), generator=torch.Generator().manual_seed(2))
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    return (
        out.logits.detach(),
        out.loss.detach()[None],
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_patched_equals_unpatched(family, dtype):
    if dtype == torch.bfloat16 and family not in ("Llama", "Gemma2", "Qwen3"):
        pytest.skip("bf16 on three families: a norm with and without offset, post-norms, QK-norm")
    plain, patched = build(family), build(family)
    report = apply_kernels(patched, arch="sm_90", sku="H100-80", dtype=dtype)
    assert report.family == family
    assert {op for op, _ in report.replaced} == FAMILIES[family][2], str(report)
    assert sorted(patched.state_dict()) == sorted(plain.state_dict())
    exact = loss_and_gradients(copy.deepcopy(plain), torch.float64)
    theirs, ours = loss_and_gradients(plain, dtype), loss_and_gradients(patched, dtype)
    if dtype == torch.float32:
        # Whole models: errors of single operators (tested by the factor of two) add up along the layers, hence a factor
        # of four.
        close(family, ours, theirs, exact)
    else:
        for a, b, c in zip(flat(ours), flat(theirs), flat(exact), strict=True):
            judge_l2(family, a, b, c)


def flat(result):
    return [result[0], result[1], *result[2].values()]


def close(family, ours, theirs, exact):
    assert ours[2].keys() == theirs[2].keys() == exact[2].keys()
    for a, b, c in zip(flat(ours), flat(theirs), flat(exact), strict=True):
        judge_l2(family, a, b, c)


def judge_l2(label, ours, theirs, exact):
    """Relative L2 error at most twice torch's, plus 2e-6 for what fp32 rounding adds up along two layers."""
    norm = exact.double().norm().item()
    worst, reference = ((t.double() - exact.double()).norm().item() for t in (ours, theirs))
    assert worst <= 2 * reference + 2e-6 * norm, f"{label}: {worst:.3g}, torch {reference:.3g}, norm {norm:.3g}"


def test_the_kernels_really_ran():
    from aifactory_train.kernels.workbench import interpreter

    model = build("Qwen3")
    apply_kernels(model, arch="sm_90", dtype="fp32")
    with interpreter.counting() as launches:
        loss_and_gradients(model, torch.float32)
    ran = Counter(launch.kernel for launch in launches)
    # 2 layers x (first norm, q-norm, k-norm) + the last norm, fused second norms, two gates, two rotations forward and
    # backward
    assert ran["rms_norm_fwd"] == 2 * 3 + 1 + 2
    assert ran["rms_norm_bwd"] == ran["rms_norm_fwd"]
    assert ran["glu_fwd"] == ran["glu_bwd"] == 2
    assert ran["rope_fwd"] == 4


def test_one_switch_off():
    model = build("Llama")
    before = [type(m) for m in model.modules()]
    report = apply_kernels(model, arch="sm_90", dtype="bf16", enabled=False)
    assert [type(m) for m in model.modules()] == before
    assert not report.replaced and "switched off" in str(report)


def test_cpu_and_unknown_architectures_change_nothing():
    model = build("Llama")
    before = [type(m) for m in model.modules()]
    for arch in ("cpu", "sm_70"):
        report = apply_kernels(model, arch=arch, dtype="bf16")
        assert [type(m) for m in model.modules()] == before
        assert "nothing replaced" in str(report)


def test_an_unknown_family_is_reported():
    config = transformers.GPTNeoXConfig(
        vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    report = apply_kernels(model, arch="sm_90", dtype="bf16")
    assert report.family is None and not report.replaced
    assert "GPTNeoXForCausalLM is of no known family" in str(report)
    assert any(name == "GPTNeoXMLP" for name, _ in report.kept)


def test_what_is_kept_says_why():
    text = str(apply_kernels(build("Apertus"), arch="sm_90", dtype="bf16"))
    assert "kept 2 x ApertusMLP: its MLP has no gate" in text
    text = str(apply_kernels(build("Gemma2"), arch="sm_90", dtype="bf16"))
    assert "kept 2 x Gemma2DecoderLayer: residual not fused" in text


def test_applying_twice_and_compiling():
    model = build("Llama").eval()
    first = apply_kernels(model, arch="sm_90", dtype="fp32")
    second = apply_kernels(model, arch="sm_90", dtype="fp32")
    assert first.replaced == second.replaced
    ids = torch.randint(3, 160, (1, 5))
    with torch.no_grad():
        eager = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(eager, compiled)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_lora(dropout):
    peft = pytest.importorskip("peft")

    def adapted():
        config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "down_proj"])
        torch.manual_seed(3)
        model = peft.get_peft_model(build("Llama"), config)
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(4))
        return model

    def run(model):
        torch.manual_seed(5)
        return loss_and_gradients(model, torch.float32)

    plain, patched = adapted(), adapted()
    report = apply_kernels(patched, arch="sm_90", dtype="fp32")
    assert report.replaced["lora_linear", "Linear"] == 4
    theirs, ours = run(plain), run(patched)
    assert theirs[2].keys() == ours[2].keys() and len(ours[2]) == 8
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    with patched.disable_adapter():
        off = loss_and_gradients_free(patched)
    assert not torch.allclose(off, loss_and_gradients_free(patched.eval()))


def adapted_everywhere():
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
    model = peft.get_peft_model(build("Llama"), config, autocast_adapter_dtype=False)
    for n, p in model.named_parameters():
        if "lora_B" in n:
            p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(4))
    return model


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.name()] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_adapted_layers_of_a_block_run_together(dtype):
    """Query, key and value are one operator, gate and up another, the end of the MLP with its sum a third; what they do
    not keep is made again in backward. Values and gradients are those of the model's own layers."""
    plain, patched = adapted_everywhere(), adapted_everywhere()
    apply_kernels(patched, arch="sm_90", sku="H100-80", dtype=dtype)
    with Called() as called:
        ours = loss_and_gradients(patched, dtype)
    names = {n.partition("::")[2]: c for n, c in called.names.items() if n.startswith("aifactory::")}
    assert (names["lora_linears_fwd"], names["lora_gated_down_fwd"], names["lora_linear_fwd"]) == (4, 2, 2)
    assert called.names["aten::add.Tensor"] <= 5  # masks and positions: none of the residual stream, in no direction
    theirs = loss_and_gradients(plain, dtype)
    assert theirs[2].keys() == ours[2].keys() and len(ours[2]) == 2 * 7 * 2
    if dtype == torch.float32:
        for a, b in zip(flat(ours), flat(theirs), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    else:
        exact = loss_and_gradients(adapted_everywhere(), torch.float64)
        for a, b, c in zip(flat(ours), flat(theirs), flat(exact), strict=True):
            judge_l2("Llama", a, b, c)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_of_adapted_layers_changes_nothing(mode):
    kept, again = adapted_everywhere(), adapted_everywhere()
    for model in (kept, again):
        apply_kernels(model, arch="sm_90", dtype="fp32")
    apply_activation_checkpointing(again, mode)
    for a, b in zip(*(flat(loss_and_gradients(m, torch.float32)) for m in (kept, again)), strict=True):
        assert torch.equal(a, b)


def test_what_backward_overwrites_is_not_used_again():
    gate, up, x = (torch.randn(5, 32, requires_grad=True) for _ in range(3))
    weight, a, b = torch.randn(32, 32), torch.randn(4, 32), torch.randn(32, 4)
    out = ops.lora_gated_down(gate * 1, up * 1, x, weight, a, b, 2.0).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def loss_and_gradients_free(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 9)[None], use_cache=False).logits
