"""Training methods give one curve for any ranks, accumulation, packing and engine, as plain fine-tuning does
(test_curve.py).
"""

from __future__ import annotations

from pathlib import Path

import helpers
import pytest
from test_curve import run
from test_methods import labelled_rows, pair_rows

METHODS = {
    "dpo": ["methods.preference.kind=dpo"],
    "ipo": ["methods.preference={kind: dpo, loss: ipo}"],
    "orpo": ["methods.preference.kind=orpo"],
    "kto": ["methods.preference.kind=kto", "methods.preference.beta=0.5"],
    "dpo with replay": ["methods.preference={kind: dpo, replay_weight: 0.5}"],
    "kto with replay": ["methods.preference={kind: kto, beta: 0.5, replay_weight: 0.5}"],
    "neftune": ["methods.neftune.alpha=10"],
    "new tokens": ["model.vocabulary={text: TEXT, size: 20, train: new}"],
    "goldfish": ["methods.goldfish={k: 3, context: 5}"],
}
#: (method, engine) whose steps after the second are made again by a trainer that goes on from the checkpoint.
RESUMED = [("dpo", "zero3"), ("kto with replay", "zero2"), ("dpo with replay", "fsdp2")]
STEPS = 4
#: (name, overrides) of the splits that must agree; the first one is the reference.
ONE_RANK = [("packed", []), ("padded, accumulated", ["data.batching=padded", "train.grad_accum=3"])]
TWO_RANKS = [
    ("ddp", ["data.batching=padded", "train.grad_accum=2"]),
    ("fsdp2", ["parallel.engine=fsdp2"]),
]
#: DeepSpeed too, for what is more than a loss of tokens (plain fine-tuning under it: tests/parallel).
DEEPSPEED = {
    "dpo": ["zero1", "zero2", "zero3"],
    "orpo": ["zero3"],
    "kto": ["zero2", "zero3"],
    "dpo with replay": ["zero3"],
    "kto with replay": ["zero1"],
    "neftune": ["zero3"],
    "new tokens": ["zero3"],
}


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, dict[str, list[dict]]]:
    """``{method: {split: curve}}``: every method under every split, in two process groups altogether."""
    folder = tmp_path_factory.mktemp("methods")
    cases: dict[int, list[dict]] = {1: [], 2: []}
    for method, overrides in METHODS.items():
        settings = {"train.batch_rows": 9, "eval.before": False, "adapter.kind": "none", "train.learning_rate": 3.0e-3}
        recipe = helpers.write_recipe(folder / method, tiny_model_dir, settings=settings)
        rows = {"kto": labelled_rows, "dpo": pair_rows, "ipo": pair_rows, "orpo": pair_rows}.get(
            method.partition(" ")[0], helpers.chat_rows
        )
        helpers.write_jsonl(folder / method / "train.jsonl", rows(24))
        helpers.write_jsonl(folder / method / "eval.jsonl", rows(4, start=500))
        if method.endswith("with replay"):
            helpers.write_jsonl(folder / method / "general.jsonl", helpers.chat_rows(30, start=900))
            own, general = (f"{folder / method}/{name}.jsonl" for name in ("train", "general"))
            overrides = [*overrides, f"data.train=[{own}, {{source: {general}, share: 0.4}}]"]
        overrides = [o.replace("TEXT", str(folder / method / "train.jsonl")) for o in overrides]
        engines = [(engine, [f"parallel.engine={engine}"]) for engine in DEEPSPEED.get(method, [])]
        for ranks, splits in ((1, ONE_RANK), (2, [*TWO_RANKS, *engines])):
            for name, more in splits:
                cases[ranks].append(
                    {
                        "name": f"{method}: {name}",
                        "recipe": str(recipe),
                        "steps": STEPS,
                        "overrides": [*overrides, "train.schedule=constant", "train.grad_accum=1", *more],
                    }
                )
        for engine in [engine for name, engine in RESUMED if name == method]:
            case = {**cases[2][-1], "name": f"{method}: {engine}, resumed", "again_from": 2}
            common = [o for o in case["overrides"] if not o.startswith("parallel.engine")]
            cases[2].append({**case, "overrides": [*common, f"parallel.engine={engine}"]})
    found = {**run(folder, "one", 1, cases[1]), **run(folder, "two", 2, cases[2])}
    out: dict[str, dict[str, list[dict]]] = {}
    for name, curve in found.items():
        method, _, split = name.partition(": ")
        out.setdefault(method, {})[split] = curve
    return out


@pytest.mark.parametrize("method", METHODS)
def test_the_curve_does_not_depend_on_the_split(method: str, curves: dict) -> None:
    """Losses to 1e-5, gradient norms to 1e-4: log-ratios are small differences of large sums, so fp32 gives less than
    1e-6.
    """
    reference = curves[method]["packed"]
    assert len(reference) == STEPS
    for name, curve in curves[method].items():
        if name.endswith("resumed"):
            continue
        for step, (mine, theirs) in enumerate(zip(curve, reference, strict=True), start=1):
            assert mine["rows"] == theirs["rows"], (name, step)
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5), (name, step)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), (name, step)


@pytest.mark.parametrize(("method", "engine"), RESUMED)
def test_a_resumed_run_makes_the_same_steps_to_the_bit(method: str, engine: str, curves: dict) -> None:
    """Two ranks: sharded state, reference and KL estimate as they were. tests/engine/test_methods.py does so with one
    process.
    """
    curve = curves[method][f"{engine}, resumed"]
    assert len(curve) == STEPS + 2 and curve[2:STEPS] == curve[STEPS:]
    assert curve[2] != curve[3]


def test_splits_really_differ_and_something_is_learnt(curves: dict) -> None:
    for method, splits in curves.items():
        resumed = sum(name == method for name, _ in RESUMED)
        assert len(splits) == len(ONE_RANK) + len(TWO_RANKS) + len(DEEPSPEED.get(method, [])) + resumed
        assert [splits[name][0]["micro_batches"] for name in ("packed", "padded, accumulated", "ddp")] == [1, 3, 2]
        assert splits["packed"][-1]["loss"] < splits["packed"][0]["loss"]
