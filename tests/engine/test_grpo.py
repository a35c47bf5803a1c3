"""GRPO in the loop: what is sampled, what is judged and how, what is refused, and that a run goes on to the bit."""

from __future__ import annotations

import contextlib
import json
import re
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch

from aifactory_train.config.loading import load_recipe
from aifactory_train.config.objective import objective
from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.evaluation.sampling import Decoding, Sampling, draw, stream_keys, uniforms
from aifactory_train.methods.completions import FILE
from aifactory_train.methods.rewards import rewards_of
from aifactory_train.methods.rollouts import SampledAnswer
from aifactory_train.model import attention
from aifactory_train.model.causal_lm import CausalLM
from aifactory_train.parallel.traits import ENGINES, refuse_what_it_cannot_do
from aifactory_train.parallel.world import join_world, leave_world
from aifactory_train.run.folder import RunFolder
from aifactory_train.run.outcome import Attempt
from aifactory_train.training.stopping import StopChannels
from aifactory_train.training.trainer import Trainer

GRPO: dict[str, Any] = {
    "reward": [{"pattern": "[a-m]"}],
    "group": 4,
    "max_new_tokens": 6,
    "temperature": 1.5,
    "stop": [*string.ascii_letters, *string.digits],
}
QUIET: dict[str, Any] = {
    "adapter.kind": "none",
    "train.batch_rows": 3,
    "train.learning_rate": 3e-3,
    "train.max_steps": 6,
    "train.schedule": "constant",
    "eval.before": False,
    "eval.after": False,
    "export.automatic": False,
    "record.pack": False,
}


@pytest.fixture
def talker(tiny_model_dir: Path) -> Path:
    """A model that says something else each time; with :data:`GRPO`'s stops it ends most answers within six tokens."""
    return tiny_model_dir


def write(folder: Path, model: Path, grpo: dict[str, Any] | None = None, **settings: Any) -> Path:
    return helpers.write_recipe(
        folder, model, rows=12, eval_rows=3, settings={"methods.grpo": {**GRPO, **(grpo or {})}, **QUIET, **settings}
    )


@contextlib.contextmanager
def trainer_of(path: Path, folder: Path, *overrides: str, resume: int | None = None) -> Iterator[Trainer]:
    """A trainer before its first step, in this process."""
    recipe, world = load_recipe(str(path), list(overrides)), join_world(120, 1)
    run = RunFolder(folder)
    run.path.mkdir(parents=True, exist_ok=True)
    try:
        with Attempt(run, 0, 0, 1, timeout_s=120) as attempt:
            yield Trainer(recipe, run, world, StopChannels(None), attempt, None, resume, True)
    finally:
        leave_world()


# ---- sampling


def shares(logits: torch.Tensor, how: Sampling) -> np.ndarray:
    """The exact distribution, written down another way than the sampler's: sets of tokens, one at a time."""
    p = torch.softmax(logits.double() / how.temperature, -1).numpy()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept = order[: how.top_k or len(order)]
    mass, chosen = 0.0, []
    for i in kept:
        if chosen and mass >= how.top_p * p[kept].sum():
            break
        chosen.append(i)
        mass += p[i]
    out = np.zeros(len(p))
    out[chosen] = p[chosen] / p[chosen].sum()
    return out


@pytest.mark.parametrize(
    "how", [Sampling(), Sampling(0.7), Sampling(1.3, top_p=0.8), Sampling(1.0, top_k=5), Sampling(0.9, 0.7, 12)]
)
def test_sampled_tokens_have_the_exact_distribution(how):
    """Chi-square of 20,000 draws, each of a stream of its own, at the 0.1 % level; what is cut off is never drawn."""
    from scipy.stats import chi2

    logits = 2 * torch.randn(24, generator=torch.Generator().manual_seed(3))
    count = 20_000
    numbers = torch.from_numpy(uniforms(stream_keys(17, np.arange(count)), 4))
    tokens, logps = draw(logits.expand(count, -1), numbers, how)
    expected = count * shares(logits, how)
    seen = np.bincount(tokens.numpy(), minlength=24)
    assert seen[expected == 0].sum() == 0
    there = expected > 0
    statistic = ((seen - expected)[there] ** 2 / expected[there]).sum()
    assert statistic < chi2.ppf(0.999, there.sum() - 1)
    plain = torch.log_softmax(logits / how.temperature, -1)
    torch.testing.assert_close(logps, plain[tokens])


