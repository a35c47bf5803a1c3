"""Heads of labels: their loss is transformers', what is exported is what was trained, and bad rows are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from head_rows import COLOURS, figures, labelled_rows, write_head
from test_preferences import trainer_of
from transformers import GraniteConfig

from aifactory_train.config.loading import load_recipe
from aifactory_train.config.objective import objective
from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.data import classified, load_tokenizer, prepare
from aifactory_train.evaluation.heads import Judgement
from aifactory_train.evaluation.predicting import Predictor, texts_of
from aifactory_train.exporting import writer
from aifactory_train.exporting.gate import unpadded
from aifactory_train.exporting.gguf import export_gguf
from aifactory_train.exporting.head_files import chosen_for
from aifactory_train.metrics.scores import sigmoid
from aifactory_train.model.base import base_folder
from aifactory_train.model.head import PARAMETER, PROBLEMS, label_losses, plain_class
from aifactory_train.model.trained import load_trained
from aifactory_train.run.folder import RunFolder
from aifactory_train.training.start import train


def classifier_of(core: Any, recipe: Any) -> Any:
    """transformers' own classifier with the weights of a model in training (adapter.kind none)."""
    from transformers import AutoModelForSequenceClassification

    problem = PROBLEMS.get(recipe.methods.head.kind)
    config = helpers.tiny_config(num_labels=core.head.weight.shape[0], problem_type=problem)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    weights = {n.removeprefix("model."): p.detach() for n, p in core.named_parameters() if "lm_head" not in n}
    weights["score.weight"] = weights.pop(PARAMETER)
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("kind", ["classification", "multi_label"])
def test_the_loss_of_a_step_is_transformers(tmp_path, tiny_model_dir, kind):
    """Packed here, padded there: the same documents, the same mean over documents."""
    path = write_head(tmp_path, tiny_model_dir, kind, **{"adapter.kind": "none"})
    rows = [{**r, "text": r["text"] + "<|pad|>"} for r in labelled_rows(48, several=kind == "multi_label")]
    helpers.write_jsonl(tmp_path / "train.jsonl", rows)
    with trainer_of(path, tmp_path / "run") as trainer:
        plain = classifier_of(trainer.engine.core, trainer.recipe)
        documents = trainer.ahead.shares(trainer.state.cursor)[0]
        held = trainer.data.train
        texts = [held.row(int(i))["text"] for i in documents]
        assert any(text.endswith("<|pad|>") for text in texts)  # transformers reads the token before it
        batch = trainer.tokenizer(texts, padding=True, return_tensors="pt")
        targets = torch.from_numpy(held.targets[documents])
        with torch.no_grad():
            theirs = plain(**batch, labels=targets.float() if kind == "multi_label" else targets).loss.item()
        assert trainer.train_step()["loss"] == pytest.approx(theirs, rel=1e-5)
        assert trainer.recipe.data.labels == COLOURS
        assert "mean over documents" in objective(trainer.recipe)


def test_weights_of_labels_count_as_torch_says():
    """Weighted by the label; and pos_weight of any number of labels."""
    generator = torch.Generator().manual_seed(0)
    outputs, weights = torch.randn(20, 4, generator=generator), torch.rand(4, generator=generator) + 0.5
    one = torch.randint(0, 4, (20,), generator=generator)
    many = (torch.rand(20, 4, generator=generator) > 0.5).float()
    summed = torch.nn.CrossEntropyLoss(weight=weights, reduction="sum")(outputs, one)
    assert label_losses(outputs, one, weights).sum().item() == pytest.approx(summed.item(), rel=1e-6)
    mean = torch.nn.BCEWithLogitsLoss(pos_weight=weights)(outputs, many)
    assert label_losses(outputs, many, weights).mean().item() == pytest.approx(mean.item(), rel=1e-6)


def test_balanced_weights_are_those_of_the_training_rows(tmp_path, tiny_model_dir):
    path = write_head(tmp_path, tiny_model_dir, "classification", **{"methods.head.class_weights": "balanced"})
    rows = [{**row, "label": i % 4 == 0} for i, row in enumerate(labelled_rows(40))]
    helpers.write_jsonl(tmp_path / "train.jsonl", rows)
    helpers.write_jsonl(
        tmp_path / "eval.jsonl", [{**r, "label": i % 2 == 0} for i, r in enumerate(labelled_rows(9, start=700))]
    )
    with trainer_of(path, tmp_path / "run", "data.overlap=allow") as trainer:
        assert trainer.recipe.data.labels == ["false", "true"]
        assert trainer.method.weights.tolist() == pytest.approx([40 / (2 * 30), 40 / (2 * 10)])


# ---- what is exported


