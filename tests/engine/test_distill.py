"""Distillation from a teacher's stored log-probabilities: the loss, the file, the run."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from aifactory_train.config.loading import load_recipe
from aifactory_train.core.errors import UserError
from aifactory_train.data import teacher_scores
from aifactory_train.evaluation import teaching
from aifactory_train.methods.distill import Distill
from aifactory_train.model.loss import linear_cross_entropy
from aifactory_train.model.top_logps import DistillObjective, TeacherTop, divergences
from aifactory_train.sources import licences
from aifactory_train.training.start import train

KINDS = ("forward_kl", "reverse_kl", "js")
N, D, V = 40, 16, 300


def problem(peak: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, an output weight and targets; ``peak`` scales the logits."""
    torch.manual_seed(seed)
    hidden, weight = torch.randn(N, D), peak * torch.randn(V, D)
    return hidden, weight, torch.randint(V, (N,))


def stored(top: TeacherTop) -> tuple[torch.Tensor, torch.Tensor]:
    return top.ids, torch.cat([top.logps, top.rest.unsqueeze(1)], 1)


def taught(hidden: Any, weight: Any, targets: Any, k: int, temperature: float = 1.0, **how: Any) -> TeacherTop:
    top = TeacherTop(k, temperature, V)
    top.loss(partial(linear_cross_entropy, hidden, weight, targets, **how))
    return top


def full(kind: str, teacher: torch.Tensor, student: torch.Tensor, beta: float) -> torch.Tensor:
    """By the formulas, from all logits, in float64."""
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    mix = beta * p + (1 - beta) * q
    return {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "js": beta * kl(p, mix) + (1 - beta) * kl(q, mix)}[kind]


