"""Mixtures of experts: what the grouped operator computes, where adapters go, what they cost, the routers' losses."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import moe
import pytest
import torch
from moe import adapted, recipe

from aifactory_train.config.schema import Recipe
from aifactory_train.core import compat
from aifactory_train.core.errors import UserError
from aifactory_train.model import experts, routing
from aifactory_train.model.adapters import apply_adapter
from aifactory_train.model.attention import Documents
from aifactory_train.model.causal_lm import CausalLM
from aifactory_train.model.report import ModelReport


def as_peft_does(model: Any) -> Any:
    """The same model with peft's own forward, and transformers' loop over experts."""
    for module in model.modules():
        module.__dict__.pop("forward", None)
    model.get_base_model().set_experts_implementation("eager")
    return model


def gradients(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    out = model(input_ids=ids, labels=ids)
    asked = [p for p in model.parameters() if p.requires_grad]
    return out.logits.detach(), list(torch.autograd.grad(out.loss, asked))


def far(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("family", [*moe.FAMILIES, "deepseek_v3"])
def test_all_weights_get_the_gradient_of_the_loop_over_experts(family: str) -> None:
    ours, theirs = moe.model(family).requires_grad_(True), moe.model(family).requires_grad_(True)
    theirs.set_experts_implementation("eager")
    assert experts.use(ours)
    ids = torch.randint(5, 300, (2, 20), generator=torch.Generator().manual_seed(1))
    (logits, found), (expected, wanted) = gradients(ours, ids), gradients(theirs, ids)
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert far(found, wanted) <= 1e-5
    again = gradients(ours, ids)[1]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))  # the order of sums is fixed


@pytest.mark.parametrize("family", [*moe.FAMILIES, "deepseek_v3"])
@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_adapters_on_experts_and_routers_are_those_of_peft(family: str) -> None:
    report = ModelReport()
    model = adapted(family, recipe(experts={"router": "trained"}), report)
    ids = torch.randint(5, 300, (2, 20), generator=torch.Generator().manual_seed(1))
    logits, found = gradients(model, ids)
    expected, wanted = gradients(as_peft_does(model), ids)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert far(found, wanted) <= 1e-5
    said = {what: f"{choice} {why}" for what, choice, why in report.lines}
    layers = len(experts.find(model))
    assert f"{4 * layers} experts in {layers} layers, all adapted" in said["experts"]
    assert f"adapted in {layers} layers" in said["routers"]
    named = {n for n, p in model.named_parameters() if p.requires_grad}
    assert sum("experts.lora_A" in n or "experts.base_layer.lora_A" in n for n in named) == 2 * layers
    if family in ("deepseek_v3", "qwen3_5_moe"):  # a shared expert keeps its adapters, whatever peft takes it for
        assert any("shared_expert" in n and "gate_proj.lora_A" in n for n in named)


def test_old_names_mean_the_fused_matrices_and_half_a_pair_is_refused() -> None:
    model = adapted("mixtral", recipe(adapter={"targets": ["w1", "w2", "w3"]}))
    named = sorted(model.peft_config["default"].target_parameters)
    assert named == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    with pytest.raises(UserError, match="'w1' of the experts is one matrix with 'w3'"):
        adapted("mixtral", recipe(adapter={"targets": ["w1", "q_proj"]}))
    with pytest.raises(UserError, match="no layer of this model is called 'qkv'") as error:
        adapted("mixtral", recipe(adapter={"targets": ["qkv"]}))
    assert "gate_up_proj" in str(error.value) and "q_proj" in str(error.value)


def test_nothing_left_to_adapt_is_refused() -> None:
    with pytest.raises(UserError, match="nothing is left to adapt"):
        adapted("mixtral", recipe(adapter={"targets": ["w1", "w2", "w3"]}, experts={"adapt": "none"}))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_target_that_no_layer_has_is_named(family: str) -> None:
    import helpers

    report = ModelReport()
    model = helpers.tiny_model("llama") if family == "llama" else moe.model(family)
    apply_adapter(model, recipe(adapter={"targets": ["q_proj", "qkv"]}), report)
    assert ("targets left out", "1: 'qkv'", "no layer of this model is called so") in report.lines
    model = helpers.tiny_model("llama") if family == "llama" else moe.model(family)
    with pytest.raises(UserError, match="no layer of this model is called 'qkv'") as error:
        apply_adapter(model, recipe(adapter={"targets": "qkv"}), report)
    assert "o_proj" in str(error.value)


def test_what_cannot_be_adapted_is_left_out_aloud_or_refused() -> None:
    report = ModelReport()
    model = adapted("qwen3_moe", recipe(adapter={"dropout": 0.1}), report)
    assert not experts.wrappers(model)
    assert any(what == "experts" and "none of them adapted" in why for what, _, why in report.lines)
    with pytest.raises(UserError, match="adapters cannot be put on experts"):
        adapted("qwen3_moe", recipe(adapter={"dropout": 0.1}, experts={"adapt": "all"}))
    report = ModelReport()
    assert not experts.wrappers(adapted("qwen3_moe", recipe(experts={"adapt": "none"}), report))
    assert ("routers", "frozen", "experts.router not given") in report.lines


def test_routers_are_frozen_where_all_weights_are_trained() -> None:
    model = apply_adapter(
        moe.model("gpt_oss"), recipe(adapter={"kind": "none"}, experts={"router": "frozen"}), ModelReport()
    )
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"model.layers.{i}.mlp.router.{p}" for i in (0, 1) for p in ("weight", "bias")}


def peak(function: Any) -> int:
    """Most bytes that were allocated on the CPU at once while ``function`` ran, above those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    moves = [(e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for _, size in sorted(moves, key=lambda move: move[0]):
        now += size
        most = max(most, now)
    return most


def test_adapters_on_128_experts_take_less_than_half_of_what_peft_takes() -> None:
    """Weights and all that a step allocates."""
    shape = {"experts": 128, "layers": 2, "hidden_size": 64, "moe_intermediate_size": 64, "vocabulary": 100}
    model = adapted("qwen3_moe", recipe(), **shape)
    ids = torch.randint(5, 99, (1, 64))
    weights = sum(p.numel() * 4 for p in model.parameters())
    ours = peak(lambda: gradients(model, ids)) + weights
    theirs = peak(lambda: gradients(as_peft_does(model), ids)) + weights
    print(f"weights {weights:,}, ours {ours:,}, peft's {theirs:,}")
    assert ours > weights and ours < 0.5 * theirs


# ---- the routers' losses


def core_of(model: Any, settings: Recipe) -> CausalLM:
    core = CausalLM(model)
    core.routing = routing.watch(model, core.language_model, settings, ModelReport(), "cpu")
    return core


def one_document(ids: torch.Tensor, padding: int = 0) -> dict[str, Any]:
    length = len(ids) + padding
    row = torch.cat([ids, ids.new_full((padding,), 3)])[None]
    return {
        "input_ids": row,
        "position_ids": torch.arange(length)[None],
        "documents": Documents.of(torch.tensor([0, length]), "cpu"),
        "positions": torch.arange(len(ids) - 1),
        "targets": ids[1:],
        "real": (torch.arange(length) < len(ids))[None],
    }


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_losses_are_those_of_transformers_over_the_whole_step(family: str) -> None:
    """Three documents of unequal length, one a micro-batch, one of them padded, against all of them at once."""
    from aifactory_train.model import attention

    attention.register()
    documents = [torch.randint(5, 300, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 11, 23)]
    units = sum(len(d) - 1 for d in documents)
    settings = recipe(adapter={"kind": "none"}, experts={"balance_loss": 0.3, "z_loss": 0.02})
    model = moe.model(family, attn_implementation=attention.PER_DOCUMENT).requires_grad_(True)
    model.set_attn_implementation(attention.PER_DOCUMENT)
    experts.use(model)
    core = core_of(model, settings)
    routed = core.routing
    assert routed is not None
    routed.begin(sum(map(len, documents)), units)
    batches = [one_document(d, padding=i * 4) for i, d in enumerate(documents)]
    routed.count_before([functools.partial(core, **b) for b in batches])
    before = torch.get_rng_state()
    total = 0.0
    for batch in batches:
        loss = core(**batch)
        total += loss.item() / units
        (loss / units).backward()
    found = [p.grad.clone() for p in model.parameters()]
    assert torch.equal(before, torch.get_rng_state())

    plain = moe.model(family).requires_grad_(True)
    function = sys.modules[type(plain).__module__].load_balancing_loss_func
    logits: list[list[torch.Tensor]] = [[] for _ in routed.routers]
    for number, (_, router, _) in enumerate(routing.routers_of(plain)):
        router.register_forward_hook(lambda _, __, out, n=number: logits[n].append(out[0]))
    outs = [plain(input_ids=d[None]).logits[0] for d in documents]
    of = torch.nn.functional.cross_entropy
    parts = [of(o[:-1], d[1:], reduction="sum") for o, d in zip(outs, documents, strict=True)]
    nll = torch.stack(parts).sum() / units
    layers = tuple(torch.cat(parts) for parts in logits)
    balance = function(layers, 4, 2)
    z = torch.stack([x.logsumexp(-1).square().mean() for x in layers]).mean()
    (nll + 0.3 * balance + 0.02 * z).backward()
    assert far(found, [p.grad for p in plain.parameters()]) <= 1e-5
    assert abs(total - nll.item()) <= 1e-5 * nll.item()  # the loss that is shown is that of the words
    figures = routed.figures()
    assert figures["router_balance_loss"] == pytest.approx(balance.item(), rel=1e-5)
    assert figures["router_z_loss"] == pytest.approx(z.item(), rel=1e-5)
    assert 1.0 <= figures["expert_load_max"] <= 4.0 and 0.0 < figures["expert_load_entropy"] <= 1.0


def test_the_models_configuration_asks_for_its_loss() -> None:
    model = moe.model("mixtral", output_router_logits=True, router_aux_loss_coef=0.25)
    assert routing.weights_of(recipe(), model.config) == (routing.Weights(0.25, 0.0), "the model's configuration")
    assert routing.weights_of(recipe(experts={"balance_loss": 0.0}), model.config)[0] == routing.Weights()
    assert routing.weights_of(recipe(), moe.model("mixtral").config)[0] == routing.Weights()


def test_a_loss_that_cannot_be_computed_is_refused() -> None:
    import helpers

    with pytest.raises(UserError, match="no routed experts"):
        core_of(helpers.tiny_model("llama"), recipe(experts={"balance_loss": 0.1}))
    model = moe.model("deepseek_v3")
    with pytest.raises(UserError, match="no load-balancing loss is defined for DeepseekV3"):
        core_of(model, recipe(experts={"balance_loss": 0.1}))
    with pytest.raises(UserError, match="compiled blocks"):
        core_of(moe.model("mixtral"), recipe(experts={"z_loss": 0.1}, parallel={"compile": True}))


def test_an_index_that_is_no_experts_gives_nothing() -> None:
    model = moe.model("mixtral")
    module = experts.use(model)[0][1]
    x, weights = torch.randn(6, 32), torch.rand(6, 2)
    index = torch.tensor([[0, 1], [4, 4], [2, 4], [3, 0], [1, 2], [4, 3]])
    out = module(x, index, weights)
    module.config._experts_implementation_internal = "eager"
    torch.testing.assert_close(out, module(x, index, weights))


def test_peft_is_asked_which_names_it_takes_for_experts() -> None:
    assert {"gate_proj", "up_proj", "down_proj"} <= compat.peft_takes_for_experts("qwen3_moe")
    assert compat.peft_takes_for_experts("llama") == set()


def test_a_checkpoint_of_before_experts_had_settings_goes_on() -> None:
    from aifactory_train.config.loading import to_tree
    from aifactory_train.parallel.changes import check_changes

    now = to_tree(recipe())
    before = {key: value for key, value in now.items() if key != "experts"}
    assert check_changes(before, now, same_rates=True) == []


# ---- what is told


def test_the_report_shows_the_loads() -> None:
    from aifactory_train.report.curves import curves

    step = {"kind": "train", "step": 1, "loss": 1.0}
    shown = curves([step | {"expert_load_max": 1.5, "expert_load_entropy": 0.9}], {}, {})
    assert "Expert load" in shown and "Expert entropy" in shown
    assert "Expert" not in curves([step], {}, {})


def test_an_export_names_the_server_that_refuses_its_adapter(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from aifactory_train.exporting.vllm_check import say_who_ignores

    config = tmp_path / "adapter_config.json"
    config.write_text('{"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}')
    say_who_ignores(tmp_path)
    said = capsys.readouterr()
    assert "mlp.experts.down_proj" in said.err + said.out and "vLLM" in said.err + said.out
    config.write_text('{"target_modules": ["q_proj"], "target_parameters": null}')
    say_who_ignores(tmp_path)
    said = capsys.readouterr()
    assert said.err + said.out == ""


# ---- from recipe to export


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", moe.FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "none"])
def test_train_resume_and_export(family: str, kind: str, tmp_path: Path) -> None:
    train_and_export(family, kind, tmp_path)


def train_and_export(family: str, kind: str, folder: Path) -> None:
    """Four steps at once and in two parts give the same bits; adapter, merged and whole weights pass their gates."""
    import json

    import helpers
    from safetensors.torch import load_file

    from aifactory_train import cli

    base = moe.write(folder / "model", family)
    path = helpers.write_recipe(
        folder / "recipe", base, rows=24, eval_rows=4,
        settings={"adapter.kind": kind, "experts.balance_loss": 0.01, "checkpoint.every_steps": 2, "export.merge": True,
                  "export.dtype": "fp32", "eval.before": False, "eval.after": False, "train.epochs": 4,
                  "train.schedule": "constant"},
    )  # fmt: skip

    def train(name: str, *more: str) -> Path:
        assert cli.main(["train", str(path), "--run-dir", str(folder / name), *more]) == 0
        return folder / name

    whole = train("whole")
    train("parts", "--set", "train.max_steps=2")
    parts = train("parts", "--resume", "auto", "--set", "train.max_steps=4")
    kinds = ["adapter", "merged"] if kind == "lora" else ["model"]
    for exported in kinds:
        verdict = json.loads((whole / "export" / exported / "verification.json").read_text())
        assert verdict["passed"] and verdict["difference"] <= 1e-5, verdict
        for file in (whole / "export" / exported).glob("*.safetensors"):
            one, two = load_file(file), load_file(parts / "export" / exported / file.name)
            assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), file.name
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    assert len(steps) == 4 and all(row["router_balance_loss"] > 0 and row["expert_load_max"] >= 1 for row in steps)
