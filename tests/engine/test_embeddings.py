"""Embeddings: the loss is the one of sentence-transformers, over the step as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embedding_rows import matched_rows, write_embedding
from test_preferences import trainer_of

from aifactory_train.config.loading import load_recipe
from aifactory_train.config.objective import objective
from aifactory_train.core.errors import UserError
from aifactory_train.data import load_tokenizer, prepare
from aifactory_train.metrics.retrieval import ndcg, ranks, recall
from aifactory_train.planning.workload import documents_of_a_row, preference_of


def plain_model(core: Any) -> Any:
    """transformers' AutoModel with the weights of a model in training (adapter.kind none)."""
    import helpers
    from transformers import AutoModel

    model = AutoModel.from_config(helpers.tiny_config(), dtype=torch.float32).eval()
    names = {n.removeprefix("model.model."): p.detach() for n, p in core.named_parameters() if "lm_head" not in n}
    model.load_state_dict(names)
    return model


def plain_vectors(model: Any, tokenizer: Any, texts: list[str], pooling: str) -> torch.Tensor:
    """Each text alone."""
    out = []
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double()
        out.append(states[-1] if pooling == "last_token" else states.mean(dim=0))
    return torch.stack(out)


def plain_loss(queries: torch.Tensor, candidates: torch.Tensor, scale: float, sizes: list[int]) -> float:
    """Multiple negatives ranking, written out: minus the log of the softmax of scaled cosines, a sum over sizes."""
    total = 0.0
    for size in sizes:
        q, c = queries[:, :size].numpy(), candidates[:, :size].numpy()
        cosines = (q @ c.T) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(c, axis=1)[None]
        logits = scale * cosines
        total += float(np.mean(np.log(np.exp(logits).sum(axis=1)) - np.diag(logits)))
    return total


@pytest.mark.parametrize(("pooling", "sizes"), [("last_token", None), ("mean", [16, 8])])
def test_the_loss_of_a_step_is_multiple_negatives_ranking(tmp_path, tiny_model_dir, pooling, sizes):
    settings = {"adapter.kind": "none", "methods.head.pooling": pooling, "methods.head.matryoshka": sizes}
    path = write_embedding(tmp_path, tiny_model_dir, **settings)
    with trainer_of(path, tmp_path / "run", "train.grad_accum=3") as trainer:
        plain = plain_model(trainer.engine.core)
        documents = trainer.ahead.shares(trainer.state.cursor)[0]
        rows = [trainer.data.train.row(int(i)) for i in documents]
        texts = [
            [row["text"] for row in rows],
            [row["positive"] for row in rows],
            [text for row in rows for text in row["negatives"]],
        ]
        asked, right, wrong = (plain_vectors(plain, trainer.tokenizer, t, pooling) for t in texts)
        assert len(wrong)
        width = asked.shape[1]
        expected = plain_loss(asked, torch.cat([right, wrong]), 20.0, [*(sizes or []), width])
        step = trainer.train_step()
        assert step["micro_batches"] > 1
        assert step["loss"] == pytest.approx(expected, rel=1e-5)
        assert step["supervised_tokens"] == len(rows) == 8 and 0 <= step["in_batch_accuracy"] <= 1
        assert "positive among all positives and negatives" in objective(trainer.recipe)


def test_the_gradient_is_that_of_the_whole_step(tmp_path, tiny_model_dir):
    """Against autograd through one padded batch of plain transformers."""
    import torch.nn.functional as F

    path = write_embedding(tmp_path, tiny_model_dir, **{"adapter.kind": "none", "train.max_grad_norm": None})
    with trainer_of(path, tmp_path / "run", "train.grad_accum=3") as trainer:
        plain = plain_model(trainer.engine.core)
        rows = [trainer.data.train.row(int(i)) for i in trainer.ahead.shares(trainer.state.cursor)[0]]
        texts = [*(r["text"] for r in rows), *(r["positive"] for r in rows), *(n for r in rows for n in r["negatives"])]
        batch = trainer.tokenizer(texts, padding=True, return_tensors="pt")
        states = plain(**batch).last_hidden_state
        last = states[torch.arange(len(texts)), batch["attention_mask"].sum(dim=1) - 1]
        vectors = F.normalize(last, dim=1)
        logits = vectors[: len(rows)] @ vectors[len(rows) :].T / 0.05
        F.cross_entropy(logits, torch.arange(len(rows))).backward()
        norm = torch.stack([p.grad.double().square().sum() for p in plain.parameters()]).sum().sqrt().item()
        assert trainer.train_step()["grad_norm"] == pytest.approx(norm, rel=1e-4)


