"""The next step is made by a thread while this one is computed: the same steps, and a checkpoint keeps the cursor of
the step done.
"""

from __future__ import annotations

import json
import sys
import threading
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from read_backs import ReadBacks

from aifactory_train.config.loading import load_recipe
from aifactory_train.core.errors import UserError
from aifactory_train.data import Cursor, Sampler
from aifactory_train.methods.supervised import Supervised
from aifactory_train.parallel import batches
from aifactory_train.run.folder import RunFolder
from aifactory_train.run.outcome import waits_for_others
from aifactory_train.training.ahead import StepsAhead
from aifactory_train.training.start import train
from aifactory_train.training.trainer import Trainer


class Named(Supervised):
    """Batches are the names of their documents; the thread that makes them is noted."""

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.fails_at: int | None = None

    def batch(self, step, share):
        self.threads.append(threading.current_thread().name)
        if step.step == self.fails_at:
            raise UserError("a torn row")
        return step.step, share.tolist()


class Prepared(Named):
    def before_step(self, step):
        """Something that a batch needs."""


def context(total: int = 9, device: str = "cpu") -> SimpleNamespace:
    lengths = np.arange(1, 41)
    settings = SimpleNamespace(grad_accum=2, micro_batch_tokens=64)
    return SimpleNamespace(
        data=SimpleNamespace(train=SimpleNamespace(lengths=lengths, supervised=lengths // 2)),
        sampler=Sampler(lengths, seed=3, batch_rows=7),
        recipe=SimpleNamespace(train=settings, data=SimpleNamespace(batching="packed")),
        engine=SimpleNamespace(dims=SimpleNamespace(data_ranks=2, data_rank=lambda rank: rank)),
        world=SimpleNamespace(device=device, rank=1),
        total_steps=total,
    )


def walk(steps: StepsAhead, total: int = 9) -> list:
    found, cursor = [], Cursor()
    for step in range(total):
        ready = steps.take(step, cursor)
        cursor = ready.following
        found.append((ready.context.documents.tolist(), ready.batches, ready.following, ready.supervised, ready.tokens))
    return found


def test_steps_made_ahead_are_the_steps_made_when_they_are_wanted(monkeypatch) -> None:
    method = Named()
    found = walk(StepsAhead(context(), method))  # over an epoch's end
    assert set(method.threads[2:]) == {"next-step"}  # all but the first step's
    assert len(method.threads) == 9 * 2  # nothing is made twice, and nothing after the last step
    monkeypatch.setattr(StepsAhead, "_prepare", lambda self, *wanted: None)
    assert walk(StepsAhead(context(), Named())) == found


def test_a_method_that_prepares_its_steps_makes_its_batches_itself() -> None:
    method = Prepared()
    assert all(batches is None for _, batches, *_ in walk(StepsAhead(context(), method))) and not method.threads


def test_after_going_back_the_step_that_was_made_ahead_is_thrown_away() -> None:
    steps = StepsAhead(context(), Named())
    first = steps.take(0, Cursor())
    other = Cursor(2, 14)
    again = steps.take(1, other)  # as after a roll-back: another cursor than the one that followed
    assert again.context.documents.tolist() == context().sampler.step(other)[0].tolist()
    assert again.context.documents.tolist() != steps.take(1, first.following).context.documents.tolist()


def test_what_goes_wrong_ahead_is_said_at_its_own_step() -> None:
    method = Named()
    method.fails_at = 2
    steps = StepsAhead(context(), method)
    cursor = steps.take(1, steps.take(0, Cursor()).following).following
    with pytest.raises(UserError, match="a torn row"):
        steps.take(2, cursor)
    method.fails_at = None
    assert steps.take(2, cursor).context.step == 2


def test_the_thread_works_for_this_rank_s_gpu_and_a_rank_that_waits_for_it_is_not_excused(monkeypatch) -> None:
    chosen, seen = [], []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(batches, "micro_limit", lambda most, lengths, device: most)
    steps = StepsAhead(context(device="cuda:3"), Named())
    cursor = steps.take(0, Cursor()).following
    steps.close()
    go = threading.Event()
    monkeypatch.setattr(Named, "batch", lambda self, step, share: go.wait(10))
    steps.take(1, cursor)  # the one after it is being made, and does not end
    waiting = threading.Thread(target=steps.close)
    waiting.start()
    stack = traceback.extract_stack(sys._current_frames()[waiting.ident])  # type: ignore[index]
    seen.append(waits_for_others(stack, "cuda:3"))
    go.set()
    waiting.join(10)
    assert chosen == ["cuda:3"] * 2 and seen == [False]


def test_batches_reach_a_gpu_from_pinned_memory_without_waiting(monkeypatch) -> None:
    from aifactory_train.data.batch import Batch

    how: list[str] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: how.append("pinned") or self)
    whole = torch.Tensor.to

    def to(self, *args, **more):
        how.append("at once" if more.get("non_blocking") else "waits")
        return whole(self, *args, **more)

    monkeypatch.setattr(torch.Tensor, "to", to)
    row = torch.arange(6)[None]
    batch = Batch(
        row, row, torch.tensor([[1, -100, 2, 3, -100, 4]]), torch.tensor([0, 2, 6], dtype=torch.int32), 4, 4, 6
    )
    on_device = batches.device_batch(batch, "meta")
    assert how.count("pinned") == how.count("at once") == 5 and "waits" not in how
    assert on_device.positions.shape == on_device.targets.shape == (4,)
    here = batches.device_batch(batch, "cpu")
    assert here.positions.tolist() == [0, 2, 3, 5] and here.targets.tolist() == [1, 2, 3, 4]


def test_a_run_resumes_at_the_step_done_not_at_the_one_made_ahead(make_recipe, tmp_path: Path, monkeypatch) -> None:
    settings = ["eval.before=false", "eval.after=false", "export.automatic=false", "checkpoint.every_steps=2"]
    recipe = load_recipe(str(make_recipe(settings={"train.max_steps": 4})), settings)
    run = tmp_path / "run"
    asked = []
    with monkeypatch.context() as patch:
        whole_step = Trainer.train_step

        def counted(self):
            with ReadBacks() as seen:
                whole_step(self)
            asked.append(dict(seen.found))

        patch.setattr(Trainer, "train_step", counted)
        assert train(recipe, run, quiet=True) == 0
    # The host waits for the device once a step: for loss and norm together. (The first step is made here, of host
    # tensors.)
    assert asked[1:] == [{"tolist": 1}] * 3

    def rows() -> list[tuple]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [(r["step"], r["loss"], r["grad_norm"], r["epoch"], r["tokens"]) for r in lines]

    whole = rows()
    saved = json.loads((run / "checkpoints/step-4/trainer.json").read_text())["cursor"]
    RunFolder(run).set_state("stopped", step=4)
    assert train(recipe, run, resume="2", quiet=True) == 0
    assert rows() == whole and len(whole) == 4  # bit for bit
    assert json.loads((run / "checkpoints/step-4/trainer.json").read_text())["cursor"] == saved

    monkeypatch.setattr(StepsAhead, "_prepare", lambda self, *wanted: None)
    assert train(recipe, tmp_path / "plain", quiet=True) == 0
    run = tmp_path / "plain"
    assert rows() == whole
