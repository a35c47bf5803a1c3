"""A folder in which somebody forged what he liked: ``verify`` has a finding for each, and never a traceback or an
endless wait.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import helpers
import pytest

from aifactory_train.core.errors import UserError
from aifactory_train.record import chain, signing
from aifactory_train.record.chain import make_event, read_events
from aifactory_train.record.check import verify
from aifactory_train.record.files import load_record, write_record
from aifactory_train.report.pack import write_pack


@pytest.fixture
def signed(tell, tmp_path):
    """``(run folder, public key)`` of a run whose pack was signed."""
    run = tell()
    public = signing.make_key(tmp_path / "one.pem")
    assert write_pack(run, key=tmp_path / "one.pem")["manifest"]["signed"]
    found = verify(run.path, key=public)
    assert found["ok"], found
    return run.path, public


def rewrite(path: Path, change) -> None:
    """Change a JSON file: ``change`` gets the tree and gives another back, or changes it in place."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(tree) or tree), encoding="utf-8")


def kinds(folder: Path, **more) -> set[str]:
    return {f["kind"] for f in verify(folder, **more)["faults"]}


# ---- a key was given: there must be a signature by it, and it must speak for the run


@pytest.mark.parametrize("also", [[], ["manifest.dsse.json"]])
def test_a_deleted_manifest_is_a_fault_when_a_key_is_given(signed, also):
    folder, public = signed
    for name in ["manifest.json", *also]:
        (folder / "evidence" / name).unlink()
    assert kinds(folder, key=public) == {"manifest-missing"}
    shutil.rmtree(folder / "evidence")
    assert "manifest-missing" in kinds(folder, key=public)
    # without a key and without any trace of a signature it is what an unsigned run looks like
    assert verify(folder)["ok"] and "there is no manifest" in verify(folder)["notes"][0]


def test_an_envelope_whose_manifest_is_gone_is_a_fault_without_a_key_too(signed):
    folder, _ = signed
    (folder / "evidence" / "manifest.json").unlink()
    assert kinds(folder) == {"manifest-missing"}


def test_no_envelope_and_no_signature_in_it(signed):
    folder, public = signed
    envelope = folder / "evidence" / "manifest.dsse.json"
    rewrite(envelope, lambda tree: tree.update(signatures=[]))
    assert kinds(folder, key=public) == {"wrong-key"}
    envelope.unlink()
    assert kinds(folder, key=public) == {"signature-missing"}


def test_the_forger_of_everything_is_found(signed):
    """Another chain, record and figures, and no manifest."""
    from aifactory_train.cli import main

    folder, public = signed
    events = (folder / "events.jsonl").read_text().splitlines()
    forged, prev = [], chain.GENESIS
    for number, line in enumerate(events):
        old = json.loads(line.replace('"bits_per_byte": 2.6', '"bits_per_byte": 0.6'))
        event = make_event(number, prev, old["kind"], old["set"], old["note"])
        forged.append(json.dumps(event))
        prev = event["sha256"]
    (folder / "events.jsonl").write_text("\n".join(forged) + "\n")
    write_record(folder)
    assert load_record(folder)["eval"]["after"]["bits_per_byte"] == 0.6
    for name in ("manifest.json", "manifest.dsse.json"):
        (folder / "evidence" / name).unlink()
    assert verify(folder)["ok"], "without a key nobody can tell"
    assert kinds(folder, key=public) == {"manifest-missing"}
    assert main(["verify", str(folder), "--key", str(public)]) == 1


