"""No model is trained on documents that see each other, or the future, without being told: the check of the start."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import helpers
import pytest
import torch

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.model import attention, causal_lm, recurrent, small_copy
from aifactory_train.model import position_check as pc
from aifactory_train.model.attention import decoding
from aifactory_train.model.loading import build_model
from aifactory_train.model.operators import apply_operators
from aifactory_train.model.precision import choose_precision
from aifactory_train.model.report import ModelReport

SHAPE: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
DELTA = {
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
SMALL_BERT = {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
#: Of some families as they are published: sizes, and every kind of layer.
PUBLISHED: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"layer_types": (["mamba"] * 5 + ["attention"] + ["mamba"] * 4) * 4, "num_hidden_layers": 40},
    "nemotron_h": {"hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"},
    "lfm2": {"num_hidden_layers": 6, "layer_types": ["conv", "conv", "full_attention"] * 2},
    "minimax": {"num_hidden_layers": 16, "layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 2},
}
PACKED = (
    "gemma2",
    "gpt_oss",
    "phi",
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma3_text",
    "mistral",
    "gpt2",
    "gpt_neox",
    "phimoe",
    "olmo2",
    "smollm3",
)
RECURRENT = ("qwen3_next", "qwen3_5_text", "minimax", "granitemoehybrid", "nemotron_h", "lfm2")


def configuration(family: str, **settings: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **settings)


@pytest.mark.parametrize("family", PACKED)
def test_models_whose_attention_is_ours_keep_their_packs(family):
    verdict = pc.examine(configuration(family))
    assert (verdict.batching, verdict.error, verdict.limits) == (pc.PACKED, None, {})
    verdict.raise_refusal(10**6)


@pytest.mark.parametrize("family", RECURRENT)
def test_layers_with_a_state_are_run_on_documents(family):
    verdict = pc.examine(configuration(family, **PUBLISHED.get(family, {})))
    assert (verdict.batching, verdict.error, verdict.attention) == (pc.PACKED, None, pc.OURS)
    assert "run on each document" in verdict.why


def unknown(monkeypatch) -> None:
    """As if a family had a layer whose name nobody knows."""
    monkeypatch.setattr(recurrent, "STATEFUL", re.compile("none"))


@pytest.mark.parametrize("family", RECURRENT)
def test_a_state_that_runs_through_a_pack_is_found(family, monkeypatch):
    unknown(monkeypatch)
    verdict = pc.examine(configuration(family, **PUBLISHED.get(family, {})))
    assert verdict.batching == pc.PADDED and verdict.error is None
    assert "keep the documents of a pack apart" in verdict.why


def test_one_leaking_layer_at_the_end_is_found(monkeypatch):
    """The small copy holds every kind of layer, wherever it stands: one delta net behind six layers of attention."""
    unknown(monkeypatch)
    layers = ["full_attention"] * 6
    shape = {**SHAPE, **DELTA, "num_hidden_layers": 7}
    clean = configuration("qwen3_5_text", **shape, layer_types=[*layers, "full_attention"])
    assert pc.examine(clean).batching == pc.PACKED
    assert (
        pc.examine(configuration("qwen3_5_text", **shape, layer_types=[*layers, "linear_attention"])).batching
        == pc.PADDED
    )


OWN = ("bloom", "gptj", "stablelm", "modernbert-decoder")


@pytest.mark.parametrize("family", OWN)
def test_a_model_that_does_not_ask_our_attention_computes_as_transformers_has_it(family):
    verdict = pc.examine(configuration(family))
    assert (verdict.batching, verdict.error, verdict.attention) == (pc.PADDED, None, pc.OWN)
    assert "with our attention" in verdict.why


def test_a_model_that_sees_the_future_is_refused_by_name():
    verdict = pc.examine(configuration("bert"))
    with pytest.raises(UserError, match=r"'bert' cannot be trained here: it sees the future") as caught:
        verdict.raise_refusal(8)
    assert caught.value.where == "model.base" and caught.value.fix
    assert pc.examine(configuration("bert", is_decoder=True)).error is None


def test_logits_that_are_not_the_models_own_are_refused(monkeypatch):
    monkeypatch.setattr(causal_lm, "_logit_scale", lambda config: 1.0)
    verdict = pc.examine(configuration("granite", **SHAPE, logits_scaling=4.0))
    assert verdict.batching == pc.REFUSED and "differ by" in verdict.why


def test_what_cannot_be_shrunk_is_not_trusted(monkeypatch):
    monkeypatch.setattr(small_copy, "MOST_PARAMETERS", 10)
    verdict = pc.examine(configuration("llama", **SHAPE))
    assert (verdict.batching, verdict.attention) == (
        pc.PADDED,
        pc.OWN,
    ) and "could not be checked on a small copy" in verdict.why
    assert "parameters are not few" in verdict.why


def test_a_forward_pass_that_cannot_be_called_is_one_refusal(monkeypatch):
    def fails(*_: Any) -> None:
        raise TypeError("forward() got an unexpected keyword argument 'documents'")

    monkeypatch.setattr(pc, "_logits", fails)
    verdict = pc.examine(configuration("llama", **SHAPE))
    assert verdict.batching == pc.REFUSED and "unexpected keyword argument 'documents'" in verdict.why


def test_chunks_of_attention_are_computed():
    """Llama 4 attends within chunks and says so by a mask alone."""
    verdict = pc.examine(configuration("llama4_text", **ADAPTED["llama4_text"], attention_chunk_size=16))
    assert (verdict.batching, verdict.limits) == (pc.PACKED, {})


def test_a_window_that_our_attention_leaves_out_limits_the_documents(monkeypatch):
    monkeypatch.setattr(attention, "_chunk", lambda module: 0)
    verdict = pc.examine(configuration("llama4_text", **ADAPTED["llama4_text"], attention_chunk_size=8192))
    assert verdict.batching == pc.PACKED and verdict.limits == {"attention_chunk_size": 8192}
    verdict.raise_refusal(8192)
    with pytest.raises(UserError, match="8192 tokens in some layers") as caught:
        verdict.raise_refusal(8193)
    assert caught.value.where == "data.sequence_length" and "8192" in str(caught.value.fix)


def test_random_numbers_and_the_configuration_are_left_alone():
    config = configuration("qwen3", **SHAPE)
    before = config.to_dict()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    pc.examine(config)
    assert torch.equal(torch.rand(3), expected) and config.to_dict() == before


# ---- the cache and the recipe


def folder_of(tmp_path, family: str, **settings: Any):
    configuration(family, **settings).save_pretrained(tmp_path)
    return tmp_path


def recipe_for(base, **data: Any) -> Recipe:
    tree = {"model": {"base": str(base)}, "data": {"train": "rows.jsonl", "sequence_length": 128, **data}}
    return Recipe.model_validate(tree)


def test_the_verdict_is_kept_and_found_anew_for_another_structure(tmp_path, monkeypatch):
    monkeypatch.setenv("AIFACTORY_CACHE", str(tmp_path / "cache"))
    calls = []
    real = pc.examine
    monkeypatch.setattr(pc, "examine", lambda config, **how: calls.append(config.model_type) or real(config, **how))
    base = folder_of(tmp_path / "base", "qwen3_5_text", **SHAPE, **DELTA, layer_types=["linear_attention"] * 2)
    first = pc.check(recipe_for(base), base, device="cpu")
    assert pc.check(recipe_for(base), base, device="cpu") == first and len(calls) == 1
    kept = list((tmp_path / "cache" / "position-checks").iterdir())
    assert [f.name.startswith("qwen3_5_text-") for f in kept] == [True]

    kept[0].write_text("{")  # damaged: found again
    assert pc.check(recipe_for(base), base, device="cpu") == first and len(calls) == 2
    other = folder_of(tmp_path / "other", "qwen3_5_text", **SHAPE, **DELTA, layer_types=["full_attention"] * 2)
    assert pc.check(recipe_for(other), other, device="cpu").batching == pc.PACKED and len(calls) == 3
    larger = folder_of(
        tmp_path / "larger", "qwen3_5_text", **{**SHAPE, "vocab_size": 500}, **DELTA, layer_types=["full_attention"] * 2
    )
    assert pc.check(recipe_for(larger), larger, device="cpu").batching == pc.PACKED and len(calls) == 3


def test_refusals_are_kept_too_and_a_cache_that_cannot_be_written_is_no_fault(tmp_path, monkeypatch):
    base = folder_of(tmp_path / "base", "bert", **SMALL_BERT)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AIFACTORY_CACHE", str(tmp_path / "file"))  # no folder can be made below a file
    with pytest.raises(UserError, match="sees the future"):
        pc.check(recipe_for(base), base, device="cpu")
    monkeypatch.setenv("AIFACTORY_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        with pytest.raises(UserError, match="sees the future"):
            pc.check(recipe_for(base), base, device="cpu")
        monkeypatch.setattr(pc, "examine", lambda *_, **__: pytest.fail("the verdict was kept"))


def test_packs_become_rows_only_where_the_model_needs_it(tmp_path):
    leaks, fine = pc.PositionVerdict(pc.PADDED, "because", {}), pc.PositionVerdict(pc.PACKED, "fine", {})
    recipe = recipe_for("x")
    line = pc.settle(recipe, fine)
    assert recipe.data.batching == "packed" and line[:2] == (
        "documents",
        "packed; compared with each alone on a small copy",
    )
    line = pc.settle(recipe, leaks)
    assert recipe.data.batching == "padded" and line[1].startswith("one document a row") and line[2] == "because"
    assert recipe.model.attention == "auto"


def test_a_kernel_that_the_model_cannot_use_is_refused():
    own = pc.PositionVerdict(pc.PADDED, "it asks none", {}, attention=pc.OWN)
    recipe = recipe_for("x")
    pc.settle(recipe, own)
    assert (recipe.model.attention, recipe.data.batching) == ("own", "padded")
    recipe.model.attention = "varlen"
    with pytest.raises(UserError, match="cannot use our attention: it asks none") as caught:
        pc.settle(recipe, own)
    assert caught.value.where == "model.attention: varlen"


# ---- as a user meets it


def write_base(folder, family: str, **settings: Any):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(configuration(family, **settings), dtype=torch.float32).save_pretrained(folder)
    return helpers.write_tokenizer(folder)


def test_a_recurrent_model_is_trained_in_packs_and_the_table_says_so(tmp_path):
    base = write_base(
        tmp_path / "base", "qwen3_5_text", **SHAPE, **DELTA, layer_types=["linear_attention", "full_attention"]
    )
    short = {"train.max_steps": 1, "eval.after": False, "export.automatic": False, "checkpoint.at_end": False}
    recipe = helpers.write_recipe(tmp_path / "recipe", base, settings=short)
    done = helpers.cli("train", recipe, "--run-dir", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "compared with each alone" in " ".join(done.stdout.split())
    assert "batching: packed" in (tmp_path / "run" / "run.yaml").read_text()

    # the loss is that of plain transformers on each document alone
    before = json.loads((tmp_path / "run" / "eval.json").read_text())["before"]["loss"]
    assert before == pytest.approx(plain_loss(base, tmp_path / "recipe"), rel=1e-5)


def plain_loss(base, folder) -> float:
    """Mean NLL of the assistant tokens of eval.jsonl, each row alone, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    total, count = 0.0, 0
    for line in (folder / "eval.jsonl").read_text(encoding="utf-8").splitlines():
        question, answer = json.loads(line)["messages"]
        head = f"<|im_start|>user\n{question['content']}<|im_end|>\n<|im_start|>assistant\n"
        start = tokenizer(head, add_special_tokens=False).input_ids
        ids = start + tokenizer(f"{answer['content']}<|im_end|>", add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(len(start), len(ids)):
            total -= float(logits[place - 1, ids[place]])
            count += 1
    return total / count


def test_a_model_that_sees_the_future_is_refused_before_anything_is_prepared(tmp_path):
    base = write_base(tmp_path / "base", "bert", **SMALL_BERT)
    recipe = helpers.write_recipe(tmp_path / "recipe", base)
    result = helpers.cli("train", recipe, "--run-dir", tmp_path / "run", cwd=tmp_path)
    helpers.refused(result, "'bert' cannot be trained here", "sees the future", "model.base", "fix:")


@pytest.mark.slow
def test_bloom_is_trained_by_its_own_attention_and_exported(tmp_path):
    base = write_base(tmp_path / "base", "bloom", vocab_size=400, hidden_size=64, n_layer=2, n_head=4, pad_token_id=3)
    recipe = helpers.write_recipe(tmp_path / "recipe", base)
    done = helpers.cli("train", recipe, "--run-dir", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "model's own" in done.stdout and "attention: own" in (tmp_path / "run" / "run.yaml").read_text()
    before = json.loads((tmp_path / "run" / "eval.json").read_text())["before"]["loss"]
    assert before == pytest.approx(plain_loss(base, tmp_path / "recipe"), rel=1e-5)
    asked = helpers.cli("train", recipe, "--run-dir", tmp_path / "no", "--set", "model.attention=varlen", cwd=tmp_path)
    helpers.refused(asked, "cannot use our attention", "model.attention: varlen", "fix:")


# ---- what ended in tracebacks


ADAPTED = {
    "gpt2": {"vocab_size": 400, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neox": SHAPE,
    "phimoe": {**SHAPE, "num_local_experts": 4, "sliding_window": None},
    "llama4_text": {**SHAPE, "intermediate_size_mlp": 128, "head_dim": 16, "num_local_experts": 2},
}


@pytest.mark.parametrize("family", ADAPTED)
def test_adapters_of_families_that_name_their_parts_otherwise(family, tmp_path):
    """The backbone is found below peft, routers that return several tensors get no adapter from all-linear, and a model
    may add to what our linear layers return."""
    base = write_base(tmp_path / "base", family, **ADAPTED[family])
    report = ModelReport()
    recipe = recipe_for(base)
    precision, _ = choose_precision(recipe, "cpu")
    core = build_model(recipe, base, None, device="cpu", precision=precision, report=report)
    with torch.no_grad(), decoding(core.model):  # before our operators: they are compared too
        ids = torch.randint(4, 400, (1, 12), generator=torch.Generator().manual_seed(1))
        logits = core.model(input_ids=ids).logits[0, :-1]
    apply_operators(core, recipe, device="cpu", engine="ddp", weights="always", report=report)
    bounds = torch.tensor([0, 12], dtype=torch.int32)
    loss = core(ids, torch.arange(12)[None], pc.Documents.of(bounds, "cpu"), torch.arange(11), ids[0, 1:])
    loss.backward()
    assert any(p.grad is not None for n, p in core.named_parameters() if "lora_B" in n)
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    trained = next(line[1] for line in report.lines if line[0] == "trained")
    assert ("but 2 routers" in trained) == (family in ("phimoe", "llama4_text"))


def test_a_router_asked_for_by_name_is_refused(tmp_path):
    base = write_base(tmp_path / "base", "phimoe", **ADAPTED["phimoe"])
    recipe = recipe_for(base)
    recipe.adapter.targets = ["q_proj", "router"]
    precision, _ = choose_precision(recipe, "cpu")
    with pytest.raises(UserError, match=r"router' returns more than") as caught:
        build_model(recipe, base, None, device="cpu", precision=precision, report=ModelReport())
    assert caught.value.where == "adapter.targets"


def test_attention_returns_what_can_be_viewed():
    from aifactory_train.model.attention import per_document_attention

    states = torch.randn(1, 4, 7, 8)
    documents = pc.Documents.of(torch.tensor([0, 3, 7]), "cpu")
    out, _ = per_document_attention(SimpleNamespace(), states, states, states, None, documents=documents)  # type: ignore[arg-type]
    assert out.is_contiguous() and out.view(1, 7, 32).shape == (1, 7, 32)


# ---- every family that transformers has


def _all_families() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("family", _all_families())
def test_no_family_is_trained_wrongly_in_silence(family):
    """A verdict for each, never a traceback; and packs that are trusted hold for other documents and weights too."""
    try:
        config = configuration(family)
    except Exception as error:
        pytest.skip(f"transformers cannot build its default configuration: {error}")
    verdict = pc.examine(config)
    assert (verdict.batching == pc.REFUSED) == (verdict.error is not None) and verdict.why
    if verdict.batching == pc.REFUSED or "could not be checked" in verdict.why:
        return
    own, lengths = verdict.attention == pc.OWN, [5, 1, 17]
    with torch.no_grad(), small_copy.quietly():
        _, plain, _, _ = small_copy.small_plain(config, False)
        generator = torch.Generator().manual_seed(9)
        for parameter in plain.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
        documents = [torch.randint(pc.FIRST_TOKEN, pc.VOCABULARY, (n,), generator=generator) for n in lengths]
        alone = torch.cat([plain(input_ids=d[None], use_cache=False).logits[0] for d in documents])
        ours = small_copy.as_trained(plain.config, plain, False, own=own)
        if verdict.batching == pc.PACKED:
            found = pc._logits(ours, torch.cat(documents)[None], lengths)
        else:
            rows = torch.full((3, 17), pc.FIRST_TOKEN)
            for row, d in zip(rows, documents, strict=True):
                row[: len(d)] = d
            padded = pc._logits(ours, rows, [17] * 3).view(3, 17, -1)
            found = torch.cat([p[:n] for p, n in zip(padded, lengths, strict=True)])
    assert float((found - alone).abs().max()) <= 2 * pc.TOLERANCE * float(alone.abs().max())


# ---- bad input


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("qwen2_5_vl", "a vision-language model"),
        ("wav2vec2", "a model of speech"),
        ("t5", "an encoder-decoder"),
        ("deberta", "an encoder, which sees the future"),
        ("vit", "a model of images"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_by_name(family, words):
    from aifactory_train.model.loading import check_causal

    config = configuration(family)
    with pytest.raises(UserError, match=words) as caught:
        check_causal(config, "some/model")
    assert f"'{family}'" in caught.value.what and caught.value.fix
    check_causal(configuration("llama"), "some/model")


def test_the_text_part_is_offered_where_it_is_a_family_of_its_own():
    from aifactory_train.model.loading import check_causal

    with pytest.raises(UserError, match="a vision-language model") as caught:
        check_causal(configuration("llava", text_config={"model_type": "llama"}), "some/model")
    assert "model_type 'llama'" in str(caught.value.fix)


def test_layers_that_peft_refuses_are_left_out_by_name_and_count():
    from transformers import AutoModelForCausalLM

    from aifactory_train.model.adapters import apply_adapter

    report = ModelReport()
    config = configuration("mamba", vocab_size=400, hidden_size=64, num_hidden_layers=2, state_size=8)
    model = apply_adapter(AutoModelForCausalLM.from_config(config), recipe_for("x"), report)
    adapted = {n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert "in_proj" in adapted and "out_proj" not in adapted
    assert "but 2 output projections of Mamba" in report.lines[-1][1]
