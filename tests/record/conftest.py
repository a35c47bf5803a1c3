"""A run folder with a whole record, written by the real recorder from a loop that only pretends to train (no torch in
the loop).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers
import numpy as np
import pytest

from aifactory_train.config.loading import load_recipe
from aifactory_train.core.files import write_json
from aifactory_train.data import Shares
from aifactory_train.record.devices import device_of
from aifactory_train.record.events import Evaluated, EventBus, RunEnded, RunStarted, StepDone
from aifactory_train.record.recorder import Recorder
from aifactory_train.record.trackers import Trackers
from aifactory_train.report.pack import write_pack
from aifactory_train.run.folder import RunFolder

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 400,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
FIGURES = {
    "before": {
        "bits_per_byte": 2.8,
        "perplexity": 388.0,
        "loss": 5.96,
        "rows": 12,
        "ci": {"bits_per_byte": [2.7, 2.9]},
    },
    "after": {
        "bits_per_byte": 2.6,
        "perplexity": 259.0,
        "loss": 5.55,
        "rows": 12,
        "ci": {"bits_per_byte": [2.5, 2.7], "perplexity": [250.0, 270.0]},
        "samples": [{"prompt": "What colour is the door?", "expected": "Red.", "answer": "The door is red."}],
    },
}


class Pretend:
    """A run as the recorder hears of it."""

    def __init__(self, recipe, *, step: int = 0, total_steps: int = 8):
        lengths = np.asarray([40, 17, 90, 33], dtype=np.int32)
        sources = [
            {
                "name": "train",
                "format": "messages",
                "sha256": "ab" * 32,
                "rows": 4,
                "documents": 4,
                "tokens": 180,
                "counts": {},
            },
            {
                "name": "eval",
                "format": "messages",
                "sha256": "cd" * 32,
                "rows": 2,
                "documents": 2,
                "tokens": 60,
                "counts": {},
            },
        ]
        report = {
            "sources": sources,
            "split": {"by": "given eval sources"},
            "duplicates": {"rows": 0, "by": "content"},
            "overlap": {"policy": "drop", "same_text": 0},
            "sets": {
                "train": {"rows": 4, "documents": 4, "tokens": 180, "supervised": 60},
                "eval": {"rows": 2, "documents": 2, "tokens": 60, "supervised": 20},
            },
            "digests": {"train": "12" * 32, "eval": "34" * 32},
        }
        self.step, self.total_steps = step, total_steps
        self.data = SimpleNamespace(
            report=report,
            tokenizer_info={"vocabulary": 400},
            train=SimpleNamespace(lengths=lengths, supervised=lengths // 3),
        )
        self.report = SimpleNamespace(parameters=107_840, trainable=8_192, lines=[("attention", "per_document", "CPU")])
        self.config = dict(CONFIG)

    def started(self) -> RunStarted:
        """What the loop says when it begins."""
        return RunStarted(
            step=self.step,
            total_steps=self.total_steps,
            data=self.data,  # type: ignore[arg-type]
            report=self.report,  # type: ignore[arg-type]
            model_config=self.config,
            engine="ddp",
            precision="compute fp32",
            devices=[("node1", device_of("cpu"))],
        )


def world(**more: Any) -> SimpleNamespace:
    facts = {"rank": 0, "size": 1, "local_rank": 0, "local_size": 1, "device": "cpu", "host": "node1", "is_main": True}
    return SimpleNamespace(**{**facts, **more})


def step_record(step: int) -> dict[str, Any]:
    return {
        "kind": "train", "step": step, "loss": 6.0 - 0.05 * step, "grad_norm": 0.5, "learning_rate": 1e-3, "rows": 2,
        "tokens": 57, "supervised_tokens": 20, "seconds": 0.5, "tokens_per_s": 114.0,
    }  # fmt: skip


def attempt(run: RunFolder, recipe, first: int, last: int, *, number: int, how: str = "finished") -> Recorder:
    """One attempt from step ``first`` to ``last``. ``how``: finished, stopped, killed, or an exception's text."""
    recorder = Recorder(run, world(), recipe, attempt=number, write_pack=write_pack)
    bus = EventBus(Trackers(run, recipe, recorder.failed), recorder)
    trainer = Pretend(recipe, step=first)
    bus.emit(trainer.started())
    if first == 0:
        bus.emit(Evaluated("before", FIGURES["before"], 0))
    with open(run.metrics_file, "a", encoding="utf-8") as metrics:
        for step in range(first + 1, last + 1):
            record = step_record(step)
            documents = np.asarray([0, 1])
            bus.emit(StepDone(record, documents, Shares(documents, np.asarray([0, 2]), micros=1)))
            metrics.write(json.dumps(record) + "\n")
    if how == "killed":
        recorder.progress()
        return recorder
    if how == "finished":
        bus.emit(Evaluated("after", FIGURES["after"], last))
        adapter = run.export / "adapter"
        adapter.mkdir(parents=True, exist_ok=True)
        (adapter / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 8)
        (adapter / "adapter_config.json").write_text("{}\n")
        write_json(run.eval_file, FIGURES)
        recorder.exported({"paths": {"adapter": str(adapter)}, "gate": {"adapter": {"passed": True}}})
        bus.emit(RunEnded("finished"))
    elif how == "stopped":
        bus.emit(RunEnded("stopped", "SIGUSR1"))
    else:
        bus.emit(RunEnded("failed", f"RuntimeError: {how}"))
    return recorder


@pytest.fixture
def tell(tmp_path, tiny_model_dir, monkeypatch) -> Callable[..., RunFolder]:
    """Factory of a finished run: ``tell(**settings of the recipe)``; the user's configuration folder is an empty
    one.
    """
    monkeypatch.setenv("AIFACTORY_CONFIG", str(tmp_path / "config"))
    monkeypatch.delenv("AIFACTORY_SITE", raising=False)

    def make(settings: dict[str, Any] | None = None, *, name: str = "run", story: Callable | None = None) -> RunFolder:
        path = helpers.write_recipe(tmp_path / f"recipe-{name}", tiny_model_dir, settings=settings)
        recipe = load_recipe(str(path), [])
        run = RunFolder(tmp_path / "runs" / name)
        run.path.mkdir(parents=True)
        run.save_config(recipe)
        run.set_state("running", step=0)
        if story is None:
            attempt(run, recipe, 0, 8, number=1)
        else:
            story(run, recipe)
        run.set_state("finished", step=8)
        return run

    return make


@pytest.fixture(scope="session")
def validators() -> str:
    """The Python that has the official validators (``make validators``; their pins do not fit beside ours)."""
    root = Path(__file__).resolve().parents[2]
    for candidate in (os.environ.get("AIFACTORY_VALIDATORS"), str(root / ".validators" / "bin" / "python")):
        if candidate and Path(candidate).is_file():
            return candidate
    pytest.skip("the official validators are not installed (make validators)")
    return sys.executable
