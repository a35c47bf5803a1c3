"""``aifactory launch --accept``: a job without a recipe, by the scripts and in the environment of training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_scripts import SYSTEMS, kind_of, needs_shellcheck, shell_files, shellcheck, submission

from aifactory_train import cli, sites
from aifactory_train.launchers import checks
from aifactory_train.launchers.build import build
from aifactory_train.launchers.files import finish
from aifactory_train.launchers.here import this_machine
from aifactory_train.launchers.request import LaunchRequest

HOW = {"recipe": "--accept", "accept": ("--quick",)}


def acceptance(system_id: str, **more):
    system = this_machine() if system_id == "here" else sites.load(system_id, overlay=False)
    base = {**HOW, "site": system_id, "account": system.access.example.get("account", "acct")}
    if system.access.qos == "project":
        base["qos"] = system.access.example.get("qos", "proj")
    if system.scheduler.kind == "kubernetes":
        base["container"] = "registry.example/image:1"
    return build(LaunchRequest(**{**base, **more}), system, None)


def exports(sub) -> set[str]:
    """What every rank's environment gets, but for the cores of one."""
    return {line for line in sub.lines if line.startswith("export ") and "OMP_NUM_THREADS" not in line}


@pytest.mark.parametrize("system_id", SYSTEMS)
def test_one_process_with_a_whole_node_in_the_environment_of_training(system_id: str, plain_recipe) -> None:
    sub = acceptance(system_id)
    shape = sub.shape
    same = submission(system_id, plain_recipe, style=shape.style)
    assert (shape.nodes, shape.ranks_per_node, shape.tasks_per_node) == (1, 1, 1)
    assert shape.gpus_per_node == same.shape.gpus_per_node and shape.time_s <= 20 * 60
    assert exports(sub) == exports(same) != set()
    if shape.gpus_per_node:
        assert f"export AIFACTORY_EXPECT_GPUS={shape.gpus_per_node}" in exports(sub)
    if shape.cpus_per_task and same.shape.cpus_per_task and same.shape.tasks_per_node == 1:
        assert shape.cpus_per_task == same.shape.cpus_per_task
    assert "numa-binding" not in "".join(content.decode() for content in shell_files(sub).values())


@pytest.mark.parametrize("system_id", [*SYSTEMS, "here"])
def test_what_the_job_runs(system_id: str) -> None:
    sub = acceptance(system_id)
    files = {file.path: file.content for file in finish(sub)}
    words = files["submission/arguments"].decode().rstrip("\0").split("\0")
    assert words == ["-m", "aifactory_train", "accept", "--out", f"{sub.run_dir}/acceptance", "--run-dir",
                     str(sub.run_dir), "--quick"]  # fmt: skip
    from aifactory_train.commands import accept

    parser = cli.build_parser("accept")
    given = parser.parse_args([*words[2:], "--attempt", "1", "--stop-at", "1e10"])  # as rank.sh adds them
    assert given.run is accept.run and given.attempt == 1 and str(given.run_dir) == str(sub.run_dir)
    assert "submission/recipe.yaml" not in files
    assert json.loads(files["submission/policy.json"])["resubmit"] == "none"


@needs_shellcheck
def test_shellcheck_is_clean(tmp_path: Path) -> None:
    """A system of each scheduler, in a container and without; the other lines are those of training's scripts."""
    seen: set[str] = set()
    for i, system_id in enumerate(["vega", "lumi-g", "alps-daint", "hunter", "rudens", "eidf-gpu", "here"]):
        sub = acceptance(system_id)
        for path, content in shell_files(sub).items():
            key = kind_of(sub, content.decode())
            if key not in seen:
                seen.add(key)
                (tmp_path / f"{i}-{Path(path).name}").write_bytes(content)
    assert shellcheck(tmp_path) >= 5


def test_no_rule_asks_for_a_recipe() -> None:
    """All rules of all sites: none falls over a recipe that is not there, none speaks of one."""
    for system_id in SYSTEMS:
        found = checks.check(acceptance(system_id), None, here=False)
        said = " ".join(f"{finding.what} {finding.fix}" for finding in found if finding.level == "refuse")
        assert "recipe" not in said and "model.base" not in said, (system_id, said)


def test_the_command_prints_a_script(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["launch", "--accept", "--site", "lumi-g", "--account", "project_465000001", "--dry-run"]
    assert cli.main(argv) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash") and re.search(r"^#SBATCH --ntasks-per-node=1$", script, re.M)
    assert not list(tmp_path.iterdir())
    assert cli.main([*argv, "--explain"]) == 0
    assert "an acceptance is one process" in capsys.readouterr().out or "acceptance-lumi-g" in script
    assert cli.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "acceptance-lumi-g"


@pytest.mark.parametrize(
    "more", [["health/phenotype-terms"], ["--nodes", "2"], ["--nproc", "4"], ["--set", "a.b=c"], ["--array", "a.b=1,2"],
             ["--chain", "2"], ["--resume"], ["--resubmit", "chain"]],
)  # fmt: skip
def test_what_has_no_meaning_without_a_recipe_is_refused(more, capsys) -> None:
    assert cli.main(["launch", "--accept", "--site", "lumi-g", "--dry-run", *more]) == 2
    said = capsys.readouterr()
    assert "cannot go with it" in said.err and not said.out and "Traceback" not in said.err


def test_quick_goes_with_accept_alone(capsys) -> None:
    assert cli.main(["launch", "health/phenotype-terms", "--quick", "--dry-run"]) == 2
    assert "--accept" in capsys.readouterr().err
