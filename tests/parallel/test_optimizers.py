"""Muon, schedule-free AdamW, Adafactor: each is what its paper says, keeps what the plan counts, and is refused by name
where it cannot work.

That every engine trains one curve with them is in ``test_same_curve.py``, that they resume bit by bit in
``tests/checkpoint/test_optimizer_state.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from aifactory_train.config.schema import Recipe, TrainConfig
from aifactory_train.core.errors import UserError
from aifactory_train.model import shapes
from aifactory_train.parallel.muon import Muon, orthogonalised
from aifactory_train.parallel.optim import build_optimizer, new_moments, parameter_groups, treatment_of
from aifactory_train.parallel.schedule_free import ScheduleFreeAdamW, averaged
from aifactory_train.parallel.traits import ENGINES, refuse_what_it_cannot_do
from aifactory_train.planning import workload

NEW = ("muon", "schedule_free_adamw", "adafactor")


def recipe(**more: Any) -> Recipe:
    data = {"train": [{"source": "rows.jsonl", "licence": "MIT"}]}
    return Recipe.model_validate({"model": {"base": "unused"}, "data": data, "adapter": {"kind": "none"}, **more})


def asking(name: str, **more: Any) -> Recipe:
    schedule = {"schedule": "constant"} if name == "schedule_free_adamw" else {}
    return recipe(train={"optimizer": name, **schedule}, **more)


def small(seed: int = 0) -> nn.Module:
    """Embedding, two blocks of a tall, a wide and a square matrix with a norm, a head."""
    torch.manual_seed(seed)

    def block() -> nn.Module:
        return nn.ModuleDict(
            {
                "up": nn.Linear(8, 24, bias=False),
                "down": nn.Linear(24, 8, bias=False),
                "square": nn.Linear(8, 8),
                "norm": nn.LayerNorm(8),
            }
        )

    parts = {"embed_tokens": nn.Embedding(11, 8), "layers": nn.ModuleList([block(), block()]), "head": nn.Linear(8, 11)}
    return nn.ModuleDict(parts)


def optimizer_of(core: nn.Module, **train: Any) -> tuple[list[dict[str, Any]], torch.optim.Optimizer]:
    settings = TrainConfig.model_validate(train)
    treatment = treatment_of(core, list(core["layers"]), settings)  # type: ignore[index,arg-type]
    groups = parameter_groups(core.named_parameters(), settings.weight_decay, treatment)
    return groups, build_optimizer(groups, settings)


def give_gradients(core: nn.Module, step: int) -> None:
    torch.manual_seed(100 + step)
    for parameter in core.parameters():
        parameter.grad = torch.randn_like(parameter)


# ---- Muon


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (16, 80), (3, 40, 24)])
def test_singular_values_end_near_one_and_singular_vectors_stay(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(shape, dtype=torch.float64)
    found = orthogonalised(matrix)
    before, values = torch.linalg.svdvals(matrix), torch.linalg.svdvals(found)
    seen = before > 0.01 * before.norm(dim=-1, keepdim=True)  # five iterations lift what is above this to 1
    assert seen.float().mean() > 0.9
    assert float(values[seen].min()) > 0.6 and float(values.max()) < 1.25, values
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    between = left.mT @ found @ right.mT  # diagonal where the vectors are the same
    assert float((between - torch.diag_embed(between.diagonal(dim1=-2, dim2=-1))).abs().max()) < 1e-9


def test_muon_steps_matrices_as_torch_does_and_the_rest_as_adamw() -> None:
    torch_muon = getattr(torch.optim, "Muon", None)
    if torch_muon is None:
        pytest.skip("this torch has no Muon to compare with")
    ours, theirs = small(), small()
    groups, optimizer = optimizer_of(ours, optimizer="muon", weight_decay=0.1, learning_rate=0.02)
    matrices = [n for g in groups if g["orthogonal"] for n in g["names"]]
    assert matrices == [f"layers.{i}.{n}.weight" for i in (0, 1) for n in ("up", "down", "square")]
    named = dict(theirs.named_parameters())
    reference = [
        torch_muon([named[n] for n in matrices], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([named["head.weight"]], lr=0.02, betas=(0.9, 0.95), weight_decay=0.1),
        torch.optim.AdamW(
            [p for n, p in named.items() if n not in [*matrices, "head.weight"]],
            lr=0.02, betas=(0.9, 0.95), weight_decay=0.0,
        ),
    ]  # fmt: skip
    for step in range(4):
        for core, steppers in ((ours, [optimizer]), (theirs, reference)):
            give_gradients(core, step)
            for stepper in steppers:
                stepper.step()
    for name, parameter in ours.named_parameters():
        # torch multiplies in bf16
        torch.testing.assert_close(parameter, named[name], atol=2e-3 if name in matrices else 1e-6, rtol=0, msg=name)


def test_an_update_of_muon_is_as_large_as_one_of_adamw() -> None:
    """What the scale is for: 0.2 to 0.4 is what AdamW's updates have in training (section 2.2 of its paper)."""
    core = small()
    before = {n: p.detach().clone() for n, p in core.named_parameters()}
    groups, optimizer = optimizer_of(core, optimizer="muon", learning_rate=1.0)
    give_gradients(core, 0)
    optimizer.step()
    for name in next(g["names"] for g in groups if g["orthogonal"]):
        moved = (core.get_parameter(name).detach() - before[name]).square().mean().sqrt()
        assert 0.1 < float(moved) < 0.4, name