def test_a_number_at_either_end_gives_a_token_that_may_be_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    tokens, _ = draw(logits, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), Sampling())
    assert tokens.tolist() == [1, 2]


def wrapped(seed: int = 0) -> CausalLM:
    attention.register()
    model = helpers.tiny_model("llama", seed=seed, tied=False)
    model.set_attn_implementation(attention.PER_DOCUMENT)
    return CausalLM(model)


def decoded(core: CausalLM, prompts: list[list[int]], keys: np.ndarray, **more: Any) -> list[list[Any]]:
    how = {"max_new_tokens": 8, "stop_ids": [2, 40, 41, 42], "pad_id": 3, "device": "cpu", "how": Sampling(1.5), **more}
    decoding = Decoding(core, prompts, keys, **how)
    while decoding.advance():
        pass
    return decoding.answers


def test_answers_are_those_of_each_prompt_alone_and_log_probabilities_those_of_the_loss():
    """Unequal prompts, padded and cached, rows leaving: what plain transformers gives each token of each answer."""
    core, plain = wrapped(), helpers.tiny_model("llama", tied=False)
    draw_from = torch.Generator().manual_seed(5)
    prompts = [torch.randint(4, 400, (n,), generator=draw_from).tolist() for n in (3, 11, 7)]
    keys = np.stack([stream_keys(1, 0, unit, np.arange(5)) for unit in range(3)])
    stops = list(range(2, 80))
    together = decoded(core, prompts, keys, stop_ids=stops)
    lengths = {len(one.tokens) for group in together for one in group}
    assert len(lengths) > 2 and any(one.ended for group in together for one in group)
    for unit, prompt in enumerate(prompts):
        assert [one.tokens for one in decoded(core, [prompt], keys[unit : unit + 1], stop_ids=stops)[0]] == [
            one.tokens for one in together[unit]
        ]
        assert len({tuple(one.tokens) for one in together[unit]}) > 1  # each answer has a stream of its own
        for one in together[unit]:
            assert one.ended == (one.tokens[-1] in stops) and not set(one.tokens[:-1]) & set(stops)
            with torch.no_grad():
                logits = plain(torch.tensor([prompt + one.tokens])).logits[0, len(prompt) - 1 : -1] / 1.5
            expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(one.tokens)[:, None]).squeeze(1)
            np.testing.assert_allclose(one.logps, expected.numpy(), rtol=1e-4, atol=1e-5)


# ---- steps


def test_a_step_learns_from_its_own_answers_and_says_so(tmp_path, talker):
    """Ratios are 1 and the KL 0 where the policy that samples is the one that learns; the prompt ends before the
    expected answer; figures are those of the answers that are kept."""
    path = write(tmp_path, talker, {"keep": 4, "kl": 0.1})
    with trainer_of(path, tmp_path / "run") as trainer:
        record = trainer.train_step()
        now = trainer.method.now
        assert len(now.answers) == 12 and now.totals.shape == (3, 4)
        assert record["rows"] == 3 and record["tokens"] == int(now.lengths.sum())
        assert record["supervised_tokens"] == sum(len(a.tokens) for a in now.answers)
        assert record["reward"] == pytest.approx(now.totals.mean()) and record["reward_std"] > 0
        assert record["completion_tokens"] == pytest.approx(record["supervised_tokens"] / 12)
        assert record["truncated"] == sum(not a.ended for a in now.answers) > 0
        assert record["kl"] == pytest.approx(0, abs=1e-9) and record["clipped"] == 0
        for answer in now.answers:
            question = trainer.data.train.questions[answer.unit]
            asked = trainer.tokenizer.decode(question.prompt_ids)
            assert asked.endswith("<|im_start|>assistant\n") and question.expected not in asked  # no leak
            judged = answer.ended and answer.text
            assert answer.rewards == ([float(re.search("[a-m]", answer.text) is not None)] if judged else None)
        later = trainer.train_step()
        assert later["kl"] > 1e-8  # the reference stays where it was
        kept = [json.loads(line) for line in (tmp_path / "run" / FILE).read_text().splitlines()]
        assert Counter(row["step"] for row in kept) == {1: 4, 2: 4}
        assert {"prompt", "completion", "rewards", "reward", "advantage", "truncated", "row_id"} <= set(kept[0])
    assert "GRPO" in objective(load_recipe(str(path)))


