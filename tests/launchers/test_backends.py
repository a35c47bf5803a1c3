"""A scheduler is one class: one that only this file knows can be planned for, written for, submitted to and followed.

And nobody outside ``launchers/backends`` asks for the name of one.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
from pathlib import Path

import pytest

import aifactory_train
from aifactory_train import sites
from aifactory_train.config.loading import load_recipe
from aifactory_train.core.errors import UserError
from aifactory_train.launchers import backends, checks, follow, runs
from aifactory_train.launchers.backends import Backend, Job
from aifactory_train.launchers.backends.base import REGISTERED
from aifactory_train.launchers.backends.commands import ask
from aifactory_train.launchers.build import build
from aifactory_train.launchers.explain import explain
from aifactory_train.launchers.planned import plan_for
from aifactory_train.launchers.request import LaunchRequest
from aifactory_train.launchers.shaping import shape_of
from aifactory_train.launchers.stopping import stop
from aifactory_train.launchers.submission import Line, Submission
from aifactory_train.sites.schedulers import SCHEDULERS


class Toy(Backend):
    """A scheduler with two commands: ``toysub FILE`` and ``toystat JOB``."""

    name = "toy"
    title = "Toy"
    aliases = ("plaything",)
    schedulers = ("toy",)
    programs = ("toysub", "toystat")
    unseen = "nobody has seen a toy scheduler"
    arrays = False
    chain = False
    script_file = "job.toy"
    job_id = "$TOY_JOB"

    def directives(self, sub: Submission) -> list[Line]:
        return [sub.line(f"#TOY nodes={sub.shape.nodes} seconds={sub.shape.time_s}", "all that it wants to know")]

    def document(self, sub: Submission, script: str) -> str:
        return f"toy job of {sub.name}\n{script}"

    def submit(self, run_dir: Path, *, test_only: bool = False) -> str:
        return ask("toysub", str(run_dir / "submission" / self.script_file)).stdout.strip()

    def query(self, job: str) -> Job | None:
        done = ask("toystat", job)
        return Job(id=job, state=done.stdout.strip()) if done.returncode == 0 else None

    def cancel(self, job: str) -> None:
        ask("toysub", "--cancel", job)


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """The backend, registered, with its commands on PATH; they keep what they are given in the folder that is
    returned.
    """
    monkeypatch.setitem(REGISTERED, "toy", Toy())
    folder = tmp_path / "scheduler"
    folder.mkdir()
    for name, text in {
        "toysub": 'if [ "$1" = --cancel ]; then echo failed > "$here/state"; else cp "$1" "$here/got"; echo pending > '
        '"$here/state"; echo toy-7; fi',
        "toystat": '[ "$1" = toy-7 ] && cat "$here/state"',
    }.items():
        program = folder / name
        program.write_text(f"#!/bin/sh\nhere='{folder}'\n{text}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture
def site():
    """A machine like Vega whose scheduler is the toy."""
    system = sites.load("vega", overlay=False)
    return system.model_copy(update={"scheduler": system.scheduler.model_copy(update={"kind": "toy"})})


def test_a_toy_scheduler_goes_all_the_way(toy, site, plain_recipe, tmp_path):
    request = LaunchRequest(
        recipe=str(plain_recipe), site="vega", account="acct", time_s=600, run_dir=str(tmp_path / "run")
    )
    recipe = load_recipe(str(plain_recipe))
    shape = shape_of(request, site)
    assert (shape.backend, shape.style) == ("toy", "torchrun")
    plan, _, reported = plan_for(request, site, shape, recipe)
    assert plan is not None or reported  # asked, though this recipe's model is unknown to it
    sub = build(request, site, recipe, shape=shape, plan=plan)
    head, script = sub.script.split("\n", 1)
    assert head == "toy job of run" and script.startswith("#!/bin/bash") and "#TOY nodes=1 seconds=600" in script
    assert "job=$TOY_JOB" in script and "--backend toy" in script
    assert sub.lines["#TOY nodes=1 seconds=600"].why == "all that it wants to know"
    found = {f.rule: f for f in checks.check(sub, recipe, here=True, submitting=True)}
    assert "scheduler-here" not in found and "backend-matches-scheduler" not in found
    assert found["scheduler-unseen"].what == Toy.unseen

    file = runs.write(sub)
    assert file.name == "job.toy" and file.read_text() == sub.script
    assert (sub.run_dir / "submission" / "job.sh").read_text() == script
    assert json.loads((sub.run_dir / "submission" / "policy.json").read_text())["resubmit"] == "none"
    job = backends.get("plaything").submit(sub.run_dir)
    runs.remember_jobs(sub.run_dir, [job])
    assert job == "toy-7" and (toy / "got").read_text() == sub.script
    assert follow.status_of(sub.run_dir)["state"] == "pending"
    stop(sub.run_dir, cancel=True)
    assert (toy / "state").read_text().strip() == "failed", "the job was not cancelled"
    assert follow.status_of(sub.run_dir)["state"] == "cancelled"


def test_what_it_cannot_do_is_refused_by_rule(toy, site, plain_recipe, tmp_path):
    array = (("train.seed", ("1", "2")),)
    request = LaunchRequest(recipe=str(plain_recipe), account="acct", run_dir=str(tmp_path / "run"), array=array)
    recipe = load_recipe(str(plain_recipe))
    found = checks.check(build(request, site, recipe), recipe, here=True)
    assert any(f.rule == "array-size" and "arrays are not written for Toy" in f.what for f in found)


def test_directives_of_any_form_have_their_own_reason(toy, site, plain_recipe, tmp_path):
    request = LaunchRequest(recipe=str(plain_recipe), account="acct", time_s=600, run_dir=str(tmp_path / "run"))
    lines = {line.text: line for line in explain(build(request, site, load_recipe(str(plain_recipe))))}
    assert lines["#TOY nodes=1 seconds=600"].why == "all that it wants to know"
    assert not any("#TOY" in line.why or "TOY nodes" in line.why for line in lines.values())


def test_several_nodes_are_refused_where_a_node_does_not_know_its_rank(toy, site, plain_recipe, tmp_path, monkeypatch):
    recipe = load_recipe(str(plain_recipe))

    def refused(nodes: int) -> list[str]:
        request = LaunchRequest(recipe=str(plain_recipe), account="acct", nodes=nodes, run_dir=str(tmp_path / "run"))
        found = checks.check(build(request, site, recipe), recipe, here=True)
        return [str(f.fix) for f in found if f.rule == "nodes-startable"]

    assert refused(1) == [] and refused(2) == ["--nodes 1"]
    monkeypatch.setattr(Toy, "styles", ("torchrun", "mpi"))
    assert refused(2) == ["--style mpi or --nodes 1"]
    monkeypatch.setattr(Toy, "node_rank", '"$TOY_NODE"')
    assert refused(2) == []


def test_one_torchrun_a_node_is_not_started_by_mpiexec(plain_recipe, tmp_path):
    system, recipe = sites.load("hunter", overlay=False), load_recipe(str(plain_recipe))
    request = LaunchRequest(recipe=str(plain_recipe), site="hunter", style="torchrun", run_dir=str(tmp_path / "run"))
    script = build(request, system, recipe).script
    assert "start=()" in script and '"$submission/node.sh"' in script
    mpi = build(dataclasses.replace(request, style="mpi"), system, recipe).script
    assert "  mpiexec\n" in mpi and '"$submission/rank.sh"' in mpi


def test_its_commands_are_missed_where_they_are_not(monkeypatch, site, plain_recipe, tmp_path):
    monkeypatch.setitem(REGISTERED, "toy", Toy())
    request = LaunchRequest(recipe=str(plain_recipe), account="acct", run_dir=str(tmp_path / "run"))
    recipe = load_recipe(str(plain_recipe))
    found = {f.rule: f for f in checks.check(build(request, site, recipe), recipe, here=True, submitting=True)}
    assert "no toysub, toystat on this machine" in found["scheduler-here"].what


def test_every_kind_of_scheduler_has_one_backend():
    for kind in SCHEDULERS:
        assert sum(kind in backend.schedulers for backend in backends.known().values()) == 1, kind
    assert {kind for backend in backends.known().values() for kind in backend.schedulers} == set(SCHEDULERS)


def test_names_and_aliases_are_each_one_backend():
    words = [word for backend in backends.known().values() for word in (backend.name, *backend.aliases)]
    assert len(words) == len(set(words))
    for word in words:
        assert word in (backends.get(word).name, *backends.get(word).aliases)
    with pytest.raises(UserError, match=r"no backend 'slurmm'.*slurm"):
        backends.get("slurmm")


@pytest.mark.parametrize("name", list(backends.known()))
def test_what_a_backend_declares_holds_together(name):
    backend = backends.known()[name]
    assert backend.styles and backend.title
    assert backend.requeue <= backend.chain, "what can requeue can also go on"
    assert backend.batch or not (backend.chain or backend.arrays or backend.unseen), "nothing queues jobs here"
    assert (backend.software == "here") is not backend.batch
    if backend.batch:
        with pytest.raises(UserError, match="none in the foreground"):
            backend.run(Path("nowhere"))


# ---- nobody else asks for the name

ROOT = Path(aifactory_train.__file__).resolve().parents[1]
NAMES = {"slurm", "pbspro", "torque", "kubernetes", "local", "mpi"}
#: File -> comparisons that it may hold, all of another kind of name.
ALLOWED = {
    "launchers/container.py": 2,  # ids of sites, of which one is this machine; the kind of a data source
    "aifactory_train/commands/launch.py": 1,  # the id of a site
    "aifactory_train/parallel/world.py": 1,  # how the ranks were started, told by their environment
    "sites/profiles.py": 1,  # the id of a site
    "sites/check/room.py": 1,  # a twin is a slurmctld
}


def comparisons(source: str, names: set[str] = NAMES) -> list[int]:
    """Lines that compare something with a scheduler's name, by ``==``, ``in``, ``match`` or a test of a prefix."""
    found = []
    for node in ast.walk(ast.parse(source)):
        sides: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
            sides = list(node.args)
        words = [
            w for side in sides for w in (side.elts if isinstance(side, (ast.Tuple, ast.List, ast.Set)) else [side])
        ]
        if any(isinstance(w, ast.Constant) and w.value in names for w in words):
            found.append(node.lineno)
    return found


