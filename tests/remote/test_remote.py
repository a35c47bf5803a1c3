"""A laptop and a login node with a real OpenSSH server between them; the scheduler there is a stand-in."""

from __future__ import annotations

import ast
import json
import random
import shutil
import time
from pathlib import Path

import pytest
import sshd
from conftest import Here, jobs

from aifactory_train.core.errors import UserError
from aifactory_train.remote import calling, connection, known


def accepted(here: Here, name: str, *more: object) -> dict[str, object]:
    """A launch that needs no model: a check of one node."""
    done = here("launch", "--accept", "--on", "lab", "--name", name, "--json", *more)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_one_authentication_serves_launch_status_stop_and_get(lab, here, node, tmp_path):
    before = node.logins()
    count = len(jobs(node))
    answer = accepted(here, "one", "--token", "token-one")
    again = accepted(here, "one", "--token", "token-one")
    assert again["jobs"] == answer["jobs"] and len(jobs(node)) == count + 1, "the same token submits nothing twice"
    run = Path(str(answer["run_dir"]))
    assert run == node.home / "work" / "runs" / "one" and jobs(node)[-1] == f"{run}/submission/job.sh"
    seconds = []
    for _ in range(5):
        began = time.monotonic()
        done = here("status", "one", "--on", "lab", "--json")
        seconds.append(time.monotonic() - began)
        assert json.loads(done.stdout)["state"] == "pending"
    print(f"status --on: {min(seconds):.2f} s")
    (run / "logs" / "big").write_bytes(b"x" * 3_000_000)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "weights").write_bytes(b"w")
    done = here("get", "one", "--on", "lab", "--to", tmp_path / "home", "--json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "home" / "logs" / "big").stat().st_size == 3_000_000
    assert not (tmp_path / "home" / "checkpoints").exists() and not list((tmp_path / "home").rglob("*.part"))
    assert json.loads(here("get", "one", "--on", "lab", "--to", tmp_path / "home", "--json").stdout)["bytes"] == 0
    assert json.loads(here("stop", "one", "--cancel", "--on", "lab", "--json").stdout)["cancelled"]
    assert json.loads(here("status", "one", "--on", "lab", "--json").stdout)["state"] == "cancelled"
    assert node.logins() == before, "the fixture's authentication serves them all"


def test_a_launch_that_died_between_submission_and_note_finds_its_job(lab, here, node):
    """The books over there are lost and the job is not noted down: the scheduler is asked for the folder's jobs."""
    answer = accepted(here, "lost", "--token", "token-lost")
    (Path(str(answer["run_dir"])) / "submission" / "jobs").unlink()
    for books in (node.home / "af" / "requests").glob("token-lost"):
        books.rename(books.with_name("elsewhere"))
    count = len(jobs(node))
    assert accepted(here, "lost", "--token", "token-lost")["jobs"] == answer["jobs"] and len(jobs(node)) == count


def fetched(node: sshd.Server, base: str, model: Path) -> None:
    """Put ``model`` where a fetch over there would have left ``base``."""
    hub = node.home / "hf" / "hub" / f"models--{base.replace('/', '--')}"
    shutil.copytree(model, hub / "snapshots" / ("0" * 40))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0" * 40)


def test_a_recipe_goes_there_with_its_rows_and_nothing_twice(lab, here, node, tmp_path, tiny_model_dir):
    rows = tmp_path / "my rows '1'.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Door {i}?", "response": "Red."}) + "\n" for i in range(40)))
    recipe = tmp_path / "doors.yaml"
    recipe.write_text(
        json.dumps(
            {
                "about": {"title": "doors"},
                "model": {"base": "HuggingFaceTB/SmolLM2-135M-Instruct", "licence": "Apache-2.0"},
                "data": {"train": {"source": str(rows), "format": "prompt", "licence": "own"}, "sequence_length": 128},
                "train": {"max_steps": 2, "batch_rows": 8},
            }
        )
    )
    words = ("launch", recipe, "--on", "lab", "--name", "doors", "--json", "--token", "token-doors")
    done = here(*words)
    assert done.returncode == 2 and "[model-staged]" in done.stderr and "--on lab" in done.stderr, done.stderr
    assert "whose is" not in done.stderr, "what the recipe says of its rows goes with them"
    fetched(node, "HuggingFaceTB/SmolLM2-135M-Instruct", tiny_model_dir)
    words = (*words[:-1], "token-doors-2")
    done = here(*words)
    assert done.returncode == 0, done.stderr
    run = Path(str(json.loads(done.stdout)["run_dir"]))
    written = "".join(p.read_text() for p in (run / "submission").rglob("*") if p.is_file())
    assert str(rows) not in written and str(tmp_path) not in written
    (sent,) = [p for p in (node.home / "af").rglob("rows*.jsonl") if p.read_bytes() == rows.read_bytes()]
    assert str(sent) in written and jobs(node)[-1] == f"{run}/submission/job.sh"
    again = here(*words)
    assert again.returncode == 0 and "sent" not in again.stderr, again.stderr
    assert json.loads(again.stdout)["jobs"] == json.loads(done.stdout)["jobs"]
    assert here("logs", "doors", "--on", "lab").returncode in (0, 2)
    assert json.loads(here("status", "doors", "--on", "lab", "--json").stdout)["state"] == "pending"