@pytest.mark.parametrize(("kind", "adapter"), [("classification", "lora"), ("multi_label", "none")])
def test_a_run_learns_and_its_export_is_a_plain_classifier(tmp_path, tiny_model_dir, kind, adapter):
    """Loaded by transformers (and peft) alone, a batch with padding gives the outputs that the run evaluated."""
    settings = {"adapter.kind": adapter, "train.max_steps": 30, "eval.before": True, "train.learning_rate": 1e-2}
    more = {"export.merge": True} if adapter == "lora" else {}
    path = write_head(tmp_path, tiny_model_dir, kind, held=32, **settings, **more, **{"export.dtype": "fp32"})
    run = tmp_path / "run"
    assert train(load_recipe(str(path)), run, quiet=True) == 0
    found = figures(run)
    assert found["after"]["loss"] < 0.9 * found["before"]["loss"]
    assert found["change"]["loss"]["better"] is True
    for folder in (run / "export").iterdir():
        verdict = json.loads((folder / "verification.json").read_text())
        assert verdict["passed"] and verdict["difference"] <= 1e-5
        head = json.loads((folder / "head.json").read_text())
        assert head["labels"] == COLOURS and head["temperature"] > 0
        assert ("thresholds" in head) == (kind == "multi_label")
        model, tokenizer = plainly(folder, tiny_model_dir)
        assert model.config.id2label == dict(enumerate(COLOURS))
        rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
        inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs).logits.double().numpy()
        marks = np.asarray(
            [[c in ([r["label"]] if isinstance(r["label"], str) else r["label"]) for c in COLOURS] for r in rows]
        )
        judged = Judgement(outputs, marks if kind == "multi_label" else marks.argmax(1)).figures()
        for name in ("loss", "accuracy", "macro_f1", "auroc"):
            assert judged[name] == pytest.approx(found["after"][name], rel=1e-5), name
    predicted_as_judged(run, tmp_path / "eval.jsonl", found["after"], kind)
    refuse_text(run, tiny_model_dir, tmp_path / "next")


def predicted_as_judged(run: Path, file: Path, after: dict[str, Any], kind: str) -> None:
    """``aifactory predict`` gives the labels that the held-out figures speak of, and says where a row has no text."""
    recipe = RunFolder(run).load_config()
    predictor, rows = Predictor(RunFolder(run), "cpu"), texts_of(file, recipe)
    given = predictor.predict(rows)
    wanted = [json.loads(line)["label"] for line in file.read_text().splitlines()]
    assert [p["id"] for p in given] == [f"eval.jsonl:{i + 1}" for i in range(len(wanted))]
    if kind == "classification":
        right = [p["labels"] == [label] for p, label in zip(given, wanted, strict=True)]
        assert np.mean(right) == pytest.approx(after["accuracy"])
        assert all(sum(p["probabilities"].values()) == pytest.approx(1, abs=1e-4) for p in given)
    else:
        plain = sigmoid(predictor.outputs([predictor.tokenizer(text).input_ids for _, text in rows]))
        chosen = plain >= np.asarray(after["calibration"]["thresholds"])
        assert [p["labels"] for p in given] == [[COLOURS[k] for k in np.flatnonzero(row)] for row in chosen]
    bad = file.with_name("bad.jsonl")
    bad.write_text('{"text": "a text"}\n{"txt": "a text"}\n')
    with pytest.raises(UserError, match="'text' is missing") as caught:
        texts_of(bad, recipe)
    assert caught.value.where == f"{bad}:2"


