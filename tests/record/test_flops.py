"""FLOPs counted from dimensions equal what torch counts on the real model, and a count by hand."""

from __future__ import annotations

import helpers
import pytest
import torch

from aifactory_train.model import flops, shapes

LENGTHS = [40, 17, 90]
SUPERVISED = 60


def torch_count(family: str, targets, recompute: str) -> tuple[float, shapes.ModelShape]:
    """FLOPs that ``FlopCounterMode`` sees in one forward and backward of our packed model (attention written out)."""
    from peft import LoraConfig, get_peft_model
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from aifactory_train.model import attention
    from aifactory_train.model.attention import Documents
    from aifactory_train.model.causal_lm import CausalLM
    from aifactory_train.model.cpu_matmul import as_torch
    from aifactory_train.parallel.apply import apply_activation_checkpointing

    attention.register()
    model = helpers.tiny_model(family)
    model.set_attn_implementation(attention.PER_DOCUMENT)
    model.config.use_cache = False
    shape = shapes.from_config(model.config.to_dict(), family)
    if targets:
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    core = CausalLM(model).train()
    apply_activation_checkpointing(core, recompute)
    ids = torch.randint(4, 300, (1, sum(LENGTHS)))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    edges = torch.tensor([0, 40, 57, 147], dtype=torch.int32)
    behind_head = torch.arange(5, 5 + SUPERVISED)

    # The chunked loss adds into the weight's gradient in place, an operator that torch's counter does not know.
    def in_place(_, a, b, *args, out_shape=None, **kwargs):
        return 2 * a[0] * a[1] * b[1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})
    with as_torch(), sdpa_kernel(SDPBackend.MATH), counter:  # nor does it know oneDNN's products
        core(ids, positions, Documents.of(edges, "cpu"), behind_head, ids[0, behind_head]).backward()
    return counter.get_total_flops(), shape


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "v_proj"], ["down_proj"]])
@pytest.mark.parametrize("family", helpers.FAMILIES)
def test_equals_torch(family, targets, recompute):
    counted, shape = torch_count(family, targets, recompute)
    trained = flops.Trained(rank=4 if targets else 0, targets=targets or "all-linear", recompute=recompute)
    ours = flops.documents(shape, LENGTHS, SUPERVISED, trained)
    assert ours.executed_full_attention == pytest.approx(counted, rel=0.01)
    # causal attention is less than the square, recomputation is never free, mathematics is never more than what runs
    assert ours.executed < ours.executed_full_attention
    assert ours.model < ours.model_full_attention
    if recompute == "full":
        assert ours.executed > ours.model


def test_by_hand():
    """One layer, hidden 4, two heads of 2, one document of 3 tokens, 2 supervised: every product written down."""
    shape = shapes.ModelShape(name="hand", layers=1, hidden=4, heads=2, kv_heads=1, head_dim=2, ffn=6, vocab=10)
    q, k, v, o = 4 * 4, 4 * 2, 4 * 2, 4 * 4
    mlp = 3 * 4 * 6
    forward = 2 * 3 * (q + k + v + o + mlp)
    head = 2 * 2 * 10 * 4
    pairs = 1 + 2 + 3  # causal: token i looks at i tokens
    causal = 2 * (2 * pairs * 2) * 2  # two products, 2 FLOPs, head size 2, two heads
    square = 2 * (2 * 9 * 2) * 2
    work = flops.documents(shape, [3], 2, flops.Trained())
    assert work.model == 3 * forward + 3 * head + 3 * causal
    assert work.model_full_attention == 3 * forward + 3 * head + 3 * square
    assert work.executed == 3 * forward + 3 * head + 3.5 * causal
    lora = flops.documents(shape, [3], 2, flops.Trained(rank=1))
    adapters = 2 * 3 * ((4 + 4) + (4 + 2) + (4 + 2) + (4 + 4) + 3 * (4 + 6))
    assert lora.model == 2 * forward + 2 * head + 3 * adapters + 3 * causal


def test_padding_runs_but_is_not_work():
    shape = shapes.ModelShape(name="pad", layers=2, hidden=8, heads=2, kv_heads=2, head_dim=4, ffn=16, vocab=32)
    packed = flops.documents(shape, [5, 11], 8, flops.Trained())
    padded = flops.documents(shape, [5, 11], 8, flops.Trained(), segments=[11, 11])
    assert padded.model == packed.model
    assert padded.executed > packed.executed


def test_documents_agree_with_the_planner():
    """Equal documents: the count of a step is the planner's per-token figure times the tokens."""
    shape = shapes.ModelShape(name="even", layers=3, hidden=16, heads=4, kv_heads=2, head_dim=4, ffn=32, vocab=64)
    step = flops.step(shape, 20)
    work = flops.documents(shape, [20] * 5, 100, flops.Trained())
    assert work.model == pytest.approx(100 * step.model)
    assert work.model_full_attention == pytest.approx(100 * step.model_full_attention)
    assert work.executed == pytest.approx(100 * step.executed)
