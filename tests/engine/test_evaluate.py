"""Held-out figures equal a plain computation on full logits, whatever the batching and the number of ranks."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from aifactory_train.config.loading import load_recipe
from aifactory_train.core.errors import UserError
from aifactory_train.data import load_tokenizer, prepare
from aifactory_train.evaluation import evaluate as ev
from aifactory_train.evaluation.answers import TEXT_PROMPT_TOKENS, answer_rows, answers, chat_template, question
from aifactory_train.evaluation.likelihood import HeldOut, _micro_batches, choose_rows, held_out
from aifactory_train.evaluation.memorisation import MEMORY_LEAST, MEMORY_TOKENS, memory_probe, probe_memory
from aifactory_train.evaluation.results import SetResult
from aifactory_train.model.attention import PER_DOCUMENT, register
from aifactory_train.model.causal_lm import CausalLM, Forward

ANSWERS = {"eval.metrics": ["bits_per_byte", "perplexity", "exact_match", "token_f1"], "eval.generate_rows": 5}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_model_dir):
    """(recipe, tokenizer, data) of the tiny recipe with 10 held-out rows."""
    path = helpers.write_recipe(tmp_path_factory.mktemp("recipe"), tiny_model_dir, eval_rows=10, settings=ANSWERS)
    recipe = load_recipe(str(path))
    tokenizer = load_tokenizer(recipe)
    return recipe, tokenizer, prepare(recipe, tokenizer)


@pytest.fixture(scope="module")
def wrapped(tiny_model_dir):
    register()
    model = helpers.tiny_model("llama")
    model.set_attn_implementation(PER_DOCUMENT)
    return CausalLM(model)


def score(module, prepared, **more) -> HeldOut:
    _, _, data = prepared
    options = {"max_rows": 100, "batching": "packed", "pad_id": 3, "device": "cpu", "micro_batch_tokens": 512}
    return held_out(module, data.evals["eval"], **{**options, **more})


def by_hand(tokenizer) -> list[tuple[float, float, int, int, int]]:
    """(NLL of supervised tokens, of text tokens, their counts, bytes) of the held-out rows from transformers alone."""
    plain = helpers.tiny_model("llama")
    out = []
    for row in helpers.chat_rows(10, start=500):
        question, answer = (m["content"] for m in row["messages"])
        head = tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").input_ids
        body = tokenizer(answer).input_ids
        ids = torch.tensor([*head, *body, tokenizer.convert_tokens_to_ids("<|im_end|>")])
        with torch.no_grad():
            nll = F.cross_entropy(plain(ids[None]).logits[0, :-1].double(), ids[1:], reduction="none")[len(head) - 1 :]
        assert len(nll) == len(body) + 1
        out.append((nll.sum().item(), nll[:-1].sum().item(), len(nll), len(body), len(answer.encode())))
    return out


def test_figures_equal_a_computation_by_hand(prepared, wrapped):
    _, tokenizer, _ = prepared
    found, expected = score(wrapped, prepared), np.array(by_hand(tokenizer))
    assert found.rows == 10
    np.testing.assert_allclose(found.nll, expected[:, 0], rtol=1e-6)
    np.testing.assert_allclose(found.text_nll, expected[:, 1], rtol=1e-6)
    np.testing.assert_array_equal(found.tokens, expected[:, 2])
    np.testing.assert_array_equal(found.text_bytes, expected[:, 4])
    loss = expected[:, 0].sum() / expected[:, 2].sum()
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    # text only: the end of turn is in the loss but not in the bits
    assert found.bits_per_byte == pytest.approx(expected[:, 1].sum() / math.log(2) / expected[:, 4].sum(), rel=1e-6)


@pytest.mark.parametrize("options", [{"batching": "padded"}, {"micro_batch_tokens": 1}, {"micro_batch_tokens": 10**6}])
def test_batching_changes_nothing(prepared, wrapped, options):
    a, b = score(wrapped, prepared), score(wrapped, prepared, **options)
    for name in ("nll", "tokens", "text_nll", "text_bytes"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-5)


class _Counting(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls, self.modes = inner, 0, []

    def forward(self, *args, **kwargs):
        self.calls += 1
        self.modes.append(self.inner.training)
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_rows_and_call_the_model_equally_often(prepared, wrapped, monkeypatch, ranks):
    """Each rank's sums are captured where they would be reduced; together they are those of one process."""
    parts, calls = [], []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: parts.append(tensor.clone()))
    for rank in range(ranks):
        module = _Counting(wrapped)
        score(module, prepared, rank=rank, world_size=ranks, micro_batch_tokens=128)
        calls.append(module.calls)
    assert len(set(calls)) == 1
    assert calls[0] >= 2  # there was something to share
    alone = score(wrapped, prepared)
    total = sum(parts).numpy()
    np.testing.assert_allclose(total[0], alone.nll, rtol=1e-6)
    np.testing.assert_array_equal(total[1], alone.tokens)
    owned = sum((part[1] > 0).int() for part in parts)
    assert (owned == 1).all()  # no row twice