# ---- rows


def prepared(path: Path) -> Any:
    recipe = load_recipe(str(path))
    return prepare(recipe, load_tokenizer(recipe))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"query": "a question"}, "column 'positive' is missing"),
        ({"query": "a question", "positive": " "}, "without a positive"),
        ({"query": "a question", "positive": None}, "without a positive"),
        ({"query": "", "positive": "an answer"}, "nothing to embed"),
        ({"query": "a question", "positive": "an answer", "negative": "an answer"}, "a negative is the same text"),
        ({"query": "a question", "positive": "a question"}, "the query is the same text"),
        ({"query": "a question", "positive": ["one", "two"]}, "one positive"),
        ({"query": "a question", "positive": "an answer", "negatives": ["x", 3]}, "a number, not text"),
        ({"query": "a question", "positive": "an answer", "score": 0.7}, "'score' grades"),
        ({"anchor": "a question", "positive": "an answer", "label": 0}, "'label' grades"),
        ({"sentence1": "one", "sentence2": "two", "score": 4.5}, "'score' grades"),
    ],
)
def test_a_row_that_is_no_pair_is_named_with_its_line(tmp_path, tiny_model_dir, row, words):
    path = write_embedding(tmp_path, tiny_model_dir)
    rows = matched_rows(3)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows, row]))
    with pytest.raises(UserError, match=words) as raised:
        prepared(path)
    assert "train.jsonl:4" in str(raised.value.where)


def test_the_names_that_others_use_are_read(tmp_path, tiny_model_dir):
    path = write_embedding(tmp_path, tiny_model_dir)
    rows = [
        {"anchor": "a first question", "positive": "a first answer", "negative_1": "no", "negative_2": "never"},
        {"query": "a second question", "pos": ["a second answer"], "neg": ["no", "never", "no"], "label": "shoes"},
        {"question": "a third question", "answer": "[a third] answer"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    train = prepared(path).train
    found = [train.row(int(i)) for i in range(len(train))]
    assert [len(r["negatives"]) for r in found] == [2] * 4 + [2] * 4 + [0] * 2
    assert found[-1]["positive"] == "[a third] answer"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("methods.head.pooling=cls", "sees nothing but itself"),
        ("data.labels=[a, b]", "tells the positive of a query"),
        ("methods.head.matryoshka=[8, 8]", "stands there twice"),
        ("data.long_documents=split", "the match of the whole"),
        ("eval.metrics=[accuracy]", "nDCG@10"),
        ("eval.best_by=bits_per_byte", "ndcg_at_10 are"),
        ("data.train.0.format=preference", "needs rows of format retrieval"),
    ],
)
def test_settings_that_mean_nothing_here_are_refused(tmp_path, tiny_model_dir, setting, words):
    with pytest.raises(UserError, match=words):
        load_recipe(str(write_embedding(tmp_path, tiny_model_dir)), [setting])


@pytest.mark.parametrize("setting", ["temperature=0.1", "pooling=mean", "normalise=false", "matryoshka=[8]"])
def test_settings_of_embeddings_are_refused_beside_other_heads(tmp_path, tiny_model_dir, setting):
    path = write_embedding(tmp_path, tiny_model_dir, **{"methods.head.kind": "classification"})
    with pytest.raises(UserError, match="belongs to kind embedding"):
        load_recipe(str(path), [f"methods.head.{setting}"])