def test_what_failed_is_never_the_better_answer(tmp_path, talker):
    """A reward that likes nothing: answers that were cut off are the worst of their group all the same, or leave it."""
    (tmp_path / "mine.py").write_text("def reward(prompt, answer, expected):\n    return -1.0 - len(answer)\n")
    reward = [{"file": str(tmp_path / "mine.py")}]
    path = write(tmp_path, talker, {"reward": reward})
    with trainer_of(path, tmp_path / "run") as trainer:
        trainer.train_step()
        now = trainer.method.now
        failed = np.asarray([a.failed for a in now.answers]).reshape(now.totals.shape)
        assert failed.any() and not failed.all()
        for totals, bad in zip(now.totals, failed, strict=True):
            if bad.any() and not bad.all():
                assert totals[bad].max() <= totals[~bad].min() < 0
        made = now.answers
    with trainer_of(path, tmp_path / "again", "methods.grpo.truncated=leave_out") as trainer:
        record = trainer.train_step()
        now = trainer.method.now
        assert [a.tokens.tolist() for a in now.answers] == [a.tokens.tolist() for a in made]
        assert record["supervised_tokens"] == sum(len(a.tokens) for a in made if not a.failed)
        assert len(now) == sum(not a.failed for a in made) < 12


@pytest.mark.parametrize("more", [{}, {"rollout_steps": 3, "kl": 0.1, "ratio": "sequence"}])
def test_a_resumed_run_goes_on_to_the_bit(tmp_path, talker, more):
    """Also in the middle of steps whose answers were sampled together."""
    path = write(tmp_path, talker, more)

    def told(record: dict[str, Any]) -> dict[str, Any]:
        timing = ("seconds", "tokens_per_s", "rollout_seconds", "memory_bytes")
        return {k: v for k, v in record.items() if k not in timing}

    with trainer_of(path, tmp_path / "run") as trainer:
        records = []
        for step in range(4):
            records.append(told(trainer.train_step()))
            if step == 1:
                trainer._save(wait=True)
        wanted = {n: p.detach().clone() for n, p in trainer.engine.core.named_parameters()}
        if more:
            assert records[2]["kl"] > 0 and "reference" in trainer.report.lines[-1]
    with trainer_of(path, tmp_path / "run", resume=2) as trainer:
        assert [told(trainer.train_step()) for _ in range(2)] == records[2:]
        for name, parameter in trainer.engine.core.named_parameters():
            assert torch.equal(parameter, wanted[name]), name
        steps = [json.loads(line)["step"] for line in (tmp_path / "run" / FILE).read_text().splitlines()]
        assert steps == [1, 1, 2, 2, 3, 3, 4, 4]


def test_answers_sampled_ahead_are_those_of_the_steps_own_prompts(tmp_path, talker):
    path = write(tmp_path, talker, {"rollout_steps": 3})
    with trainer_of(path, tmp_path / "run") as trainer:
        for _ in range(4):
            documents, _ = trainer.sampler.step(trainer.state.cursor)
            trainer.train_step()
            assert [a.unit for a in trainer.method.now.answers] == np.repeat(documents, 4).tolist()


