"""The loss of GRPO and its variants: by hand on a toy, and what TRL computes of the same stored rollouts."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch

from aifactory_train.config.grpo_block import GrpoConfig
from aifactory_train.methods.grpo_loss import SUMS, GroupObjective, advantages, spread, token_weights, units_of
from aifactory_train.model.attention import PER_DOCUMENT, Documents, register
from aifactory_train.model.causal_lm import CausalLM

pytestmark = pytest.mark.filterwarnings("ignore")
GROUP, LONGEST = 4, 12


def settings(**more: Any) -> GrpoConfig:
    return GrpoConfig(**{"reward": "exact_match", "group": GROUP, "max_new_tokens": LONGEST, **more})


def objective(how: GrpoConfig, counts: list[int], worth: Any, sampled: Any, reference: Any = None) -> GroupObjective:
    each = np.asarray(worth, dtype=np.float32)
    return GroupObjective(
        settings=how,
        counts=counts,
        advantages=torch.from_numpy(each if how.ratio == "sequence" else np.repeat(each, counts)),
        sampled=torch.as_tensor(sampled, dtype=torch.float32),
        reference=None if reference is None else torch.as_tensor(reference, dtype=torch.float32),
        weights=torch.from_numpy(token_weights(how, counts)),
        sums=torch.zeros(len(SUMS), dtype=torch.float64),
    )


# ---- by hand


def test_advantages_by_hand():
    rewards = np.asarray([[1.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3], [2.0, np.nan, 1.0, np.nan]])
    deviation = math.sqrt(4 * 0.25 / 3)
    half = 0.5 / (deviation + 1e-4)
    pair = 0.5 / (math.sqrt(0.5) + 1e-4)
    expected = [[half, -half, -half, half], [0, 0, 0, 0], [pair, 0, -pair, 0]]
    np.testing.assert_allclose(advantages(rewards, "group"), expected, rtol=1e-12)
    np.testing.assert_allclose(
        advantages(rewards, "none"), [[0.5, -0.5, -0.5, 0.5], [0] * 4, [0.5, 0, -0.5, 0]], rtol=1e-12
    )
    np.testing.assert_allclose(spread(rewards), [deviation, 0, math.sqrt(0.5)], rtol=1e-12)
    assert spread(np.full((1, 7), 0.1)).tolist() == [0.0]  # not the 1e-17 that a mean leaves


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_ratios_and_clipping_by_hand(ratio):
    """Two answers of two tokens and one: each token's (answer's) ratio, cut above for a good one and below for a bad
    one only.
    """
    how = settings(ratio=ratio, loss="dapo", clip=0.2, clip_high=0.3)
    policy, sampled, worth = [-1.0, -2.0, -0.5], [-1.5, -1.0, -0.1], [1.0, -1.0]
    ratios = [math.exp(p - s) for p, s in zip(policy, sampled, strict=True)]
    if ratio == "sequence":
        mean = math.exp((0.5 - 1.0) / 2)
        plain = -mean * 2 - (-max(ratios[2], 0.8))  # the one answer's two tokens; the other is cut at 1 - clip
        clipped, count = 1, 2
    else:
        plain = -min(ratios[0], 1.3) - ratios[1] + max(ratios[2], 0.8)
        clipped, count = 2, 3
    assert ratios[0] > 1.3 and ratios[2] < 0.8
    values = torch.tensor(policy, requires_grad=True)
    given = objective(how, [2, 1], worth, sampled)
    loss = given.loss(lambda **_: -values)
    assert loss.item() == pytest.approx(plain, rel=1e-6)
    kl = sum(math.exp(s - p) - (s - p) - 1 for p, s in zip(policy, sampled, strict=True))
    assert given.sums.tolist() == pytest.approx([kl, 3, clipped, count], rel=1e-6)
    loss.backward()
    assert values.grad[2] == 0  # what is cut has no gradient
    assert (values.grad[0] == 0) == (ratio == "token")


@pytest.mark.parametrize(("loss", "expected"), [("grpo", 3), ("dapo", 9), ("dr_grpo", 36)])
def test_what_a_step_is_a_mean_over(loss, expected):
    how, lengths = settings(loss=loss), np.asarray([2, 3, 4])
    assert units_of(how, lengths) == expected
    assert token_weights(how, lengths.tolist()).sum() == pytest.approx({"grpo": 3, "dapo": 9, "dr_grpo": 9}[loss])
    assert units_of(how, np.zeros(0, dtype=np.int64)) == 1


# ---- TRL


def model_of(seed: int) -> Any:
    """A model with opinions: larger (tied) embeddings spread its logits."""
    model = helpers.tiny_model("llama", seed=seed)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(4)
    return model


def rollouts() -> tuple[list[list[int]], list[list[int]], np.ndarray]:
    """(prompts, answers, rewards ``[2, GROUP]``) of two groups, all of unequal length."""
    draw = torch.Generator().manual_seed(4)
    prompts = [torch.randint(4, 400, (n,), generator=draw).tolist() for n in (5, 9)]
    answers = [torch.randint(4, 400, (n,), generator=draw).tolist() for n in (3, 7, 12, 5, 1, 8, 4, 6)]
    return prompts, answers, np.asarray([[1.0, 0.0, 0.5, 0.0], [0.0, 0.0, 1.0, 1.0]])


def wrapped(seed: int) -> CausalLM:
    register()
    model = model_of(seed)
    model.set_attn_implementation(PER_DOCUMENT)
    return CausalLM(model, 16)


def packed(prompts: list[list[int]], answers: list[list[int]]) -> dict[str, torch.Tensor]:
    """All answers behind their prompts in one row."""
    rows = [prompts[i // GROUP] + answer for i, answer in enumerate(answers)]
    edges = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    positions = [
        np.arange(edge + len(row) - len(answer) - 1, edge + len(row) - 1)
        for edge, row, answer in zip(edges[:-1], rows, answers, strict=True)
    ]
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row]]),
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "documents": Documents.of(torch.from_numpy(edges.astype(np.int32)), "cpu"),
        "positions": torch.from_numpy(np.concatenate(positions)),
        "targets": torch.tensor([token for answer in answers for token in answer]),
    }


def trl_trainer(folder: Path, model_dir: Path, **options: Any) -> Any:
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = trl.GRPOConfig(
            output_dir=str(folder / "trl"),
            use_cpu=True,
            bf16=False,
            report_to=[],
            gradient_checkpointing=False,
            disable_tqdm=True,
            per_device_train_batch_size=8,
            num_generations=GROUP,
            max_completion_length=LONGEST,
            **options,
        )
        return trl.GRPOTrainer(
            model=model_of(0),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=args,
            train_dataset=Dataset.from_list([{"prompt": f"Q{i}"} for i in range(4)]),
            processing_class=AutoTokenizer.from_pretrained(model_dir),
        )


def padded(rows: list[list[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = [[3] * (width - len(r)) + r if left else r + [3] * (width - len(r)) for r in rows]
    mask = [[0] * (width - len(r)) + [1] * len(r) if left else [1] * len(r) + [0] * (width - len(r)) for r in rows]
    return torch.tensor(ids), torch.tensor(mask)


#: (ours, TRL's) settings of each variant that both have.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss": "grpo"}, {"loss_type": "grpo"}),
    "grpo with kl": ({"loss": "grpo", "kl": 0.3}, {"loss_type": "grpo", "beta": 0.3}),
    "dapo": ({"loss": "dapo", "clip_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo with kl": ({"loss": "dapo", "kl": 0.1}, {"loss_type": "dapo", "beta": 0.1}),
    "dr_grpo": ({"loss": "dr_grpo", "scale": "none"}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "gspo": (
        {"loss": "grpo", "ratio": "sequence", "clip": 0.03, "clip_high": 0.04},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    ),
    "gspo with kl, over tokens": (
        {"loss": "dapo", "ratio": "sequence", "kl": 0.2},
        {"loss_type": "dapo", "importance_sampling_level": "sequence", "beta": 0.2},
    ),
    "a temperature": ({"loss": "grpo", "temperature": 0.7}, {"loss_type": "grpo", "temperature": 0.7}),
}


@pytest.fixture(scope="module")
def peers(tmp_path_factory, tiny_model_dir) -> Any:
    """TRL's trainer, made once for each temperature; what else a variant changes of it is set before each loss."""
    pytest.importorskip("trl", reason="pip install trl")
    made: dict[float, Any] = {}

    def peer(temperature: float = 1.0, scale_rewards: str = "group", **options: Any) -> Any:
        if temperature not in made:
            made[temperature] = trl_trainer(tmp_path_factory.mktemp("trl"), tiny_model_dir, temperature=temperature)
        found = made[temperature]
        usual = {"beta": 0.0, "importance_sampling_level": "token", "epsilon": 0.2}
        chosen = {**usual, **options}
        chosen["epsilon_low"] = chosen.pop("epsilon")
        chosen.setdefault("epsilon_high", chosen["epsilon_low"])
        for key, value in chosen.items():
            assert hasattr(found, key), key
            setattr(found, key, value)
        found.args.use_bias_correction_kl = False  # of the KL estimate by the ratio; ours is the papers'
        found.model.zero_grad()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield peer


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_trl(peers, variant):
    """Loss to 1e-5 and the gradient of the embeddings, where the policy that sampled and the reference are other
    models.
    """
    mine, theirs = VARIANTS[variant]
    how, (prompts, answers, rewards) = settings(**mine), rollouts()
    policy, counts = wrapped(0), [len(a) for a in answers]
    batch = packed(prompts, answers)

    class Each:
        def loss(self, nll: Any) -> torch.Tensor:
            return -nll(reduction="none", temperature=how.temperature)

    with torch.no_grad():
        # near the policy, as after a few steps: some ratios are cut and most are not
        noise = torch.randn(sum(counts), generator=torch.Generator().manual_seed(1))
        sampled = policy(**batch, objective=Each()) + 0.2 * noise
        reference = wrapped(1)(**batch, objective=Each()) if how.kl else None
    worth = advantages(rewards, how.scale).ravel()
    given = objective(how, counts, worth, sampled, reference)
    units = units_of(how, np.asarray(counts))
    ours = policy(**batch, objective=given) / units
    ours.backward()
    assert 0 < given.sums[2] < given.sums[3]

    peer = peers(**theirs)
    prompt_ids, prompt_mask = padded([prompts[i // GROUP] for i in range(8)], left=True)
    answer_ids, answer_mask = padded(answers, left=False)

    def spread_out(values: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(answer_ids.shape)
        out[answer_mask.bool()] = values
        return out

    flat = torch.from_numpy(rewards.ravel())
    deviation = torch.from_numpy(rewards).std(1).repeat_interleave(GROUP) + 1e-4  # as TRL scales them
    centred = flat - torch.from_numpy(rewards).mean(1).repeat_interleave(GROUP)
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": answer_ids,
        "completion_mask": answer_mask,
        "advantages": (centred / deviation if how.scale == "group" else centred).float(),
        "old_per_token_logps": spread_out(sampled),
        "num_items_in_batch": torch.tensor(float(sum(counts))),
    }
    if reference is not None:
        inputs["ref_per_token_logps"] = spread_out(reference)
    peer.current_gradient_accumulation_steps = 1
    peer.model.train()
    expected = peer._compute_loss(peer.model, inputs)
    expected.backward()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
    mine_grad = policy.language_model.get_input_embeddings().weight.grad
    their_grad = peer.model.get_input_embeddings().weight.grad
    torch.testing.assert_close(mine_grad, their_grad, rtol=1e-3, atol=1e-5 * float(their_grad.abs().max()))
