"""FLOPs of mixtures of experts, hybrids and other decoders: equal to torch's counter on tiny models, states by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import helpers
import pytest

from aifactory_train.core.errors import UserError
from aifactory_train.model import flops, shapes
from aifactory_train.model.blocks import Recurrence
from aifactory_train.record import products

TOKENS = 128
SIZE: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 3, "bos_token_id": None,
    "eos_token_id": 2,
}  # fmt: skip
ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN = {"head_dim": 16, "moe_intermediate_size": 40, "num_experts": 8, "num_experts_per_tok": 2}
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "layer_types": ["mamba", "attention"]}
LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "head_dim": 8, "n_routed_experts": 8, "moe_intermediate_size": 40, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
OLD = {"vocab_size": 400, "hidden_size": 64, "n_layer": 2, "n_head": 4, "bos_token_id": None, "eos_token_id": 2}

#: families that formulae cover, and others that are read from their modules
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {**SIZE, **ROUTED},
    "qwen3_moe": {**SIZE, **QWEN, "num_hidden_layers": 3, "mlp_only_layers": [1]},
    "gpt_oss": {**SIZE, **ROUTED, "head_dim": 16},
    "olmoe": {**SIZE, "num_experts": 8, "num_experts_per_tok": 2},
    "qwen3_next": {**SIZE, **QWEN, **DELTA, "shared_expert_intermediate_size": 40},
    "qwen3_5_moe_text": {**SIZE, **QWEN, **DELTA, "shared_expert_intermediate_size": 40},
    "qwen3_5_text": {**SIZE, **DELTA, "head_dim": 16},
    "granitemoehybrid": {**SIZE, **ROUTED, **MAMBA, "shared_intermediate_size": 40},
    "gpt2": {**OLD, "n_positions": 512},
    "bloom": OLD,
    "phi": SIZE,
    "gemma2": {**SIZE, "head_dim": 16, "sliding_window": 32},
    "deepseek_v3": {**SIZE, **LATENT},
    "phimoe": {**SIZE, **ROUTED},
    "lfm2": {**SIZE, "layer_types": ["conv", "full_attention"]},
}  # fmt: skip
#: their states are no matrix products to torch's counter
UNSEEN = ("granitemoehybrid", "lfm2")


def build(family: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    model.config.use_cache = False
    model.config._experts_implementation = "eager"
    return model.train()


def torch_counts(family: str) -> tuple[float, dict[str, Any]]:
    """What ``FlopCounterMode`` sees of one forward and backward of transformers' own model (the whole score matrix),
    and its configuration. Convolutions are left out: the counter takes the backward of one channel for all channels."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = build(family)

    def solved(system: Any, right: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return math.prod(right) * right[-2]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.linalg_solve_triangular: solved})
    with counter:
        logits = model(input_ids=torch.randint(4, 300, (1, TOKENS))).logits
        logits.square().mean().backward()
    seen = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
    wanted = {n: f for n, f in seen.items() if "conv" not in n and not (family in UNSEEN and "bmm" in n)}
    return float(sum(wanted.values())), model.config.to_dict()


def whole(model: flops.ModelProducts, states: bool) -> flops.ModelProducts:
    """Without windows (torch computes what it masks) and, where the counter does not see them, without states."""
    blocks = []
    for block in model.blocks:
        gone = {} if states else {"recurrent": 0.0, "recurrent_executed": 0.0, "scores": 0, "values": 0}
        blocks.append(replace(block, window=None, chunk=None, **gone))
    return replace(model, blocks=tuple(blocks))


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_torch(family: str) -> None:
    counted, config = torch_counts(family)
    trained = flops.Trained()
    read = products.of_config(config, trained)
    sources = [read]
    if family in shapes.COVERED:
        sources.append(flops.of_shape(shapes.from_config(config, family), trained))
    for model in sources:
        ours = flops.count(whole(model, family not in UNSEEN), [TOKENS], TOKENS, trained)
        assert ours.executed_full_attention == pytest.approx(counted, rel=0.003)
        real = flops.count(model, [TOKENS], TOKENS, trained)
        assert 0 < real.model <= real.executed