def test_dropout_is_off_and_the_mode_comes_back(prepared):
    register()
    model = helpers.tiny_model("llama", attention_dropout=0.5)
    model.set_attn_implementation(PER_DOCUMENT)
    module = _Counting(CausalLM(model))
    module.train()
    first, second = score(module, prepared), score(module, prepared)
    assert module.training
    assert not any(module.modes)
    np.testing.assert_array_equal(first.nll, second.nll)


def test_rows_are_chosen_evenly():
    assert choose_rows(5, 10).tolist() == [0, 1, 2, 3, 4]
    chosen = choose_rows(1000, 11)
    assert len(chosen) == 11
    assert chosen[0] == 0 and chosen[-1] == 999
    assert np.ptp(np.diff(chosen)) <= 1


def test_micro_batches_hold_every_row_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 200, 60)
    for batching in ("packed", "padded"):
        batches = _micro_batches(lengths, 256, batching)
        assert sorted(r for b in batches for r in b) == list(range(60))
        for b in batches:
            cost = lengths[b].sum() if batching == "packed" else lengths[b].max() * len(b)
            assert cost <= 256 or len(b) == 1


def test_an_empty_set_is_refused(prepared, wrapped):
    with pytest.raises(UserError, match="no held-out rows"):
        held_out(
            wrapped,
            _Empty(),
            max_rows=5,
            batching="packed",
            pad_id=3,
            device="cpu",
            micro_batch_tokens=64,
        )


class _Empty:
    name = "nothing"
    lengths = np.zeros(0, dtype=np.int32)

    def __len__(self):
        return 0


# ---- answers


class _Oracle(torch.nn.Module):
    """Answers each known prompt with the given tokens and then the stop token, as a model with a cache would."""

    def __init__(self, config, replies: dict[tuple[int, ...], list[int]], stop: int):
        super().__init__()
        self.language_model = SimpleNamespace(config=config)
        self.own = self.stateful = False  # neither attention of its own nor recurrent layers
        self.backbone = SimpleNamespace(forward=lambda past_key_values: None)  # it takes a cache
        self.replies, self.stop, self.vocabulary = replies, stop, config.vocab_size
        self.state: list[list[int]] = []

    def forward(self, tokens, position_ids, *, attention_mask, cache, task):
        assert task is Forward.DECODE
        if tokens.shape[1] > 1:
            prompts = [tuple(row[mask.bool()].tolist()) for row, mask in zip(tokens, attention_mask, strict=True)]
            self.state = [[*self.replies[p], self.stop] for p in prompts]
        if len(tokens) < len(self.state):  # rows that have ended have left, all at once
            self.state = [left for left in self.state if left]
        assert len(tokens) == len(self.state)
        logits = torch.zeros(len(tokens), self.vocabulary)
        for i, left in enumerate(self.state):
            logits[i, left.pop(0) if left else 0] = 1.0  # what follows the stop is nobody's
        return logits


