"""The record of whole runs: what is in it, that it cannot break a training, and that any change is found and named."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from aifactory_train.core.errors import UserError
from aifactory_train.core.missing import is_missing, missing_places
from aifactory_train.record import fill, signing
from aifactory_train.record.chain import Chain, read_events
from aifactory_train.record.check import verify
from aifactory_train.record.collect import method_section
from aifactory_train.record.events import RunEnded
from aifactory_train.record.files import exported_values, load_record, write_record
from aifactory_train.record.lineage import changes
from aifactory_train.record.recorder import Recorder
from aifactory_train.report.pack import write_pack

from .conftest import Pretend, attempt, step_record, world


def test_a_finished_run(tell):
    run = tell()
    record = load_record(run.path)
    assert verify(run.path)["ok"], verify(run.path)
    assert record["run"]["id"] == "run" and record["run"]["seed"] == 3
    assert [f["path"] for f in record["base"]["files"] if f["path"].endswith(".safetensors")]
    totals = record["compute"]["totals"]
    assert totals["steps"] == 8 and totals["tokens_processed"] == {"real": 456, "with_padding": 456}
    assert totals["flop_model"] > 0 and totals["flop_executed"] > 0 and totals["restarts"] == 0
    assert record["eval"]["after"]["bits_per_byte"] == 2.6
    assert "samples" not in json.dumps(record["eval"]), "answers of rows do not belong into the record"
    assert record["artefact"]["tree_sha256"] and record["artefact"]["adapter_only"]
    assert all(is_missing(v) for v in record["people"].values())
    for name in ("record.json", "events.jsonl", "report.html", "evidence/README.md", "evidence/manifest.json"):
        assert (run.path / name).is_file(), name


def test_events_come_as_they_happen(tell):
    events, _ = read_events(tell().path / "events.jsonl")
    kinds = [e["kind"] for e in events]
    assert kinds[0] == "attempt-started" and kinds[-2:] == ["attempt-ended", "pack-written"]
    assert kinds.index("exported") > kinds.index("evaluated")


# ---- every change is found and named


def one_byte(path: Path, at: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize(
    "name",
    [
        "export/adapter/adapter_model.safetensors",
        "data_manifest.json",
        "evidence/bom.cdx.json",
        "eval.json",
        "run.yaml",
        "ro-crate-metadata.json",
    ],
)
def test_one_byte_changed_in_a_file(tell, name):
    run = tell()
    one_byte(run.path / name, -30)
    found = verify(run.path)
    assert not found["ok"]
    assert [f["kind"] for f in found["faults"] if f["where"] == name] == ["file-changed"], found


def test_one_byte_changed_in_the_record(tell):
    run = tell()
    text = (run.path / "record.json").read_text()
    (run.path / "record.json").write_text(text.replace('"bits_per_byte": 2.6,', '"bits_per_byte": 1.6,'))
    found = verify(run.path)
    assert any(f["where"] == "record.json: eval/after/bits_per_byte" for f in found["faults"]), found


@pytest.mark.parametrize("place", range(0, 4000, 333))
def test_any_byte_of_the_record(tell, place):
    run = tell()
    one_byte(run.path / "record.json", place)
    assert not verify(run.path)["ok"]


def test_an_edited_event_and_a_shortened_log(tell):
    run = tell()
    path = run.path / "events.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0].replace('"seed": 3', '"seed": 4'), *lines[1:]]) + "\n")
    assert any(f["kind"] == "edited-event" and f["where"] == "events.jsonl:1" for f in verify(run.path)["faults"])
    path.write_text("\n".join(lines[:-3]) + "\n")
    assert any(f["where"].startswith("record.json") for f in verify(run.path)["faults"])


def test_files_that_come_and_go(tell):
    run = tell()
    (run.path / "export" / "adapter" / "more.safetensors").write_bytes(b"x")
    (run.path / "export" / "adapter" / "adapter_config.json").unlink()
    kinds = {(f["kind"], f["where"]) for f in verify(run.path)["faults"]}
    assert ("file-added", "export/adapter/more.safetensors") in kinds
    assert ("file-missing", "export/adapter/adapter_config.json") in kinds


def test_a_missing_record_or_log(tell):
    run = tell()
    (run.path / "record.json").unlink()
    assert [f["kind"] for f in verify(run.path)["faults"] if f["where"] == "record.json"] == ["record-missing"]
    (run.path / "events.jsonl").unlink()
    assert "events-missing" in {f["kind"] for f in verify(run.path)["faults"]}


def test_a_kill_between_event_and_record_is_no_fault(tell):
    run = tell()
    before = (run.path / "record.json").read_bytes()
    Chain(run.path / "events.jsonl").append("checkpoint", {"checkpoints/last": 9})
    (run.path / "record.json").write_bytes(before)
    found = verify(run.path)
    assert any("1 events behind" in n for n in found["notes"])
    assert not [f for f in found["faults"] if f["where"].startswith("record.json:")]
    assert write_record(run.path)["checkpoints"]["last"] == 9


def test_inputs_are_checked_when_asked(tell, tiny_model_dir, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    run = tell({"model.base": str(base)})
    assert not [f for f in verify(run.path, inputs=True)["faults"] if f["where"].startswith("base")]
    one_byte(base / "model.safetensors", -5)
    faults = verify(run.path, inputs=True)["faults"]
    assert [f["where"] for f in faults if f["where"].startswith("base")] == ["base model: model.safetensors"]


def test_every_file_that_weights_are_read_from_is_listed(tell, tiny_model_dir, tmp_path):
    """Also one that a look through the folder would pass over: the index names it."""
    from safetensors import safe_open

    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    (base / ".parts").mkdir()
    (base / "model.safetensors").rename(base / ".parts" / "one.safetensors")
    shutil.copy(base / ".parts" / "one.safetensors", base / "other.safetensors")
    with safe_open(base / ".parts" / "one.safetensors", framework="pt") as shard:
        places = dict.fromkeys(shard.keys(), ".parts/one.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    run = tell({"model.base": str(base)})
    listed = {entry["path"] for entry in load_record(run.path)["base"]["files"]}
    assert {".parts/one.safetensors", "model.safetensors.index.json"} <= listed
    one_byte(base / ".parts" / "one.safetensors", -5)
    faults = verify(run.path, inputs=True)["faults"]
    assert [f["where"] for f in faults if f["where"].startswith("base")] == ["base model: .parts/one.safetensors"]


# ---- signature


def test_signed_and_checked(tell, tmp_path):
    run = tell()
    public = signing.make_key(tmp_path / "one.pem")
    other = signing.make_key(tmp_path / "other.pem")
    assert write_pack(run, key=tmp_path / "one.pem")["manifest"]["signed"]
    assert verify(run.path, key=public)["ok"]
    wrong = verify(run.path, key=other)
    assert [f["kind"] for f in wrong["faults"]] == ["wrong-key"]

    envelope = run.path / "evidence" / "manifest.dsse.json"
    content = json.loads(envelope.read_text())
    broken = json.loads(envelope.read_text())
    broken["signatures"][0]["sig"] = broken["signatures"][0]["sig"].replace(broken["signatures"][0]["sig"][5], "A", 1)
    envelope.write_text(json.dumps(broken))
    assert {f["kind"] for f in verify(run.path, key=public)["faults"]} <= {"bad-signature", "signature-unreadable"}
    assert not verify(run.path, key=public)["ok"]
    envelope.write_text(json.dumps(content))
    # whoever changes a file and repairs the manifest cannot repair the signature
    one_byte(run.path / "export/adapter/adapter_model.safetensors")
    manifest = run.path / "evidence" / "manifest.json"
    fresh = signing.statement(run.path, load_record(run.path))
    manifest.write_text(json.dumps(fresh))
    assert "manifest-edited" in {f["kind"] for f in verify(run.path, key=public)["faults"]}
    envelope.unlink()
    assert "signature-missing" in {f["kind"] for f in verify(run.path, key=public)["faults"]}


def test_dsse_by_another_implementation(tell, tmp_path):
    """securesystemslib reads the envelope and accepts the signature; with another key it does not."""
    dsse = pytest.importorskip("securesystemslib.dsse")
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import SSlibKey

    run = tell()
    public = signing.make_key(tmp_path / "k.pem")
    signing.make_key(tmp_path / "o.pem")
    write_pack(run, key=tmp_path / "k.pem")
    content = json.loads((run.path / "evidence" / "manifest.dsse.json").read_text())
    keyid = content["signatures"][0]["keyid"]
    envelope = dsse.Envelope.from_dict(content)

    def key(path: Path) -> SSlibKey:
        return SSlibKey.from_crypto(signing.load_public(path), keyid=keyid)

    envelope.verify([key(public)], 1)
    with pytest.raises(VerificationError):
        envelope.verify([key(tmp_path / "o.pub")], 1)
    statement = json.loads(envelope.payload)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    names = {s["name"] for s in statement["subject"]}
    assert {"record.json", "events.jsonl", "data_manifest.json", "export/adapter/adapter_model.safetensors"} <= names


def test_keys_that_are_refused(tmp_path):
    public = signing.make_key(tmp_path / "k.pem")
    with pytest.raises(UserError, match="already"):
        signing.make_key(tmp_path / "k.pem")
    (tmp_path / "k.pem").chmod(0o644)
    with pytest.raises(UserError, match="others can read"):
        signing.load_private(tmp_path / "k.pem")
    with pytest.raises(UserError, match="not a PEM public key"):
        signing.load_public(tmp_path / "k.pem")
    (tmp_path / "bad.pem").write_text("nonsense")
    (tmp_path / "bad.pem").chmod(0o600)
    with pytest.raises(UserError, match="not an unencrypted PEM"):
        signing.load_private(tmp_path / "bad.pem")
    assert signing.load_public(public)


# ---- attempts


def test_restarts_and_waste(tell):
    def story(run, recipe):
        attempt(run, recipe, 0, 6, number=1, how="killed")
        attempt(run, recipe, 4, 8, number=2, how="stopped")
        attempt(run, recipe, 8, 10, number=3, how="CUDA error: an illegal memory access")
        attempt(run, recipe, 8, 12, number=4)

    record = load_record(tell(story=story).path)
    attempts, totals = record["compute"]["attempts"], record["compute"]["totals"]
    assert [a["state"] for a in attempts.values()] == ["killed", "stopped", "failed", "finished"]
    assert "no end was recorded" in attempts["001"]["cause"]
    assert attempts["002"]["cause"] == "SIGUSR1" and "illegal memory" in attempts["003"]["cause"]
    assert totals["restarts"] == 3 and totals["repeated_steps"] == 2 + 0 + 2
    assert 0 < totals["wasted_device_hours"] < totals["device_hours"]
    # everything that was computed counts, also what was computed twice
    one = record["compute"]["attempts"]["001"]["flop_model"] / 6
    assert totals["flop_model"] == pytest.approx(one * (6 + 4 + 2 + 4))
    assert verify(tell(name="other", story=story).path)["ok"]


def test_lineage_adds_the_earlier_run(tell):
    first = tell(name="first")
    second = tell({"model.start_from": str(first.path)}, name="second")
    a, b = load_record(first.path)["aiact"], load_record(second.path)["aiact"]
    assert b["modification_flop_lineage"] == pytest.approx(a["modification_flop_this"] + b["modification_flop_this"])
    assert load_record(second.path)["lineage"]["run"] == "first"
    (first.path / "record.json").unlink()
    third = load_record(tell({"model.start_from": str(first.path)}, name="third").path)
    assert is_missing(third["lineage"]["flop_model"])


def test_changes_between_runs(tell):
    one, two = tell(name="one"), tell({"train.learning_rate": 5e-3, "adapter.rank": 8}, name="two")
    found = {c["place"]: (c["earlier"], c["later"]) for c in changes(load_record(one.path), load_record(two.path))}
    assert found["hparams/learning_rate"] == (0.01, 0.005) and found["method/rank"] == (4, 8)
    assert "run/id" not in found


# ---- it never breaks a training


def test_a_full_disk_is_said_and_survived(tell, monkeypatch, capsys):
    def story(run, recipe):
        recorder = Recorder(run, world(), recipe, attempt=1, write_pack=write_pack)
        recorder.hear(Pretend(recipe).started())
        real = Chain.append

        def full(self, *args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Chain, "append", full)
        for step in range(1, 4):
            recorder.step(step_record(step), [0, 1], [[[0, 1]]])
        recorder.evaluated("after", {"loss": 1.0}, 3)
        recorder.evaluated("during", {"loss": 1.0}, 3)
        monkeypatch.setattr(Chain, "append", real)
        recorder.hear(RunEnded("finished"))

    record = load_record(tell(story=story).path)
    assert capsys.readouterr().err.count("record: evaluated failed") == 1
    assert "No space left" in record["compute"]["attempts"]["001"]["errors"]["evaluated"]
    assert record["compute"]["totals"]["steps"] == 3


def test_an_unknown_architecture_is_said(tell, capsys):
    def story(run, recipe):
        recorder = Recorder(run, world(), recipe, attempt=1, write_pack=write_pack)
        trainer = Pretend(recipe)
        trainer.config = {"model_type": "unheard-of"}
        recorder.hear(trainer.started())
        recorder.step(step_record(1), [0, 1], [[[0, 1]]])
        recorder.hear(RunEnded("finished"))

    run = tell(story=story)
    record = load_record(run.path)
    assert record["compute"]["attempts"]["001"]["flop_counted"] is False
    assert is_missing(record["aiact"]["reasoning"]) and record["aiact"]["provider_flag"] is None
    assert "unheard-of" in record["compute"]["attempts"]["001"]["errors"]["counting FLOPs"]
    assert "MISSING" in (run.path / "evidence" / "one-third.md").read_text()


def test_a_step_costs_little(tell):
    """Well under 1 % of a step of 0.1 s, with 64 documents in it."""

    def story(run, recipe):
        recorder = Recorder(run, world(), recipe, attempt=1, write_pack=write_pack)
        trainer = Pretend(recipe)
        recorder.hear(trainer.started())
        began = time.process_time()
        for step in range(1, 201):
            recorder.step(step_record(step), [0, 1, 2, 3] * 16, [[[0, 1]]])
        story.each = (time.process_time() - began) / 200
        recorder.hear(RunEnded("stopped"))

    tell(story=story)
    assert story.each < 1e-3, f"{story.each * 1e3:.2f} ms"


def test_other_ranks_write_nothing(tell):
    def story(run, recipe):
        recorder = Recorder(run, world(rank=1, local_rank=1, is_main=False), recipe, attempt=1)
        recorder.step(step_record(1), [0], [[[0]]])
        recorder.evaluated("after", {}, 1)
        recorder.hear(RunEnded("finished"))
        assert not (run.path / "events.jsonl").exists() and not (run.path / "attempts").exists()

    tell(story=story)


# ---- what people fill in


def test_fill_once_per_organisation(tell, tmp_path):
    path = fill.organisation_file(None)
    fill.save(path, {"provider_legal_name": "Example Ltd", "intended_use": "term normalisation", "user_data": "no"})
    assert path.stat().st_mode & 0o777 == 0o600
    record = load_record(tell().path)
    assert record["people"]["provider_legal_name"] == "Example Ltd"
    assert is_missing(record["people"]["contact"])
    assert "people/contact" in dict(missing_places(record))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"provider_legal_nam": "x"}, "did you mean 'provider_legal_name'"),
        ({"contact": ""}, "needs a text"),
        (["x"], "mapping"),
        ({"contact": {"a": 1}}, "needs a text"),
    ],
)
def test_fill_refuses(values, words):
    with pytest.raises(UserError, match=words):
        fill.check_values(values, "organisation.yaml")


def test_template_asks_everything_and_answers_nothing():
    import yaml

    from aifactory_train.record.people import PEOPLE

    text = fill.template()
    assert yaml.safe_load(text) is None and all(f"#{key}:" in text for key in PEOPLE)


def test_one_meter_a_node(tell):
    """Of two ranks on each of two nodes the first of each node measures; every rank comes to the same attempt."""

    def story(run, recipe):
        started = {}
        for rank in range(4):
            where = world(rank=rank, local_rank=rank % 2, host=f"n{rank // 2}", is_main=rank == 0)
            recorder = Recorder(run, where, recipe, attempt=1)
            recorder._start_meter(
                [("n0", {"kind": "cpu"}), ("n0", {"kind": "cpu"}), ("n1", {"kind": "cpu"}), ("n1", {})]
            )
            started[rank] = recorder
        files = {p.name for p in (run.path / "attempts" / "001").glob("energy-*.json")}
        assert files == {"energy-n0.json", "energy-n1.json"}
        assert [r for r, recorder in started.items() if recorder._meter is not None] == [0, 2]
        for recorder in started.values():
            recorder.hear(RunEnded("finished"))
        final = [json.loads(p.read_text())["final"] for p in (run.path / "attempts" / "001").glob("energy-*.json")]
        assert final == [True, True]

    tell(story=story)


def test_what_the_guard_left_out_is_told_and_counted(tell):
    def story(run, recipe):
        recorder = Recorder(run, world(), recipe, attempt=1, write_pack=write_pack)
        recorder.hear(Pretend(recipe).started())
        recorder.incident("skip", 3, "the loss is nan", [0, 1])
        recorder.hear(RunEnded("finished"))

    run = tell(story=story)
    record = load_record(run.path)
    assert record["incidents"]["000000003"]["why"] == "the loss is nan"
    assert record["compute"]["totals"]["flop_model"] > 0 and record["compute"]["totals"]["steps"] == 0
    assert "the loss is nan" in (run.path / "report.html").read_text()


@pytest.mark.parametrize(
    ("settings", "objective", "goldfish"),
    [
        ({}, "next-token cross-entropy over assistant turns", False),
        ({"preference": {"kind": "dpo", "beta": 0.2}}, "(DPO, beta 0.2)", False),
        ({"goldfish": {"k": 4}}, "one token in 4 withheld", {"k": 4}),
    ],
)
def test_the_record_says_what_was_minimised(tell, settings, objective, goldfish):
    recipe = tell().load_config()
    recipe = type(recipe).model_validate({**recipe.model_dump(), "methods": settings})
    reported = method_section(recipe, 100, 10)
    assert objective in reported["objective"]
    assert reported["goldfish"] == goldfish or goldfish.items() <= reported["goldfish"].items()


def test_an_export_in_another_format_is_an_artefact_of_that_format(tell):
    run = tell()
    recipe = run.load_config()
    (run.export / "gguf-f16").mkdir()
    (run.export / "gguf-f16" / "model.gguf").write_bytes(b"GGUF")
    artefact = exported_values(run.path, recipe, {})["artefact"]
    assert artefact["format"] == "safetensors, gguf" and not artefact["adapter_only"]