def test_the_count_finds_what_it_is_to_find():
    text = (
        "a == 'slurm'\nb in ('local', 'mpi')\n'pbspro' != c\nd.startswith('local')\nmatch e:\n case 'torque': "
        "pass\nf = 'slurm'\n"
    )
    assert sorted(comparisons(text)) == [1, 2, 3, 4, 6]


def test_only_backends_compare_names_of_schedulers():
    """Elsewhere in the package ``local`` is a kind of data source, so only the rooms that launch are held to that
    word.
    """
    launching = ("launchers/", "sites/", "aifactory_train/commands/launch.py")
    found: dict[str, list[int]] = {}
    for room in ("launchers", "sites", "aifactory_train", "recipes", "kernels"):
        for file in sorted((ROOT / room).rglob("*.py")):
            name = file.relative_to(ROOT).as_posix()
            names = NAMES if name.startswith(launching) else NAMES - {"local"}
            lines = [] if name.startswith("launchers/backends/") else comparisons(file.read_text(), names)
            if lines:
                found[name] = lines
    over = {name: lines for name, lines in found.items() if len(lines) > ALLOWED.get(name, 0)}
    assert not over, f"ask the backend instead: {over}"
    assert {name: len(lines) for name, lines in found.items()} == ALLOWED, "the list is longer than it need be"


def test_templates_name_no_scheduler_either():
    for file in (ROOT / "launchers" / "templates").glob("*.j2"):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if line.lstrip().startswith("{%"):
                assert "backend" not in line, f"{file.name}:{number}: {line}"
