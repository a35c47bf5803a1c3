"""An independent judge of the profiles: facts from published job scripts and tables that no profile was written from.

``published/SYSTEM.yaml`` holds facts alone (options, limits, names), each with its source. A fact is one of

    carries   options and lines of a script that is known to run: ours for the same job must mean the same
    taken     a job that is known to run: no rule of ours refuses it
    refused   a job beyond a published limit: a rule of ours refuses it
    accounts  forms of accounts in use (digits are made up)
    hosts     names of nodes: the system is recognised there
    profile   values of the profile, as somebody else published them

Twins are built from the profiles and agree with them by construction; these facts need not.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from aifactory_train import sites
from aifactory_train.config.loading import load_recipe
from aifactory_train.core.errors import UserError
from aifactory_train.launchers import checks
from aifactory_train.launchers.build import build
from aifactory_train.launchers.request import LaunchRequest
from aifactory_train.sites.fields import parse_duration
from aifactory_train.sites.paths import dig

FOLDER = Path(__file__).parent / "published"
FILES = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.yaml"))}
KINDS = ("carries", "taken", "refused", "accounts", "hosts", "profile")
SHORT = {"-A": "--account", "-p": "--partition", "-q": "--qos", "-C": "--constraint", "-N": "--nodes", "-t": "--time"}
SHORT |= {"-c": "--cpus-per-task", "--tasks-per-node": "--ntasks-per-node", "-n": "--ntasks"}
SIZE_AND_TIME = {"nodes-over-partition", "nodes-over-qos", "nodes-under-minimum", "nodes-over-machine"}
SIZE_AND_TIME |= {"gpus-over-limit", "time-over-partition", "time-over-qos"}


def facts():
    """(system, kind, the fact, what goes with it) one by one."""
    for system, data in FILES.items():
        for entry in data["facts"]:
            (kind,) = [k for k in KINDS if k in entry]
            found = entry[kind]
            each = found.items() if kind == "profile" else found if isinstance(found, list) else [found]
            for fact in each:
                yield pytest.param(system, kind, fact, entry, id=f"{system}-{kind}-{fact}-{entry['source']}"[:110])


@functools.cache
def system_of(name: str):
    return sites.load(name, overlay=False)


@functools.cache
def recipe():
    return load_recipe("health/phenotype-terms")


def submission(name: str, job: dict[str, Any]):
    """Our script for a job as somebody else asked for it, and the rules that refuse it."""
    system = system_of(name)
    qos = job.get("qos") or (system.access.example.get("qos") if system.access.qos == "project" else None)
    request = LaunchRequest(
        recipe="health/phenotype-terms",
        site=name,
        nodes=job.get("nodes", 1),
        partition=job.get("partition"),
        qos=qos,
        account=job.get("account") or system.access.example.get("account"),
        time_s=parse_duration(job["time"]) if "time" in job else None,
        gpus_per_node=job.get("gpus"),
        style=job.get("style"),
        container="registry.example#image:1" if system.software.needs_image else None,
    )
    sub = build(request, system, recipe(), files=False)
    return sub, {f.rule: f for f in checks.check(sub, recipe(), here=False) if f.level == "refuse"}


def meaning(options: list[str]) -> dict[str, Any]:
    """What options of Slurm ask for, whatever their spelling: GPUs and CPUs a node, time in seconds, the rest as is."""
    given: dict[str, str] = {}
    for option in options:
        name, _, value = option.replace("=", " ", 1).partition(" ")
        given[SHORT.get(name, name)] = value.strip()
    nodes = int(given.get("--nodes") or 1)
    asked: dict[str, Any] = {}
    for name, value in given.items():
        if name in ("--gres", "--gpus-per-node"):
            asked["gpus"] = int(value.rpartition(":")[2])
        elif name == "--gpus":
            asked.setdefault("gpus", int(value.rpartition(":")[2]) // nodes)
        elif name == "--gpus-per-task":
            asked["gpus"] = int(value) * int(given.get("--ntasks-per-node") or 1)
        elif name == "--cpus-per-task":
            asked["cpus"] = int(value) * int(given.get("--ntasks-per-node") or 1)
        elif name == "--time":
            asked["time"] = parse_duration(value)
        elif name not in ("--ntasks-per-node", "--ntasks"):
            asked[name] = value
    return asked


def plain(text: str) -> str:
    """A line of shell without quotes and without what happens if it fails."""
    text = re.sub(r"\s*\|\| .*$", "", re.sub(r"^ml ", "module load ", text.strip()))
    return text.replace("'", "").replace('"', "")


@pytest.mark.parametrize(("name", "kind", "fact", "entry"), [*facts()])
def test_what_others_published_holds_here(name, kind, fact, entry):
    source = FILES[name]["sources"][entry["source"]]
    said = f"{name}: {fact}, as published in {source['where']} ({source['date']})"
    if kind == "hosts":
        try:
            assert sites.identify(names=[fact], env=entry.get("env", {}), cluster="") == name, said
        except UserError as error:  # systems that share nodes' names ask for --site
            assert name in str(error), said
    elif kind == "profile":
        path, value = fact
        assert dig(system_of(name), path) == value, said
    elif kind == "accounts":
        _, refused = submission(name, {**entry.get("job", {}), "account": fact})
        assert not {"account-form", "account-suffix"} & set(refused), (said, refused)
    elif kind == "taken":
        _, refused = submission(name, fact)
        assert not refused, (said, refused)
    elif kind == "refused":
        _, refused = submission(name, fact)
        assert SIZE_AND_TIME & set(refused), (said, refused)
    else:
        script = submission(name, entry.get("job", {}))[0].script.splitlines()
        if fact.startswith("#!"):
            assert script[0] == fact, said
        elif fact.startswith("-l "):
            assert any(line.startswith(f"#PBS {fact}") for line in script), said
        elif fact.startswith("-"):
            ours = meaning([line.removeprefix("#SBATCH ") for line in script if line.startswith("#SBATCH ")])
            theirs = meaning([option for option in entry["carries"] if option.startswith("-")])
            for key in meaning([fact]):
                assert ours.get(key) == theirs[key], (said, key, ours)
        else:
            assert plain(fact.removeprefix("srun ")) in {plain(line) for line in script}, said


def count(data: dict[str, Any]) -> int:
    return sum(
        len(e[k]) if isinstance(e[k], list) or k == "profile" else 1 for e in data["facts"] for k in KINDS if k in e
    )


def test_enough_is_judged():
    assert len([name for name, data in FILES.items() if count(data) >= 10]) >= 12
    assert all(data["system"] == name for name, data in FILES.items())


@pytest.mark.parametrize("name", FILES)
def test_the_judge_is_independent(name):
    """No source of these facts is one that a value of the profile was taken from; each says where and when."""
    system, data = system_of(name), FILES[name]
    assert {e["source"] for e in data["facts"]} == set(data["sources"])
    used = {f"{fact.source} {fact.url or ''}".lower() for fact in system.stated_facts()}
    for key, source in data["sources"].items():
        assert re.fullmatch(r"\d{4}(-\d{2}){0,2}|n\.d\., seen 2026-\d{2}-\d{2}", str(source["date"])), (name, key)
        place = source["where"].split()[0].lower()
        for known in used:
            assert "/" not in place or place not in known, (name, key, known)