def plainly(folder: Path, base: Path) -> tuple[Any, Any]:
    """As the model card says."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not (folder / "adapter_config.json").is_file():
        return AutoModelForSequenceClassification.from_pretrained(folder).eval(), tokenizer
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(base, config=config)
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    return PeftModel.from_pretrained(model, folder).eval(), tokenizer


def test_an_export_of_another_head_does_not_pass_the_gate(tmp_path, tiny_model_dir, monkeypatch):
    settings = {"train.max_steps": 2, "eval.after": False, "adapter.kind": "none", "export.dtype": "fp32"}
    path = write_head(tmp_path, tiny_model_dir, "classification", **settings)
    right = writer.ShardFiles.put

    def wrong(files: Any, name: str, tensor: torch.Tensor) -> None:
        right(files, name, tensor.flip(0) if name == "score.weight" else tensor)

    monkeypatch.setattr(writer.ShardFiles, "put", wrong)
    with pytest.raises(RunFailed, match="is another model"):
        train(load_recipe(str(path)), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "export" / "model").exists()


def test_a_row_of_the_gate_ends_with_a_real_token():
    assert unpadded([1, 3, 2, 3, 3], 3) == [1, 3, 2] and unpadded([3, 3], 3) == [3]


def test_what_was_chosen_belongs_to_the_weights_that_were_evaluated(tmp_path):
    """An export of a training that ends, a later merge of that export, another checkpoint."""
    run = RunFolder(tmp_path / "run")
    (run.export / "adapter").mkdir(parents=True)
    run.eval_file.write_text(json.dumps({"after": {"calibration": {"temperature": 2.0, "rows": 9}}}))
    assert chosen_for(run, live=True, again=False) == {"temperature": 2.0, "rows": 9}
    assert chosen_for(run, live=False, again=True) is None
    kept = {"labels": COLOURS, "temperature": 3.0, "thresholds": [0.4], "rows": 9}
    (run.export / "adapter" / "head.json").write_text(json.dumps(kept))
    assert chosen_for(run, live=False, again=True) == {"temperature": 3.0, "thresholds": [0.4], "rows": 9}
    assert chosen_for(run, live=False, again=False) is None


def refuse_text(run: Path, base: Path, folder: Path) -> None:
    """What writes text, or starts from it, refuses a run with a head by name."""
    with pytest.raises(UserError, match="trained a head") as caught:
        load_trained(RunFolder(run), "cpu")
    assert "aifactory predict" in caught.value.fix
    with pytest.raises(UserError, match="no place for a trained head"):
        export_gguf(RunFolder(run), "f16")
    path = helpers.write_recipe(folder, base, settings={"model.start_from": str(run)})
    with pytest.raises(UserError, match="trained a head"):
        base_folder(load_recipe(str(path)))


# ---- bad input


BAD_ROWS = [
    ({"text": "a text", "label": "mauve"}, "'mauve' is not in data.labels"),
    ({"text": "a text", "label": None}, "'label' is empty"),
    ({"text": "a text", "label": ["red", "blue"]}, "holds 2 labels"),
    ({"text": "a text", "label": 0.5}, "does not predict numbers"),
    ({"text": "a text", "label": {"is": "red"}}, "an object, no label"),
    ({"text": "  ", "label": "red"}, "nothing to classify"),
    ({"text": "a text", "colour": "red"}, "rows with 'text' and 'label'"),
    ({"prompt": "a text", "completion": "red", "label": "blue"}, "say different labels"),
]


def test_a_bad_row_is_named_by_file_and_line(tmp_path, tiny_model_dir):
    path = write_head(tmp_path, tiny_model_dir, "classification", **{"data.labels": COLOURS})
    recipe = load_recipe(str(path))
    tokenizer = load_tokenizer(recipe)
    for row, words in BAD_ROWS:
        helpers.write_jsonl(tmp_path / "train.jsonl", [*labelled_rows(6), row])
        with pytest.raises(UserError, match=words) as caught:
            prepare(recipe, tokenizer)
        assert caught.value.where == f"{tmp_path}/train.jsonl:7"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("methods.goldfish={k: 4}", "a head has none"),
        ("methods.preference.kind=dpo", "each a training method"),
        ("data.long_documents=split", "the label of the whole"),
        ("eval.metrics=[chrf]", "judges text"),
        ("eval.best_by=bits_per_byte", "no figure of this head"),
        ("eval.label_separator=;", "multi_label"),
        ("adapter.train_embeddings=true", "does not go with a head"),
        ("data.train.0.format=messages", "needs rows of format label"),
        ("data.labels=[a, a]", "twice"),
    ],
)
def test_settings_that_do_not_go_with_a_head_are_refused(tmp_path, tiny_model_dir, setting, words):
    path = write_head(tmp_path, tiny_model_dir, "classification")
    with pytest.raises(UserError, match=words):
        load_recipe(str(path), [setting])


def test_weights_of_labels_that_cannot_be_are_refused(tmp_path, tiny_model_dir):
    for weights, words in (({"red": 0}, "above 0"), ({"mauve": 2}, "'mauve' is not in data.labels")):
        settings = {"methods.head.class_weights": weights, "data.labels": COLOURS}
        with pytest.raises(UserError, match=words):
            load_recipe(str(write_head(tmp_path, tiny_model_dir, "classification", **settings)))
    path = write_head(tmp_path, tiny_model_dir, "classification", **{"methods.head.class_weights": {"mauve": 2}})
    with pytest.raises(UserError, match="no row has the label 'mauve'"), trainer_of(path, tmp_path / "run"):
        pass


def test_rows_of_one_label_are_refused(tmp_path, tiny_model_dir):
    path = write_head(tmp_path, tiny_model_dir, "classification")
    for name, rows in (("train", labelled_rows(8)), ("eval", labelled_rows(4, start=500))):
        helpers.write_jsonl(tmp_path / f"{name}.jsonl", [{**row, "label": "red"} for row in rows])
    with pytest.raises(UserError, match="all rows have the label 'red'"), trainer_of(path, tmp_path / "a"):
        pass


def test_a_model_that_transformers_has_no_classifier_of_is_refused(tmp_path, tiny_model_dir):
    recipe = load_recipe(str(write_head(tmp_path, tiny_model_dir, "classification", **{"data.labels": COLOURS})))
    with pytest.raises(UserError, match="no classifier of models of type 'granite'"):
        plain_class(GraniteConfig(), recipe)
    assert plain_class(helpers.tiny_config("qwen3"), recipe).__name__ == "Qwen3ForSequenceClassification"


# ---- rows of every form


def test_answers_are_labels_and_what_a_head_does_not_read_is_counted(tmp_path, tiny_model_dir):
    """Rows of the generative form serve as they are; separators divide labels where there may be several."""
    path = write_head(tmp_path, tiny_model_dir, "multi_label")
    talk = [
        {"role": "system", "content": "Sort."},
        {"role": "user", "content": "a boat"},
        {"role": "assistant", "content": "red; blue"},
    ]
    rows = [{"messages": talk}, {"prompt": "a lamp", "completion": "red", "system": "Sort."}]
    rows += [{"text": "a cup", "labels": []}, {"text": "a map", "labels": ["blue", "red"]}, {"text": "x", "label": 7}]
    rows += [{"text": "a csv", "label": '["red", "blue"]'}]
    helpers.write_jsonl(tmp_path / "train.jsonl", rows)
    settings = ["eval.label_separator=;", "data.overlap=allow", "train.batch_rows=2"]
    with trainer_of(path, tmp_path / "run", *settings) as trainer:
        held = trainer.data.train
        told = {held.row(i)["text"]: held.row(i)["labels"] for i in range(len(held))}
        report = trainer.data.report
    assert told == {
        "a boat": ["red", "blue"],
        "a lamp": ["red"],
        "a cup": [],
        "a map": ["blue", "red"],
        "x": ["7"],
        "a csv": ["red", "blue"],
    }
    remarks = report["sources"][0]["remarks"]
    assert remarks["a system turn is no part of what a head reads"] == 2
    assert held.names == sorted(["7", *COLOURS])


def test_whole_numbers_keep_their_order(monkeypatch):
    monkeypatch.setattr(classified, "labels_of", lambda rows: rows)
    assert classified.names_of([[["10"], ["2"]], [["-1"]]]) == ["-1", "2", "10"]
    assert classified.names_of([[["10"], ["2"], ["b"]]]) == ["10", "2", "b"]


def test_a_text_is_cut_as_transformers_cuts_it(tmp_path, tiny_model_dir, tiny_tokenizer):
    path = write_head(
        tmp_path, tiny_model_dir, "classification", **{"data.sequence_length": 16, "train.micro_batch_tokens": 64}
    )
    with trainer_of(path, tmp_path / "run") as trainer:
        held = trainer.data.train
        assert max(held.lengths) == 16
        for i in range(len(held)):
            theirs = tiny_tokenizer(held.row(i)["text"], truncation=True, max_length=16).input_ids
            assert held.tokens(i).tolist() == theirs


# ---- resume


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, tiny_model_dir):
    settings = {"train.max_steps": 4, "checkpoint.every_steps": 2, "checkpoint.at_end": True, "eval.after": False}
    path = write_head(tmp_path, tiny_model_dir, "classification", **settings, **{"adapter.dropout": 0.1})
    fixed = ["train.schedule=constant", "train.warmup_steps=0", "export.automatic=false"]
    assert train(load_recipe(str(path), fixed), tmp_path / "whole", quiet=True) == 0
    assert train(load_recipe(str(path), [*fixed, "train.max_steps=2"]), tmp_path / "cut", quiet=True) == 0
    assert train(load_recipe(str(path), fixed), tmp_path / "cut", resume="auto", quiet=True) == 0
    kept = []
    for name in ("whole", "cut"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        kept.append([(r["step"], r["loss"], r["grad_norm"]) for r in map(json.loads, lines)])
    assert kept[0] == kept[1] and len(kept[0]) == 4
    rows = labelled_rows(48)
    rows[0]["label"] = next(colour for colour in COLOURS if colour != rows[0]["label"])
    helpers.write_jsonl(tmp_path / "train.jsonl", rows)  # other labels on the same texts
    with pytest.raises(UserError, match="the training rows, or their tokens, are others"):
        train(load_recipe(str(path), [*fixed, "train.max_steps=6"]), tmp_path / "cut", resume="auto", quiet=True)
