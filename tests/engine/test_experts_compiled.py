"""Blocks with experts that are compiled (``parallel.compile``) compute what they compute as they are."""

from __future__ import annotations

import moe
import pytest
import torch

from aifactory_train.model.attention import PER_DOCUMENT, Documents, register
from aifactory_train.model.causal_lm import CausalLM
from aifactory_train.parallel.apply import prepare_blocks


def losses_and_gradients(family: str, compiled: bool) -> tuple[list[float], list[torch.Tensor]]:
    """Of two packs of other documents and lengths, one behind the other, with adapters on all experts."""
    register()
    model = moe.adapted(family, moe.recipe(), layers=2)
    model.config._attn_implementation = PER_DOCUMENT
    core = CausalLM(model)
    prepare_blocks(core, compute=None, checkpointing="none", compiled=compiled)
    losses = []
    for lengths in ([7, 9], [5, 6, 10]):
        total = sum(lengths)
        ids = torch.randint(4, 400, (1, total), generator=torch.Generator().manual_seed(total))
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        every = torch.arange(total - 1)
        loss = core(ids, positions, Documents.of(bounds, "cpu"), every, ids[0, 1:])
        loss.backward()
        losses.append(loss.item())
    return losses, [p.grad for p in core.parameters() if p.requires_grad and p.grad is not None]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_compiled_blocks_with_experts_compute_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, wanted = losses_and_gradients(family, compiled=False)
    whole, graphs = torch.compile, []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **more: whole(f, backend=backend, **more))
    torch._dynamo.reset()
    found, gradients = losses_and_gradients(family, compiled=True)
    assert graphs, "nothing was compiled"
    assert found == pytest.approx(plain, rel=1e-6)
    assert len(gradients) == len(wanted)
    for a, b in zip(gradients, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1e-6)