def test_packed_answers_count_as_padded_ones_in_several_micro_batches(tmp_path, talker):
    """One step under both: the same answers, loss and gradient norm, for each thing that a loss is a mean over."""
    for loss in ("grpo", "dapo", "dr_grpo"):
        path, found = write(tmp_path / loss, talker, {"loss": loss, "scale": "none"}), []
        for name, overrides in {"packed": [], "padded": ["data.batching=padded", "train.grad_accum=3"]}.items():
            with trainer_of(path, tmp_path / loss / name, *overrides) as trainer:
                record = trainer.train_step()
                answers = [answer.tokens.tolist() for answer in trainer.method.now.answers]
                found.append((record, answers))
        (packed, mine), (padded, theirs) = found
        assert mine == theirs and (packed["micro_batches"], padded["micro_batches"]) == (1, 3)
        assert packed["grad_norm"] > 0
        for key in ("loss", "grad_norm", "reward", "kl"):
            assert packed[key] == pytest.approx(padded[key], rel=1e-4, abs=1e-6), (loss, key)


# ---- rewards


def test_rewards_by_name_pattern_and_file(tmp_path, tiny_model_dir):
    (tmp_path / "mine.py").write_text("def short(prompt, answer, expected):\n    return len(answer) < 4\n")
    reward = [
        "numeric_match",
        {"metric": "valid_json", "weight": 0.5},
        {"pattern": r"^\d+$"},
        {"file": str(tmp_path / "mine.py"), "function": "short", "weight": -1},
    ]
    recipe = load_recipe(str(write(tmp_path, tiny_model_dir, {"reward": reward})))
    found = rewards_of(recipe)
    assert [(r.name, r.weight) for r in found] == [
        ("numeric_match", 1),
        ("valid_json", 0.5),
        ("pattern", 1),
        ("short", -1),
    ]
    assert [r("Q", "12", "it is 12.0") for r in found] == [1, 1, 1, 1]
    assert [r("Q", "about {", "12") for r in found] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 1 / 0", "raised ZeroDivisionError"),
        ("return float('nan')", "returned nan"),
        ("return None", "returned NoneType"),
        ("return 'good'", "returned str"),
    ],
)
def test_a_reward_that_fails_ends_the_run_by_name(tmp_path, talker, body, said):
    (tmp_path / "mine.py").write_text(f"def worth(prompt, answer, expected):\n    {body}\n")
    path = write(tmp_path, talker, {"reward": [{"file": str(tmp_path / "mine.py"), "function": "worth"}]})
    reward = rewards_of(load_recipe(str(path)))[0]
    with pytest.raises(RunFailed, match=f"the reward 'worth' {said}") as failed:
        reward("Q", "A", "E")
    if "raised" in said:
        assert str(tmp_path / "mine.py") + ":2" in str(failed.value)


def test_a_constant_reward_ends_the_run_by_name(tmp_path, talker):
    path = write(tmp_path, talker, {"reward": [{"pattern": "^"}], "no_signal_steps": 2, "truncated": "leave_out"})
    with trainer_of(path, tmp_path / "run") as trainer:
        record = trainer.train_step()
        assert record["flat_groups"] == 1 and record["loss"] == 0 and record["grad_norm"] == 0
        with pytest.raises(RunFailed, match=r"for 2 steps .* same reward.*pattern 1"):
            trainer.train_step()


@pytest.mark.parametrize(
    ("file", "function", "word"),
    [
        (None, "reward", "is not there"),
        ("x = 1", "reward", "has no function"),
        ("def reward(a): ...", "reward", "three texts"),
        ("import nothing_of_this_name", "reward", "cannot be imported"),
    ],
)
def test_files_that_hold_no_reward_are_refused(tmp_path, tiny_model_dir, file, function, word):
    if file is not None:
        (tmp_path / "mine.py").write_text(file + "\n")
    path = write(tmp_path, tiny_model_dir, {"reward": [{"file": str(tmp_path / "mine.py"), "function": function}]})
    with pytest.raises(UserError, match=word):
        rewards_of(load_recipe(str(path)))