def oracle(prepared, wrong: int = 0) -> _Oracle:
    """Knows the answers of the held-out rows but for the first ``wrong`` ones."""
    _, tokenizer, data = prepared
    template = chat_template(tokenizer)
    replies = {}
    for i in range(10):
        q = question(data.evals["eval"], i, tokenizer, template)
        replies[tuple(q.prompt_ids)] = tokenizer("nothing" if i < wrong else q.expected).input_ids
    return _Oracle(helpers.tiny_config("llama"), replies, tokenizer.convert_tokens_to_ids("<|im_end|>"))


def how(**more):
    return {"device": "cpu", "rank": 0, "world_size": 1, "autocast": None, "pad_id": 3, **more}


def answered(prepared, recipe, wrong: int = 0) -> SetResult:
    """All held-out rows, scored by nothing and answered by the oracle."""
    _, tokenizer, data = prepared
    rows = len(data.evals["eval"])
    result = SetResult(data.evals["eval"], HeldOut(np.arange(rows), *np.ones((4, rows))))
    result.asked, result.answers, result.cut_off = answer_rows(
        oracle(prepared, wrong), tokenizer, result, recipe, data.tokenizer_info, how()
    )
    return result


def test_answers_are_matched_with_expectations(prepared):
    recipe = _all_rows(prepared[0])
    out = ev._figures([answered(prepared, recipe, wrong=3)], recipe, generate=True, pooled=True)
    assert out["answered_rows"] == 10
    assert out["exact_match"] == out["token_f1"] == pytest.approx(0.7)
    low, high = out["ci"]["exact_match"]
    assert low < 0.7 < high
    assert len(out["samples"]) == recipe.eval.samples
    assert out["samples"][0]["answer"] == "nothing"
    assert out["samples"][0]["prompt"] == "What colour is the scarf number 500?"


def test_every_metric_of_the_configuration_is_computed(prepared):
    import typing

    from aifactory_train.config.schema import MetricName

    recipe = _all_rows(prepared[0])
    recipe.eval.metrics = list(typing.get_args(MetricName))
    out = ev._figures([answered(prepared, recipe, wrong=5)], recipe, generate=True, pooled=True)
    missing = set(recipe.eval.metrics) - set(out)
    assert missing == {"memorisation"}  # that one asks about training rows: tested below
    for name in set(recipe.eval.metrics) - missing:
        assert out[name] is not None and out["ci"][name] is not None, name
    assert out["accuracy"] == out["exact_match"] == 0.5
    json.dumps(out, allow_nan=False)


def test_slices_add_up_to_the_whole(tmp_path, tiny_model_dir, wrapped):
    path = helpers.write_recipe(tmp_path, tiny_model_dir, settings=ANSWERS)
    rows = helpers.chat_rows(12, start=500)
    for number, row in enumerate(rows):
        row["language"] = "fi" if number % 3 else "is"
        row["label"] = "warm" if number % 2 else "cold"
    helpers.write_jsonl(tmp_path / "eval.jsonl", rows)
    recipe = load_recipe(str(path), ["eval.generate_rows=100", "eval.max_new_tokens=2"])
    tokenizer = load_tokenizer(recipe)
    data = prepare(recipe, tokenizer)
    out = ev.evaluate(wrapped, tokenizer, data, recipe, device="cpu", rank=0, world_size=1, generate=True)
    slices = out["slices"]
    assert {
        name: {v: block["rows"] for v, block in values.items()} for name, values in slices.items() if name != "length"
    } == {
        "language": {"fi": 8, "is": 4},
        "label": {"cold": 6, "warm": 6},
    }
    assert len(slices["length"]) == 3
    for values in slices.values():
        blocks = values.values()
        assert sum(b["rows"] for b in blocks) == sum(b["answered_rows"] for b in blocks) == 12
        weighted = sum(b["bits_per_byte"] * b["text_bytes"] for b in blocks) / sum(b["text_bytes"] for b in blocks)
        assert out["bits_per_byte"] == pytest.approx(weighted, rel=1e-9)
        assert out["token_f1"] == pytest.approx(sum(b["token_f1"] * b["rows"] for b in blocks) / 12)
    private = recipe.model_copy(deep=True)
    private.privacy.profile = "sensitive"
    again = ev.evaluate(wrapped, tokenizer, data, private, device="cpu", rank=0, world_size=1, generate=True)
    assert set(again["slices"]) == {"language", "length"}  # labels are text
    recipe.eval.slices = False
    assert "slices" not in ev.evaluate(
        wrapped, tokenizer, data, recipe, device="cpu", rank=0, world_size=1, generate=True
    )