def test_a_manifest_must_list_what_the_run_has(signed, tmp_path):
    """A signature by the right key over a manifest that leaves files out, of which those left out were deleted."""
    folder, public = signed
    left_out = ["record.json", "eval.json", "export/adapter/adapter_model.safetensors", "data_manifest.json"]
    real = signing.statement

    def shorter(*args):
        tree = real(*args)
        tree["subject"] = [s for s in tree["subject"] if s["name"] not in left_out]
        return tree

    record = load_record(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signing, "statement", shorter)
        assert signing.write_manifest(folder, record, tmp_path / "one.pem")["signed"]
    found = {f["where"]: f["kind"] for f in verify(folder, key=public)["faults"]}
    assert found == dict.fromkeys(left_out, "file-added")
    for name in left_out:
        (folder / name).unlink()
    found = {f["where"]: f["kind"] for f in verify(folder, key=public)["faults"]}
    assert found["record.json"] in ("record-missing", "manifest-incomplete")
    assert found["export/adapter/adapter_model.safetensors"] == "file-missing"
    (folder / "events.jsonl").unlink()
    assert "manifest-incomplete" in kinds(folder, key=public) | kinds(folder)


def test_a_key_that_is_none_is_refused_whatever_the_folder_holds(signed, tmp_path):
    folder, _ = signed
    (folder / "evidence" / "manifest.json").unlink()
    (tmp_path / "no.pub").write_text("no key")
    with pytest.raises(UserError, match="not a PEM public key"):
        verify(folder, key=tmp_path / "no.pub")


# ---- what people read


@pytest.mark.parametrize("name", ["report.html", "metrics.jsonl", "eval.json", "record.json"])
def test_what_a_reader_trusts_is_covered(signed, name):
    folder, public = signed
    path = folder / name
    path.write_text(path.read_text(encoding="utf-8").replace("2.6", "0.6").replace('"loss"', '"lost"') + " ")
    assert name in {f["where"].partition(":")[0] for f in verify(folder, key=public)["faults"]}


def added_manifest(folder, place):
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_text("{}")


ADDED = {
    "export/manifest.json": added_manifest,
    "export/sub/manifest.dsse.json": added_manifest,
    "evidence/sub/manifest.json": added_manifest,
    "evidence/annexes": lambda folder, place: (folder / place).symlink_to(folder.parent),
    "export/adapter-2": lambda folder, place: (folder / place).symlink_to(folder.parent),
    "export/pipe": lambda folder, place: os.mkfifo(folder / place),
    "export/dangling": lambda folder, place: (folder / place).symlink_to("nowhere"),
    "plan.json": lambda folder, place: (folder / place).write_text("{}"),
}


@pytest.mark.parametrize("place", ADDED)
def test_what_was_put_beside_the_signed_files_is_a_fault(signed, place):
    folder, public = signed
    if place == "plan.json":
        (folder / place).unlink(missing_ok=True)
        if not any(
            s["name"] == "report.html" for s in json.loads((folder / "evidence/manifest.json").read_text())["subject"]
        ):
            pytest.fail("the manifest is not one of this version")
    (folder / "export").mkdir(exist_ok=True)
    ADDED[place](folder, place)
    faults = verify(folder, key=public)["faults"]
    assert {f["where"] for f in faults if f["kind"] == "file-added"} == {place}, faults


def test_hidden_files_are_named_as_not_covered(signed):
    folder, public = signed
    (folder / "evidence" / ".hidden").write_text("x")
    found = verify(folder, key=public)
    assert found["ok"] and "evidence/ (1 files)" in found["notes"][-1]


def test_a_manifest_that_says_two_things_is_a_fault(signed):
    folder, public = signed
    place = folder / "evidence" / "manifest.json"
    place.write_text(place.read_text().replace('"subject"', '"subject": [], "subject"', 1))
    assert kinds(folder, key=public) == {"manifest-unreadable"}


def test_a_key_without_end_is_refused(signed):
    with pytest.raises(UserError, match="not a regular file"):
        verify(signed[0], key=Path("/dev/zero"))