@pytest.mark.slow
def test_cuts_submit_nothing_twice(lab, here, node):
    proxy = sshd.CuttingProxy(node.port)
    draw = random.Random(1)
    words = ["--ssh-config", node.client("cut", proxy.port), "--folder", node.home / "af", "--python", sshd.PYTHON]
    try:
        assert here("remote", "add", "cut", node.host, *words, "--site", "vega").returncode == 0
        for number in range(6):
            here("remote", "close", "cut")
            proxy.after = draw.randrange(3000, 60000)
            count = len(jobs(node))
            token = f"token-cut-{number}"
            done = here("launch", "--accept", "--on", "cut", "--name", f"cut{number}", "--json", "--token", token)
            assert done.returncode == 0, done.stderr
            assert len(json.loads(done.stdout)["jobs"]) == 1 and len(jobs(node)) == count + 1
        assert proxy.cuts
    finally:
        here("remote", "close", "cut")
        proxy.close()


HOSTILE = [
    "'",
    '"',
    "$(touch {c})",
    "`touch {c}`",
    "; touch {c}",
    "| touch {c}",
    "\ntouch {c}\n",
    "a'b\"c$(touch {c})",
    "-rf",
    "*",
]
HOSTILE += [
    "&& touch {c}",
    "> {c}",
    "${IFS}touch${IFS}{c}",
    "~root",
    "../../etc",
    "%x",
    "!!",
    "\\",
    "é 漢字",
    "--",
    "#",
    "A b" * 100,
]


def test_hostile_values_reach_no_shell(lab, here, node, tmp_path, capsys):
    canary = tmp_path / "canary"
    config, folder = str(node.client("plain")), f"{node.home}/af"
    known.Remote("fine", "me@host.eu:22", folder=folder).checked()
    there = connection.Connection(known.Remote("lab", node.host, folder=folder, ssh_config=config))
    for value in HOSTILE:
        text = value.replace("{c}", str(canary))
        for fields in ((text, "me@host"), ("fine", f"me@{text}"), ("fine", "me@host", f"me@{text}")):
            if value not in ("#",) or "@" in fields[-1]:
                with pytest.raises(UserError):
                    known.Remote(*fields).checked()
    try:
        for value in HOSTILE[::4]:
            text = value.replace("{c}", str(canary))
            assert calling.here_as_there(there, ["status", "--json", "--", text], live=False, env={}) == 2
    finally:
        there.close()
    assert not canary.exists()


def test_faults_are_sentences(lab, here, node):
    def added(name: str, known: str, key: str) -> str:
        config = node.client(name)
        text = config.read_text().replace(f"{node.base}/known_hosts", known)
        config.write_text(text.replace(f"{node.base}/user", key))
        done = here("remote", "add", name, node.host, "--ssh-config", config)
        assert done.returncode == 2, done.stderr
        return done.stderr

    mine, user = f"{node.base}/known_hosts", f"{node.base}/user"
    assert "key is not known here" in added("unknown", f"{node.base}/none", user)
    other = node.base / "changed"
    other.write_text(f"sshd.test {(node.base / 'user.pub').read_text()}")
    assert "key is another one than before" in added("changed", str(other), user)
    sshd.keys(node.base / "stranger")
    assert "did not accept your key" in added("stranger", mine, f"{node.base}/stranger")
    import subprocess

    sign = ["ssh-keygen", "-q", "-s", node.base / "authority", "-I", "me", "-n", node.user, "-V", "-2h:-1h"]
    subprocess.run([*sign, node.base / "stranger.pub"], check=True)
    assert "expired at" in added("expired", mine, f"{node.base}/stranger")


def test_what_goes_there_runs_on_python_3_6():
    ast.parse(connection.AGENT.read_text(), feature_version=(3, 6))
