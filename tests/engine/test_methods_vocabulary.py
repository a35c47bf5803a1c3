"""A larger vocabulary: old tokens keep their ids, new ones begin as the mean of their pieces, and the export holds
them.
"""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
import torch
from test_preferences import trainer_of
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from aifactory_train.config.loading import load_recipe
from aifactory_train.config.schema import VocabularyConfig
from aifactory_train.core.errors import UserError
from aifactory_train.sources.vocabulary import extended, learn_merges, texts
from aifactory_train.training.start import train

LINES = [
    "Hún er fædd á Íslandi og talar íslensku við börnin sín.",
    "Íslenska er töluð á Íslandi; börnin læra íslensku í skólanum.",
    "Skólinn er við höfnina, og börnin ganga þangað á hverjum morgni.",
]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def models(request, tmp_path_factory) -> tuple[Path, Path]:
    """(base, extended base) with 30 new tokens, with tied and untied embeddings."""
    folder = tmp_path_factory.mktemp("vocabulary")
    base = helpers.write_model(folder / "base", tied=request.param)
    text = folder / "icelandic.txt"
    text.write_text("\n".join(LINES), encoding="utf-8")
    settings = VocabularyConfig(text=str(text), size=30)
    grown = extended(base, settings)
    assert extended(base, settings) == grown  # built once
    return base, grown


def test_old_tokens_keep_their_ids_and_text_gets_shorter(models):
    old, new = (AutoTokenizer.from_pretrained(folder, local_files_only=True) for folder in models)
    facts = json.loads((models[1] / "vocabulary.json").read_text())
    assert len(facts["tokens"]) == 30 == len(new) - len(old)
    assert all(new.get_vocab()[token] == number for token, number in old.get_vocab().items())
    for line in LINES:
        assert len(new(line).input_ids) < len(old(line).input_ids)
        assert new.decode(new(line).input_ids) == line
    assert new.decode(new("Grüße aus Þingvellir, 東京!").input_ids) == "Grüße aus Þingvellir, 東京!"
    chat = [{"role": "user", "content": "Hæ"}, {"role": "assistant", "content": "Íslandi"}]
    assert new.apply_chat_template(chat, tokenize=False) == old.apply_chat_template(chat, tokenize=False)
    assert new.convert_tokens_to_ids("<|im_end|>") == old.convert_tokens_to_ids("<|im_end|>")


def test_new_embeddings_are_the_mean_of_their_pieces_and_old_ones_stay(models):
    base, grown = (AutoModelForCausalLM.from_pretrained(folder, local_files_only=True) for folder in models)
    old = Tokenizer.from_file(str(models[0] / "tokenizer.json"))
    facts = json.loads((models[1] / "vocabulary.json").read_text())
    tied = base.config.tie_word_embeddings
    assert (grown.get_output_embeddings().weight is grown.get_input_embeddings().weight) == tied
    assert grown.config.vocab_size == facts["first_id"] + 30
    for side in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(base, side)().weight, getattr(grown, side)().weight
        assert torch.equal(before, after[: len(before)])
        for number, token in enumerate(facts["tokens"]):
            pieces = [piece.id for piece in old.model.tokenize(token)]
            assert len(pieces) >= 2
            torch.testing.assert_close(after[facts["first_id"] + number], before[pieces].mean(0), rtol=1e-5, atol=1e-6)
    ids = torch.tensor([old.encode("The door number 3 is red.").ids])
    with torch.no_grad():
        torch.testing.assert_close(base(ids).logits, grown(ids).logits[..., : base.config.vocab_size])


def test_merges_are_the_most_frequent_pairs_first():
    tokenizer = Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "normalizer": None,
                "pre_tokenizer": {"type": "Whitespace"},
                "post_processor": None,
                "decoder": None,
                "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate("abcd")}, "merges": []},
            }
        )
    )
    assert learn_merges(tokenizer, iter(["abc abc abd", "abc"]), 10) == [("a", "b"), ("ab", "c")]  # abd occurs once
    assert learn_merges(tokenizer, iter(["abc abc abd", "abc"]), 1) == [("a", "b")]


def test_what_cannot_be_extended_is_refused(models, tmp_path):
    base = models[0]
    with pytest.raises(UserError, match="no such file"):
        extended(base, VocabularyConfig(text=str(tmp_path / "none.txt")))
    (tmp_path / "short.txt").write_text("xq")
    with pytest.raises(UserError, match="repeats nothing"):
        extended(base, VocabularyConfig(text=str(tmp_path / "short.txt")))
    bare = tmp_path / "bare"
    bare.mkdir()
    tree = json.loads((base / "tokenizer.json").read_text())
    tree["pre_tokenizer"] = None
    (bare / "tokenizer.json").write_text(json.dumps(tree))
    (bare / "config.json").write_text((base / "config.json").read_text())
    with pytest.raises(UserError, match="only byte-pair tokenizers"):
        extended(bare, VocabularyConfig(text=str(tmp_path / "short.txt")))


