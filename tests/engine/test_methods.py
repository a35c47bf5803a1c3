"""Each method has its published property, in one process; what splits may not change is in test_methods_curve.py."""

from __future__ import annotations

import json
import math
import shutil

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from aifactory_train.config.loading import load_recipe
from aifactory_train.core.errors import UserError
from aifactory_train.data import Cursor, Sampler, collate, load_tokenizer, prepare
from aifactory_train.data.cells import RowError
from aifactory_train.data.rows import canonical, detect_format
from aifactory_train.evaluation.generate import generate
from aifactory_train.evaluation.likelihood import held_out
from aifactory_train.evaluation.memorisation import memory_probe
from aifactory_train.methods import preference_loss as pref
from aifactory_train.methods.goldfish import GoldfishTokens, withheld
from aifactory_train.methods.neftune import noise_keys
from aifactory_train.methods.pairs import Mismatched, PairedTokens
from aifactory_train.methods.preference import Preference
from aifactory_train.methods.reference import REFERENCE_FILE, Reference
from aifactory_train.model.answer_loss import dpo_loss, kto_loss, orpo_loss
from aifactory_train.model.attention import PER_DOCUMENT, register
from aifactory_train.model.causal_lm import CausalLM
from aifactory_train.model.embedding_noise import mix32
from aifactory_train.model.loss import linear_cross_entropy
from aifactory_train.parallel.batches import device_batch
from aifactory_train.run.folder import RunFolder
from aifactory_train.training.start import train


def pair_rows(count: int, start: int = 0) -> list[dict]:
    """Questions whose chosen answers are statements and whose rejected answers are refusals, of unequal lengths."""
    return [
        {
            "id": f"pair-{i}",
            "prompt": f"Tell me about number {i}.",
            "chosen": helpers.row_text(i),
            "rejected": "No. " + helpers.row_text(i + 7)[: 8 + i % 9] + " never.",
        }
        for i in range(start, start + count)
    ]


def labelled_rows(count: int, start: int = 0) -> list[dict]:
    return [
        {"id": f"{r['id']}-{label}", "prompt": r["prompt"], "completion": r[side], "label": label}
        for r in pair_rows(count, start)
        for side, label in (("chosen", True), ("rejected", False))
    ]


def write_preferences(folder, model, kind: str, **settings):
    """Recipe of a preference method with 32 training and 8 held-out pairs."""
    path = helpers.write_recipe(folder, model, settings={"methods.preference": {"kind": kind}, **settings})
    rows = labelled_rows if kind == "kto" else pair_rows
    helpers.write_jsonl(folder / "train.jsonl", rows(32))
    helpers.write_jsonl(folder / "eval.jsonl", rows(8, 500))
    return path


def prepared(path, *overrides):
    recipe = load_recipe(str(path), list(overrides))
    tokenizer = load_tokenizer(recipe)
    return recipe, tokenizer, prepare(recipe, tokenizer)


# ---- losses equal the papers' formulas


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def answers(pairs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    policy = -40 * torch.rand(pairs, 2, generator=generator, dtype=torch.float64)
    return policy, policy + torch.randn(pairs, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.5, 0.2)])
def test_dpo_equals_its_formula(beta, smoothing):
    policy, reference = answers(50)
    plain = 0.0
    for (c, r), (rc, rr) in zip(policy.tolist(), reference.tolist(), strict=True):
        margin = beta * ((c - rc) - (r - rr))
        plain -= (1 - smoothing) * math.log(sigmoid(margin)) + smoothing * math.log(sigmoid(-margin))
    assert dpo_loss(policy, reference, beta, smoothing).item() == pytest.approx(plain, rel=1e-6)
    assert dpo_loss(policy, policy, beta).item() == pytest.approx(50 * math.log(2))  # nothing learnt yet