def test_what_cannot_learn_is_refused_at_the_start(tmp_path, tiny_model_dir):
    path = write_embedding(tmp_path, tiny_model_dir)
    with (
        pytest.raises(UserError, match="nothing to tell its positive from"),
        trainer_of(path, tmp_path / "one", "train.batch_rows=1"),
    ):
        pass
    with (
        pytest.raises(UserError, match="dimensions, 4096 are more"),
        trainer_of(path, tmp_path / "two", "methods.head.matryoshka=[4096]"),
    ):
        pass


def test_a_plan_counts_both_texts_and_the_pass_before_a_step(tmp_path, tiny_model_dir):
    recipe = load_recipe(str(write_embedding(tmp_path, tiny_model_dir)))
    assert preference_of(recipe) == "embedding" and documents_of_a_row("embedding") == 2


# ---- figures


def test_a_query_of_several_rows_has_no_positive_of_its_own_as_negative(tmp_path, tiny_model_dir):
    path = write_embedding(tmp_path, tiny_model_dir)
    rows = [
        {"query": "a question", "positive": "one answer"},
        {"query": "a question", "positive": "other answer"},
        {"query": "what else", "positive": "one answer", "negative": "neither"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with trainer_of(path, tmp_path / "run") as trainer:
        corpus = trainer.data.train.corpus(np.arange(3))
        # candidates: the three positives, and the negative
        assert corpus.belongs.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 1, 0]]
        assert corpus.left_out.tolist() == [[0, 1, 1, 0], [1, 0, 1, 0], [1, 0, 0, 0]]


def test_rankings_by_hand():
    scores = np.asarray([[0.9, 0.5, 0.7, 0.1], [0.5, 0.5, 0.5, 0.5]])
    belongs = np.asarray([[False, True, False, True], [True, False, False, False]])
    first, second = ranks(scores, belongs)
    assert first.tolist() == [3, 4] and second.tolist() == [4]  # equal scores count against the model
    assert ndcg(first) == pytest.approx((1 / 2 + 1 / np.log2(5)) / (1 + 1 / np.log2(3)))
    assert ndcg(np.asarray([1, 2])) == 1.0 and ndcg(np.asarray([11])) == 0.0
    assert recall(first, 1) == 0.0 and recall(first, 3) == 0.5 and recall(first, 10) == 1.0


# ---- a run and its export


