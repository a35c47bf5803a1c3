"""Every engine trains the same curve as one process: full and LoRA, with and without accumulation, unequal
micro-batches.

The default tests use two ranks; ``pytest -m slow tests/parallel/test_same_curve.py`` runs the whole matrix on four.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from curves import run_cases

from aifactory_train.parallel import traits

FIRST, LOSS, NORM = 1e-6, 1e-5, 1e-4  # relative: first loss, every loss, every gradient norm before clipping
METHODS = {
    "adamw full": {"adapter": "none", "optimizer": "adamw", "rate": 1e-2},
    "adamw lora": {"adapter": "lora", "optimizer": "adamw", "rate": 1e-2},
    "sgd full": {"adapter": "none", "optimizer": "sgd", "rate": 0.1, "train": {"momentum": 0.9}},
    "sgd lora": {"adapter": "lora", "optimizer": "sgd", "rate": 0.3},
}
#: Beside them: what some engines refuse, and what is set for single parameters.
MORE: dict[str, dict[str, Any]] = {
    "muon": {"optimizer": "muon", "rate": 2e-2, "train": {"layer_decay": 0.8}},
    "schedule-free": {"optimizer": "schedule_free_adamw", "train": {"schedule": "constant"}},
    "adafactor": {"optimizer": "adafactor"},
    "lora+": {"adapter": "lora", "optimizer": "adamw", "rate": 2e-3, "train": {"lora_plus_ratio": 8, "average": {}}},
    "frozen": {"optimizer": "adamw", "train": {"freeze": ["*embed*", "*.1.mlp.*"]}},
}
MORE = {name: {"adapter": "none", "steps": 6, "judge": True, **case} for name, case in MORE.items()}
ENGINES = list(traits.ENGINES)
Curve = dict[str, list[float]]


def relative(found: list[float], expected: list[float]) -> list[float]:
    return [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]


def agrees(curve: Curve, reference: Curve) -> bool:
    losses, norms = relative(curve["losses"], reference["losses"]), relative(curve["norms"], reference["norms"])
    return losses[0] <= FIRST and max(losses) <= LOSS and max(norms) <= NORM


def report(case: dict[str, Any], curve: Curve, reference: Curve) -> str:
    losses, norms = relative(curve["losses"], reference["losses"]), relative(curve["norms"], reference["norms"])
    return (
        f"{case['engine']:6s} x{case.get('accumulation', 1)} {case['optimizer']:5s} {case['adapter']:5s} "
        f"first {losses[0]:.1e}  loss {max(losses):.1e}  norm {max(norms):.1e}"
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curve]:
    """The curve of one process, one micro-batch, by method."""
    methods = {**METHODS, **MORE}
    cases = [{**method, "engine": "ddp"} for method in methods.values()]
    return dict(zip(methods, run_cases(1, cases, tmp_path_factory.mktemp("alone")), strict=True))


def shards(ranks: int, engine: str) -> dict[str, int]:
    """Two groups, where the size of a group is chosen."""
    return {"shard_size": ranks // 2} if traits.ENGINES[engine].shard_group == "chosen" else {}


def matrix(ranks: int, engines: list[str], methods: list[str], accumulations: list[int]) -> list[dict[str, Any]]:
    return [
        {
            **METHODS[m],
            "method": m,
            "engine": e,
            "accumulation": a,
            **shards(ranks, e),
        }
        for e in engines
        for m in methods
        for a in accumulations
    ]


def compare(ranks: int, cases: list[dict[str, Any]], alone: dict[str, Curve], folder: Path, timeout: float) -> None:
    """The curves of ``cases`` are those of ``alone``, and so are the losses that are evaluated after them."""
    wrong = []
    for case, curve in zip(cases, run_cases(ranks, cases, folder, timeout), strict=True):
        reference = alone[case["method"]]
        line = report(case, curve, reference)
        print(line)
        if not agrees(curve, reference):
            wrong.append(line)
        if case.get("judge"):
            before, mean, after = curve["judged"]
            keeps = case["method"] in ("schedule-free", "lora+")
            near = max(relative(curve["judged"], reference["judged"])) <= LOSS
            if not near or before != after or (mean != before) != keeps:
                wrong.append(f"{line}: evaluated {curve['judged']}, alone {reference['judged']}")
    assert not wrong, "\n".join(wrong)


def test_full_fine_tuning_learns(alone: dict[str, Curve]) -> None:
    for method in ("adamw full", "sgd full"):
        losses = alone[method]["losses"]
        assert losses[-1] <= 0.8 * losses[0], (method, losses[0], losses[-1])


def test_two_ranks_train_the_curve_of_one(alone: dict[str, Curve], tmp_path: Path) -> None:
    """Each engine once with AdamW in full and once as LoRA, with four micro-batches, one of them empty on some rank;
    and the other optimizers."""
    cases = matrix(2, ["ddp", "fsdp2", "zero2", "zero3"], ["adamw full"], [4])
    cases += matrix(2, ["fsdp2", "zero1"], ["adamw lora"], [4]) + matrix(2, ["fsdp2", "zero3"], ["sgd full"], [1])
    more = [("fsdp2", m) for m in MORE] + [("ddp", "muon"), ("ddp", "lora+"), ("zero3", "frozen")]
    cases += [{**MORE[m], "method": m, "engine": e} for e, m in more]
    compare(2, cases, alone, tmp_path, 300)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_four_ranks_train_the_curve_of_one(alone: dict[str, Curve], tmp_path: Path) -> None:
    """All engines (HSDP as 2 x 2), both methods, both optimizers, accumulation 1 and 4."""
    compare(4, matrix(4, ENGINES, list(METHODS), [1, 4]), alone, tmp_path, 1700)


@pytest.mark.slow
def test_other_optimizers_on_four_ranks(alone: dict[str, Curve], tmp_path: Path) -> None:
    engines = [name for name in ENGINES if traits.ENGINES[name].keeps_mean]
    cases = [{**MORE[m], "method": m, "engine": e, **shards(4, e)} for e in engines for m in MORE]
    compare(4, cases, alone, tmp_path, 900)


def test_the_comparison_sees_the_classic_mistakes(alone: dict[str, Curve], tmp_path: Path) -> None:
    """Loss times world size, mean of means, and only the last micro-batch: each must be outside the tolerance."""
    method = {**METHODS["sgd full"], "method": "sgd full"}
    bugs = ["times world", "mean of means", "last only"]
    cases = [{**method, "engine": "fsdp2", "accumulation": 4, "bug": bug, "steps": 3} for bug in bugs]
    for case, curve in zip(cases, run_cases(2, cases, tmp_path), strict=True):
        reference = {key: values[:3] for key, values in alone["sgd full"].items() if isinstance(values, list)}
        assert not agrees(curve, reference), case["bug"]


def test_bf16_deviates_as_little_as_in_one_process(alone: dict[str, Curve], tmp_path: Path) -> None:
    check_half(2, ["ddp", "fsdp2", "zero1", "zero2", "zero3"], alone, tmp_path)


@pytest.mark.slow
def test_bf16_deviates_as_little_on_four_ranks(alone: dict[str, Curve], tmp_path: Path) -> None:
    check_half(4, ENGINES, alone, tmp_path)


def check_half(ranks: int, engines: list[str], alone: dict[str, Curve], folder: Path) -> None:
    """Compute in bf16 from fp32 masters: over 20 steps, at most twice the deviation from fp32 that one process has."""
    half = {**METHODS["adamw full"], "precision": {"compute": "bf16", "frozen": "bf16"}}
    single = run_cases(1, [{**half, "engine": "ddp"}], folder)[0]
    exact = alone["adamw full"]["losses"]
    allowed = 2 * max(relative(single["losses"], exact))
    assert allowed > 1e-6  # it does compute in bf16
    cases = [{**half, "engine": e, "accumulation": 2, **shards(ranks, e)} for e in engines]
    for case, curve in zip(cases, run_cases(ranks, cases, folder), strict=True):
        deviation = max(relative(curve["losses"], exact))
        print(f"{case['engine']}: {deviation:.2e}, one process {allowed / 2:.2e}")
        assert deviation <= allowed, case["engine"]


def test_recomputation_compilation_and_clipping_change_nothing(tmp_path: Path) -> None:
    """Activation checkpointing (with tied and untied embeddings), compiled blocks, clipping, offload: the same
    curve.
    """
    method = {**METHODS["adamw full"], "max_norm": 0.5, "steps": 8}
    plain, untied = run_cases(1, [{**method, "engine": "ddp"}, {**method, "engine": "ddp", "tied": False}], tmp_path)
    cases = [
        {**method, "engine": "ddp", "checkpointing": "full"},
        {**method, "engine": "fsdp2", "checkpointing": "full"},
        {**method, "engine": "fsdp2", "checkpointing": "selective"},
        {**method, "engine": "zero3", "checkpointing": "full"},
        {**method, "engine": "zero2", "offload": True},
        {**method, "engine": "zero3", "offload": True},
        {**method, "engine": "fsdp2", "tied": False},
        {**method, "engine": "zero3", "tied": False},
    ]
    for case, curve in zip(cases, run_cases(2, cases, tmp_path), strict=True):
        assert agrees(curve, plain if case.get("tied", True) else untied), report(case, curve, plain)


@pytest.mark.slow
def test_compiled_blocks_change_nothing(tmp_path: Path) -> None:
    """``torch.compile`` per block (needs a C++ compiler)."""
    method = {**METHODS["adamw full"], "steps": 5}
    plain = run_cases(1, [{**method, "engine": "ddp"}], tmp_path)[0]
    cases = [
        {**method, "engine": e, "compile": True, "checkpointing": c} for e, c in (("ddp", "none"), ("fsdp2", "full"))
    ]
    for case, curve in zip(cases, run_cases(2, cases, tmp_path), strict=True):
        assert agrees(curve, plain), report(case, curve, plain)
        assert curve["graphs"] >= 1 and not curve["graph_breaks"], (curve["graphs"], curve["graph_breaks"])