def test_muon_learns_in_fewer_steps_than_adamw() -> None:
    """A deep linear network on ill-conditioned inputs that lie along no axis, both at the best of a row of rates."""

    def steps_to(optimizer: str, rate: float, most: int = 150) -> int:
        torch.manual_seed(3)
        core: Any = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(24, 24, bias=False) for _ in range(3)])})
        one, other = (torch.linalg.qr(torch.randn(24, 24))[0] for _ in range(2))
        inputs = torch.randn(96, 24) @ (one * torch.logspace(0, -1.5, 24)) @ other
        targets = inputs @ torch.randn(24, 24)
        _, stepper = optimizer_of(core, optimizer=optimizer, learning_rate=rate)
        start = None
        for step in range(most):
            hidden = inputs
            for layer in core["layers"]:
                hidden = layer(hidden)
            loss = (hidden - targets).square().mean()
            start = start or loss.item()
            if loss.item() < 0.01 * start:
                return step
            stepper.zero_grad()
            loss.backward()
            for group in stepper.param_groups:
                group["lr"] = rate * (1 - step / most)
            stepper.step()
        return most

    best = {name: min(steps_to(name, rate) for rate in (0.03, 0.1, 0.3)) for name in ("adamw", "muon")}
    assert best["muon"] <= 0.75 * best["adamw"] < 150, best


def test_muon_without_a_matrix_to_train_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"train\.optimizer: muon is for the matrices of the model"):
        asking("muon", adapter={"kind": "lora"})


# ---- schedule-free AdamW


def test_the_recursion_is_the_papers() -> None:
    """Against ``x``, ``y`` and ``z`` written out (algorithm 1, with a warm-up: weights by the rate's square)."""
    torch.manual_seed(2)
    parameter = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    x = z = parameter.detach().clone()
    optimizer = ScheduleFreeAdamW([{"params": [parameter]}], lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    square, total = torch.zeros_like(x), 0.0
    for step, rate in enumerate((0.01, 0.02, 0.03, 0.03, 0.03, 0.03), 1):
        y = 0.1 * z + 0.9 * x
        torch.testing.assert_close(parameter.detach(), y, rtol=1e-9, atol=1e-12)
        gradient = torch.sin(3 * y) + y
        square = 0.95 * square + 0.05 * gradient**2
        z = z - rate * (gradient / ((square / (1 - 0.95**step)).sqrt() + 1e-8) + 0.1 * y)
        total += rate**2
        x = x + rate**2 / total * (z - x)
        parameter.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    torch.testing.assert_close(averaged(parameter.detach(), optimizer.state[parameter]["z"], 0.9), x.float())


def test_its_mean_needs_no_falling_rate() -> None:
    """Noisy least squares at a constant rate: the mean comes as near as AdamW with a rate that falls to zero, and
    AdamW's last iterate at the constant rate does not."""

    def loss_of(kind: str) -> float:
        torch.manual_seed(4)
        inputs = torch.randn(256, 10)
        targets = inputs @ torch.randn(10, 1) + 0.5 * torch.randn(256, 1)
        best = float((inputs @ torch.linalg.lstsq(inputs, targets).solution - targets).square().mean())
        core: Any = nn.ModuleDict({"layers": nn.ModuleList([]), "head": nn.Linear(10, 1, bias=False)})
        name = "schedule_free_adamw" if kind == "schedule-free" else "adamw"
        _, optimizer = optimizer_of(core, optimizer=name, schedule="constant", betas=(0.9, 0.99))
        weight = core["head"].weight
        for step in range(600):
            rows = torch.randint(256, (8,))
            optimizer.zero_grad()
            (core["head"](inputs[rows]) - targets[rows]).square().mean().backward()
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * (1 - step / 600 if kind == "falling" else 1.0)
            optimizer.step()
        end = averaged(weight, optimizer.state[weight]["z"], 0.9) if kind == "schedule-free" else weight
        return float((inputs @ end.detach().T - targets).square().mean()) - best

    constant, falling, free = (loss_of(kind) for kind in ("constant", "falling", "schedule-free"))
    assert free < 2 * falling and free < 0.5 * constant, (constant, falling, free)


def test_it_refuses_a_schedule() -> None:
    with pytest.raises(ValidationError, match=r"train\.schedule: schedule_free_adamw .* set train\.schedule constant"):
        recipe(train={"optimizer": "schedule_free_adamw", "schedule": "cosine"})
    with pytest.raises(ValidationError, match=r"train\.betas: "):
        recipe(train={"optimizer": "schedule_free_adamw", "schedule": "constant", "betas": [0.0, 0.95]})


# ---- Adafactor


def test_adafactor_is_that_of_transformers() -> None:
    from transformers.optimization import Adafactor

    ours, theirs = small(), small()
    _, optimizer = optimizer_of(ours, optimizer="adafactor", learning_rate=0.01)
    reference = Adafactor(theirs.parameters(), lr=0.01, scale_parameter=False, relative_step=False)
    for step in range(4):
        for core, stepper in ((ours, optimizer), (theirs, reference)):
            give_gradients(core, step)
            stepper.step()
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


def test_second_moments_of_rank_one_are_kept_exactly() -> None:
    """What the factors are for: where squares are an outer product, the update is AdamW's without first moment."""
    torch.manual_seed(5)
    parameter = nn.Parameter(torch.zeros(6, 9))
    optimizer = build_optimizer([{"params": [parameter]}], TrainConfig(optimizer="adafactor"))
    optimizer.param_groups[0]["lr"] = 1.0
    signs = torch.randn(6, 9).sign()
    parameter.grad = torch.rand(6, 1).add(0.1) * torch.rand(1, 9).add(0.1) * signs
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), -signs, rtol=1e-4, atol=1e-4)