@pytest.mark.parametrize(
    ("adapter", "pooling", "dtype"),
    [("lora", "last_token", "bf16"), ("none", "mean", "fp32"), ("lora", "mean", "fp32")],
)
def test_a_run_learns_and_its_export_gives_the_same_vectors(tmp_path, tiny_model_dir, adapter, pooling, dtype, capsys):
    """Loaded by transformers alone, and by sentence-transformers where it is installed."""
    from transformers import AutoModel, AutoTokenizer

    from aifactory_train.commands import predict
    from aifactory_train.training.start import train

    settings = {"adapter.kind": adapter, "methods.head.pooling": pooling, "methods.head.matryoshka": [8]}
    more = {"eval.before": True, "train.max_steps": 12, "export.dtype": dtype}
    run = tmp_path / "run"
    assert train(load_recipe(str(write_embedding(tmp_path, tiny_model_dir, **settings, **more))), run, quiet=True) == 0
    found = json.loads((run / "eval.json").read_text())
    before, after = found["before"], found["after"]
    assert after["loss"] < before["loss"] and after["ndcg_at_10"] > before["ndcg_at_10"]
    assert found["change"]["loss"]["better"] is True and after["rows"] == 24
    assert after["ci"]["ndcg_at_10"][0] <= after["ndcg_at_10"] <= after["ci"]["ndcg_at_10"][1]
    assert "8" in after["dimensions"] and len(after["dimensions"]) == 2
    assert found["verdict"]["word"] == "better" and "it finds what belongs" in found["verdict"]["sentence"]
    assert found["verdict"]["next"].startswith("aifactory predict")
    kinds = {"lora": {"adapter", "merged"}, "none": {"model"}}[adapter]
    assert {folder.name for folder in (run / "export").iterdir()} == kinds
    for folder in (run / "export").iterdir():
        assert json.loads((folder / "verification.json").read_text())["passed"]
        assert json.loads((folder / "embedding.json").read_text())["pooling"] == pooling
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": r["query"]}) + "\n" for r in rows))
    import argparse

    args = {"run_name": str(run), "text": None, "data": str(tmp_path / "new.jsonl"), "out": None, "json": True}
    assert predict.run(argparse.Namespace(**args)) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == len(rows)
    ours = [json.loads(line)["embedding"] for line in (run / "embeddings.jsonl").read_text().splitlines()]
    whole = run / "export" / ("merged" if adapter == "lora" else "model")
    assert [m["type"].rpartition(".")[2] for m in json.loads((whole / "modules.json").read_text())] == [
        "Transformer",
        "Pooling",
        "Normalize",
    ]
    if dtype == "bf16":
        return
    model, tokenizer = (
        AutoModel.from_pretrained(whole, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(whole),
    )
    theirs = plain_vectors(model, tokenizer, [r["query"] for r in rows], pooling)
    theirs = theirs / theirs.norm(dim=1, keepdim=True)
    assert np.abs(np.asarray(ours) - theirs.numpy()).max() < 1e-5
    library = pytest.importorskip("sentence_transformers")
    encoded = library.SentenceTransformer(str(whole), device="cpu").encode([r["query"] for r in rows])
    assert np.abs(np.asarray(ours) - encoded).max() < 1e-5


def test_an_export_of_other_vectors_does_not_pass_the_gate(tmp_path, tiny_model_dir, monkeypatch):
    from aifactory_train.core.errors import RunFailed
    from aifactory_train.exporting import writer
    from aifactory_train.training.start import train

    settings = {"adapter.kind": "none", "train.max_steps": 2, "eval.after": False, "export.dtype": "fp32"}
    path = write_embedding(tmp_path, tiny_model_dir, **settings)
    right = writer.ShardFiles.put

    def wrong(files: Any, name: str, tensor: torch.Tensor) -> None:
        right(files, name, tensor * 1.001 if name == "model.embed_tokens.weight" else tensor)

    monkeypatch.setattr(writer.ShardFiles, "put", wrong)
    with pytest.raises(RunFailed, match="another model"):
        train(load_recipe(str(path)), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "export" / "model").exists()


def test_what_needs_text_or_labels_says_what_this_run_gives(tmp_path, tiny_model_dir):
    from aifactory_train.model.trained import load_classifier, load_embedder, load_trained
    from aifactory_train.run.folder import RunFolder

    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.save_config(load_recipe(str(write_embedding(tmp_path, tiny_model_dir))))
    with pytest.raises(UserError, match="it gives vectors and writes no text"):
        load_trained(run, "cpu")
    with pytest.raises(UserError, match="no labels"):
        load_classifier(run, "cpu")
    with pytest.raises(UserError, match="exported nothing"):
        load_embedder(run, "cpu")


def test_both_passes_of_a_step_drop_the_same(tmp_path, tiny_model_dir, monkeypatch):
    """The gradient is that of the vectors which the second pass computes."""
    from aifactory_train.methods import embedding

    first: list[torch.Tensor] = []
    second: list[torch.Tensor] = []
    gathered, loss = embedding.gathered, embedding.CarriedGradient.loss

    def gather(parts: list[torch.Tensor], *more: Any) -> torch.Tensor:
        first.extend(parts)
        return gathered(parts, *more)

    def carry(self: Any, outputs: torch.Tensor) -> torch.Tensor:
        second.append(self.vectors(outputs).detach())
        return loss(self, outputs)

    monkeypatch.setattr(embedding, "gathered", gather)
    monkeypatch.setattr(embedding.CarriedGradient, "loss", carry)
    path = write_embedding(tmp_path, tiny_model_dir, **{"adapter.dropout": 0.5})
    with trainer_of(path, tmp_path / "run", "train.grad_accum=2") as trainer:
        trainer.train_step()
        trainer.train_step()  # a fresh adapter adds nothing, dropped or not
    assert len(first) == len(second) == 4
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