@pytest.mark.parametrize("family", [f for f in FAMILIES if f in shapes.COVERED])
def test_formulae_and_modules_agree(family: str) -> None:
    """Windows, states and full recomputation included, on several documents."""
    config = build(family).config.to_dict()
    for trained in (flops.Trained(), flops.Trained(recompute="full"), flops.Trained(4, ["q_proj", "v_proj"])):
        by_shape = flops.count(flops.of_shape(shapes.from_config(config, family), trained), [40, 17, 90], 60, trained)
        by_module = flops.count(products.of_config(config, trained), [40, 17, 90], 60, trained)
        assert by_module.model == pytest.approx(by_shape.model, rel=1e-9)
        # which product comes last, and what a first block leaves out, is known by stages alone
        assert by_module.executed == pytest.approx(by_shape.executed, rel=0.02)


def test_a_token_pays_for_its_experts_alone() -> None:
    config = {**FAMILIES["mixtral"], "model_type": "mixtral"}
    few, many = (shapes.from_config({**config, "num_local_experts": n}, "m") for n in (4, 64))
    work = [flops.documents(shape, [100], 100, flops.Trained()).model for shape in (few, many)]
    routers = 3 * 2 * 100 * 60 * 64 * few.layers
    assert work[1] - work[0] == routers and many.parameters > 8 * few.parameters
    twice = shapes.from_config({**config, "num_experts_per_tok": 4}, "m")
    experts = 3 * 2 * 100 * 2 * (3 * 64 * 48) * few.layers
    assert flops.documents(twice, [100], 100, flops.Trained()).model - work[0] == experts


def test_states_by_hand() -> None:
    """A head of 4 x 8: each token changes and reads its state; chunked kernels do more, never less."""
    net = Recurrence("delta", (), heads=2, key=4, value=8, key_heads=2, channels=24, taps=4, chunk=16)
    assert net.flops == 2 * (3 * 2 * 4 * 8) + 2 * 24 * 4
    inside = 2 * 16 * 2 * (4 + 4 + 8) + 16 * 2 * (4 + 8)  # k k^T, q k^T, times v; the triangular system
    assert net.executed_flops == inside + 3 * 2 * 2 * 4 * 8 + 2 * 24 * 4
    mamba = Recurrence("mamba2", (), heads=2, key=4, value=8, key_heads=1, chunk=16)
    assert mamba.flops == 2 * 2 * 2 * 4 * 8
    assert mamba.executed_flops == mamba.flops + 2 * 16 * (1 * 4 + 2 * 8)


@pytest.mark.parametrize(("limit", "pairs"), [("window", 1 + 2 + 3 + 3 + 3), ("chunk", 1 + 2 + 3 + 1 + 2)])
def test_only_what_is_attended_counts(limit: str, pairs: int) -> None:
    block = flops.BlockProducts(1, {}, 8, 8, **{limit: 3})  # type: ignore[arg-type]
    assert block.pairs([5])[0] == pairs


def test_a_record_counts_a_family_without_formulae(tmp_path) -> None:
    """No key of the record says that counting failed."""
    from types import SimpleNamespace

    from aifactory_train.record.recorder import Recorder

    config = build("phi").config.to_dict()
    with pytest.raises(UserError):
        shapes.from_config(config, "phi")
    adapter = SimpleNamespace(kind="lora", rank=4, targets="all-linear", train_embeddings=False)
    parallel = SimpleNamespace(activation_checkpointing="none")
    recipe = SimpleNamespace(adapter=adapter, parallel=parallel, model=SimpleNamespace(base="tiny/phi"))
    recorder: Any = SimpleNamespace(recipe=recipe)
    recorder._products = lambda *given: Recorder._products(recorder, *given)
    counted = Recorder._counter(recorder, config)([100], 50)
    weights = sum(p.numel() for n, p in build("phi").named_parameters() if "layers" in n and p.dim() > 1)
    assert counted.model > 4 * 100 * weights
    assert Recorder._inference(recorder, config)["flop"] > 0


def test_helpers_families_have_formulae() -> None:
    """The dense families go on being counted by formulae, not by modules."""
    for family in helpers.FAMILIES:
        assert shapes.from_config(helpers.tiny_config(family).to_dict(), family).layers == 2
