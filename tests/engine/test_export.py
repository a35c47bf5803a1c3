"""Exports reproduce the trained model when plain transformers and peft read them, and nothing else becomes visible."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from aifactory_train.config.loading import load_recipe
from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.core.files import write_json
from aifactory_train.data import load_tokenizer, prepare
from aifactory_train.exporting import gate, reload_check
from aifactory_train.exporting import writer as ex
from aifactory_train.exporting.gate import (
    BF16_KL,
    BF16_TOP1,
    GATE_POSITIONS,
    gate_rows,
    is_plain_fp32,
    judge,
    plain_logits,
    reference_logits,
    relative,
    reload_logits,
)
from aifactory_train.model.base import claimed_name, public_base
from aifactory_train.model.loading import build_model
from aifactory_train.model.precision import choose_precision
from aifactory_train.model.report import ModelReport
from aifactory_train.model.trained import load_trained
from aifactory_train.parallel.world import World
from aifactory_train.run.folder import RunFolder

CASES = {
    "lora": {"adapter.kind": "lora"},
    "rslora": {"adapter.kind": "rslora"},
    "dora": {"adapter.kind": "dora"},
    "embeddings, tied": {"adapter.train_embeddings": True},
    "embeddings, untied": {"adapter.train_embeddings": True, "model.base": "untied"},
    "embeddings, dora": {"adapter.train_embeddings": True, "adapter.kind": "dora"},
    "all weights": {"adapter.kind": "none"},
    "gemma3": {"model.base": "gemma3"},
}


class Trained:
    """A run whose training is over: recipe, data, and a model whose trained parameters moved."""

    def __init__(self, folder, base, settings=None, keep_rows=False):
        path = folder / "recipe.yaml" if keep_rows else helpers.write_recipe(folder, base, settings=settings)
        self.recipe = load_recipe(str(path))
        self.tokenizer = load_tokenizer(self.recipe)
        self.data = prepare(self.recipe, self.tokenizer)
        self.run = RunFolder(folder / "run")
        self.run.path.mkdir()
        self.run.save_config(self.recipe)
        precision, _ = choose_precision(self.recipe, "cpu")
        self.core = build_model(
            self.recipe, base, self.tokenizer, device="cpu", precision=precision, report=ModelReport()
        )
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in self.core.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    @property
    def engine(self):
        """What export needs of an engine: the model, its trained tensors, and the ranks."""
        named = [(n, p.detach().clone()) for n, p in self.core.named_parameters() if p.requires_grad]
        world = World(0, 1, 0, 1, "cpu", "alone", "")
        return SimpleNamespace(core=self.core, world=world, full_parameters=lambda trained_only: iter(named))

    def export(self, **options):
        return ex.export_run(
            self.run,
            **{"engine": self.engine, "tokenizer": self.tokenizer, "data": self.data, "recipe": self.recipe, **options},
        )

    def names(self) -> list[str]:
        return sorted(p.name for p in self.run.export.iterdir())


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("bases")
    return {
        "tied": tiny_model_dir,
        "untied": helpers.write_model(folder / "untied", tied=False),
        "gemma3": helpers.write_model(folder / "gemma3", family="gemma3"),
    }


def trained(folder, bases, settings=None) -> Trained:
    settings = dict(settings or {})
    return Trained(folder, bases[settings.pop("model.base", "tied")], settings)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, bases):
    """All cases exported (adapter or whole weights, merged in fp32 and bf16) and reloaded by one fresh process."""
    runs, checks = {}, []
    for number, (name, settings) in enumerate(CASES.items()):
        case = trained(tmp_path_factory.mktemp("run"), bases, settings)
        whole = settings.get("adapter.kind") == "none"
        paths = case.export(merge=True, dtype="fp32", verify=False)["paths"]
        kinds = ["model"] if whole else ["adapter", "merged"]
        assert sorted(paths) == sorted(kinds)
        for kind in kinds:
            target = {
                "base": str(case.recipe.model.base) if kind == "adapter" else paths[kind],
                "adapter": paths[kind] if kind == "adapter" else None,
            }
            checks.append({"name": f"{number}-{kind}", **target, "dtype": "float32"})
        runs[name] = (number, case, paths)
    rows = gate_rows(next(iter(runs.values()))[1].data)
    return runs, rows, reload_logits(checks, rows)


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_process_computes_the_same_logits(exported, name):
    runs, rows, logits = exported
    number, case, paths = runs[name]
    expected = reference_logits(case.core, rows)
    untrained = plain_logits(untrained_model(case), rows)
    assert relative(expected, untrained) > 0.01  # the training changed the model: equality below means something
    for kind in paths:
        verdict = judge(kind, "fp32", expected, logits[f"{number}-{kind}"])
        assert verdict.passed, verdict
        assert verdict.difference <= (1e-6 if kind == "adapter" else 1e-5)
        assert verdict.top1_agreement == 1.0


def untrained_model(case):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(case.recipe.model.base, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", CASES)
def test_folders_are_complete(exported, name):
    """Tokenizer, template, EOS, a card that names the parents; no other dtype, nothing left over."""
    from transformers import AutoTokenizer, GenerationConfig

    runs, _, _ = exported
    _, case, paths = runs[name]
    assert case.names() == sorted(paths)
    for kind, path in paths.items():
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        messages = helpers.chat_rows(1)[0]["messages"]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == case.tokenizer.apply_chat_template(
            messages, tokenize=False
        )
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert GenerationConfig.from_pretrained(path).eos_token_id == end == case.data.tokenizer_info["end_of_turn_id"]
        card = Path(path, "README.md").read_text(encoding="utf-8")
        metadata = yaml.safe_load(card.split("---")[1])
        assert metadata["library_name"] == ("peft" if kind == "adapter" else "transformers")
        assert "Apache-2.0" in card and "CC0-1.0" in card
        assert str(case.run.path.parent) not in card  # no path of this machine
        state = {}
        for file in (case.run.export / kind).glob("*.safetensors"):
            state.update(load_file(file))
        assert state and all(t.dtype == torch.float32 for t in state.values())
        if kind != "adapter":
            config = json.loads(Path(path, "config.json").read_text())
            assert config["dtype"] == "float32" and config.get("use_cache", True)


def test_adapter_config_is_that_of_peft_and_the_same_each_time(exported, tmp_path):
    runs, _, _ = exported
    _, case, _ = runs["dora"]
    config = json.loads((case.run.export / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["use_dora"] and config["r"] == 4 and config["inference_mode"]
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["base_model_name_or_path"] == case.recipe.model.base
    before = {f.name: f.read_bytes() for f in (case.run.export / "adapter").iterdir()}
    case.export(merge=False, verify=False)
    assert {f.name: f.read_bytes() for f in (case.run.export / "adapter").iterdir()} == before


def test_eos_is_what_was_supervised_not_what_the_tokenizer_calls_eos(tmp_path):
    """Many base tokenizers name <|endoftext|> while chats end with another token: the export stops where training
    did.
    """
    from transformers import GenerationConfig

    base = helpers.write_model(tmp_path / "base", eos="<|endoftext|>")
    chats = trained(tmp_path / "chat", {"tied": base})
    chats.export(verify=False)
    assert chats.tokenizer.eos_token == "<|endoftext|>"
    ids = {t: chats.tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_end|>")}
    assert GenerationConfig.from_pretrained(chats.run.export / "adapter").eos_token_id == ids["<|im_end|>"]

    recipe = helpers.write_recipe(tmp_path / "text", base)
    for name, start in (("train", 0), ("eval", 100)):
        rows = [{"text": f"Number {i} stands here and waits."} for i in range(start, start + 12)]
        helpers.write_jsonl(recipe.with_name(f"{name}.jsonl"), rows)
    texts = Trained(tmp_path / "text", base, keep_rows=True)
    texts.export(verify=False)
    assert GenerationConfig.from_pretrained(texts.run.export / "adapter").eos_token_id == ids["<|endoftext|>"]


def test_what_the_base_is_called_elsewhere(tmp_path, tiny_model_dir, monkeypatch):
    """Ids as the recipe names them; a folder by its absolute path, whatever its configuration calls itself."""

    def asked(base, revision=None):
        model = SimpleNamespace(base=str(base), revision=revision, start_from=None, vocabulary=None, rope_scaling=None)
        return SimpleNamespace(model=model)

    assert public_base(asked("org/some-model", "abc123")) == ("org/some-model", "abc123")
    assert public_base(asked("pypi:llm-x==0.1#x/model.gguf")) == ("pypi:llm-x==0.1#x/model.gguf", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps({"_name_or_path": "org/Known-Model"}))
    for text in ("mine", "./mine", str(tmp_path / "mine"), "../" + tmp_path.name + "/mine"):
        assert public_base(asked(text, "main")) == (str(tmp_path / "mine"), None)
        assert claimed_name(asked(text)) == "org/Known-Model"
    assert public_base(asked(tiny_model_dir)) == (str(tiny_model_dir), None)
    assert claimed_name(asked("org/some-model")) is claimed_name(asked(tiny_model_dir)) is None
    for odd in ("[]", '{"_name_or_path": 7}', '{"_name_or_path": "/a/b"}', '{"_name_or_path": "a/b`](x)"}', "no"):
        (tmp_path / "mine" / "config.json").write_text(odd)
        assert claimed_name(asked("mine")) is None


def test_generation_settings_that_transformers_would_not_save(tmp_path, bases, in_process):
    """The export works, adapter and merged, also from the files of a finished run, and says what it repaired. The last
    two kinds are those that plain transformers does not even load."""
    import shutil

    from transformers import GenerationConfig

    for number, (settings, kept) in enumerate(
        [({"temperature": 0.6, "top_p": 0.9}, (True, 0.6)), ({"max_new_tokens": 0, "temperature": 1.0}, (None, 1.0))]
    ):
        base = tmp_path / f"base-{number}"
        shutil.copytree(bases["tied"], base)
        (base / "generation_config.json").write_text(json.dumps(settings))
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "_name_or_path": "acme-lab/original-7b"}))
        case = trained(tmp_path / f"run-{number}", {"tied": base})
        outcome = case.export(merge=True)
        assert outcome["gate"]["adapter"]["passed"] and outcome["gate"]["merged"]["passed"]
        ex.export_run(case.run, merge=True)
        for kind in ("adapter", "merged"):
            written = GenerationConfig.from_pretrained(case.run.export / kind)
            assert (written.do_sample, written.temperature) == kept and written.max_new_tokens is None
            assert written.eos_token_id == case.data.tokenizer_info["end_of_turn_id"]
            card = (case.run.export / kind / "README.md").read_text()
            assert f"`{base.name}` calls itself `acme-lab/original-7b`. That is a claim" in card
            assert yaml.safe_load(card.split("---")[1])["base_model"] == base.name
        adapter = json.loads((case.run.export / "adapter" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(base)


def test_all_weights_of_such_a_base(tmp_path, bases, in_process):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(bases["tied"], base)
    (base / "generation_config.json").write_text('{"temperature": 0.6, "length_penalty": 3.0}')
    case = trained(tmp_path / "run", {"tied": base}, {"adapter.kind": "none"})
    assert case.export()["gate"]["model"]["passed"]
    written = json.loads((case.run.export / "model" / "generation_config.json").read_text())
    assert written["do_sample"] is True and written["temperature"] == 0.6 and "length_penalty" not in written


@pytest.mark.parametrize(
    ("value", "words"), [(0.0, "all zero"), (float("nan"), "not finite"), (float("inf"), "not finite")]
)
def test_a_training_that_diverged_is_one_message(tmp_path, bases, value, words):
    case = trained(tmp_path, bases, {"adapter.kind": "none"})
    with torch.no_grad():
        case.core.language_model.model.norm.weight.fill_(value)
    with pytest.raises(RunFailed, match=f"the trained model is ruined, .* {words}"):
        case.export()
    assert case.names() == []


def test_zero_logits_pass_no_gate():
    nothing = [torch.zeros(3, 5)]
    assert not judge("merged", "fp32", nothing, nothing).passed
    assert not judge("merged", "bf16", nothing, [torch.ones(3, 5)]).passed


# ---- the gate


@pytest.fixture
def in_process(monkeypatch):
    """The gate's script run here instead of in a fresh process: saves the imports where the process is not the
    point.
    """

    def run(command, **options):
        assert options["input"] == Path(reload_check.__file__).read_text(encoding="utf-8")
        try:
            reload_check.main(command[-1])
        except Exception as error:
            return SimpleNamespace(returncode=1, stderr=f"{type(error).__name__}: {error}")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(gate.subprocess, "run", run)


def test_gate_passes_and_is_recorded_and_merging_later_gives_bf16(tmp_path, bases):
    case = trained(tmp_path, bases)
    outcome = case.export()
    verdict = json.loads((case.run.export / "adapter" / "verification.json").read_text())
    assert verdict == outcome["gate"]["adapter"]
    assert verdict["passed"] and verdict["difference"] <= 1e-6 and verdict["places"] == 8 * GATE_POSITIONS

    later = ex.export_run(case.run, merge=True)  # what `aifactory export RUN --merge` does: from files alone
    gate = later["gate"]["merged"]
    assert gate["dtype"] == "bf16" and gate["passed"] and gate["mean_kl"] <= BF16_KL
    assert gate["top1_agreement"] >= BF16_TOP1
    state = load_file(case.run.export / "merged" / "model.safetensors")
    assert all(t.dtype == torch.bfloat16 for t in state.values())
    assert "lm_head.weight" not in state  # tied
    assert case.names() == ["adapter", "merged"]

    with pytest.raises(UserError, match="exported already"):
        ex.export_run(case.run, merge=False)
    with pytest.raises(UserError, match="no complete checkpoint of step 7"):
        ex.export_run(case.run, merge=False, step=7)


def test_a_wrong_export_is_not_made_visible_and_the_old_one_stays(tmp_path, bases, monkeypatch, in_process):
    case = trained(tmp_path, bases)
    case.export(verify=False)
    old = (case.run.export / "adapter" / "adapter_model.safetensors").read_bytes()
    write = ex.Export._write_adapter

    def wrong(self, folder):
        write(self, folder)
        state = load_file(folder / "adapter_model.safetensors")
        name = next(n for n in state if "lora_B" in n)
        state[name] = state[name] * 1.001  # a thousandth off in one of 28 tensors
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(ex.Export, "_write_adapter", wrong)
    with pytest.raises(RunFailed, match="is another model") as caught:
        case.export()
    assert caught.value.exit_code == 1
    assert (case.run.export / "adapter" / "adapter_model.safetensors").read_bytes() == old
    assert case.names() == ["adapter"]


def test_a_wrong_merge_is_found_before_rounding_hides_it(tmp_path, bases):
    """An adapter merged at a thousandth more strength passes any bf16 comparison; the fp32 comparison catches it."""
    case = trained(tmp_path, bases)
    case.export(verify=False)
    config = case.run.export / "adapter" / "adapter_config.json"
    tree = json.loads(config.read_text())
    config.write_text(json.dumps({**tree, "lora_alpha": tree["lora_alpha"] * 1.001}))
    with pytest.raises(RunFailed, match="before rounding"):
        ex.export_run(case.run, merge=True, dtype="bf16")
    assert case.names() == ["adapter"]


def test_an_export_that_cannot_be_loaded_says_why(tmp_path, bases, monkeypatch, in_process):
    case = trained(tmp_path, bases)
    monkeypatch.setattr(
        ex.Export, "_write_adapter", lambda self, folder: (folder / "adapter_config.json").write_text("{}")
    )
    with pytest.raises(RunFailed, match="cannot load the export"):
        case.export()
    assert case.names() == []


def test_not_finite_is_not_equal():
    logits = [torch.randn(4, 9)]
    broken = [torch.full((4, 9), float("nan"))]
    for dtype in ("fp32", "bf16"):
        assert judge("merged", dtype, logits, logits).passed
        assert not judge("merged", dtype, logits, broken).passed


def test_bf16_verdict_ignores_ties_but_not_changes():
    generator = torch.Generator().manual_seed(0)
    clear = torch.randn(200, 50, generator=generator) * 4
    rounded = [clear.bfloat16().float()]
    assert judge("merged", "bf16", [clear], rounded).passed
    shuffled = [clear[:, torch.randperm(50, generator=generator)]]
    assert not judge("merged", "bf16", [clear], shuffled).passed
    weaker = [clear * 0.5]
    assert not judge("merged", "bf16", [clear], weaker).passed  # same best tokens, other probabilities


# ---- other precisions, other ranks, nothing to export


def test_a_bf16_base_is_exported_through_a_rebuilt_fp32_model(tmp_path, bases, in_process):
    """Training in bf16 compute: the model in memory is no fp32 reference, so one is rebuilt from the trained
    tensors.
    """
    case = trained(tmp_path, bases, {"precision.compute": "bf16"})
    assert not is_plain_fp32(case.core)
    outcome = case.export()
    assert outcome["gate"]["adapter"]["difference"] <= 1e-6
    state = load_file(case.run.export / "adapter" / "adapter_model.safetensors")
    own = {n: p for n, p in case.core.named_parameters() if p.requires_grad}
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B"
    assert torch.equal(state[f"{name}.weight"], own[f"model.{name}.default.weight"])


def test_using_a_run_needs_an_export(tmp_path, bases):
    case = trained(tmp_path, bases)
    for call in (lambda: load_trained(case.run, "cpu"), lambda: ex.export_run(case.run, merge=True)):
        with pytest.raises(UserError, match="exported nothing yet"):
            call()


@pytest.mark.parametrize("name", ["lora", "embeddings, tied", "all weights"])
def test_what_chat_and_eval_load_is_the_trained_model(exported, name):
    runs, rows, _ = exported
    _, case, _ = runs[name]
    loaded, tokenizer, recipe = load_trained(case.run, "cpu")
    assert relative(reference_logits(case.core, rows), reference_logits(loaded, rows)) <= 1e-6
    assert not any(p.requires_grad for p in loaded.parameters())
    assert tokenizer.chat_template == case.tokenizer.chat_template
    assert recipe == case.recipe


def test_the_card_shows_figures_and_parents(tmp_path, bases):
    from aifactory_train.exporting.model_card import model_card

    case = trained(tmp_path, bases, {"about": {"title": "Colours", "languages": ["en"], "risks": ["Not for driving."]}})
    figures = {
        "bits_per_byte": 1.5,
        "perplexity": 9.0,
        "chrf": 0.25,
        "rouge_l": 0.5,
        "rows": 12,
        "ci": {"bits_per_byte": [1.4, 1.6]},
    }
    write_json(case.run.eval_file, {"before": {**figures, "bits_per_byte": 2.0}, "after": figures})
    card = model_card(case.run, case.recipe, case.data, "adapter", "fp32")
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["language"] == ["en"] and metadata["license"] == "apache-2.0"  # the base's: the rows are CC0
    results = metadata["model-index"][0]["results"][0]["metrics"]
    assert {r["type"]: r["value"] for r in results} == {
        "bits_per_byte": 1.5,
        "perplexity": 9.0,
        "chrf": 0.25,
        "rouge_l": 0.5,
    }
    for words in (
        "# Colours",
        "| bits per byte | 2 | 1.5 | 1.4 to 1.6 |",
        "| chrF | 0.25 | 0.25 |",
        "| ROUGE-L | 0.5 | 0.5 |",
        "Not for driving.",
        "PeftModel.from_pretrained",
    ):
        assert words in card