# ---- what is refused


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("methods.grpo.group=1", "a group of one"),
        ("methods.grpo.reward=[]", "at least 1"),
        ("methods.grpo.reward={python_tests: true}", "unit tests run answers as programs"),
        ("methods.grpo.reward={model: acme/reward}", "second model in memory"),
        ("methods.grpo.reward={metric: exact_match, pattern: a}", "one of metric, pattern and file"),
        ("methods.grpo.reward={pattern: '('}", "no regular expression"),
        ("methods.grpo.reward=[exact_match, exact_match]", "stands there twice"),
        ("methods.grpo.rollouts=vllm", "vllm is not offered"),
        ("methods.grpo.max_new_tokens=256", "no room for a prompt"),
        ("methods.neftune={alpha: 5}", "another model than the one that sampled"),
        ("train.batch_tokens=512", "number of prompts"),
        ("guard.spike_factor=3", "lies around 0"),
        ("data.long_documents=split", "pieces of questions"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, tiny_model_dir, override, word):
    path = write(tmp_path, tiny_model_dir)
    overrides = [override] if not override.startswith("train.batch_tokens") else [override, "train.batch_rows=null"]
    with pytest.raises(UserError, match=word):
        load_recipe(str(path), overrides)


def test_engines_that_were_not_tried_are_refused(tmp_path, tiny_model_dir):
    path = write(tmp_path, tiny_model_dir)
    for engine, traits in ENGINES.items():
        recipe = load_recipe(str(path), [f"parallel.engine={engine}"])
        with contextlib.nullcontext() if traits.samples else pytest.raises(UserError, match="has not been tried"):
            refuse_what_it_cannot_do(recipe, engine)
    assert not ENGINES["zero3"].samples and ENGINES["fsdp2"].samples


def test_the_file_of_a_reward_lies_beside_the_recipe(tmp_path, tiny_model_dir):
    path = write(tmp_path, tiny_model_dir, {"reward": [{"file": "./mine.py"}]})
    (tmp_path / "mine.py").write_text("def reward(prompt, answer, expected):\n    return 1\n")
    recipe = load_recipe(str(path))
    assert recipe.methods.grpo.reward[0].file == str(tmp_path / "mine.py")
    assert rewards_of(recipe)[0]("Q", "A", "E") == 1


def test_prompts_without_room_are_left_out_by_number_and_stops_must_be_tokens(tmp_path, talker):
    path = write(tmp_path, talker)
    rows = helpers.chat_rows(12)
    rows[4]["messages"][0]["content"] += " really" * 8
    helpers.write_jsonl(tmp_path / "train.jsonl", rows)
    with trainer_of(path, tmp_path / "run", "methods.grpo.max_new_tokens=200") as trainer:
        assert len(trainer.data.train) == 11
        assert any("1 (prompt too long)" in w for w in trainer.data.report["warnings"])
    everything = ["methods.grpo.max_new_tokens=250"]
    with pytest.raises(UserError, match="no row can be asked"), trainer_of(path, tmp_path / "none", *everything):
        pass
    with (
        pytest.raises(UserError, match="answers end at one"),
        trainer_of(path, tmp_path / "stop", "methods.grpo.stop=[nonsense words]"),
    ):
        pass


def test_answers_survive_a_checkpoint_to_the_bit():
    answer = SampledAnswer(
        3, np.asarray([5, 400], dtype=np.int32), np.asarray([-0.1, -7.25], dtype=np.float32), True, "ü", [0.1]
    )
    again = SampledAnswer.unpacked(json.loads(json.dumps(answer.packed())))
    assert again.tokens.tolist() == [5, 400] and (again.logps == answer.logps).all()
    assert (again.unit, again.ended, again.text, again.rewards) == (3, True, "ü", [0.1])
