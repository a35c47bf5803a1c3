"""Loading, adapters, precision and starting points: what is trained is what the recipe says, and the loss is the
model's own.
"""

from __future__ import annotations

import json
import shutil

import helpers
import pytest
import torch
import torch.nn.functional as F

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.model import causal_lm as m
from aifactory_train.model.attention import PER_DOCUMENT, Documents, decoding, register
from aifactory_train.model.base import base_folder
from aifactory_train.model.loading import build_model, check_vocabulary
from aifactory_train.model.precision import choose_precision
from aifactory_train.model.report import ModelReport
from aifactory_train.run.folder import RunFolder


@pytest.fixture(scope="module")
def untied_model_dir(tmp_path_factory):
    return helpers.write_model(tmp_path_factory.mktemp("models") / "untied", tied=False)


def recipe_for(base, **settings) -> Recipe:
    tree = {
        "model": {"base": str(base)},
        "data": {"train": "rows.jsonl", "sequence_length": 128},
        "adapter": {"rank": 4},
    }
    for key, value in settings.items():
        block, _, name = key.partition("__")
        tree.setdefault(block, {})[name] = value
    return Recipe.model_validate(tree)


def build(base, **settings) -> tuple[m.CausalLM, ModelReport]:
    recipe, report = recipe_for(base, **settings), ModelReport()
    precision, _ = choose_precision(recipe, "cpu")
    core = build_model(recipe, base, None, device="cpu", precision=precision, report=report)
    return core, report


def shake(core: m.CausalLM, seed: int = 0) -> m.CausalLM:
    """Give every trained parameter a small random change, as training would (a fresh adapter changes nothing)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in core.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return core


KINDS = [
    {"adapter__kind": "none"},
    {"adapter__kind": "lora"},
    {"adapter__kind": "rslora"},
    {"adapter__kind": "dora"},
    {"adapter__kind": "lora", "adapter__train_embeddings": True},
    {"adapter__kind": "lora", "adapter__targets": ["q_proj", "v_proj"]},
]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("settings", KINDS, ids=lambda s: "-".join(map(str, s.values())))
def test_loss_and_gradients_are_those_of_the_peft_model(tiny_model_dir, untied_model_dir, settings, tied):
    """Our chunked loss against cross-entropy on the logits that the (wrapped) model itself returns."""
    core, _ = build(tiny_model_dir if tied else untied_model_dir, **settings)
    shake(core)
    ids = torch.randint(4, 400, (1, 30), generator=torch.Generator().manual_seed(1))
    places = torch.arange(29)
    loss = core(ids, torch.arange(30)[None], Documents.of(torch.tensor([0, 30]), "cpu"), places, ids[0, 1:])
    loss.backward()
    ours = {n: p.grad.clone() for n, p in core.named_parameters() if p.requires_grad}
    core.zero_grad()
    with decoding(core.model):
        logits = core.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
    expected = F.cross_entropy(logits, ids[0, 1:], reduction="sum")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert ours
    for name, parameter in core.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                ours[name], parameter.grad, rtol=2e-4, atol=2e-5, msg=lambda s, n=name: f"{n}: {s}"
            )


def test_what_is_trained(tiny_model_dir, untied_model_dir):
    core, report = build(tiny_model_dir, adapter__kind="none")
    assert report.trainable == report.parameters == sum(p.numel() for p in core.parameters())

    core, report = build(tiny_model_dir)
    trained = [n for n, p in core.named_parameters() if p.requires_grad]
    assert all("lora_" in n for n in trained) and len(trained) == 2 * 2 * 7  # A and B, two layers, seven projections
    assert report.trainable == sum(p.numel() for p in core.parameters() if p.requires_grad)

    for base, copies in ((tiny_model_dir, 1), (untied_model_dir, 2)):
        core, _ = build(base, adapter__train_embeddings=True)
        embeddings = [p for n, p in core.named_parameters() if p.requires_grad and "modules_to_save" in n]
        assert len(embeddings) == copies
        assert any(core.output_weight is p for p in embeddings)  # the loss reads what is trained


def test_adapters_on_the_output_layer_and_unknown_targets_are_refused(untied_model_dir):
    with pytest.raises(UserError, match="output layer") as caught:
        build(untied_model_dir, adapter__targets=["q_proj", "lm_head"])
    assert caught.value.where == "adapter.targets"
    with pytest.raises(UserError, match="not found") as caught:
        build(untied_model_dir, adapter__targets=["q_projection"])
    assert caught.value.where == "adapter.targets"


def test_scaled_logits_and_output_biases(tmp_path):
    """Granite divides its logits, Cohere multiplies them; Phi adds a bias, that each logit gets."""
    import transformers as tf

    register()
    shape = {
        "vocab_size": 200,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 3,
    }
    ids = torch.randint(4, 200, (1, 12))
    for plain in (
        tf.GraniteForCausalLM(tf.GraniteConfig(**shape, logits_scaling=4.0)),
        tf.CohereForCausalLM(tf.CohereConfig(**shape, logit_scale=0.125)),
        tf.PhiForCausalLM(tf.PhiConfig(**shape)),
    ):
        plain.eval()
        with torch.no_grad():
            if (bias := plain.get_output_embeddings().bias) is not None:
                bias.normal_()
            expected = plain(ids).logits[0]
            plain.set_attn_implementation(PER_DOCUMENT)
            core = m.CausalLM(plain)
            places, documents = torch.arange(12), Documents.of(torch.tensor([0, 12]), "cpu")
            found = core(ids, places[None], documents, places, task=m.Forward.LOGITS)
        assert core.logit_scale != 1.0 or core.output_bias is not None
        assert (found - expected).abs().max() <= 1e-6


def test_precision_policy(tiny_model_dir):
    everywhere, why = choose_precision(recipe_for(tiny_model_dir), "cpu")
    assert set(vars(everywhere).values()) == {torch.float32} and why == "CPU"
    mixed, _ = choose_precision(recipe_for(tiny_model_dir, precision__compute="bf16"), "cpu")
    assert (mixed.parameters, mixed.frozen, mixed.compute) == (torch.float32, torch.bfloat16, torch.bfloat16)
    core, _ = build(tiny_model_dir, precision__compute="bf16")
    for parameter in core.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)


def test_weights_that_are_trained_are_not_rounded_on_the_way(tiny_model_dir):
    """Full fine-tuning with bf16 compute keeps the base's fp32 weights bit for bit."""
    exact = helpers.tiny_model("llama").state_dict()
    core, _ = build(tiny_model_dir, adapter__kind="none", precision__compute="bf16")
    for name, parameter in core.model.named_parameters():
        assert torch.equal(parameter, exact[name]), name