def test_orpo_equals_its_formula():
    policy, _ = answers(50)
    lengths = torch.randint(1, 30, (50, 2), generator=torch.Generator().manual_seed(1)).double()
    plain = 0.0
    for (c, r), (nc, nr) in zip(policy.tolist(), lengths.tolist(), strict=True):
        odds = [math.exp(x / n) / (1 - math.exp(x / n)) for x, n in ((c, nc), (r, nr))]
        plain += -c / nc - 0.3 * math.log(sigmoid(math.log(odds[0] / odds[1])))
    assert orpo_loss(policy, lengths, 0.3).item() == pytest.approx(plain, rel=1e-6)
    certain = torch.zeros(1, 2, requires_grad=True)  # probability 1: infinite odds, still a finite loss and gradient
    loss = orpo_loss(certain, torch.ones(1, 2), 0.3)
    loss.backward()
    assert loss.isfinite() and certain.grad.isfinite().all()


def test_kto_equals_its_formula():
    policy, reference = (x.flatten() for x in answers(50))
    good = torch.arange(100) % 3 == 0
    plain = 0.0
    for p, r, g in zip(policy.tolist(), reference.tolist(), good.tolist(), strict=True):
        gain = 0.2 * ((p - r) - 0.7)
        plain += 1.5 * (1 - sigmoid(gain)) if g else 0.5 * (1 - sigmoid(-gain))
    assert kto_loss(policy, reference, good, 0.7, 0.2, (1.5, 0.5)).item() == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("kernels", [False, True])