def test_what_no_signature_speaks_for_is_named(signed):
    folder, public = signed
    for name in ("checkpoints/step-4/COMPLETE", "checkpoints/step-4/model.safetensors", "predictions.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    found = verify(folder, key=public)
    note = next(n for n in found["notes"] if n.startswith("not covered by the signature"))
    assert found["ok"] and "checkpoints/ (2 files)" in note and "predictions.jsonl" in note and "state.json" in note
    assert "attempts/ (1 files)" in note
    assert "report.html" not in note and "export/" not in note
    assert not [n for n in verify(folder)["notes"] if n.startswith("not covered")]


def test_a_manifest_of_the_first_version_still_holds(signed, tmp_path, monkeypatch):
    """It listed neither report nor metrics: that is said, and is no fault."""
    folder, public = signed
    monkeypatch.setattr(signing, "_SINCE", ())
    signing.write_manifest(folder, load_record(folder), tmp_path / "one.pem")
    monkeypatch.undo()
    found = verify(folder, key=public)
    note = next(n for n in found["notes"] if n.startswith("not covered by the signature"))
    assert found["ok"] and "metrics.jsonl" in note and "report.html" in note


# ---- findings, not tracebacks


def forge_events(folder: Path, change) -> None:
    """The first event with its values changed and every digest made to fit: the chain itself holds."""
    events, _ = read_events(folder / "events.jsonl")
    change(events[0])
    prev = chain.GENESIS
    for event in events:
        event["prev_sha256"] = prev
        prev = event["sha256"] = chain.digest({k: v for k, v in event.items() if k != "sha256"})
    text = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "events.jsonl").write_text(text)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("set", [1]),
        ("set", None),
        ("seq", "zero"),
        ("seq", True),
        ("seq", 1.0),
        ("kind", 7),
        ("note", {}),
        ("time", None),
    ],
)
def test_events_of_other_types(tell, key, value):
    folder = tell().path
    forge_events(folder, lambda event: event.update({key: value}))
    assert "unreadable-event" in kinds(folder)


@pytest.mark.parametrize("line", [DEEP, '{"seq": NaN}', "[]", '{"a": ' + "1" * 5000 + "}", '"\\ud800"'])
def test_lines_that_are_no_events(tell, line):
    folder = tell().path
    with open(folder / "events.jsonl", "a", encoding="utf-8") as log:
        log.write(line + "\n")
    assert "unreadable-event" in kinds(folder)


def test_half_a_surrogate_in_an_event(tell):
    folder = tell().path
    lines = (folder / "events.jsonl").read_text().splitlines()
    lines[0] = lines[0].replace('"seed": 3', '"seed": "\\ud800"')
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    assert "unreadable-event" in kinds(folder)


def test_control_characters_in_names_reach_no_terminal(tell, capsys):
    from aifactory_train.cli import main

    folder = tell().path
    rewrite(
        folder / "evidence" / "manifest.json",
        lambda tree: tree["subject"].append({"name": "a\x1b[2J\n[/b]", "digest": {"sha256": "x"}}),
    )
    assert main(["verify", str(folder)]) == 1
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "values",
    [
        {"artefact": "text"},
        {"artefact": [1]},
        {"artefact": {"files": {"a": 1}}},
        {"artefact": {"files": ["text"]}},
        {"artefact": {"files": [{"sha256": "x", "bytes": 1}]}},
        {"artefact": {"files": [{"path": 7, "sha256": "x", "bytes": 1}]}},
        {"artefact": {"files": [{"path": "eval.json", "sha256": 7, "bytes": 1}]}},
        {"artefact": {"files": [{"path": "eval.json", "sha256": "x", "bytes": "1"}]}},
        {"artefact": {"files": [{"path": "a\0b", "sha256": "x", "bytes": 1}]}},
        {"artefact": {"files": [{"path": "n" * 5000, "sha256": "x", "bytes": 1}]}},
        {"artefact": {"files": [{"path": "../../etc/passwd", "sha256": "x", "bytes": 1}]}},
        {"artefact": {"files": [{"path": "/etc/passwd", "sha256": "x", "bytes": 1}]}},
        {"data_manifest": "text"},
        {"data_manifest": {"path": ["x"], "sha256": "x", "bytes": 1}},
        {"base": "text"},
        {"base": {"id": 7, "revision": None}},
        {"base": {"id": "\0", "revision": ["x"]}},
        {"data": "text"},
        {"data": ["text", 7, None]},
        {"data": [{"source": 7, "name": "x"}]},
        {"/".join(["deep"] * 20_000): 1},
    ],
)
def test_events_that_make_an_odd_record(tell, values):
    """The later events that set the same places are gone, so that the forged value is what the record holds."""
    folder = tell().path
    events, _ = read_events(folder / "events.jsonl")
    event = make_event(0, chain.GENESIS, events[0]["kind"], {**events[0]["set"], **values}, "")
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    try:
        write_record(folder)
    except RecursionError:
        (folder / "record.json").write_text("{}")
    found = verify(folder, inputs=True)
    named = {f["kind"] for f in found["faults"]}
    assert named & {"record-unreadable", "file-missing"}, found