def test_pickled_weights_missing_configurations_and_long_sequences_are_refused(tmp_path, tiny_model_dir):
    from safetensors.torch import load_file

    pickled = shutil.copytree(tiny_model_dir, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        build(pickled)

    broken = shutil.copytree(tiny_model_dir, tmp_path / "broken")
    (broken / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(UserError, match="no usable model configuration"):
        build(broken)

    with pytest.raises(UserError, match="512 positions") as caught:
        build(tiny_model_dir, data__sequence_length=1024, data__train="x.jsonl", train__micro_batch_tokens=2048)
    assert caught.value.where == "data.sequence_length"


def test_a_tokenizer_larger_than_the_embedding_is_refused(tiny_model_dir, tiny_tokenizer):
    small = helpers.tiny_model("llama", vocabulary=300)
    with pytest.raises(UserError, match="ids up to 399, the model's embedding has 300 rows"):
        check_vocabulary(small, tiny_tokenizer)


# ---- starting from an earlier run


def earlier_run(folder, base, core: m.CausalLM | None = None, whole=None, **settings) -> RunFolder:
    """A run folder with an exported adapter (``core``) or whole weights (``whole``), as export leaves it."""
    run = RunFolder(folder)
    run.export.mkdir(parents=True)
    run.save_config(recipe_for(base, **settings))
    if core is not None:
        core.model.save_pretrained(run.export / "adapter")
    if whole is not None:
        whole.save_pretrained(run.export / "model")
    return run


def test_an_adapter_goes_on_where_the_earlier_run_left_it(tmp_path, tiny_model_dir):
    first = shake(build(tiny_model_dir)[0])
    run = earlier_run(tmp_path / "first", tiny_model_dir, first)
    second, report = build(tiny_model_dir, model__start_from=str(run.path))
    expected = {n: p for n, p in first.named_parameters() if p.requires_grad}
    for name, parameter in second.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, expected[name]), name
    assert any(line[0] == "starting point" for line in report.lines)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path, tiny_model_dir, untied_model_dir):
    run = earlier_run(tmp_path / "first", tiny_model_dir, build(tiny_model_dir)[0])
    start = {"model__start_from": str(run.path)}
    with pytest.raises(UserError, match=r"does not fit: .*lora_A.* is .* there and .* here"):
        build(tiny_model_dir, adapter__rank=8, **start)
    with pytest.raises(UserError, match=r"absent.* here"):
        build(tiny_model_dir, adapter__targets=["q_proj"], **start)
    with pytest.raises(UserError, match="trains all weights"):
        build(tiny_model_dir, adapter__kind="none", **start)
    with pytest.raises(UserError, match="adapter belongs to") as caught:
        build(untied_model_dir, **start)
    assert caught.value.fix == f"--set model.base={tiny_model_dir}"


def test_whole_weights_become_the_new_base_also_for_later_adapters(tmp_path, tiny_model_dir):
    tuned = shake(build(tiny_model_dir, adapter__kind="none")[0]).model
    whole = earlier_run(tmp_path / "whole", tiny_model_dir, whole=tuned, adapter__kind="none")
    second, _ = build(tiny_model_dir, model__start_from=str(whole.path))
    frozen = second.language_model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(frozen, tuned.model.layers[0].self_attn.q_proj.weight)
    # a third run that starts from the second one's adapter stands on the same weights
    run = earlier_run(tmp_path / "second", tiny_model_dir, second, model__start_from=str(whole.path))
    assert base_folder(recipe_for(tiny_model_dir, model__start_from=str(run.path))) == whole.export / "model"


def test_runs_without_export_and_circles_are_refused(tmp_path, tiny_model_dir):
    empty = earlier_run(tmp_path / "empty", tiny_model_dir)
    with pytest.raises(UserError, match="no export to start from"):
        build(tiny_model_dir, model__start_from=str(empty.path))
    with pytest.raises(UserError, match="no run 'nowhere'"):
        build(tiny_model_dir, model__start_from="nowhere")
    loop = earlier_run(tmp_path / "loop", tiny_model_dir, model__start_from=str(tmp_path / "loop"))
    with pytest.raises(UserError, match="leads back to itself"):
        base_folder(loop.load_config())


def test_a_model_whose_files_lack_weights_is_refused(tmp_path, tiny_model_dir):
    """transformers would begin there with random numbers, and say so in a warning alone."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    recipe = Recipe.model_validate(
        {"model": {"base": str(base)}, "data": {"train": ["x.jsonl"], "sequence_length": 64}}
    )
    precision = choose_precision(recipe, "cpu")[0]
    with pytest.raises(UserError, match=r"the weight files lack lm_head\.weight"):
        build_model(recipe, base, None, device="cpu", precision=precision, report=ModelReport())