def test_rows_alike_are_not_sliced():
    from aifactory_train.metrics.slices import by_length, tags

    assert by_length([5, 5, 5, 5, 5, 5]) is None
    assert by_length([1, 2, 3]) is None
    assert tags([{}, {}], [3, 4], [None, None]) == {}
    assert tags([{}] * 4, [3] * 4, ["a", "b", "c", "d"]) == {}  # every row its own label: no classes
    assert tags([{}] * 4, [3] * 4, ["a", "b", "b", "a"]) == {"label": ["a", "b", "b", "a"]}


# ---- memorisation and forgetting


def test_memorisation_is_found_where_it_is_and_not_on_held_out_rows(prepared):
    """A model that continues every training document exactly, and knows no other."""
    recipe, tokenizer, data = prepared
    recipe = recipe.model_copy(deep=True)
    recipe.eval.generate_rows = 16
    known = {}
    for index in range(len(data.train)):
        probe = memory_probe(data.train, index)
        if probe is not None:
            known[tuple(probe[0])] = probe[1]
    assert len(known) > 20

    class Recaller(_Oracle):
        def forward(self, tokens, position_ids, *, attention_mask, cache, task):
            if tokens.shape[1] > 1:
                prompts = [tuple(row[mask.bool()].tolist()) for row, mask in zip(tokens, attention_mask, strict=True)]
                self.replies = {p: known.get(p, [5, 6, 7]) for p in prompts}
            return super().forward(tokens, position_ids, attention_mask=attention_mask, cache=cache, task=task)

    module = Recaller(helpers.tiny_config("llama"), {}, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    figures = {"ci": {}, "replicates": {}}
    out = probe_memory(module, data, recipe, figures, how())
    assert out["memorisation"] == 1.0 and out["memorisation_held_out"] == 0.0
    assert out["memorisation_rows"] >= 8
    assert figures["ci"]["memorisation"] == (1.0, 1.0)
    assert "memorisation" in figures["replicates"]


def test_a_probe_cuts_what_carries_loss(prepared):
    _, _, data = prepared
    for index in range(len(data.train)):
        probe = memory_probe(data.train, index)
        places = np.flatnonzero(data.train.mask(index))
        if probe is None:
            assert len(places) < 2 * MEMORY_LEAST
            continue
        prompt, wanted = probe
        assert places[0] < len(prompt) < places[-1]
        whole = data.train.tokens(index).tolist()
        assert whole[: len(prompt) + len(wanted)] == [*prompt, *wanted]
        assert MEMORY_LEAST <= len(wanted) <= MEMORY_TOKENS


def test_general_text_is_scored_completely_whatever_the_sequence_length(prepared, wrapped):
    from aifactory_train.evaluation.general import general_documents, passages

    recipe, tokenizer, _ = prepared
    whole = sum(len(row["text"].encode()) for row in passages())
    assert 2000 < whole < 6000  # small enough to be on by default
    for length in (64, 256, 512):
        recipe = recipe.model_copy(deep=True)
        recipe.data.sequence_length = length
        general = general_documents(recipe, tokenizer)
        assert max(general.lengths) <= length
        scored = sum(general.text_bytes(i) for i in range(len(general)))
        assert (
            whole - 8 * len(passages()) < scored <= whole
        )  # but for each passage's first token, which nothing predicts
        assert sum(int(general.mask(i).sum()) for i in range(len(general))) >= scored / 6


def block(bits: float) -> dict:
    return {"general": {"bits_per_byte": bits}, "loss": 1.0}


def test_forgetting_is_warned_of_and_eval_json_holds_no_replicates(prepared):
    recipe = prepared[0]
    assert recipe.eval.forgetting  # on by default
    out = ev.results_file({"before": {**block(1.0), "replicates": {"loss": "AAA="}}, "after": block(1.2)}, recipe)
    assert out["forgetting"]["change"] == pytest.approx(0.2)
    assert "20.0 % harder" in out["forgetting"]["warning"] or "20.0% harder" in out["forgetting"]["warning"]
    assert "replicates" not in out["before"]
    calm = ev.results_file({"before": block(1.0), "after": block(1.04)}, recipe)["forgetting"]
    assert calm["warning"] is None
    assert "forgetting" not in ev.results_file({"after": block(1.0)}, recipe)
    assert "forgetting" not in ev.results_file({"before": {"loss": 1.0}, "after": {"loss": 1.0}}, recipe)


def test_evaluate_measures_the_general_text_before_and_after_only(prepared, wrapped):
    recipe, tokenizer, data = prepared
    options = {"device": "cpu", "rank": 0, "world_size": 1}
    assert "general" not in ev.evaluate(wrapped, tokenizer, data, recipe, generate=False, **options)
    figures = ev.evaluate(wrapped, tokenizer, data, recipe, generate=True, **options)["general"]
    assert figures["ci"]["bits_per_byte"][0] < figures["bits_per_byte"] < figures["ci"]["bits_per_byte"][1]
    off = recipe.model_copy(deep=True)
    off.eval.forgetting = False
    assert "general" not in ev.evaluate(wrapped, tokenizer, data, off, generate=True, **options)


def test_changes_are_paired_between_two_evaluations(prepared, wrapped):
    recipe, tokenizer, data = prepared
    options = {"device": "cpu", "rank": 0, "world_size": 1, "generate": True}
    before = ev.evaluate(wrapped, tokenizer, data, recipe, **options)
    better = helpers.tiny_model("llama", seed=1)
    better.set_attn_implementation(PER_DOCUMENT)
    after = ev.evaluate(CausalLM(better), tokenizer, data, recipe, **options)
    out = json.loads(json.dumps(ev.results_file({"before": before, "after": after}, recipe)))
    for name in ("bits_per_byte", "loss", "perplexity", "exact_match", "token_f1"):
        low, high = out["change"][name]["ci"]
        assert low <= out["change"][name]["difference"] <= high, name
    same = ev.results_file({"before": before, "after": before}, recipe)["change"]["loss"]
    assert same["ci"] == (0.0, 0.0) and same["better"] is None


def _all_rows(recipe):
    changed = recipe.model_copy(deep=True)
    changed.eval.generate_rows = 100
    return changed


def test_ranks_share_the_questions(prepared, monkeypatch):
    _, tokenizer, data = prepared
    template = chat_template(tokenizer)
    asked = [question(data.evals["eval"], i, tokenizer, template) for i in range(10)]
    boxes = {}

    def gather(target, mine):
        boxes[len(boxes)] = mine
        target[:] = [boxes.get(i, {}) for i in range(len(target))]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    options = {"max_new_tokens": 200, "stop_ids": [2], "pad_id": 3, "device": "cpu", "world_size": 2}
    with pytest.raises(KeyError):  # rank 0 alone does not hold the other half
        answers(oracle(prepared), tokenizer, asked, rank=0, **options)
    texts = answers(oracle(prepared), tokenizer, asked, rank=1, **options)
    assert texts == [q.expected for q in asked]
    assert sorted([*boxes[0], *boxes[1]]) == list(range(10))
    assert not set(boxes[0]) & set(boxes[1])


def test_what_is_asked_of_a_row(tmp_path, tiny_model_dir):
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "One?"},
                {"role": "assistant", "content": "1"},
                {"role": "user", "content": "Two?"},
                {"role": "assistant", "content": "2"},
            ]
        },
        {"text": "The harbour froze in the long winter of that year, and nobody sailed before the end of April. " * 3},
        {"text": "Short."},
    ]
    chats = helpers.write_recipe(tmp_path / "chat", tiny_model_dir)
    helpers.write_jsonl(tmp_path / "chat" / "eval.jsonl", rows[:1])
    texts = helpers.write_recipe(tmp_path / "text", tiny_model_dir)
    helpers.write_jsonl(tmp_path / "text" / "eval.jsonl", rows[1:])
    helpers.write_jsonl(tmp_path / "text" / "train.jsonl", [{"text": f"Number {i} is here."} for i in range(20)])

    recipe = load_recipe(str(chats))
    tokenizer = load_tokenizer(recipe)
    template = chat_template(tokenizer)
    held = prepare(recipe, tokenizer).evals["eval"]
    asked = question(held, 0, tokenizer, template)
    assert (asked.prompt, asked.expected) == ("Two?", "2")
    shown = tokenizer.decode(asked.prompt_ids)
    assert shown.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert shown.endswith("<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n")

    held = prepare(load_recipe(str(texts)), tokenizer).evals["eval"]
    found = [question(held, i, tokenizer, template) for i in range(2)]
    assert sum(q is None for q in found) == 1  # the short text has no rest to ask for
    long = next(q for q in found if q is not None)
    assert len(long.prompt_ids) == TEXT_PROMPT_TOKENS
    assert (long.prompt + long.expected).startswith("The harbour froze")