def test_token_log_probabilities_and_gradients_equal_full_logits(kernels):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(37, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    labels = torch.randint(0, 50, (37,), generator=generator)
    factors = torch.randn(37, generator=generator)
    plain = torch.log_softmax(1.5 * hidden @ weight.t(), 1).gather(1, labels[:, None]).squeeze(1)
    expected = torch.autograd.grad((plain * factors).sum(), (hidden, weight))
    how = {"reduction": "none", "rows": 8, "kernels": kernels}
    ours = -linear_cross_entropy(hidden, weight, labels, scale=1.5, **how)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad((ours * factors).sum(), (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    empty = linear_cross_entropy(hidden[:0], weight, labels[:0], **how)
    assert empty.shape == (0,) and empty.sum().requires_grad  # a rank without work takes part in backward


@pytest.fixture(scope="module")
def wrapped():
    register()
    model = helpers.tiny_model("llama")
    model.set_attn_implementation(PER_DOCUMENT)
    return CausalLM(model, 16)


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_the_loss_of_a_batch_equals_transformers_alone(tmp_path, tiny_model_dir, wrapped, batching):
    """DPO from the plain model's full logits, one conversation at a time, against one packed or padded pass."""
    recipe, _, data = prepared(write_preferences(tmp_path, tiny_model_dir, "dpo"))
    plain, pairs = helpers.tiny_model("llama"), PairedTokens(data.train, whole=True)
    rows = np.array([3, 0, 7])
    documents = np.stack([2 * rows, 2 * rows + 1], 1).reshape(-1)
    logps = []
    for document in documents:
        tokens, mask = (torch.from_numpy(x(int(document))) for x in (data.train.tokens, data.train.mask))
        with torch.no_grad():
            each = -F.cross_entropy(plain(tokens[None]).logits[0, :-1].double(), tokens[1:], reduction="none")
        logps.append(each[mask[1:]].sum().item())
    reference = np.asarray(logps) + np.array([0.5, -0.3, 0.1, 0.9, -1.0, 0.2])
    expected = sum(
        -math.log(sigmoid(0.1 * ((logps[2 * p] - reference[2 * p]) - (logps[2 * p + 1] - reference[2 * p + 1]))))
        for p in range(3)
    )
    method = Preference(recipe)
    method.reference.train = np.zeros(2 * len(pairs))
    method.reference.train[documents] = reference
    recipe.data.batching = batching

    class Stub:
        world = type("W", (), {"device": "cpu"})
        data = type("D", (), {"train": pairs})
        pad_id = 3

    Stub.recipe = recipe
    batch, used, lengths = method.micro_batch(Stub, rows)
    assert used.tolist() == documents.tolist() and (lengths == data.train.lengths[documents]).all()
    assert wrapped(**batch.kwargs()).item() == pytest.approx(expected, rel=1e-6)
    assert method.sums[pref.SUMS.index("good_answers")] == 3  # pairs counted


# ---- rows


def test_preference_rows():
    row = canonical({"prompt": "Q", "chosen": "good", "rejected": "bad", "system": "S", "id": 3}, "preference", {})
    assert [m["content"] for m in row["messages"]] == ["S", "Q", "good"]
    assert [m["content"] for m in row["rejected"]] == ["S", "Q", "bad"]
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}, {"role": "user", "content": "R"}]
    sides = {k: [*turns, {"role": "assistant", "content": k}] for k in ("chosen", "rejected")}
    row = canonical(sides, "preference", {})
    assert [m.get("weight") for m in row["messages"]] == [None, 0, None, None]  # the common beginning is the question
    row = canonical({"prompt": "Q", "completion": "A", "label": "False"}, "feedback", {})
    assert row["desirable"] is False and "label" not in row


@pytest.mark.parametrize(
    ("row", "fmt", "word"),
    [
        ({"prompt": "Q", "chosen": "a", "rejected": "a"}, "preference", "the same"),
        ({"prompt": "Q", "chosen": "a"}, "preference", "'rejected' is missing"),
        ({"prompt": "Q", "chosen": "a", "rejected": " "}, "preference", "empty"),
        ({"prompt": "Q", "completion": "a"}, "feedback", "'label' is missing"),
        ({"prompt": "Q", "completion": "a", "label": 0.5}, "feedback", "not true or false"),
        ({"chosen": "a", "rejected": "b"}, "preference", "the column 'prompt' is missing"),
    ],
)
def test_bad_preference_rows_are_named(row, fmt, word):
    with pytest.raises(RowError, match=word):
        canonical(row, fmt, {})


def test_pairs_without_a_method_are_refused_with_the_key_to_set():
    with pytest.raises(RowError) as error:
        detect_format(["prompt", "chosen", "rejected"])
    assert "methods.preference.kind" in error.value.fix


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["methods.preference.kind=dpo", "methods.goldfish.k=4"], "no meaning for preferences"),
        (["methods.preference.kind=kto", "methods.preference.loss=ipo"], "belongs to kind dpo"),
        (
            ["methods.preference={kind: dpo, loss: ipo, label_smoothing: 0.1}"],
            "belongs to loss sigmoid",
        ),
        (["methods.preference={kind: dpo, replay_weight: 0.5}"], "nothing is replayed"),
        (["eval.best_by=preference_loss"], "needs methods.preference"),
        (["methods.preference.kind=kto", "eval.best_by=reward_accuracy"], "of pairs"),
        (["methods.preference.kind=kto", "methods.preference.label_smoothing=0.1"], "belongs to kind dpo"),
        (["methods.preference.kind=simpo", "methods.preference.loss=ipo"], "belongs to kind dpo"),
        (["methods.preference.kind=dpo", "methods.preference.gamma=0.5"], "belongs to kind simpo"),
        (["methods.preference.kind=orpo", "methods.preference.nll_weight=1"], "belongs to kind simpo or cpo"),
        (["methods.preference.kind=dpo", "data.train.0.format=text"], "needs rows of format preference"),
        (["data.train.0.format=feedback"], "need kind kto"),
        (["data.train.0.share=0.5"], "every source has a share"),
        (["methods.preference.kind=ppo"], "dpo"),
    ],
)
def test_methods_that_do_not_go_together_are_refused(tiny_recipe, overrides, word):
    with pytest.raises(UserError, match=word):
        load_recipe(str(tiny_recipe), overrides)


