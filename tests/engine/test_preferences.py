"""Runs that learn from preferences: what the reference is, what replay adds, which evaluation is the best, what
held-out rows show.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_methods import labelled_rows, pair_rows, write_preferences

from aifactory_train.config.loading import load_recipe
from aifactory_train.config.objective import objective
from aifactory_train.core.errors import UserError
from aifactory_train.data import load_tokenizer, prepare
from aifactory_train.evaluation.likelihood import held_out
from aifactory_train.methods.pairs import HeldOutLabels, LabelledTokens, PairedTokens
from aifactory_train.methods.preference import BALANCE, Preference
from aifactory_train.methods.reference import REFERENCE_FILE
from aifactory_train.metrics.bootstrap import unpacked
from aifactory_train.model.answer_loss import dpo_loss, ipo_loss
from aifactory_train.model.attention import decoding
from aifactory_train.parallel.world import join_world, leave_world
from aifactory_train.report.curves import curves
from aifactory_train.run.folder import RunFolder
from aifactory_train.run.outcome import Attempt
from aifactory_train.training.start import train
from aifactory_train.training.stopping import Best, StopChannels
from aifactory_train.training.trainer import Trainer

QUIET = {
    "eval.before": False,
    "eval.after": False,
    "eval.forgetting": False,
    "export.automatic": False,
    "record.pack": False,
    "train.max_steps": 20,
    "train.epochs": 20,
}


@contextlib.contextmanager
def trainer_of(path: Path, folder: Path, *overrides: str) -> Iterator[Trainer]:
    """A trainer before its first step, in this process."""
    recipe, world = load_recipe(str(path), list(overrides)), join_world(120, 1)
    run = RunFolder(folder)
    run.path.mkdir(parents=True)
    try:
        with Attempt(run, 0, 0, 1, timeout_s=120) as attempt:
            yield Trainer(recipe, run, world, StopChannels(None), attempt, None, None, True)
    finally:
        leave_world()


def ours_or_plain(model: Any) -> Any:
    """Around a plain call: a model that training loaded attends to documents otherwise."""
    ours = str(model.config._attn_implementation).startswith("aifactory")
    return decoding(model) if ours else contextlib.nullcontext()


def plain_logps(model: Any, dataset: Any, documents: Any) -> np.ndarray:
    """Log-probabilities of answers by transformers alone, one document at a time."""
    found = []
    for document in documents:
        tokens, mask = (torch.from_numpy(x(int(document))) for x in (dataset.tokens, dataset.mask))
        with torch.no_grad(), ours_or_plain(model):
            each = -F.cross_entropy(model(tokens[None]).logits[0, :-1].double(), tokens[1:], reduction="none")
        found.append(each[mask[1:]].sum().item())
    return np.asarray(found)


# ---- the reference is the model before the first step, and stays it


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_the_reference_is_the_base(tmp_path, tiny_model_dir, adapter):
    """Precomputed log-probabilities are those of the base, after the model has moved: adapter disabled, or transformers
    alone.
    """
    settings = {**QUIET, "adapter.kind": adapter, "train.learning_rate": 5e-3}
    path = write_preferences(tmp_path, tiny_model_dir, "dpo", **settings)
    with trainer_of(path, tmp_path / "run") as trainer:
        for _ in range(3):
            trainer.train_step()
        kept, core = trainer.method.reference.train, trainer.engine.core
        base, documents = trainer.data.train.base, np.arange(10)
        assert np.isfinite(kept).all() and len(kept) == 64
        moved = plain_logps(core.model, base, documents)
        if adapter == "lora":
            with core.model.disable_adapter():
                found = plain_logps(core.model, base, documents)
        else:
            found = plain_logps(helpers.tiny_model("llama"), base, documents)
        assert kept[documents] == pytest.approx(found, rel=1e-6)
        assert abs(moved - found).max() > 0.1
        rows = {what: (choice, why) for what, choice, why in trainer.report.lines}
        assert "64 answers" in rows["reference"][0] and "MiB" in rows["reference"][1]


def test_the_reference_of_a_run_that_continues_another_is_that_run(tmp_path, tiny_model_dir):
    """Not the base: with its adapter disabled a continued run would be pulled back to where the earlier run began."""
    from peft import PeftModel

    first = helpers.write_recipe(
        tmp_path / "a",
        tiny_model_dir,
        settings={"eval.before": False, "eval.after": False, "train.learning_rate": 2e-2, "record.pack": False},
    )
    assert train(load_recipe(str(first)), tmp_path / "first", quiet=True) == 0
    path = write_preferences(
        tmp_path / "b", tiny_model_dir, "dpo", **QUIET, **{"model.start_from": str(tmp_path / "first")}
    )
    with trainer_of(path, tmp_path / "run") as trainer:
        trainer.train_step()
        documents, base = np.arange(10), trainer.data.train.base
        kept = trainer.method.reference.train[documents]
        original = plain_logps(helpers.tiny_model("llama"), base, documents)
    start = PeftModel.from_pretrained(helpers.tiny_model("llama"), tmp_path / "first" / "export" / "adapter")
    assert kept == pytest.approx(plain_logps(start, base, documents), rel=1e-6)
    assert abs(kept - original).max() > 0.1


def test_orpo_needs_no_reference(tmp_path, tiny_model_dir):
    path = write_preferences(tmp_path, tiny_model_dir, "orpo", **QUIET)
    with trainer_of(path, tmp_path / "run") as trainer:
        trainer.train_step()
        assert trainer.method.reference.train is None
        assert ("reference", "none", "ORPO needs none") in trainer.report.lines
    assert not (tmp_path / "run" / REFERENCE_FILE).exists()


# ---- formulas at their optimum


def gradient_at(loss: Any, margin: float) -> float:
    """Of the loss of one pair, with respect to the margin of log-ratios; a positive one pushes the margin down."""
    at = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
    policy = torch.stack([at / 2, -at / 2], dim=1)
    loss(policy, torch.zeros(1, 2, dtype=torch.float64)).backward()
    return float(at.grad)


def test_label_smoothing_and_ipo_want_a_finite_margin_and_dpo_an_ever_larger_one():
    beta, wrong = 0.2, 0.3
    smooth = math.log((1 - wrong) / wrong) / beta  # where sigmoid(beta m) is the share of pairs that are right
    ones = torch.ones(1, 2, dtype=torch.float64)
    for loss, optimum in (
        (lambda p, r: dpo_loss(p, r, beta, wrong), smooth),
        (lambda p, r: ipo_loss(p, r, ones, beta), 1 / (2 * beta)),
        (lambda p, r: ipo_loss(p, r, 4 * ones, beta), 4 / (2 * beta)),  # four tokens: a mean margin a token
    ):
        assert gradient_at(loss, optimum) == pytest.approx(0, abs=1e-12)
        assert gradient_at(loss, 0.9 * optimum) < 0 < gradient_at(loss, 1.1 * optimum)
    assert gradient_at(lambda p, r: dpo_loss(p, r, beta), 50.0) < 0


def test_ipo_equals_its_formula():
    generator = torch.Generator().manual_seed(0)
    policy = -40 * torch.rand(50, 2, generator=generator, dtype=torch.float64)
    reference = policy + torch.randn(50, 2, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 30, (50, 2), generator=generator).double()
    plain = 0.0
    for (c, r), (rc, rr), (nc, nr) in zip(policy.tolist(), reference.tolist(), lengths.tolist(), strict=True):
        plain += ((c - rc) / nc - (r - rr) / nr - 1 / (2 * 0.3)) ** 2
    assert ipo_loss(policy, reference, lengths, 0.3).item() == pytest.approx(plain, rel=1e-6)


def test_a_large_beta_keeps_the_policy_near_its_reference(tmp_path, tiny_model_dir):
    """Beta weighs the KL divergence from the reference (Rafailov et al. 2023, section 4): both learn the order, one
    moves far less.
    """
    settings = {**QUIET, "adapter.kind": "none", "train.learning_rate": 3e-3}
    path = write_preferences(tmp_path, tiny_model_dir, "dpo", **settings)
    moved = {}
    for beta in (0.05, 5.0):
        with trainer_of(path, tmp_path / f"run-{beta}", f"methods.preference.beta={beta}") as trainer:
            last = [trainer.train_step() for _ in range(20)][-1]
            base, kept = trainer.data.train.base, trainer.method.reference.train
            assert last["reward_accuracy"] == 1.0
            moved[beta] = abs(plain_logps(trainer.engine.core.model, base, range(32)) - kept[:32]).mean()
    assert moved[5.0] < 0.3 * moved[0.05]


# ---- replay beside preferences


def with_replay(
    folder: Path, model: Path, kind: str, share: float = 0.4, weight: float = 0.5, **settings: Any
) -> list[str]:
    write_preferences(folder, model, kind, **{**QUIET, "logging.row_ids": True, **settings})
    helpers.write_jsonl(folder / "general.jsonl", helpers.chat_rows(40, start=900))
    own, general = (f"{folder}/{name}.jsonl" for name in ("train", "general"))
    return [
        "data.overlap=allow",
        f"data.train=[{own}, {{source: {general}, share: {share}}}]",
        f"methods.preference.replay_weight={weight}",
    ]


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_step_is_the_preference_loss_and_the_weighted_likelihood_of_replayed_rows(tmp_path, tiny_model_dir, kind):
    overrides = with_replay(tmp_path, tiny_model_dir, kind)
    with trainer_of(tmp_path / "recipe.yaml", tmp_path / "run", *overrides) as trainer:
        view, record = trainer.data.train, trainer.train_step()
        assert view.lengths[view.replayed].sum() / view.lengths.sum() > 0.3  # 40 rows wait for an epoch's share
        units = [i for i in range(len(view)) if view.row_id(i) in record["row_ids"]]
        replayed = [i for i in units if view.replayed[i]]
        assert replayed and len(replayed) < len(units) and all(view.source(i) == "general" for i in replayed)
        documents = view.documents(np.asarray(replayed))
        nll = -plain_logps(helpers.tiny_model("llama"), view.base, documents).sum()
        mean = nll / view.base.supervised[documents].sum()
        assert record["replay_loss"] == pytest.approx(mean, rel=1e-6)
        # The policy is the reference yet: each pair costs log 2, each rated answer 1 / 2.
        start = math.log(2) if kind == "dpo" else 0.5
        assert record["preference_loss"] == pytest.approx(start, abs=1e-5)
        assert record["loss"] == pytest.approx(start + 0.5 * mean, rel=1e-5)
        later = trainer.train_step()
        assert later["loss"] == pytest.approx(later["preference_loss"] + 0.5 * later["replay_loss"], rel=1e-6)
        assert not np.isfinite(trainer.method.reference.train[documents]).any()  # imitated, not rated


def test_units_are_pairs_and_replayed_documents(tmp_path, tiny_model_dir):
    overrides = with_replay(tmp_path, tiny_model_dir, "dpo")
    recipe = load_recipe(str(tmp_path / "recipe.yaml"), overrides)
    data = prepare(recipe, load_tokenizer(recipe))
    view = PairedTokens(data.train, whole=True)
    held = PairedTokens(data.evals["train"])  # given its own rows, a source is split; a replayed one is not
    pairs = 32 - len(held)
    assert list(data.evals) == ["train"] and 0 < len(held) < 8 and len(held.rejected) == len(held)
    assert int(view.replayed.sum()) == 40 and len(view) == pairs + 40 and len(view.base) == 2 * pairs + 40
    order = np.random.default_rng(0).permutation(len(view))
    documents = view.documents(order)
    assert sorted(documents.tolist()) == list(range(len(view.base)))
    place = 0
    for unit in order.tolist():
        count = 1 if view.replayed[unit] else 2
        mine = documents[place : place + count]
        assert {data.train.row_id(int(i)) for i in mine} == {view.row_id(unit)}
        assert view.lengths[unit] == data.train.lengths[mine].sum()
        assert view.supervised[unit] == data.train.supervised[mine].sum()
        assert view.desirable[mine].tolist() == ([False] if count == 1 else [True, False])
        place += count
    assert not hasattr(view, "rejected")


def test_replay_beside_dpo_keeps_what_was_known(tmp_path, tiny_model_dir):
    """A model that knows general answers learns from pairs: where those are replayed it forgets none of them."""
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    settings = {"train.learning_rate": 3e-3, "adapter.kind": "none"}
    overrides = with_replay(tmp_path, model, "dpo", weight=1.0, **settings)
    plain = [f"data.train={tmp_path}/general.jsonl", "methods.preference=null", "data.overlap=allow"]
    how = {"batching": "packed", "pad_id": 3, "device": "cpu", "micro_batch_tokens": 512}
    with trainer_of(
        tmp_path / "recipe.yaml", tmp_path / "knows", *plain, f"data.eval={tmp_path}/general.jsonl"
    ) as first:
        general = first.data.train
        for _ in range(20):
            first.train_step()
        first.engine.core.model.save_pretrained(model)
        known = held_out(first.engine.module, general, max_rows=20, **how).loss
    forgotten = {}
    for name, more in (("alone", []), ("replayed", overrides)):
        with trainer_of(tmp_path / "recipe.yaml", tmp_path / name, *more) as trainer:
            last = [trainer.train_step() for _ in range(16)][-1]
            assert last["reward_accuracy"] == 1.0
            forgotten[name] = held_out(trainer.engine.module, general, max_rows=20, **how).loss - known
    assert forgotten["alone"] > 0.1 and forgotten["replayed"] < 0.2 * forgotten["alone"]


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("{source: general.jsonl, share: 0.2, format: preference}", "rows to imitate"),
        ("{source: general.jsonl, format: messages}", "give it a share"),
    ],
)
def test_sources_beside_preferences_that_are_no_replay_are_refused(tmp_path, tiny_model_dir, source, word):
    path = write_preferences(tmp_path, tiny_model_dir, "dpo")
    with pytest.raises(UserError, match=word):
        load_recipe(str(path), [f"data.train=[train.jsonl, {source}]"])


# ---- KTO: labels


def test_kto_learns_from_unpaired_unbalanced_rows_and_says_which_weight_balances_them(tmp_path, tiny_model_dir):
    path = write_preferences(tmp_path, tiny_model_dir, "kto", **QUIET, **{"train.learning_rate": 5e-3})
    rows = [r for i, r in enumerate(labelled_rows(48)) if r["label"] == (i // 2 % 4 == 0)]  # one answer to a question
    assert len({r["prompt"] for r in rows}) == len(rows) == 48 and sum(r["label"] for r in rows) == 12
    helpers.write_jsonl(tmp_path / "train.jsonl", rows)
    with trainer_of(path, tmp_path / "run") as trainer:
        (warning,) = [w for w in trainer.data.report["warnings"] if "desirable" in w]
        assert "desirable_weight=3 would" in warning
    with trainer_of(path, tmp_path / "again", "methods.preference.desirable_weight=3") as trainer:
        assert not [w for w in trainer.data.report.get("warnings", []) if "desirable" in w]
        steps = [trainer.train_step() for _ in range(10)]
    margins = [s["reward_margin"] for s in steps if "reward_margin" in s]  # some step may hold answers of one kind
    assert len(margins) > 5 and margins[-1] > margins[0] + 0.01


@pytest.mark.parametrize(("good", "bad"), [(1, 9), (3, 4), (5, 4), (7, 2), (40, 10)])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.5), (0.1, 3.0)])
def test_the_advised_weight_balances(tiny_recipe, good, bad, weights):
    recipe = load_recipe(str(tiny_recipe), ["methods.preference.kind=kto"])
    how = recipe.methods.preference
    how.desirable_weight, how.undesirable_weight = weights
    advice = Preference(recipe)._unbalanced(good, bad)
    if advice is not None:
        key, value = advice.rpartition("methods.preference.")[2].partition(" would")[0].split("=")
        setattr(how, key, float(value))
    ratio = how.desirable_weight * good / (how.undesirable_weight * bad)
    assert BALANCE[0] * 0.99 <= ratio <= BALANCE[1] * 1.01
    assert (advice is None) == (BALANCE[0] <= weights[0] * good / (weights[1] * bad) <= BALANCE[1])


def test_answers_of_one_kind_and_answers_in_pieces_are_refused(tmp_path, tiny_model_dir):
    def view(rows: list[dict], cls: Any, *overrides: str) -> Any:
        path = write_preferences(tmp_path, tiny_model_dir, "kto")
        helpers.write_jsonl(tmp_path / "train.jsonl", rows)
        recipe = load_recipe(str(path), list(overrides))
        data = prepare(recipe, load_tokenizer(recipe)).train
        return cls(data) if cls is LabelledTokens else cls(data, 256)

    good = [r for r in labelled_rows(8) if r["label"]]
    bad = [r for r in labelled_rows(8) if not r["label"]]
    for rows, word in ((good, "labelled true"), (bad, "labelled false")):
        with pytest.raises(UserError, match=word):
            view(rows, LabelledTokens)
    assert view(good, HeldOutLabels).rejected is None
    with pytest.raises(UserError, match="no held-out answer is desirable"):
        view(bad, HeldOutLabels)
    long = [{**good[0], "completion": "word " * 400}, *bad]
    with pytest.raises(UserError, match=r"train\.jsonl:1.*|split") as error:
        view(long, LabelledTokens, "data.long_documents=split")
    assert "train.jsonl:1" in str(error.value.where) and "long_documents" in str(error.value.fix)


# ---- held-out figures, and the best evaluation by them


@pytest.mark.parametrize("kind", ["dpo", "orpo", "kto", "simpo"])
def test_held_out_figures_agree_with_each_other_and_have_intervals(tmp_path, tiny_model_dir, kind):
    settings = {"train.learning_rate": 5e-3, "eval.forgetting": False, "export.automatic": False, "record.pack": False}
    path = write_preferences(tmp_path, tiny_model_dir, kind, **settings)
    assert train(load_recipe(str(path)), tmp_path / "run", quiet=True) == 0
    results = json.loads((tmp_path / "run" / "eval.json").read_text())
    before, after = results["before"], results["after"]
    names = {"preference_loss", "reward_margin", "preference_margin", "chosen_logp", "rejected_logp"}
    names |= {"reward_accuracy", "preference_accuracy"} if kind != "kto" else set()
    for figures in (before, after):
        assert names <= set(figures) and all(figures["ci"][name] is not None for name in names)
        for name in names:
            low, high = figures["ci"][name]
            assert low - 1e-9 <= figures[name] <= high + 1e-9
        difference = figures["chosen_logp"] - figures["rejected_logp"]
        assert figures["preference_margin"] == pytest.approx(difference, abs=1e-9)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    page = curves([*records, {"kind": "eval", "step": 4, **after}], {}, {})
    assert "preference loss of a pair or answer" in page and "Reward margin" in page and "supervised token" not in page
    assert names <= set(results["change"])
    assert results["change"]["preference_loss"]["better"] is True
    assert results["change"]["reward_margin"]["better"] is True
    moved = after["preference_margin"] - before["preference_margin"]
    if kind == "orpo":
        assert after["reward_margin"] == after["preference_margin"]  # means over tokens, without a reference
        assert after["preference_loss"] > -after["chosen_logp"]
    elif kind == "simpo":
        assert after["reward_margin"] == pytest.approx(2 * after["preference_margin"])  # beta, where none is given
    else:
        # Before the first step policy and reference are one model, to the bit.
        assert before["reward_margin"] == 0 and before["preference_loss"] == (math.log(2) if kind == "dpo" else 0.5)
        assert after["reward_margin"] == pytest.approx(0.1 * moved, abs=1e-9)
    if kind == "dpo":
        assert before["reward_accuracy"] == 0.5  # equal rewards count half
        kept = json.loads((tmp_path / "run" / REFERENCE_FILE).read_text())["held_out"]["eval"]
        assert len(unpacked(kept["own"])) == len(unpacked(kept["rejected"])) == 8
    if kind == "kto":
        assert after["rows"] == 8  # of sixteen: those that are worth predicting


def test_kto_counts_bits_and_answers_of_desirable_rows_alone(tmp_path, tiny_model_dir):
    """The figures of likelihood are those of a held-out set without the undesirable answers."""
    figures = {}
    for name in ("both", "other bad answers"):
        path = write_preferences(tmp_path / name, tiny_model_dir, "kto", **{**QUIET, "eval.generate_rows": 4})
        rows = labelled_rows(8, 500)
        if name != "both":
            rows = [{**r, "completion": r["completion"] if r["label"] else "zzz " + r["prompt"] * 3} for r in rows]
        helpers.write_jsonl(tmp_path / name / "eval.jsonl", rows)
        with trainer_of(path, tmp_path / name / "run") as trainer:
            figures[name] = trainer._evaluate("after", generate=True)
    one, other = figures.values()
    for key in ("bits_per_byte", "perplexity", "loss", "rows", "tokens", "text_bytes", "chosen_logp", "samples"):
        assert one[key] == other[key], key
    assert one["rejected_logp"] != other["rejected_logp"]


def test_the_best_evaluation_is_that_of_the_lowest_preference_loss(tmp_path, tiny_model_dir):
    """A third of the pairs is the wrong way round: the preference loss turns while chosen answers still get
    likelier.
    """
    settings = {
        **QUIET,
        "adapter.kind": "none",
        "eval.after": True,
        "eval.every_steps": 2,
        "eval.early_stopping": 2,
    }
    path = write_preferences(tmp_path, tiny_model_dir, "dpo", **settings)
    rows = pair_rows(32)
    for row in rows[::3]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    helpers.write_jsonl(tmp_path / "train.jsonl", rows)
    assert train(load_recipe(str(path)), tmp_path / "run", quiet=True) == 0
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    seen = [r for r in lines if r["kind"] == "eval"]
    best = min(seen, key=lambda r: r["preference_loss"])
    assert seen.index(best) == len(seen) - 3  # two evaluations without a better one, then the end
    assert min(seen, key=lambda r: r["loss"]) is not best  # the likelihood would have chosen another
    after = json.loads((tmp_path / "run" / "eval.json").read_text())["after"]
    assert after["preference_loss"] == pytest.approx(best["preference_loss"], rel=1e-6)


def test_what_the_best_evaluation_is_judged_by(tiny_recipe):
    def best(*overrides: str) -> Best:
        return Best(load_recipe(str(tiny_recipe), ["eval.every_steps=1", "eval.early_stopping=2", *overrides]))

    plain, accuracy = best(), best("methods.preference.kind=dpo", "eval.best_by=reward_accuracy")
    assert plain.by == "loss" and best("methods.preference.kind=kto").by == "preference_loss"
    assert [accuracy.improves({"reward_accuracy": x}, s) for s, x in enumerate((0.5, 0.7, 0.7, None))] == [
        True,
        True,
        False,
        False,
    ]
    assert accuracy.step == 1 and accuracy.exhausted
    again = best("methods.preference.kind=dpo", "eval.best_by=reward_accuracy")
    again.load(json.loads(json.dumps(accuracy.state())))
    assert again.state() == accuracy.state() and again.exhausted
    plain.load(accuracy.state())  # another figure says nothing about this one
    assert plain.step is None and plain.improves({"loss": 3.0}, 4) and not plain.exhausted


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "next-token cross-entropy over assistant turns"),
        (["data.supervise=all", "methods.goldfish.k=5"], "all tokens; one token in 5 withheld"),
        (["methods.preference={kind: dpo, beta: 0.3, label_smoothing: 0.1}"], "(DPO, beta 0.3, label smoothing 0.1)"),
        (["methods.preference={kind: dpo, loss: ipo}"], "identity preference optimisation of pairs (IPO, beta 0.1)"),
        (["methods.preference={kind: orpo, beta: 0.5}"], "0.5 x their log odds ratio"),
        (["methods.preference={kind: dpo, loss: sigmoid_norm, beta: 2}"], "(DPO, beta 2, a mean over tokens) relative"),
        (["methods.preference={kind: simpo}"], "of a token (SimPO, beta 2, gamma 1)"),
        (["methods.preference={kind: simpo, beta: 0.1, gamma: 0}"], "(SimPO, beta 0.1, gamma 0)"),
        (["methods.preference={kind: cpo}"], "(CPO, beta 0.1) and 1 x likelihood of chosen answers"),
        (["methods.preference={kind: cpo, nll_weight: 0}"], "log-probability (CPO, beta 0.1)"),
        (["methods.distill={teacher: org/name, weight: 0.25}"], "0.25 x Kullback-Leibler divergence of the student"),
        (["methods.preference={kind: kto, desirable_weight: 2}", "methods.neftune.alpha=7"], "weights 2 and 1"),
        (["data.train=[a.jsonl, {source: b.jsonl, share: 0.1}]"], "0.1 of the tokens replayed"),
        (
            [
                "methods.preference={kind: dpo, replay_weight: 0.5}",
                "data.train=[a.jsonl, {source: b.jsonl, share: 0.1}]",
            ],
            "0.5 x next-token cross-entropy over assistant turns of replayed rows",
        ),
    ],
)
def test_the_objective_in_words(tiny_recipe, overrides, words):
    found = objective(load_recipe(str(tiny_recipe), overrides))
    assert words in found
    assert ("NEFTune, alpha 7" in found) == any("neftune" in o for o in overrides)
    assert "changed by" not in found, "a block of ours has words of its own"