def test_new_tokens_need_trained_embeddings(tiny_recipe, tmp_path):
    (tmp_path / "t.txt").write_text("x")
    with pytest.raises(UserError, match="need trained embeddings"):
        load_recipe(str(tiny_recipe), [f"model.vocabulary.text={tmp_path}/t.txt"])


@pytest.mark.parametrize(
    "adapter", ["none", pytest.param("lora", marks=pytest.mark.slow)]
)  # two gates each in a process
def test_a_run_trains_and_exports_the_larger_model(tmp_path, tiny_model_dir, adapter):
    (tmp_path / "is.txt").write_text("\n".join(LINES), encoding="utf-8")
    settings = {
        "model.vocabulary": {"text": "./is.txt", "size": 20},
        "adapter.kind": adapter,
        "adapter.train_embeddings": True,
        "export.merge": True,
        "train.max_steps": 2,
        "train.learning_rate": 1e-2,
        "eval.forgetting": False,
    }
    path = helpers.write_recipe(tmp_path, tiny_model_dir, settings=settings)
    helpers.write_jsonl(tmp_path / "train.jsonl", [{"text": f"{line} {i}"} for i in range(8) for line in LINES])
    helpers.write_jsonl(tmp_path / "eval.jsonl", [{"text": line} for line in LINES])
    recipe = load_recipe(str(path), ["data.overlap=allow"])
    assert train(recipe, tmp_path / "run", quiet=True) == 0  # the export's gate compared it with the trained model
    export = tmp_path / "run" / "export" / ("model" if adapter == "none" else "merged")
    tokenizer = AutoTokenizer.from_pretrained(export, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(export, local_files_only=True, dtype=torch.float32)
    assert len(tokenizer) == 420 == model.get_input_embeddings().weight.shape[0]
    from aifactory_train.sources import resolve_model

    start = AutoModelForCausalLM.from_pretrained(resolve_model(recipe.model), local_files_only=True)
    moved = (model.get_input_embeddings().weight - start.get_input_embeddings().weight)[400:].abs().amax(1)
    assert (moved > 1e-3).sum() >= 10  # those that occur have been trained


@pytest.mark.parametrize("tied", [True, False])
def test_new_embeddings_move_and_the_others_do_not(tmp_path, tied):
    """``train: new`` under AdamW: old rows of both embeddings stay to the bit, new ones that occur move, and so does
    the rest.
    """
    model = helpers.write_model(tmp_path / "model", tied=tied)
    (tmp_path / "is.txt").write_text("\n".join(LINES), encoding="utf-8")
    settings = {
        "model.vocabulary": {"text": str(tmp_path / "is.txt"), "size": 20, "train": "new"},
        "adapter.kind": "none",
        "train.max_steps": 3,
        "train.epochs": 3,
        "data.overlap": "allow",
    }
    path = helpers.write_recipe(tmp_path / "run", model, settings=settings)
    helpers.write_jsonl(tmp_path / "run" / "train.jsonl", [{"text": f"{line} {i}"} for i in range(8) for line in LINES])
    helpers.write_jsonl(tmp_path / "run" / "eval.jsonl", [{"text": line} for line in LINES])
    with trainer_of(path, tmp_path / "out") as trainer:
        core = trainer.engine.core
        before = {name: p.detach().clone() for name, p in core.named_parameters()}
        for _ in range(3):
            trainer.train_step()
        after = dict(core.named_parameters())
        assert ("embeddings", "rows from 400 on are trained", "model.vocabulary.train new") in trainer.report.lines
    embeddings = [name for name in before if before[name].shape[0] == 420]
    assert len(embeddings) == (1 if tied else 2)
    for name in embeddings:
        assert torch.equal(before[name][:400], after[name][:400]), name
        assert ((after[name] - before[name])[400:].abs().amax(1) > 1e-3).sum() >= 10, name
    assert all(not torch.equal(before[name], after[name]) for name in before if name not in embeddings)


def test_weight_decay_would_move_rows_that_are_to_stay(tiny_recipe, tmp_path):
    (tmp_path / "t.txt").write_text("x")
    vocabulary = f"model.vocabulary={{text: {tmp_path}/t.txt, train: new}}"
    with pytest.raises(UserError, match="needs 0"):
        load_recipe(str(tiny_recipe), [vocabulary, "adapter.kind=none", "train.weight_decay=0.1"])


def test_rows_that_a_vocabulary_does_not_learn_of_are_counted(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "a"}, {"prompt": "b", "completion": "c"}, {"messages": [{"content": "d"}, {"content": None}]}, [1]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    assert list(texts(file)) == ["a", "d"] and "2 rows hold neither" in capsys.readouterr().err
    for content, what in ((b"\xff\n", "not UTF-8"), (b"{\n", "not valid JSON"), (b"[" * 100_000, "not valid JSON")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=what):
            list(texts(file))