def test_a_pair_that_loses_an_answer_is_dropped_and_counted(tmp_path, tiny_model_dir):
    path = write_preferences(tmp_path, tiny_model_dir, "dpo", **{"data.long_documents": "drop"})
    rows = pair_rows(32)
    rows[5]["rejected"] = "word " * 400
    helpers.write_jsonl(tmp_path / "train.jsonl", rows)
    _, _, data = prepared(path)
    pairs = PairedTokens(data.train)
    assert len(pairs) == 31 and "pair-5" not in {pairs.row_id(i) for i in range(31)}
    assert data.report["sources"][0]["counts"]["dropped: pair"] == 1


# ---- training raises the margin


@pytest.mark.parametrize("kind", ["dpo", "orpo", "kto"])
def test_the_preferred_margin_rises(tmp_path, tiny_model_dir, kind):
    settings = {"train.max_steps": 8, "train.learning_rate": 5e-3, "eval.forgetting": False, "export.automatic": False}
    path = write_preferences(tmp_path, tiny_model_dir, kind, **settings)
    assert train(load_recipe(str(path)), tmp_path / "run", quiet=True) == 0
    results = json.loads((tmp_path / "run" / "eval.json").read_text())
    change = results["change"]["preference_margin"]
    assert change["better"] is True and change["ci"][0] > 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["reward_margin"] > steps[0]["reward_margin"] + 0.01
    if kind == "dpo":
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # policy and reference are the same model
        assert steps[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
    if kind == "kto":
        assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-5) and steps[0]["kl"] == pytest.approx(0, abs=1e-4)
    if kind != "kto":
        assert results["after"]["preference_accuracy"] >= results["before"]["preference_accuracy"]