# ---- 8 bits


def test_codes_of_eight_bits_are_within_the_stated_bound() -> None:
    from aifactory_train.kernels.adamw8bit.reference import decode, encode

    torch.manual_seed(7)
    first = torch.randn(64, 256, dtype=torch.float64) * torch.logspace(0, -6, 256)
    second = torch.rand(64, 256, dtype=torch.float64) ** 4 * torch.logspace(0, -9, 256)
    kept = encode(first, second)
    m, v = decode(*kept, dtype=torch.float64)
    (m_scale, v_scale) = (scale.double()[:, None] for scale in kept[2:])
    assert float(((first.abs() / m_scale).sqrt() - (m.abs() / m_scale).sqrt()).abs().max()) < 1.001 / 254
    assert float(((second / v_scale) ** 0.25 - (v / v_scale) ** 0.25).abs().max()) < 1.001 / 255


# ---- all of them


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_that_cannot_keep_it_say_why(engine: str, name: str) -> None:
    asked = asking(name, parallel={"engine": engine})
    if ENGINES[engine].zero_stage is None:
        refuse_what_it_cannot_do(asked, engine)
        return
    with pytest.raises(UserError, match=f"engine {engine} cannot keep the state of {name}: it cuts tensors, and") as no:
        refuse_what_it_cannot_do(asked, engine)
    assert "parallel.engine=ddp, fsdp2, hsdp" in str(no.value.fix)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "sgd", *NEW])
def test_the_plan_counts_the_bytes_that_are_kept(name: str) -> None:
    """The state of a model of the planner's own shapes, byte by byte."""
    shape = shapes.load("HuggingFaceTB/SmolLM2-135M")
    core: Any = nn.Module()
    core.embed_tokens = nn.Module()
    core.layers = nn.ModuleList([nn.Module() for _ in range(shape.layers)])
    core.outside = nn.Module()
    with torch.device("meta"):
        for owner, tensors in [
            *((layer, shape.block_tensors()) for layer in core.layers),
            (core.embed_tokens, shape.root_tensors()[:1]),
            (core.outside, shape.root_tensors()[1:]),
        ]:
            for i, (rows, columns) in enumerate(tensors):
                size = (rows, columns) if columns > 1 else (rows,)
                owner.register_parameter(f"p{i}", nn.Parameter(torch.empty(size)))
    settings = asking(name).train
    groups = parameter_groups(core.named_parameters(), 0.0, treatment_of(core, list(core.layers), settings))
    kept = 0
    optimizer = build_optimizer(groups, settings)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = new_moments(optimizer, group, parameter)
            kept += sum(t.numel() * t.element_size() for key, t in state.items() if key != "step")
    planned = workload._bytes(asking(name), shape).optimizer * shape.parameters
    assert planned == pytest.approx(kept, rel=1e-3)


def test_stacks_of_experts_are_orthogonal_one_by_one() -> None:
    core: Any = nn.ModuleDict({"layers": nn.ModuleList([nn.ParameterDict({"experts": torch.zeros(4, 6, 10)})])})
    _, optimizer = optimizer_of(core, optimizer="muon", learning_rate=1.0)
    assert isinstance(optimizer, Muon)
    parameter = core["layers"][0]["experts"]
    torch.manual_seed(6)
    parameter.grad = torch.randn(4, 6, 10)
    expected = torch.stack([orthogonalised(m) for m in parameter.grad.lerp(parameter.grad * 0.05, 0.95)])
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), -expected * 0.2 * 10**0.5, rtol=1e-4, atol=1e-5)