@pytest.mark.parametrize("name", ["record.json", "evidence/manifest.json", "evidence/manifest.dsse.json"])
@pytest.mark.parametrize("text", [DEEP, "[]", "7", "null", "", '{"a": NaN}', '"\\ud800"', "\xff", '{"log": 7}'])
def test_files_that_hold_something_else(signed, name, text):
    folder, public = signed
    (folder / name).write_bytes(text.encode("latin-1"))
    for more in ({}, {"key": public}):
        named = kinds(folder, **more)
        assert named & {"record-unreadable", "record-edited", "manifest-unreadable", "signature-unreadable"}, named


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.update(subject={"a": 1}),
        lambda tree: tree.update(subject=["text"]),
        lambda tree: tree["subject"].append({"name": 7, "digest": {"sha256": "x"}}),
        lambda tree: tree["subject"].append({"name": ["x"], "digest": {"sha256": "x"}}),
        lambda tree: tree["subject"].append({"name": "eval.json", "digest": {"sha256": 7}}),
        lambda tree: tree["subject"].append({"name": "eval.json", "digest": "x"}),
        lambda tree: tree["subject"].append({"name": "a\0b", "digest": {"sha256": "x"}}),
        lambda tree: tree["subject"].append({"name": "n" * 5000, "digest": {"sha256": "x"}}),
        lambda tree: tree["subject"].append({"name": "../x", "digest": {"sha256": "x"}}),
        lambda tree: tree["subject"].append({"name": "\ud800", "digest": {"sha256": "x"}}),
    ],
)
def test_an_odd_manifest(signed, change):
    folder, public = signed
    rewrite(folder / "evidence" / "manifest.json", change)
    for more in ({}, {"key": public}):
        assert kinds(folder, **more) & {"manifest-unreadable", "file-missing"}


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.update(payload=7),
        lambda tree: tree.update(payload="ä"),
        lambda tree: tree.update(payloadType=7),
        lambda tree: tree.update(payloadType="\ud800"),
        lambda tree: tree.update(signatures="text"),
        lambda tree: tree.update(signatures={"a": 1}),
        lambda tree: tree["signatures"][0].update(keyid=7),
        lambda tree: tree["signatures"][0].update(sig=None),
        lambda tree: tree["signatures"].append("text"),
        lambda tree: [tree],
    ],
)
def test_an_odd_envelope(signed, change):
    folder, public = signed
    rewrite(folder / "evidence" / "manifest.dsse.json", change)
    for more in ({}, {"key": public}):
        assert kinds(folder, **more) == {"signature-unreadable"}


def test_pipes_are_not_waited_for(signed):
    folder, public = signed
    for name in ("events.jsonl", "record.json", "evidence/manifest.dsse.json", "eval.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    done = helpers.cli("verify", folder, "--key", public, "--json", cwd=folder, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    found = {(f["kind"], f["where"]) for f in json.loads(done.stdout)["faults"]}
    assert {("events-unreadable", "events.jsonl"), ("file-missing", "eval.json")} <= found
    assert ("signature-missing", "evidence/manifest.dsse.json") in found
