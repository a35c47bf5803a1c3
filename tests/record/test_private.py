"""Sensitive data: what is refused by name, what is withheld, and a whole run after which the data is nowhere in plain
form.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import helpers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aifactory_train.config.loading import load_recipe
from aifactory_train.core.errors import UserError
from aifactory_train.exporting.gate import reload_logits
from aifactory_train.private import egress, permissions, profile, redact, rows, vault
from aifactory_train.private.sealed_file import PIECE, SealedWriter

pyrage = pytest.importorskip("pyrage")
pytest.importorskip("cryptography")


@pytest.fixture
def keys(tmp_path):
    recipient = vault.make_identity(tmp_path / "keys" / "id.txt")
    return vault.Vault.from_identity(tmp_path / "keys" / "id.txt"), recipient, tmp_path / "keys" / "id.txt"


@pytest.fixture(scope="module")
def lock(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lock")
    vault.make_identity(folder / "id.txt")
    return vault.Vault.from_identity(folder / "id.txt"), folder


@pytest.fixture
def everyone():
    """A folder that every user can pass into (pytest's own are closed to others)."""
    folder = Path(tempfile.mkdtemp(prefix="aft-open-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def as_before():
    """Undo what a profile changes in the process."""
    mask = os.umask(0o022)
    os.umask(mask)
    kept = dict(os.environ)
    yield
    os.umask(mask)
    for name in set(os.environ) - set(kept):
        del os.environ[name]
    os.environ.update(kept)
    egress.open_again()
    redact.deactivate()
    vault.deactivate()
    profile.in_force.clear()


# ---- encrypted files


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3 * PIECE + 5), st.integers(1, 700_000))
def test_what_is_written_is_read(lock, size, chunk):
    box, folder = lock
    data = os.urandom(min(size, 64)) * (size // 64 + 1)
    data = data[:size]
    with box.writer(folder / "x.aft") as file:
        for at in range(0, size, chunk):
            file.write(data[at : at + chunk])
    assert box.read(folder / "x.aft") == data


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_change_is_noticed(lock, data):
    box, folder = lock
    path = folder / "y.aft"
    box.write(path, b"zebra" * 300_000)
    raw = bytearray(path.read_bytes())
    kind, where = data.draw(st.sampled_from(["flip", "cut", "grow", "swap"])), data.draw(st.floats(0, 1))
    at = int(where * (len(raw) - 1))
    if kind == "flip":
        raw[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del raw[max(1, at) :]
    elif kind == "grow":
        raw += b"\0" * (1 + at % 40)
    else:
        body, size = raw.index(b"}") + 1, PIECE + 16
        raw[body : body + 40], raw[body + size : body + size + 40] = (
            raw[body + size : body + size + 40],
            raw[body : body + 40],
        )
    path.write_bytes(bytes(raw))
    with pytest.raises(UserError):
        box.read(path)


def test_wrong_key_and_missing_key(keys, tmp_path):
    box, _, _ = keys
    box.write(tmp_path / "a.aft", b"secret")
    vault.make_identity(tmp_path / "other.txt")
    with pytest.raises(UserError, match="another key"):
        vault.Vault.from_identity(tmp_path / "other.txt").read(tmp_path / "a.aft")
    with pytest.raises(UserError, match="no identity was named"):
        vault.open_source(tmp_path / "a.aft")
    (tmp_path / "other.txt").chmod(0o640)
    with pytest.raises(UserError, match="others can read"):
        vault.Vault.from_identity(tmp_path / "other.txt")


def test_several_recipients_and_plain_age(keys, tmp_path):
    box, recipient, _ = keys
    second = vault.make_identity(tmp_path / "second.txt")
    with SealedWriter(tmp_path / "b.aft", [recipient, second]) as file:
        file.write(b"for both")
    assert vault.Vault.from_identity(tmp_path / "second.txt").read(tmp_path / "b.aft") == b"for both"
    whole = pyrage.encrypt(b"by any age tool", [pyrage.x25519.Recipient.from_str(recipient)])
    (tmp_path / "c.jsonl.age").write_bytes(whole)
    assert box.read(tmp_path / "c.jsonl.age") == b"by any age tool"


def test_nothing_shows_before_it_is_whole(keys, tmp_path):
    box, _, _ = keys
    writer = box.writer(tmp_path / "d.aft")
    writer.write(b"zebra" * 500_000)
    assert not (tmp_path / "d.aft").exists()
    part = next(tmp_path.glob(".d.aft.*"))
    assert b"zebra" not in part.read_bytes()
    writer.close()
    assert (tmp_path / "d.aft").is_file() and not list(tmp_path.glob(".d.aft.*"))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_part_can_be_read_alone(lock, data):
    box, folder = lock
    size = data.draw(st.integers(0, 2 * PIECE + 9))
    plain = np.random.default_rng(size).bytes(size)
    box.write(folder / "w.aft", plain)
    window = vault.Window(box, folder / "w.aft")
    for _ in range(4):
        start = data.draw(st.integers(0, size))
        length = data.draw(st.integers(0, size - start))
        assert bytes(window.read(start, length)) == plain[start : start + length]
    with pytest.raises(UserError, match="shorter"):
        window.read(size, 1)
    window.close()


def test_a_window_notices_changes_and_a_cut_at_a_piece(lock):
    box, folder = lock
    path = folder / "v.aft"
    box.write(path, b"zebra" * 600_000)
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[4:8], "big")
    path.write_bytes(raw[: begin + 2 * (PIECE + 16)])  # two whole pieces of three
    window = vault.Window(box, path)
    assert window.read(0, 5) == b"zebra"
    with pytest.raises(UserError, match="cut off"):
        window.read(PIECE, 5)
    path.write_bytes(raw[: begin + 9] + bytes([raw[begin + 9] ^ 1]) + raw[begin + 10 :])
    with pytest.raises(UserError, match="piece 0"):
        vault.Window(box, path).read(0, 5)


def test_checkpoint_files_are_encrypted_and_read_back_bit_by_bit(keys, tmp_path):
    import torch

    from aifactory_train.parallel.storage import write_tensors

    tensors = {
        "model/a@0,0": torch.randn(700, 900),
        "optimizer/exp_avg/a@0": torch.randn(33).bfloat16(),
        "empty@0": torch.empty(0, 4),
        "scalar@": torch.tensor(3.5, dtype=torch.float64),
    }
    vault.activate(keys[0], seal=True)
    entry = write_tensors(tmp_path, "state-00000.safetensors", tensors)
    assert list(entry) == ["state-00000.safetensors.aft"]
    content = (tmp_path / "state-00000.safetensors.aft").read_bytes()
    assert entry["state-00000.safetensors.aft"]["bytes"] == len(content)
    assert tensors["model/a@0,0"].numpy().tobytes()[4000:4032] not in content and b"exp_avg" not in content
    with vault.open_tensors(tmp_path / "state-00000.safetensors") as shard:
        assert set(shard.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = shard.get_tensor(name)
            assert found.dtype == tensor.dtype and torch.equal(found, tensor)
        assert torch.equal(shard.get_slice("model/a@0,0")[3:9, 5:6], tensors["model/a@0,0"][3:9, 5:6])
    vault.deactivate()
    with pytest.raises(UserError, match="no identity"):
        vault.open_tensors(tmp_path / "state-00000.safetensors")
    assert list(write_tensors(tmp_path, "plain.safetensors", tensors)) == ["plain.safetensors"]


def test_files_in_memory_are_seen_by_a_child_and_leave_nothing(keys, tmp_path):
    path = tmp_path / "adapter.safetensors"
    with vault.in_memory(path):  # nothing seals: an ordinary file
        path.write_bytes(b"plain")
    assert path.read_bytes() == b"plain"
    path.unlink()
    vault.activate(keys[0], seal=True)
    with vault.in_memory(path):
        path.write_bytes(b"zebra" * 1000)
        with open(path, "r+b") as file:
            file.seek(5)
            file.write(b"ZEBRA")
        assert path.is_symlink() and path.read_bytes().startswith(b"zebraZEBRA")
        read = f"print(open({str(path)!r}).read(10))"
        done = subprocess.run(
            [sys.executable, "-c", read], pass_fds=vault.held(), capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "zebraZEBRA"
        vault.seal(path)
    assert [p.name for p in tmp_path.iterdir() if p.name != "keys"] == ["adapter.safetensors.aft"]
    assert vault.content(path).startswith(b"zebraZEBRA") and vault.held() == ()
    with pytest.raises(ValueError, match="half way"), vault.in_memory(path):
        path.write_bytes(b"zebra")
        raise ValueError("half way")
    assert not path.is_symlink() and vault.held() == ()


def test_what_would_be_exported_plain_is_refused_at_the_start(tmp_path, tiny_model_dir, keys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["aifactory"])
    recipe = recipe_for(tmp_path / "r", tiny_model_dir, profile="restricted", identity=str(keys[2]))
    recipe.adapter.kind = "none"
    with pytest.raises(UserError, match="all weights are trained"):
        profile.enforce(recipe)
    recipe.adapter.kind = "lora"
    recipe.export.merge = True
    with pytest.raises(UserError, match="merged weights are written unencrypted"):
        profile.enforce(recipe)


# ---- permissions


@pytest.mark.parametrize(
    ("mode", "who"), [(0o644, "every user"), (0o640, "group"), (0o600, None), (0o602, "every user")]
)
def test_mode_bits(everyone, mode, who):
    path = everyone / "rows.jsonl"
    path.write_text("x")
    path.chmod(mode)
    found = permissions.exposures(path)
    assert ([who in e.who for e in found] or [True])[0] and bool(found) == (who is not None)


def test_parents_links_and_folders(everyone):
    inner = everyone / "closed"
    inner.mkdir(mode=0o700)
    (inner / "rows.jsonl").write_text("x")
    (inner / "rows.jsonl").chmod(0o644)
    assert permissions.exposures(inner / "rows.jsonl") == []  # nobody else can pass the folder
    (everyone / "target.jsonl").write_text("x")
    (everyone / "target.jsonl").chmod(0o644)
    (inner / "link.jsonl").symlink_to(everyone / "target.jsonl")
    assert permissions.exposures(inner / "link.jsonl")  # the link is private, what it points to is not
    folder = everyone / "data"
    folder.mkdir(mode=0o700)
    folder.chmod(0o711)
    (folder / "deep").mkdir()
    (folder / "deep").chmod(0o755)
    assert {e.path for e in permissions.exposures(folder)} == {str(folder / "deep")}
    folder.chmod(0o700)
    assert permissions.exposures(folder) == []


def test_access_control_lists(everyone):
    path = everyone / "rows.jsonl"
    path.write_text("x")
    path.chmod(0o600)

    def acl(*entries):
        return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *e) for e in entries)

    nobody = 0xFFFFFFFF
    base = [(0x01, 6, nobody), (0x04, 0, nobody), (0x20, 0, nobody)]
    named = [base[0], (0x02, 4, 4711), base[1], (0x10, 4, nobody), base[2]]
    try:
        os.setxattr(path, "system.posix_acl_access", acl(*named))
    except OSError:
        pytest.skip("this file system has no access control lists")
    assert ("user 4711", None) in permissions.acl_entries(path)
    masked = [base[0], (0x02, 4, 4711), base[1], (0x10, 0, nobody), base[2]]
    os.setxattr(path, "system.posix_acl_access", acl(*masked))
    assert permissions.acl_entries(path) == []


def test_allowed_group(everyone):
    path = everyone / "rows.jsonl"
    path.write_text("x")
    path.chmod(0o640)
    gid = path.stat().st_gid
    assert permissions.exposures(path, allow_gid=gid) == []
    assert permissions.exposures(path, allow_gid=gid + 1)


# ---- profiles


def recipe_for(folder: Path, model: Path, **privacy):
    path = helpers.write_recipe(folder, model, settings={f"privacy.{k}": v for k, v in privacy.items()})
    return load_recipe(str(path), [])


def test_open_warns_and_sensitive_refuses_by_name(everyone, tiny_model_dir):
    recipe = recipe_for(everyone / "r", tiny_model_dir, profile="open")
    for name in ("train.jsonl", "eval.jsonl"):
        (everyone / "r" / name).chmod(0o644)
    (everyone / "r").chmod(0o755)
    warned = profile.enforce(recipe)["warnings"]
    assert any("train.jsonl" in w for w in warned)
    closed = recipe_for(everyone / "r", tiny_model_dir, profile="sensitive")
    (everyone / "r" / "train.jsonl").chmod(0o644)
    with pytest.raises(UserError, match="every user of this machine") as refused:
        profile.enforce(closed)
    assert "train.jsonl" in str(refused.value.where) and "chmod" in str(refused.value.fix)


def test_sensitive_puts_everything_into_force(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["aifactory", "train", "recipe.yaml"])
    recipe = recipe_for(tmp_path / "r", tiny_model_dir, profile="sensitive")
    found = profile.enforce(recipe)
    assert found["egress"]["ok"] and set(found["egress"]["attempts"].values()) == {"blocked"}
    (tmp_path / "new").write_text("x")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600
    assert os.environ["HF_HUB_OFFLINE"] == "1" and recipe.eval.samples == 0
    with pytest.raises(egress.EgressBlocked), socket.socket() as s:
        s.connect(("93.184.216.34", 80))
    with pytest.raises(egress.EgressBlocked):
        socket.getaddrinfo("huggingface.co", 443)


@pytest.mark.parametrize(
    ("argv", "job", "words"),
    [
        (["--set", "data.train=patients-2026.jsonl"], "", "command line"),
        ([], "train patients-2026.jsonl", "job's name"),
    ],
)
def test_names_that_everybody_sees(tmp_path, tiny_model_dir, monkeypatch, argv, job, words):
    recipe = recipe_for(tmp_path / "r", tiny_model_dir, profile="sensitive")
    recipe.data.train[0].source = "patients-2026.jsonl"
    monkeypatch.setattr(sys, "argv", ["aifactory", "train", *argv])
    monkeypatch.setenv("SLURM_JOB_NAME", job)
    with pytest.raises(UserError, match=words):
        profile.enforce(recipe)


def test_restricted_wants_encrypted_data_and_a_key_elsewhere(tmp_path, tiny_model_dir, keys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["aifactory"])
    recipe = recipe_for(tmp_path / "r", tiny_model_dir, profile="restricted")
    with pytest.raises(UserError, match="needs the identity"):
        profile.enforce(recipe)
    recipe = recipe_for(tmp_path / "r", tiny_model_dir, profile="restricted", identity=str(keys[2]))
    with pytest.raises(UserError, match="not encrypted"):
        profile.enforce(recipe)
    for source in [*recipe.data.train, *recipe.data.eval]:
        keys[0].write(Path(source.source + ".aft"), Path(source.source).read_bytes())
        source.source += ".aft"
    with pytest.raises(UserError, match="in the run folder"):
        profile.enforce(recipe, keys[2].parent)
    assert profile.enforce(recipe)["encrypted"].startswith("data")


def test_unknown_group_is_named(tmp_path, tiny_model_dir):
    recipe = recipe_for(tmp_path / "r", tiny_model_dir, profile="sensitive", allow_group="no-such-group-x")
    with pytest.raises(UserError, match="no group 'no-such-group-x'"):
        profile.enforce(recipe)


# ---- egress guard


def test_loopback_and_the_jobs_nodes_pass():
    egress.close(["127.0.0.1"])
    server = socket.create_server(("127.0.0.1", 0))
    with socket.create_connection(server.getsockname(), timeout=2):
        pass
    server.close()
    left, right = socket.socketpair()
    left.close(), right.close()
    egress._check("127.0.0.53")
    with pytest.raises(egress.EgressBlocked):
        egress._check("10.0.0.7")
    egress._allowed.add("10.0.0.7")
    egress._check("10.0.0.7")


@pytest.mark.parametrize(
    "ask",
    [
        lambda: socket.getnameinfo(("192.0.2.1", 0), 0),
        lambda: socket.gethostbyaddr("192.0.2.1"),
        lambda: socket.getfqdn("192.0.2.1"),
        lambda: socket.gethostbyname_ex("secret.example.invalid"),
    ],
)
def test_a_name_server_is_asked_nothing(ask):
    """The address or the name could be chosen so that it tells something to who answers."""
    egress.close()
    before = egress.blocked
    with contextlib.suppress(egress.EgressBlocked):  # getfqdn takes it for an unknown host
        ask()
    assert egress.blocked > before
    socket.getnameinfo(("127.0.0.1", 0), socket.NI_NUMERICHOST)


def _knock(queue) -> None:
    try:
        socket.create_connection(("192.0.2.1", 443), timeout=0.2)
        queue.put("got through")
    except OSError as error:
        queue.put(type(error).__name__)


def test_python_children_are_guarded():
    egress.close(["10.0.0.7"])
    code = (
        "import aifactory_train, socket; from aifactory_train.private import egress; egress._check('10.0.0.7'); "
        "socket.getaddrinfo('example.invalid', 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "EgressBlocked" in done.stderr
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_knock, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == "EgressBlocked"
    child.join()
    egress.open_again()
    done = subprocess.run(
        [sys.executable, "-c", code.replace("egress._check('10.0.0.7'); ", "")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "EgressBlocked" not in done.stderr


def test_node_lists():
    assert egress.expand("nid[001-003,007],login1") == ["nid001", "nid002", "nid003", "nid007", "login1"]
    assert egress.expand("gpu[1-2]-ib") == ["gpu1-ib", "gpu2-ib"]
    assert egress.job_nodes({"MASTER_ADDR": "nid001", "SLURM_JOB_NODELIST": "nid[001-002]"}) == ["nid001", "nid002"]
    assert egress.job_nodes({}) == []


# ---- messages without values


def test_tracebacks_warnings_and_logs_without_values(tmp_path):
    script = tmp_path / "leaky.py"
    script.write_text(
        "import logging, warnings\n"
        "from aifactory_train.private import redact\n"
        "from aifactory_train.core.errors import UserError\n"
        "redact.activate()\n"
        "logging.basicConfig()\n"
        "secret = 'zebra' + '-7f3a'\n"
        "warnings.warn('row was ' + secret)\n"
        "logging.getLogger('transformers').warning('text %s', secret)\n"
        "try:\n    raise KeyError(secret)\n"
        "except KeyError:\n    logging.getLogger('x').exception('failed on ' + secret)\n"
        "try:\n    {}[secret]\n"
        "except KeyError as error:\n    raise UserError(f\"the id '{secret}' was already given\", where='f:3') from "
        "error\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "zebra" not in done.stderr + done.stdout
    assert "leaky.py" in done.stderr and "line 16" in done.stderr and "f:3" in done.stderr and "withheld" in done.stderr


@pytest.mark.parametrize(
    "value", ["zebra", "l'appendicite du zebra d'Anne", 'he said "zebra" and', "two\nlines of zebra", "zebra'"]
)
def test_no_value_of_a_row_gets_through_whatever_it_holds(value):
    """Labels, ids and groups are quoted in messages, and people's words hold apostrophes and line ends."""
    from aifactory_train.data.cells import RowError, to_user_error
    from aifactory_train.data.split import RowRules, moment

    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": value}]}
    errors = [UserError(f"the id '{value}' was already given at rows.jsonl:1", where="rows.jsonl:2", fix="take it out")]
    for refused in (
        lambda: RowRules(labels=frozenset({"zebra crossing"})).apply({}, row),
        lambda: moment(value, "created"),
    ):
        with pytest.raises(RowError) as caught:
            refused()
        errors.append(to_user_error(caught.value, "rows.jsonl:3"))
    redact.activate()
    for error in errors:
        reported = redact.message(error).replace("labels are zebra crossing", "")  # the recipe's own
        assert not [word for word in ("zebra", "Anne", "appendicite", "lines of", "he said") if word in reported], (
            reported
        )
        assert reported.startswith("rows.jsonl:") and "[withheld]" in reported and "fix: " in reported
    assert redact.message(errors[0]).endswith("was already given at rows.jsonl:1\n  fix: take it out")
    assert "is not in data.labels" in redact.message(errors[1])
    assert redact.message(UserError("the assistant's turn is empty")) == "the assistant's turn is empty"


def test_open_profile_withholds_nothing():
    assert redact.message(ValueError("row 'x'")) == "row 'x'"
    redact.activate()
    assert "x" not in redact.message(UserError("row 'secretx'", where="a:1")).replace("[withheld]", "")


# ---- was it in the training?


def test_was_in(tmp_path):
    listed = [
        {"messages": [{"role": "user", "content": "Wer ist  das?"}, {"role": "assistant", "content": "Anna\nMüller"}]},
        {"text": "alone"},
    ]
    path = tmp_path / "row_digests.txt"
    rows.write_digests(path, listed)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert rows.was_in(path, listed[0]) and rows.was_in(path, "Anna Mu\u0308ller") and rows.was_in(path, "alone")
    assert not rows.was_in(path, "Anna") and not rows.was_in(path, {"text": "other"})
    assert "Anna" not in path.read_text()
    with pytest.raises(UserError, match="kept no digests"):
        rows.was_in(tmp_path / "none.txt", "x")


# ---- a whole run

CANARY = "zebra-7f3a quagga okapi"


def needles(tokenizer) -> dict[str, bytes]:
    """The canary as text and as its token ids, in every width that anything here writes, and as JSON."""
    ids = tokenizer(f" {CANARY}", add_special_tokens=False).input_ids[1:-1]
    assert len(ids) >= 8
    found = {"text": b"zebra-7f3a", "word": b"quagga"}
    found |= {kind: np.asarray(ids, kind).tobytes() for kind in ("<u2", "<u4", "<i8")}
    return found | {
        "json": json.dumps(ids)[1:-1].encode(),
        "tight json": json.dumps(ids, separators=(",", ":"))[1:-1].encode(),
    }


def search(wanted: dict[str, bytes], *roots: Path) -> list[str]:
    hits = []
    for root in roots:
        for path in root.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                hits += [f"{name} in {path}" for name, needle in wanted.items() if needle in content]
    return hits


def canary_recipe(folder: Path, model: Path, private: dict | None) -> tuple[Path, Path]:
    """A recipe whose rows all hold the canary; under ``private`` encrypted, with the plain rows gone."""
    helpers.write_recipe(folder, model)
    for name in ("train.jsonl", "eval.jsonl"):
        listed = helpers.chat_rows(24 if name == "train.jsonl" else 6, start=0 if name == "train.jsonl" else 500)
        for row in listed:
            row["messages"][1]["content"] += f" {CANARY}"
        helpers.write_jsonl(folder / name, listed)
    changed: dict = {"train.max_steps": 8, "train.epochs": 9.0, "eval.generate_rows": 1, "eval.before": False}
    changed |= {"checkpoint.every_steps": 1, "logging.tensorboard": True}
    import yaml

    tree = yaml.safe_load((folder / "recipe.yaml").read_text())
    for key, value in changed.items():
        block, name = key.split(".")
        tree.setdefault(block, {})[name] = value
    if private is not None:
        vault.make_identity(folder.parent / "id.txt")
        box = vault.Vault.from_identity(folder.parent / "id.txt")
        for role in ("train", "eval"):
            plain = folder / f"{role}.jsonl"
            box.write(folder / f"{role}.jsonl.aft", plain.read_bytes())
            plain.unlink()
            tree["data"][role][0]["source"] = str(folder / f"{role}.jsonl.aft")
        tree["privacy"] = {"identity": str(folder.parent / "id.txt"), **private}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    for path in folder.iterdir():
        path.chmod(0o600)
    folder.chmod(0o700)
    return folder / "recipe.yaml", folder / "run"


def isolated() -> list[str]:
    """A network namespace with loopback and no way out, where this machine lets us make one."""
    up = (
        "import fcntl, os, socket, struct, sys\n"
        "fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh22x', b'lo', 0x41))\n"  # SIOCSIFFLAGS: up and running
        "os.execvp(sys.argv[1], sys.argv[1:])"
    )
    command = ["unshare", "-rn", sys.executable, "-c", up]
    if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
        return command
    return []


def test_restricted_run_leaves_nothing_plain_connects_nowhere_and_resumes(
    tmp_path, tiny_model_dir, tiny_tokenizer, monkeypatch
):
    recipe, run = canary_recipe(tmp_path / "work", tiny_model_dir, {"profile": "restricted"})
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    env = helpers.environment(
        AIFACTORY_CACHE=str(tmp_path / "cache"), TMPDIR=str(scratch), AIFACTORY_CONFIG=str(tmp_path / "cfg")
    )
    command = [*isolated(), sys.executable, "-m", "aifactory_train", "train", str(recipe), "--run-dir", str(run)]
    with open(tmp_path / "first.log", "wb") as terminal:
        first = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=terminal, stderr=terminal)
        until = time.monotonic() + 300
        while not list(run.glob("checkpoints/step-*/COMPLETE")) and first.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)  # no clean-up of any kind
        first.wait(timeout=60)
    assert first.returncode == -signal.SIGKILL, (tmp_path / "first.log").read_text()[-3000:]
    wanted = needles(tiny_tokenizer)
    assert search(wanted, tmp_path) == []
    second = subprocess.run(
        [*command, "--resume", "auto"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400, check=False
    )
    assert second.returncode == 0, second.stderr[-3000:]

    (tmp_path / "second.log").write_text(second.stdout + second.stderr)
    assert search(wanted, tmp_path) == []
    core = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    assert not list(tmp_path.rglob("core*")), core
    record = json.loads((run / "record.json").read_text())
    assert record["privacy"]["egress"]["ok"] and record["privacy"]["core_dumps"] == "off"
    assert set(record["privacy"]["refused_connections"].values()) == {0}
    if isolated():
        assert record["privacy"]["egress"]["way_out"].startswith("no default route")
    states = [a["state"] for a in record["compute"]["attempts"].values()]
    assert states == ["killed", "finished"]
    assert (
        record["compute"]["attempts"]["002"]["first_step"] > 0
        and record["compute"]["attempts"]["002"]["last_step"] == 8
    )
    assert (run / "export" / "adapter" / "adapter_model.safetensors.aft").is_file()
    assert not (run / "export" / "adapter" / "adapter_model.safetensors").exists()
    # Neither checkpoints nor export hold the trained weights in plain form: the adapter's own bytes are searched.
    assert list(run.rglob("state-*.safetensors.aft")) and not list(run.rglob("*.safetensors"))
    from safetensors.torch import load

    sealed_adapter = run / "export" / "adapter" / "adapter_model.safetensors.aft"
    weights = load(vault.Vault.from_identity(tmp_path / "id.txt").read(sealed_adapter))
    pieces = {name: t.numpy().tobytes()[:64] for name, t in weights.items() if t.any()}
    assert pieces and search(pieces, tmp_path) == []
    for path in [run, *run.rglob("*")]:
        assert not path.stat().st_mode & 0o077, path
    assert rows.was_in(run / rows.FILE, helpers.chat_rows(1)[0]["messages"][0]["content"])
    monkeypatch.setenv("AIFACTORY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["aifactory"])
    export_again(run, pieces, monkeypatch)


def export_again(run: Path, weights: dict[str, bytes], monkeypatch) -> None:
    """Another export of an encrypted checkpoint, a merge that is refused, and one where merged weights may be plain."""
    import yaml

    from aifactory_train.exporting import writer as export
    from aifactory_train.run.folder import RunFolder

    looked = []
    reload = reload_logits

    def spy(*args, **named):
        links = [p for p in (run / "export").rglob("*.safetensors") if p.is_symlink()]
        looked.append([os.readlink(p).startswith("/proc/self/fd/") for p in links])
        assert search(weights, run / "checkpoints") == []
        assert search(weights, *[p for p in (run / "export").iterdir() if not any(p.glob("*.safetensors"))]) == []
        return reload(*args, **named)

    monkeypatch.setattr(export, "reload_logits", spy)
    before = (run / "export" / "adapter" / "adapter_model.safetensors.aft").read_bytes()
    outcome = export.export_run(RunFolder(run), step=8)
    assert looked == [[True]] and outcome["gate"]["adapter"]["passed"]
    assert (
        run / "export" / "adapter" / "adapter_model.safetensors.aft"
    ).read_bytes() != before  # a new file, a new key
    assert not list(run.rglob("*.safetensors")) and vault.held() == ()
    with pytest.raises(UserError, match="would be written unencrypted"):
        export.export_run(RunFolder(run), merge=True)
    assert sorted(p.name for p in (run / "export").iterdir()) == ["adapter"]

    profile.in_force.clear()
    tree = yaml.safe_load((run / "run.yaml").read_text())
    tree["privacy"]["profile"] = "sensitive"
    (run / "run.yaml").write_text(yaml.safe_dump(tree))
    outcome = export.export_run(RunFolder(run), merge=True)
    assert outcome["gate"]["merged"]["passed"] and (run / "export" / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_search_would_find_it(tmp_path, tiny_model_dir, tiny_tokenizer):
    """The same run without protection: the canary is all over the place, as text and as token ids."""
    recipe, run = canary_recipe(tmp_path / "work", tiny_model_dir, None)
    env = helpers.environment(AIFACTORY_CACHE=str(tmp_path / "cache"), AIFACTORY_CONFIG=str(tmp_path / "cfg"))
    done = helpers.cli("train", recipe, "--run-dir", run, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    hits = search(needles(tiny_tokenizer), run, tmp_path / "cache")
    assert any(h.startswith("text in") and "eval.json" in h for h in hits)
    assert any(h.startswith("<u2 in") and "tokens.bin" in h for h in hits)
    assert any("rows.jsonl" in h for h in hits)
