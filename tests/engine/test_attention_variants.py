"""Windows, chunks, sinks, soft caps and biased output layers: what transformers' eager attention computes, packed, to
its gradients.
"""

import pytest
import torch

from aifactory_train.core.errors import UserError
from aifactory_train.model import attention
from aifactory_train.model.attention import Documents
from aifactory_train.model.causal_lm import CausalLM, Forward
from aifactory_train.model.loss import linear_cross_entropy

SHAPE = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 3,
    "bos_token_id": None,
    "eos_token_id": 2,
}
HEADS = {**SHAPE, "head_dim": 16}
WINDOW = 16
LAYERS = ["sliding_attention", "full_attention"]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "mistral": ("Mistral", {**SHAPE, "sliding_window": WINDOW}),
    "gemma2": ("Gemma2", {**HEADS, "sliding_window": WINDOW, "attn_logit_softcapping": 5.0,
                          "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", {**HEADS, "sliding_window": WINDOW, "layer_types": LAYERS, "query_pre_attn_scalar": 24}),
    "gpt-oss": ("GptOss", {**HEADS, **EXPERTS, "sliding_window": WINDOW, "layer_types": LAYERS}),
    "olmo3": ("Olmo3", {**SHAPE, "sliding_window": WINDOW, "layer_types": LAYERS}),
    "cohere2": ("Cohere2", {**SHAPE, "sliding_window": WINDOW, "layer_types": LAYERS, "logit_scale": 0.25}),
    "exaone4": ("Exaone4", {**SHAPE, "sliding_window": WINDOW, "layer_types": LAYERS}),
    "phi": ("Phi", SHAPE),
    "llama4": ("Llama4", {**HEADS, **EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 48,
                          "attention_chunk_size": WINDOW, "layer_types": ["chunked_attention", "full_attention"],
                          "no_rope_layers": [1, 0], "use_qk_norm": False}),
}  # fmt: skip
LENGTHS = [4 * WINDOW + 5, 7, 3 * WINDOW]


def model_of(family, attend):
    import transformers as tf

    name, shape = FAMILIES[family]
    config = getattr(tf, f"{name}TextConfig", None) or getattr(tf, f"{name}Config")
    torch.manual_seed(0)
    model = getattr(tf, f"{name}ForCausalLM")(config(**shape, attn_implementation="eager")).float()
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            parameter.mul_(2.0).add_(0.05 * torch.randn_like(parameter)) if "embed" not in key else None
    model.set_attn_implementation(attend)
    return model.eval()


def alone(model, ids):
    """(logits, gradients of the summed negative log-likelihood) by plain transformers, a document at a time."""
    logits = torch.cat([model(part[None]).logits[0] for part in ids.split(LENGTHS)])
    return logits, logits.logsumexp(-1).sum() - logits.gather(1, ids.roll(1)[:, None]).sum()


def packed(core, ids):
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    bounds = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0)
    return ids[None], positions[None], Documents.of(bounds, "cpu"), torch.arange(len(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_beyond_the_window_is_each_document_by_eager_attention(family):
    attention.register()
    ids = torch.randint(4, 200, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    plain, ours = model_of(family, "eager"), model_of(family, attention.PER_DOCUMENT)
    core = CausalLM(ours)
    expected, nll = alone(plain, ids)
    given = packed(core, ids)
    found = core(*given, task=Forward.LOGITS)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    nll.backward()
    loss = core(*given, ids.roll(1))
    assert abs(loss.item() - nll.item()) <= 1e-5 * nll.item()
    loss.backward()
    theirs = dict(plain.named_parameters())
    most = max(float(p.grad.abs().max()) for p in theirs.values() if p.grad is not None)
    for name, parameter in ours.named_parameters():
        if theirs[name].grad is not None:
            assert (parameter.grad - theirs[name].grad).abs().max() <= 1e-5 * most, name


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss", "gemma3"])
def test_answers_of_models_with_caps_and_sinks_are_transformers(family):
    """Decoding under masks: left padding, a cache, beyond the window."""
    from transformers import DynamicCache

    attention.register()
    plain, ours = model_of(family, "eager"), CausalLM(model_of(family, attention.PER_DOCUMENT))
    ids = torch.randint(4, 200, (2, 3 * WINDOW), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=ours.backbone.config)
    with torch.no_grad():
        expected = plain(ids, attention_mask=mask, position_ids=places).logits
        cut = ids.shape[1] - 3
        found = [ours(ids[:, :cut], places[:, :cut], attention_mask=mask[:, :cut], cache=cache, task=Forward.DECODE)]
        for i in range(cut, ids.shape[1]):
            here = slice(i, i + 1)
            found.append(
                ours(ids[:, here], places[:, here], attention_mask=mask[:, : i + 1], cache=cache, task=Forward.DECODE)
            )
    worst = (torch.stack(found, 1) - expected[:, cut - 1 :]).abs().max()
    assert worst <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_bias_and_soft_cap_of_the_loss_in_double_precision(reduction):
    torch.manual_seed(3)
    hidden, weight, bias = (torch.randn(*n, requires_grad=True) for n in ((9, 8), (30, 8), (30,)))
    labels = torch.randint(0, 30, (9,))
    weights = torch.rand(9)
    found = linear_cross_entropy(hidden, weight, labels, reduction=reduction, scale=1.5, softcap=2.0, bias=bias, rows=4)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    logits = 2.0 * torch.tanh(1.5 * (exact[0] @ exact[1].t() + exact[2]) / 2.0)
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction=reduction)
    torch.testing.assert_close(found.double(), nll, atol=1e-5, rtol=1e-5)
    for loss, leaves in ((found, (hidden, weight, bias)), (nll, exact)):
        (loss if reduction == "sum" else (loss * weights).sum()).backward()
        assert all(t.grad is not None for t in leaves)
    for a, b in zip((hidden, weight, bias), exact, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_dropped_is_refused():
    q = torch.zeros(1, 2, 8, 4)
    documents = Documents.of(torch.tensor([0, 8], dtype=torch.int32), "cpu")
    with pytest.raises(UserError, match=r"drops 0\.1 of its attention"):
        attention.per_document_attention(
            torch.nn.Module(), q, q, q, None, documents=documents, dropout=0.1, sliding_window=3
        )


def test_queries_of_another_type_are_cast_as_sdpa_casts_them():
    """Rotary embeddings leave queries and keys in fp32 under autocast, values are bf16: a kernel takes one type."""
    q, k, v = (torch.randn(1, heads, 12, 8) for heads in (4, 2, 2))
    documents = Documents.of(torch.tensor([0, 5, 12], dtype=torch.int32), "cpu")
    how = {"documents": documents, "sliding_window": 3}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = attention.per_document_attention(torch.nn.Module(), q, k, v.bfloat16(), None, **how)
    assert found.dtype == torch.bfloat16
    one_type = (t.bfloat16() for t in (q, k, v))
    wanted, _ = attention.per_document_attention(torch.nn.Module(), *one_type, None, **how)
    assert torch.equal(found, wanted)


def test_work_grows_with_the_window():
    """Of a document of n tokens, a window w needs about n * (w + a block) scores, not n * n / 2."""
    from aifactory_train.kernels.attention.blocks import blocks

    n, w = 8192, 256
    scores = sum((q.stop - q.start) * (k.stop - k.start) for q, k, _, _ in blocks([n], w, 0))
    assert scores <= n * (w + 128) and scores < 0.1 * n * n / 2