def test_evaluate_gives_json_with_intervals_and_pools_its_sets(tmp_path, tiny_model_dir, wrapped):
    path = helpers.write_recipe(tmp_path, tiny_model_dir, settings=ANSWERS)
    helpers.write_jsonl(tmp_path / "other.jsonl", helpers.chat_rows(7, start=900))
    recipe = load_recipe(
        str(path), [f"data.eval=[{tmp_path}/eval.jsonl, {tmp_path}/other.jsonl]", "eval.max_new_tokens=4"]
    )
    tokenizer = load_tokenizer(recipe)
    data = prepare(recipe, tokenizer)
    assert len(data.evals) == 2
    out = ev.evaluate(wrapped, tokenizer, data, recipe, device="cpu", rank=0, world_size=1, generate=True)
    json.dumps(out, allow_nan=False)
    sets = out["sets"].values()
    assert out["rows"] == sum(s["rows"] for s in sets) == 19
    weighted = sum(s["bits_per_byte"] * s["text_bytes"] for s in sets) / sum(s["text_bytes"] for s in sets)
    assert out["bits_per_byte"] == pytest.approx(weighted, rel=1e-12)
    for name in ("bits_per_byte", "loss", "perplexity"):
        low, high = out["ci"][name]
        assert low <= out[name] <= high
    assert out["answered_rows"] == 10 and out["exact_match"] == 0.0
    assert len(out["samples"]) == recipe.eval.samples

    quick = ev.evaluate(wrapped, tokenizer, data, recipe, device="cpu", rank=0, world_size=1, generate=False)
    assert quick["loss"] == out["loss"]
    assert "samples" not in quick and "exact_match" not in quick


def test_an_evaluation_says_what_it_does_over_how_many_rows_and_about_how_long(prepared, wrapped):
    recipe, tokenizer, data = prepared
    recipe = recipe.model_copy(deep=True)
    recipe.eval.generate_rows, recipe.eval.samples, recipe.eval.max_new_tokens = 2, 2, 4
    said: list[str] = []
    ev.evaluate(wrapped, tokenizer, data, recipe, device="cpu", rank=0, world_size=1, generate=True, tell=said.append)
    scoring, takes, answering, at_most = said
    rows = sum(min(len(d), recipe.data.eval_rows) for d in data.evals.values())
    assert scoring.startswith(f"scoring {rows:,} held-out rows (") and re.search(r"take about \d+m\d\ds", takes)
    assert answering.startswith("answering 2 questions") and re.search(r"at most about \d+m\d\ds", at_most)