@pytest.mark.parametrize("method", ["dpo", "kto with replay", "neftune"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, tiny_model_dir, method, monkeypatch):
    settings = {
        "train.max_steps": 4,
        "checkpoint.every_steps": 2,
        "checkpoint.keep": 5,
        "eval.before": False,
        "eval.after": False,
        "export.automatic": False,
        "record.pack": False,
    }
    overrides = []
    if method != "neftune":
        path = write_preferences(tmp_path, tiny_model_dir, method[:3], **settings)
        if "replay" in method:
            helpers.write_jsonl(tmp_path / "general.jsonl", helpers.chat_rows(30, start=900))
            sources = [tmp_path / "train.jsonl", f"{{source: {tmp_path}/general.jsonl, share: 0.4}}"]
            overrides = [f"data.train=[{sources[0]}, {sources[1]}]"]
    else:
        path = helpers.write_recipe(tmp_path, tiny_model_dir, settings={**settings, "methods.neftune": {"alpha": 10}})
    recipe = load_recipe(str(path), overrides)
    assert train(recipe, tmp_path / "whole", quiet=True) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    _back_to_step_2(tmp_path / "part")
    # By now the model is another one: a reference computed again would be wrong.
    monkeypatch.setattr(Reference, "compute", lambda *_: pytest.fail("the reference was computed again"))
    assert train(recipe, tmp_path / "part", resume="auto", quiet=True) == 0

    def curve(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [(r["step"], r["loss"], r["grad_norm"]) for r in map(json.loads, lines)]

    assert curve("part") == curve("whole") and len(curve("whole")) == 4
    if method == "dpo":
        (tmp_path / "part" / REFERENCE_FILE).unlink()
        _back_to_step_2(tmp_path / "part")
        with pytest.raises(UserError, match="no such file"):
            train(recipe, tmp_path / "part", resume="auto", quiet=True)


def _back_to_step_2(folder):
    """As if the run had been stopped after its second step."""
    for later in (folder / "checkpoints").glob("step-*"):
        if later.name != "step-2":
            shutil.rmtree(later)
    RunFolder(folder).set_state("stopped", step=2, version="test")


# ---- KTO's exchanged answers


def test_exchanged_answers_come_from_another_question(tmp_path, tiny_model_dir):
    _, tokenizer, data = prepared(write_preferences(tmp_path, tiny_model_dir, "kto"))
    rows, longest = len(data.train), 256
    mixed = Mismatched(data.train, np.arange(rows), longest)
    for i in range(rows):
        other = (i + rows // 2) % rows
        text, row = tokenizer.decode(mixed.tokens(i)), data.train.row(other)
        assert data.train.row(i)["messages"][0]["content"] in text and row["messages"][-1]["content"] in text
        own = data.train.row(i)["messages"][0]["content"]
        assert row["messages"][0]["content"] != own  # no neighbour with the same question
        supervised = mixed.tokens(i)[mixed.mask(i)]
        assert supervised.tolist() == data.train.tokens(other)[data.train.mask(other)].tolist()
    assert Mismatched(data.train, np.arange(rows), 20).lengths.max() <= 20


# ---- goldfish


def test_goldfish_withholds_by_what_stands_before_and_nothing_else():
    generator = np.random.default_rng(0)
    passage = generator.integers(0, 400, 300)
    alone = withheld(passage, 4, 13)
    assert not alone[:13].any()
    for lead in (1, 50):
        moved = withheld(np.concatenate([generator.integers(0, 400, lead), passage]), 4, 13)[lead:]
        assert (moved[13:] == alone[13:]).all()  # the same passage elsewhere loses the same tokens
    changed = passage.copy()
    changed[100] += 1
    differs = np.flatnonzero(withheld(changed, 4, 13) != alone)
    assert len(differs) and differs.min() > 100 and differs.max() <= 113  # only those that see the change
    assert not withheld(passage[:13], 4, 13).any()


@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_goldfish_withholds_one_in_k(k):
    tokens = np.random.default_rng(k).integers(0, 50_000, 40_000)
    assert withheld(tokens, k, 13).mean() == pytest.approx(1 / k, rel=0.05)


def test_goldfish_counts_and_batches_agree_and_no_withheld_token_is_a_target(tmp_path, tiny_model_dir):
    path = helpers.write_recipe(tmp_path, tiny_model_dir)
    helpers.write_jsonl(
        tmp_path / "train.jsonl", [{"text": " ".join(helpers.row_text(i + j) for j in range(5))} for i in range(30)]
    )
    helpers.write_jsonl(tmp_path / "eval.jsonl", [{"text": helpers.row_text(900)}])
    _, _, data = prepared(path)
    fish = GoldfishTokens(data.train, 4, 13)
    batch = collate(fish, range(len(fish)), "packed", 3)
    assert batch.num_supervised == int(fish.supervised.sum()) < int(data.train.supervised.sum())
    for i in range(len(fish)):
        assert not (fish.mask(i) & withheld(fish.tokens(i), 4, 13)).any()
        assert not (fish.mask(i) & ~data.train.mask(i)).any()
    always = GoldfishTokens(data.train, 2, 1)
    assert always.supervised.min() >= 1


@pytest.mark.slow  # minutes of training
def test_goldfish_keeps_a_passage_from_being_recited(tmp_path, tiny_model_dir):
    """A passage is overfitted with and without: plain loss recites it, goldfish loss does not (the paper's figure
    1).
    """
    passage = {"text": " ".join(helpers.row_text(13 * i) for i in range(8))}
    outcomes = {}
    for k in (None, 3):
        folder = tmp_path / str(k)
        path = helpers.write_recipe(folder, tiny_model_dir, settings={"data.overlap": "allow"})
        for name in ("train", "eval"):
            helpers.write_jsonl(folder / f"{name}.jsonl", [passage])
        _, _, data = prepared(path)
        train_set = GoldfishTokens(data.train, k, 4) if k else data.train
        register()
        model = helpers.tiny_model("llama")
        model.set_attn_implementation(PER_DOCUMENT)
        core = CausalLM(model)
        optimizer = torch.optim.AdamW(core.parameters(), lr=3e-3)
        batch = device_batch(collate(train_set, [0], "packed", 3), "cpu")
        for _ in range(120):
            (core(**batch.kwargs()) / int(train_set.supervised[0])).backward()
            optimizer.step()
            optimizer.zero_grad()
        prompt, wanted = memory_probe(data.train, 0)
        found = generate(core, [prompt], max_new_tokens=len(wanted), stop_ids=[], pad_id=3, device="cpu")[0]
        nll = held_out(core, data.train, max_rows=1, batching="packed", pad_id=3, device="cpu", micro_batch_tokens=512)
        outcomes[k] = (found == wanted, nll.loss)
    assert outcomes[None][0] is True and outcomes[3][0] is False
    assert outcomes[3][1] > 5 * outcomes[None][1]  # the withheld tokens stay unlearnt


# ---- NEFTune


def neftune_batch(data, documents, moment=(3, 5), batching="packed"):
    batch = device_batch(collate(data.train, documents, batching, 3), "cpu")
    return batch, noise_keys(documents, data.train.lengths[documents], batch, 5.0, moment, "cpu")


def test_neftune_noise_is_uniform_bounded_and_of_the_published_size(tmp_path, tiny_model_dir):
    _, _, data = prepared(helpers.write_recipe(tmp_path, tiny_model_dir))
    documents = np.arange(20)
    batch, noise = neftune_batch(data, documents)
    width = 64
    added = noise.add_to(torch.zeros(*batch.input_ids.shape, width))[0]
    at = 0
    for document in documents:
        length = int(data.train.lengths[document])
        part, bound = added[at : at + length], 5.0 / math.sqrt(length * width)
        assert part.abs().max() <= bound * (1 + 1e-6)
        assert part.abs().max() > 0.95 * bound
        at += length
    unit = (added / noise.scale[0][:, None] * math.sqrt(width)).flatten()
    assert unit.mean().abs() < 0.01 and unit.var().item() == pytest.approx(1 / 3, rel=0.02)
    both = unit.view(-1, width)
    assert (both[:, :-1] * both[:, 1:]).mean().abs() < 0.01  # neighbours are independent
    assert (both[:-1] * both[1:]).mean().abs() < 0.01


def test_neftune_noise_belongs_to_document_place_and_step(tmp_path, tiny_model_dir):
    _, _, data = prepared(helpers.write_recipe(tmp_path, tiny_model_dir))

    def of(document, documents, **more):
        documents = np.asarray(documents)
        batch, noise = neftune_batch(data, documents, **more)
        added = noise.add_to(torch.zeros(*batch.input_ids.shape, 8)).flatten(0, 1)
        k = documents.tolist().index(document)
        start = int(batch.documents.cu_seqlens[k])
        return added[start : start + int(data.train.lengths[document])]

    alone = of(7, [7])
    assert torch.equal(alone, of(7, [2, 7, 9]))
    assert torch.equal(alone, of(7, [9, 2, 7], batching="padded"))
    assert not torch.equal(alone, of(7, [7], moment=(3, 6)))
    assert not torch.equal(alone, of(7, [7], moment=(4, 5)))


def test_mix32_is_a_bijection_on_a_sample():
    values = torch.arange(1 << 18, dtype=torch.int64) * 16381 % (1 << 32)
    mixed = mix32(values)
    assert mixed.min() >= 0 and mixed.max() < 1 << 32
    assert len(torch.unique(mixed)) == len(torch.unique(values))


def test_neftune_noise_reaches_training_and_not_evaluation(tmp_path, tiny_model_dir, wrapped):
    _, _, data = prepared(helpers.write_recipe(tmp_path, tiny_model_dir))
    batch, noise = neftune_batch(data, np.arange(4))
    clean = wrapped(**batch.kwargs()).item()
    batch.noise = noise
    assert wrapped(**batch.kwargs()).item() != clean
    silent = type(noise)(noise.keys, noise.scale * 0)
    batch.noise = silent
    assert wrapped(**batch.kwargs()).item() == pytest.approx(
        clean, rel=1e-6
    )  # embeddings given directly: the same model


# ---- replay


@pytest.mark.parametrize("share", [0.2, 0.4])
def test_replay_has_its_share_of_the_tokens_and_is_never_held_out(tmp_path, tiny_model_dir, share):
    path = helpers.write_recipe(tmp_path, tiny_model_dir)
    helpers.write_jsonl(
        tmp_path / "general.jsonl",
        [{"text": " ".join(helpers.row_text(7 * i + j) for j in range(1 + i % 5))} for i in range(400)],
    )
    source = f"data.train=[{tmp_path}/train.jsonl, {{source: {tmp_path}/general.jsonl, share: {share}}}]"
    _, _, data = prepared(path, source)
    assert list(data.evals) == ["train"]  # held out of the rows to learn, not of those replayed
    sampler = Sampler(data.train.lengths, data.train.weights, 17, 8)
    names = np.array([data.train.source(i) for i in range(len(data.train))])
    shares, seen = [], []
    for epoch in range(20):
        order = sampler.order(epoch)
        tokens = data.train.lengths[order]
        shares.append(tokens[names[order] == "general"].sum() / tokens.sum())
        assert (np.sort(order[names[order] == "train"]) == np.flatnonzero(names == "train")).all()
        seen.append(frozenset(order[names[order] == "general"].tolist()))
    assert len(set(seen)) == 20  # other rows in every epoch
    assert np.mean(shares) == pytest.approx(share, rel=0.1)  # whole documents: not to the token


@pytest.mark.slow  # minutes of training
def test_replay_keeps_what_was_known(tmp_path, tiny_model_dir):
    """A model that knows A learns B: with A replayed at a third of the tokens it forgets less of A."""
    register()
    general = [
        {"text": f"The colour of the {thing} is {c}."} for thing in helpers._THINGS for c in helpers._COLOURS[:4]
    ]
    task = [{"text": f"{thing} 0x{i:04x} error {i % 7}"} for i, thing in enumerate(helpers._THINGS * 4)]
    losses = {}
    for share in (None, 0.33):
        folder = tmp_path / str(share)
        path = helpers.write_recipe(folder, tiny_model_dir)
        for name, rows in (("general", general), ("task", task), ("eval", general[::5])):
            helpers.write_jsonl(folder / f"{name}.jsonl", rows)
        first = prepared(
            path, f"data.train={folder}/general.jsonl", f"data.eval={folder}/eval.jsonl", "data.overlap=allow"
        )
        replayed = f", {{source: {folder}/general.jsonl, share: {share}}}" if share else ""
        sources = f"data.train=[{folder}/task.jsonl{replayed}]"
        second = prepared(path, sources, f"data.eval={folder}/eval.jsonl", "data.overlap=allow")
        model = helpers.tiny_model("llama")
        model.set_attn_implementation(PER_DOCUMENT)
        core = CausalLM(model)
        for _, _, data in (first, second):
            optimizer = torch.optim.AdamW(core.parameters(), lr=3e-3)
            sampler, cursor = Sampler(data.train.lengths, data.train.weights, 17, 12), Cursor()
            for _ in range(30):
                documents, cursor = sampler.step(cursor)
                batch = device_batch(collate(data.train, documents, "packed", 3), "cpu")
                (core(**batch.kwargs()) / len(batch.targets)).backward()
                optimizer.step()
                optimizer.zero_grad()
        how = {"batching": "packed", "pad_id": 3, "device": "cpu", "micro_batch_tokens": 512}
        losses[share] = held_out(core, second[2].evals["eval"], max_rows=99, **how).loss
    assert losses[0.33] < 0.8 * losses[None]
