"""Layers that carry a state from token to token stay inside documents: the same loss and gradients, packed or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_position_check import DELTA, SHAPE, configuration

from aifactory_train.model import attention, recurrent
from aifactory_train.model.attention import PER_DOCUMENT, Documents
from aifactory_train.model.causal_lm import CausalLM
from aifactory_train.parallel.apply import apply_activation_checkpointing

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2}
#: A layer with a state and one with attention, of every kind of state that transformers has.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {**DELTA, "layer_types": ["linear_attention", "full_attention"], "num_experts": 0},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 0,
                         "shared_intermediate_size": 64},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2, "head_dim": 16,
                "block_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1,
              "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128, "head_dim": 16},
    "mamba": {"state_size": 8, "num_hidden_layers": 2},
}  # fmt: skip
LENGTHS = (5, 1, 21, 20, 3)


def model_of(family: str) -> Any:
    from transformers import AutoModelForCausalLM

    attention.register()
    torch.manual_seed(0)
    shape = {**SHAPE, **FAMILIES[family]}
    if family == "mamba":
        shape = {k: v for k, v in shape.items() if "head" not in k and "max" not in k}
    config = configuration(family, **shape)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=PER_DOCUMENT)


def documents(lengths: Sequence[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, 400, (n,), generator=generator) for n in lengths]


def loss_of(core: CausalLM, tokens: list[torch.Tensor]) -> torch.Tensor:
    """Summed over every token but each document's first, in one pack."""
    lengths = [len(t) for t in tokens]
    ids = torch.cat(tokens)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    targets = torch.tensor([p for p in range(1, len(ids)) if p not in starts.tolist()], dtype=torch.int64)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return core(ids[None], positions, Documents.of(starts.int(), "cpu"), targets - 1, ids[targets])


def gradients(core: CausalLM) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in core.named_parameters() if p.grad is not None}
    core.zero_grad()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_has_the_loss_and_gradients_of_its_documents_alone(family):
    core = CausalLM(model_of(family)).train()
    assert core.stateful
    tokens = documents(LENGTHS)
    alone = sum(loss_of(core, [t]) for t in tokens if len(t) > 1)
    alone.backward()  # type: ignore[union-attr]
    expected = gradients(core)
    packed = loss_of(core, tokens)
    packed.backward()
    assert packed.item() == pytest.approx(alone.item(), rel=1e-6)  # type: ignore[union-attr]
    found = gradients(core)
    assert found.keys() == expected.keys()
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * norm, name
    assert torch.stack([g.norm() for g in found.values()]).norm().item() == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("family", ["qwen3_next", "mamba"])
def test_what_is_computed_again_has_the_boundaries_of_its_own_micro_batch(family):
    """Two forward passes with other documents before one backward, as preference methods have them."""
    core = CausalLM(model_of(family)).train()
    first, second = documents(LENGTHS), documents((17, 2, 30))
    (loss_of(core, first) + loss_of(core, second)).backward()
    expected = gradients(core)
    apply_activation_checkpointing(core, "full")
    total = loss_of(core, first) + loss_of(core, second)
    total.backward()
    for name, gradient in gradients(core).items():
        assert torch.equal(gradient, expected[name]), name


def test_rows_hold_every_token_once_and_little_padding():
    lengths = [7, 0, 100, 1, 96, 33, 7, 7, 1]
    rows = recurrent.Rows(Documents.of(torch.tensor([0, *lengths]).cumsum(0), "cpu"), torch.device("cpu"))
    taken = torch.cat([index.flatten()[kept] for index, kept in rows.groups])
    assert torch.equal(taken[rows.order], torch.arange(sum(lengths)))
    assert len(rows.groups) < len(lengths) - 1
    assert sum(i.numel() for i, _ in rows.groups) <= (1 + recurrent.MOST_PADDING) * sum(lengths)


def test_rows_that_are_documents_are_computed_as_they_are():
    core = CausalLM(model_of("mamba")).eval()
    seen = []
    mixer = core.backbone.get_submodule(core.stateful[0])
    mixer.in_proj.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[:2]))
    ids = torch.stack(documents((9, 9)))
    bounds = torch.tensor([0, 9, 18])
    core.logits(ids, torch.arange(9).repeat(2, 1), Documents.of(bounds, "cpu"), torch.arange(18))
    assert seen == [(2, 9)]


@pytest.mark.slow
def test_compiled_blocks_are_told_the_boundaries():
    core = CausalLM(model_of("qwen3_next")).train()
    tokens = documents(LENGTHS)
    expected = loss_of(core, tokens)
    for block in core.backbone.layers:
        block.forward = torch.compile(block.forward, dynamic=True, backend="eager")
    assert loss_of(core, tokens).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("family", ["mamba", "qwen3_next", "granitemoehybrid"])
def test_answers_are_those_of_the_whole_text_read_again(family):
    """Mamba takes no cache of keys and values, and was given one that it ignored."""
    from aifactory_train.evaluation.generate import generate

    core = CausalLM(model_of(family)).eval()
    prompts = [t.tolist() for t in documents((4, 9))]
    found = generate(core, prompts, max_new_tokens=4, stop_ids=[], pad_id=3, device="cpu")
    for prompt, answer in zip(prompts, found, strict=True):
        text = list(prompt)
        for token in answer:
            with attention.decoding(core.backbone), torch.no_grad():
                logits = core.model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
            assert token == int(logits.argmax())
            text.append(token)