@pytest.mark.parametrize("softcap, temperature", [(0.0, 1.0), (0.0, 2.5), (8.0, 2.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradients_are_those_of_the_grouped_distributions(kind, softcap, temperature):
    """In chunks of 7 rows, with a bias and a factor, against autograd through all logits at once."""
    hidden, weight, targets = problem()
    bias = torch.randn(V)
    how: dict[str, Any] = {"scale": 0.7, "softcap": softcap, "bias": bias, "rows": 7}
    ids, teacher = stored(taught(*problem(0.5, seed=1)[:2], targets, 9, temperature, rows=7))
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    sums = torch.zeros(2, dtype=torch.float64)
    objective = DistillObjective(kind, 0.3, temperature, 0.6, ids, teacher, sums)
    h, w, b = leaves
    loss = objective.loss(partial(linear_cross_entropy, h, w, targets, **{**how, "bias": b}))
    mine = torch.autograd.grad(loss * 1.7, leaves)

    x = 0.7 * (F.linear(h.double(), w.double(), b.double()))
    logits = softcap * torch.tanh(x / softcap) if softcap else x
    logq = (logits / temperature).log_softmax(-1)
    kept = logq.gather(1, ids)
    rest = logq.masked_fill(torch.zeros_like(logq, dtype=torch.bool).scatter(1, ids, True), -torch.inf).logsumexp(1)
    apart = divergences(kind, teacher.double(), torch.cat([kept, rest.unsqueeze(1)], 1), 0.3).sum() * temperature**2
    nll = F.cross_entropy(logits, targets, reduction="sum")
    expected = 0.6 * apart + 0.4 * nll
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert sums.tolist() == pytest.approx([apart.item(), nll.item()], rel=1e-5)
    for one, other in zip(mine, torch.autograd.grad(expected * 1.7, leaves), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_64_tokens_are_within_a_thousandth_of_the_whole_vocabulary(kind, tmp_path):
    """Of a teacher whose 64 tokens hold 99.9 %, the file's rounding to fp16 included."""
    _, weight, targets = problem(2.0)
    hidden = problem(seed=3)[0]
    student = weight + 0.3 * torch.randn(V, D)
    top = taught(hidden, weight, targets, 64)
    assert -torch.expm1(top.rest).mean() > 0.999
    ids, teacher = through_a_file(tmp_path, top)
    q = (hidden @ student.T).log_softmax(-1)
    kept = torch.zeros(N, V, dtype=torch.bool).scatter(1, ids, True)
    grouped = torch.cat([q.gather(1, ids), q.masked_fill(kept, -torch.inf).logsumexp(1, keepdim=True)], 1)
    mine = divergences(kind, teacher, grouped, 0.5).mean().item()
    whole = full(kind, hidden @ weight.T, hidden @ student.T, 0.5).mean().item()
    assert whole > 0.01 and abs(mine - whole) < 1e-3


def through_a_file(folder: Path, top: TeacherTop) -> tuple[torch.Tensor, torch.Tensor]:
    identity = teacher_scores.TeacherId("t", None, "w", "v", V, top.k, 1.0)
    one = {"ids": top.ids, "logps": top.logps, "rest": top.rest, "nll": top.rest}
    teacher_scores.write_part(folder, identity, "own", [7], [{name: t.numpy() for name, t in one.items()}])
    scores = teacher_scores.TeacherScores(folder)
    scores.verify()
    ids, logps = scores.rows(7)
    assert np.allclose(np.exp(logps).sum(1), 1, atol=1e-5)
    return torch.from_numpy(ids), torch.from_numpy(logps)


def test_a_rank_without_targets_has_a_loss_of_nothing():
    hidden = torch.zeros(0, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    none, teacher = torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, 6)
    objective = DistillObjective("js", 0.5, 1.0, 0.5, none, teacher, torch.zeros(2, dtype=torch.float64))
    loss = objective.loss(partial(linear_cross_entropy, hidden, weight, none[:, 0]))
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and not weight.grad.any()


# ---- the pass of the teacher, and the run


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory) -> Path:
    """A teacher of three layers with opinions: larger (tied) embeddings spread its logits."""
    folder = helpers.write_model(tmp_path_factory.mktemp("teachers") / "teacher", layers=3, seed=5)
    model = helpers.tiny_model("llama", layers=3, seed=5)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(make_recipe, teacher_dir, tmp_path) -> Any:
    block = {"teacher": str(teacher_dir), "licence": "own", "top_k": 16, "stored": str(tmp_path / "stored")}
    settings = {"methods.distill": block, "train.max_steps": 3, "train.batch_rows": 6}
    return load_recipe(str(make_recipe(rows=24, eval_rows=4, settings=settings)))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_is_stored_is_what_transformers_computes(recipe, teacher_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    found = teaching.teach(recipe)
    assert found["computed_documents"] == 18 + 4 and found["sets"]["train"]["documents"] == 18  # three steps of six
    assert found["bytes_per_target"] == 2 * 16 + 2 * 16 + 4
    scores = teacher_scores.TeacherScores(tmp_path / "stored")
    model = AutoModelForCausalLM.from_pretrained(teacher_dir)
    train_set = teaching.prepare(recipe).train
    seen = nll = 0
    for i in range(len(train_set)):
        key = teacher_scores.document_key(train_set, i)
        if not scores.has(np.asarray([key]))[0]:
            continue
        seen += 1
        tokens, mask = torch.from_numpy(train_set.tokens(i)), train_set.mask(i)
        with torch.no_grad():
            logps = model(tokens[None]).logits[0].log_softmax(-1)[:-1][mask[1:]]
        nll -= float(logps.gather(1, tokens[1:][mask[1:]].unsqueeze(1)).sum())
        ids, mine = scores.rows(key)
        values, _ = logps.topk(16)
        assert np.allclose(mine[:, :-1], values.numpy(), atol=2e-3, rtol=2e-3)
        assert np.allclose(np.exp(mine[:, -1]), 1 - values.exp().sum(1).numpy(), atol=1e-5)
        assert np.allclose(logps.gather(1, torch.from_numpy(ids)).numpy(), values.numpy(), atol=1e-4)
    train_figures = found["sets"]["train"]
    assert seen == 18 and nll / train_figures["targets"] == pytest.approx(train_figures["loss"], rel=1e-5)


def test_a_pass_goes_on_where_it_was_interrupted_and_is_divided(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(teaching, "PART_TARGETS", 1)
    recipe.train.micro_batch_tokens = 256
    first = teaching.teach(recipe, share=(2, 2))
    assert first["computed_documents"] == 11 and first["sets"]["train"]["missing"] > 0
    parts = sorted((tmp_path / "stored").glob("part-*"))
    assert len(parts) > 1
    parts[0].unlink()  # an interruption before it was written
    again = teaching.teach(recipe)
    assert 0 < again["computed_documents"] < 22 and all(one["missing"] == 0 for one in again["sets"].values())
    nothing = teaching.teach(recipe)
    assert nothing["computed_documents"] == 0 and nothing["sets"] == again["sets"]
    folder = tmp_path / "once"
    whole = teaching.teach(recipe, folder=folder)
    assert whole["sets"]["train"]["loss"] == pytest.approx(again["sets"]["train"]["loss"], rel=1e-6)


def test_a_run_learns_from_the_stored_teacher_alone(recipe, teacher_dir, tmp_path, monkeypatch):
    """The divergence falls; the teacher may be gone; packed is alone; a resumed run is the same to the bit."""
    teaching.teach(recipe)
    recipe.train.max_steps, recipe.train.learning_rate, recipe.train.schedule = 3, 1e-2, "constant"
    recipe.checkpoint.every_steps, recipe.methods.distill.weight = 2, 0.9
    recipe.eval.before = recipe.eval.after = False
    recipe.export.automatic = False
    gone = tmp_path / "moved"
    monkeypatch.setattr(recipe.methods.distill, "teacher", str(gone))
    shutil.copytree(teacher_dir, gone)
    shutil.rmtree(gone)
    assert train(recipe, tmp_path / "run", quiet=True) == 0
    whole = rows(tmp_path / "run")
    for row in whole:
        assert row["loss"] == pytest.approx(0.9 * row["divergence"] + 0.1 * row["supervised_loss"], rel=1e-5)
    assert whole[-1]["divergence"] < whole[0]["divergence"]
    apart = recipe.model_copy(deep=True)
    apart.data.batching, apart.train.grad_accum, apart.checkpoint.every_steps = "padded", 3, None
    assert train(apart, tmp_path / "apart", quiet=True) == 0
    assert [r["loss"] for r in rows(tmp_path / "apart")] == pytest.approx([r["loss"] for r in whole], rel=1e-5)
    recipe.train.max_steps = 2
    assert train(recipe, tmp_path / "part", quiet=True) == 0
    recipe.train.max_steps = 3
    assert train(recipe, tmp_path / "part", resume="auto", quiet=True) == 0
    assert [r["loss"] for r in rows(tmp_path / "part")] == [r["loss"] for r in whole]


def test_rows_beyond_the_stored_ones_are_refused_by_name(recipe, tmp_path):
    with pytest.raises(UserError, match=r"no log-probabilities of a teacher are stored(.|\n)*aifactory teach"):
        train(recipe, tmp_path / "none", quiet=True)
    teaching.teach(recipe)
    recipe.train.max_steps = 4  # six rows more
    with pytest.raises(UserError, match=r"for 6 of 24 documents, the first from .*train.jsonl:\d+"):
        train(recipe, tmp_path / "more", quiet=True)


def test_the_size_of_a_step_is_tried_with_documents_that_the_run_never_uses(recipe, tmp_path):
    """On a GPU the largest micro-batch runs before the documents were looked at."""
    teaching.teach(recipe)
    data = teaching.prepare(recipe)
    method = Distill(recipe)

    class Run:
        world = type("W", (), {"device": "cpu"})
        pad_id = 3

    Run.data = method.view(data)  # type: ignore[attr-defined]
    every = np.arange(len(data.train))
    batch, _, _ = method.micro_batch(Run, every)  # type: ignore[arg-type]
    assert batch.objective.teacher.shape == (len(batch.targets), 17)
    method.ready = True
    with pytest.raises(KeyError):
        method.micro_batch(Run, every)  # type: ignore[arg-type]


def test_documents_are_found_by_content_not_by_place(recipe, tmp_path):
    """The rows in another order: the same stored values for each."""
    recipe.train.max_steps = None
    teaching.teach(recipe)
    file = Path(recipe.data.train[0].source)
    lines = file.read_text().splitlines(keepends=True)
    before = teaching.prepare(recipe).train
    file.write_text("".join(reversed(lines)))
    after = teaching.prepare(recipe).train
    scores = teacher_scores.TeacherScores(tmp_path / "stored")
    place = {after.row_id(i): i for i in range(len(after))}
    moved = [(i, place[before.row_id(i)]) for i in range(len(before))]
    assert any(i != j for i, j in moved)
    for i, j in moved:
        one, other = (scores.rows(teacher_scores.document_key(d, k))[1] for d, k in ((before, i), (after, j)))
        assert np.array_equal(one, other) and len(one) == before.supervised[i]
    changed = teaching.prepare(recipe.model_copy(deep=True)).train
    assert teacher_scores.document_key(changed, 0) != teacher_scores.document_key(changed, 1)


def test_another_teacher_or_damage_is_refused(recipe, teacher_dir, tmp_path):
    teaching.teach(recipe)
    for key, value, said in (("top_k", 8, "stored with top_k 16"), ("temperature", 2.0, "stored with temperature 1")):
        other = recipe.model_copy(deep=True)
        setattr(other.methods.distill, key, value)
        with pytest.raises(UserError, match=said):
            Distill(other).view(teaching.prepare(other))
        with pytest.raises(UserError, match="of another teacher, or with other settings"):
            teaching.teach(other)
    other = recipe.model_copy(deep=True)
    other.methods.distill.teacher = str(helpers.write_model(tmp_path / "second", layers=1, seed=9))
    with pytest.raises(UserError, match="is another model than the one whose"):
        train(other, tmp_path / "run", quiet=True)
    (part,) = (tmp_path / "stored").glob("part-*")
    content = bytearray(part.read_bytes())
    content[-3] ^= 1
    part.write_bytes(content)
    with pytest.raises(UserError, match="its digest is another one"):
        train(recipe, tmp_path / "damaged", quiet=True)
    part.write_bytes(content[:100])
    with pytest.raises(UserError, match="is damaged"):
        teaching.teach(recipe)


def test_another_vocabulary_is_refused_by_name(recipe, teacher_dir, tmp_path):
    other = tmp_path / "other-words"
    shutil.copytree(teacher_dir, other)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(other)
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    tree = json.loads(text)
    merged = next(t for t in tree["model"]["vocab"] if len(t) > 3 and t.isalpha())
    ids = tree["model"]["vocab"]
    swap = next(t for t in ids if len(t) > 3 and t.isalpha() and t != merged)
    ids[merged], ids[swap] = ids[swap], ids[merged]
    (other / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(other))
    recipe.methods.distill.teacher = str(other)
    with pytest.raises(UserError, match=r"other-words has another vocabulary: 2 tokens differ(.|\n)*same family"):
        teaching.teach(recipe)


def test_the_teachers_licence_passes_the_gate(recipe):
    recipe.methods.distill.__dict__.update(teacher="someone/closed-model", licence="CC-BY-NC-4.0")
    with pytest.raises(UserError, match=r"not for commercial use: 'someone/closed-model'") as refused:
        licences.check(recipe)
    assert refused.value.where == "methods.distill"
    recipe.about.use = "research"
    assert any("someone/closed-model" in line for line in licences.check(recipe))
    assert licences.result_licence(recipe)["name"] == "non-commercial"


@pytest.mark.parametrize(
    "override, said",
    [
        ("methods.goldfish={k: 4}", "would give away"),
        ("methods.distill.beta=0.3", "belongs to loss js"),
        ("privacy.profile=restricted", "stored unencrypted"),
        ("methods.preference.kind=dpo", "each a training method"),
        ("methods.distill.weight=0", "greater than 0"),
    ],
)
def test_what_does_not_go_together_is_refused(make_recipe, override, said):
    path = make_recipe(settings={"methods.distill": {"teacher": "org/model"}})
    load_recipe(str(path))
    with pytest.raises(UserError, match=said):
        load_recipe(str(path), [override])


def test_the_command(make_recipe, teacher_dir, tmp_path, capsys):
    from aifactory_train.cli import main

    path = str(make_recipe(rows=8, eval_rows=3))
    assert main(["teach", path]) == 2 and "--teacher ID" in capsys.readouterr().err
    out = str(tmp_path / "out")
    common = ["teach", path, "--teacher", str(teacher_dir), "--out", out, "--set", "methods.distill.top_k=8"]
    assert main([*common, "--share", "3/2"]) == 2 and "no share" in capsys.readouterr().err
    assert main([*common, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["stored"] == out and found["sets"]["train"]["documents"] == 8 and 0 < found["sets"]["train"]["mass"] < 1
    )
    assert main(common) == 0
    shown = capsys.readouterr()
    assert "mass kept" in shown.out and "0 documents computed" in shown.err


def test_fetch_brings_the_teacher_too(make_recipe, teacher_dir, capsys):
    from aifactory_train.cli import main

    path = str(make_recipe(rows=8, settings={"methods.distill": {"teacher": str(teacher_dir), "licence": "own"}}))
    assert main(["fetch", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["teacher"]["source"] == str(teacher_dir)
    assert main(["fetch", path]) == 0 and "teacher" in capsys.readouterr().out
    assert main(["fetch", path, "--only", "data", "--json"]) == 0
    assert "teacher" not in json.loads(capsys.readouterr().out)
