"""MLflow and W&B, read back from their own local stores; nothing is sent, nothing breaks the training."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from aifactory_train.core.errors import UserError
from aifactory_train.private import egress
from aifactory_train.record import trackers
from aifactory_train.record.files import load_record

from .conftest import attempt


@pytest.fixture
def no_network():
    """Any connection of Python code to another machine fails the test."""
    egress.close()
    before = egress.blocked
    yield
    egress.open_again()
    assert egress.blocked == before


def wandb_records(path: Path) -> Iterator[object]:
    """Records of a ``.wandb`` file: a 7-byte header, then LevelDB's log format (blocks of 32 KiB, pieces with crc,
    length, type).
    """
    from wandb.proto import wandb_internal_pb2

    raw = path.read_bytes()
    assert raw[:4] == b":W&B"
    at, whole = 7, b""
    while at + 7 <= len(raw):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", raw, at + 4)
        whole += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_mlflow_store(tell, no_network):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    def story(run, recipe):
        attempt(run, recipe, 0, 3, number=1, how="stopped")
        attempt(run, recipe, 3, 5, number=2)

    run = tell({"tracking.mlflow": True, "tracking.experiment": "mine"}, story=story)
    assert load_record(run.path)["compute"]["attempts"]["002"]["errors"] == {}
    client = MlflowClient(tracking_uri=(run.path / "mlruns").as_uri())
    found = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert len(found) == 1 and found[0].info.status == "FINISHED"  # the second attempt went on in the same run
    losses = {m.step: m.value for m in client.get_metric_history(found[0].info.run_id, "train/loss")}
    assert losses == {i: pytest.approx(6.0 - 0.05 * i) for i in range(1, 6)}
    assert found[0].data.params["train.learning_rate"] == "0.01"
    assert not any("train.jsonl" in v for v in found[0].data.params.values())
    assert found[0].data.metrics["eval/bits_per_byte"] == 2.6


def test_wandb_offline_store(tell, no_network):
    pytest.importorskip("wandb")
    run = tell({"tracking.wandb": True}, name="offline")
    assert load_record(run.path)["compute"]["attempts"]["001"]["errors"] == {}
    files = list((run.path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1
    records = list(wandb_records(files[0]))
    started = next(r.run for r in records if r.WhichOneof("record_type") == "run")
    assert started.run_id == "offline" and started.project == "aifactory-train"
    history = [r.history for r in records if r.WhichOneof("record_type") == "history"]
    rows = [{"/".join(i.nested_key) or i.key: i.value_json for i in h.item} for h in history]
    losses = [float(r["train/loss"]) for r in rows if "train/loss" in r]
    assert losses == [pytest.approx(6.0 - 0.05 * i) for i in range(1, 9)]


def test_a_missing_package_is_refused_by_name(tell, monkeypatch):
    import importlib.util

    from aifactory_train.config.loading import load_recipe

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else real(name, *a))
    run = tell()
    recipe = load_recipe(str(run.config_file), ["tracking.wandb=true"])
    with pytest.raises(UserError, match="'wandb' is not installed"):
        trackers.check(recipe)


def test_a_failing_tracker_ends_nothing(tell, monkeypatch, capsys):
    class Broken:
        def __init__(self, run, recipe):
            self.calls = 0

        def log(self, *arguments):
            raise ConnectionError("gone")

        def finish(self, state):
            raise ConnectionError("gone")

    monkeypatch.setattr(trackers, "MLflow", Broken)
    run = tell({"tracking.mlflow": True})
    record = load_record(run.path)
    assert record["compute"]["totals"]["steps"] == 8
    assert "gone" in record["compute"]["attempts"]["001"]["errors"]["tracker Broken"]
    assert capsys.readouterr().err.count("tracker Broken") == 1


def test_figures_only():
    assert trackers.numbers({"step": 3, "loss": 1.5, "bad": float("nan"), "flag": True, "why": "x"}) == {"loss": 1.5}
