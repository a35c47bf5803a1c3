"""A pull request from an acceptance or a run: what is confirmed, what differs, and nothing of the user's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from aifactory_train.cli import main
from aifactory_train.core import yaml_text
from aifactory_train.sites import catalogue, profiles, reporting
from aifactory_train.sites.check import check_file

SECRETS = ("nid001234", "jdoe", "g123", "my-company/secret-recipe", "4711", "hf_abcdefghijklmnopqrst")

ACCEPTANCE = {
    "format": 1, "written": "2026-11-29T10:00:00+0100", "quick": False, "site": "alps-clariden", "gpus": 4,
    "versions": {"torch": "2.9.1", "cuda": "13.0", "path": "/users/jdoe/env"},
    "machine": {"host": {"name": "nid001234"}},
    "checks": [
        {"name": "installation", "status": "PASS", "seconds": 3.1, "why": "on nid001234 by jdoe",
         "figures": {"gb_s": 1.5, "log": "/users/jdoe/x.log", "ok": True}},
        {"name": "two nodes", "status": "SKIP", "seconds": 0.0, "figures": {}, "why": "one node"},
    ],
    "facts": [
        {"fact": "node.gpus", "profile": 4, "observed": 4, "verdict": "confirmed", "by": "torch on nid001234"},
        {"fact": "node.isa", "profile": "aarch64", "observed": "aarch64", "verdict": "confirmed", "by": "uname"},
        {"fact": "gpu.arch", "profile": "sm_90", "observed": "sm_90", "verdict": "confirmed", "by": "torch"},
        {"fact": "node.cores", "profile": 288, "observed": 280, "verdict": "contradicted", "by": "lscpu"},
        {"fact": "software.driver", "profile": None, "observed": "580.1", "verdict": "new", "by": "x"},
        {"fact": "user.account", "profile": None, "observed": "g123", "verdict": "new", "by": "x"},
        {"fact": "node.cpu", "profile": None, "observed": "/users/jdoe", "verdict": "new", "by": "x"},
    ],
}  # fmt: skip

RECORD = {
    "run": {"id": "r", "recipe": "my-company/secret-recipe", "created": "2026-11-28T09:00:00Z", "host_site": "lumi-g",
            "scheduler": {"name": "slurm", "job_ids": ["4711"]}, "user_hash": "jdoe",
            "command": "aifactory /users/jdoe", "versions": {"torch": "2.10.0"}},
    "compute": {"device": {"model": "AMD Instinct MI250X", "kind": "gpu", "vendor": "amd", "count": 16, "nodes": 2},
                "attempts": {"001": {"state": "failed"}, "002": {"state": "finished", "job": "4711"}},
                "totals": {"steps": 100, "wall_s": 3600.0, "device_hours": 16.0, "restarts": 1, "mfu": 0.31}},
}  # fmt: skip


@pytest.fixture
def report(tmp_path, capsys):
    """``report(data, name, *more)`` -> (exit code, standard output, standard error)."""

    def call(data, name: str, *more: str):
        path = tmp_path / name
        path.write_text(json.dumps(data))
        code = main(["sites", "report", str(path), *more])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def test_an_acceptance_is_shown_and_written_only_when_asked(report, tmp_path):
    code, out, err = report(ACCEPTANCE, "acceptance.json")
    assert code == 0 and "nothing is written" in err
    assert (
        "`node.gpus`: 4" in out and "profile 288, here 280" in out and "| installation | PASS | 3.1 | gb_s 1.5 |" in out
    )
    assert "node.cores: 280" in out and "software.driver: '580.1'" in out
    code, out, err = report(ACCEPTANCE, "acceptance.json", "--out", str(tmp_path / "pr"))
    made = {str(p.relative_to(tmp_path / "pr")): p.read_text() for p in (tmp_path / "pr").rglob("*") if p.is_file()}
    assert set(made) == {
        "PULL_REQUEST.md", "differences.yaml", "sites/readiness.yaml", "sites/systems/alps-clariden.yaml"
    }  # fmt: skip
    shipped = catalogue.SYSTEMS / "alps-clariden.yaml"
    before, after = shipped.read_text().splitlines(), made["sites/systems/alps-clariden.yaml"].splitlines()
    added = [line for line in after if line not in before]
    assert [line for line in after if line in before] == before, "every other line stays as it is"
    assert len(added) == 2 and "at: [node.gpus, node.isa]" in "".join(added), "gpu.arch is a constant of the catalogue"
    system = profiles.resolve(yaml_text.read(tmp_path / "pr/sites/systems/alps-clariden.yaml").value)
    fact = system.provenance("node.gpus")
    assert fact.confidence == "probed" and fact.date == "2026-11-29" and "1 passed, 0 failed" in fact.source
    entry = yaml_text.read(tmp_path / "pr/sites/readiness.yaml").value["systems"]["alps-clariden"]
    assert entry["level"] == "reported" and "aifactory accept" in entry["evidence"]
    assert report(ACCEPTANCE, "acceptance.json", "--out", str(tmp_path / "pr"))[0] == 2, "nothing is overwritten"


@pytest.mark.parametrize("data, name, site", [(ACCEPTANCE, "acceptance.json", None), (RECORD, "record.json", "lumi-g")])
def test_nothing_of_the_user_leaves_the_machine(report, data, name, site):
    code, out, err = report(data, name, "--json", *(["--site", site] if site else []))
    assert code == 0, err
    said = json.dumps({k: v for k, v in json.loads(out)["files"].items() if k != "sites/readiness.yaml"})
    for secret in SECRETS:
        assert secret not in said, secret


def test_a_finished_run_confirms_what_it_rested_on(report):
    code, out, _ = report(RECORD, "record.json")
    assert code == 0 and "a training finished on 2 node(s), 16 device(s)" in out
    assert "`node.gpus`: 8" in out and "`scheduler.kind`: slurm" in out and "- mfu: 0.31" in out
    worse = json.loads(json.dumps(RECORD))
    worse["compute"]["attempts"]["002"]["state"] = "failed"
    code, out, _ = report(worse, "record.json", "--json")
    assert "sites/readiness.yaml" not in json.loads(out)["files"], "a run that did not finish is no readiness"


@pytest.mark.parametrize("site, seen", [("lumi-g", "none"), ("hunter", "none"), ("rudens", "pbspro")])
def test_what_a_job_cannot_tell_of_the_scheduler_is_no_difference(report, site, seen):
    """A process outside any job finds none; jobs of Torque see the variables of PBS."""
    data = json.loads(json.dumps(RECORD))
    data["run"] |= {"scheduler": {"name": seen, "job_ids": []}, "host_site": site}
    code, out, _ = report(data, "record.json")
    assert code == 0 and "scheduler.kind" not in out


@pytest.mark.parametrize("fact, observed", [("node.gpus", "four"), ("node.colour", "red"), ("gpu.sku", "gh200 144")])
def test_differences_are_an_overlay_that_loads(report, fact, observed):
    data = json.loads(json.dumps(ACCEPTANCE))
    data["facts"].append({"fact": fact, "profile": None, "observed": observed, "verdict": "new", "by": "x"})
    code, out, _ = report(data, "acceptance.json", "--json")
    files = json.loads(out)["files"]
    overlay = yaml_text.parse(files["differences.yaml"], "differences.yaml").value
    assert code == 0 and profiles.load("alps-clariden", overlay=overlay).node.cores == 280
    assert fact not in overlay["corrections"]
    assert (
        "Nothing that a profile holds" in files["PULL_REQUEST.md"]
        and f"`{fact}`: {observed}" in files["PULL_REQUEST.md"]
    )


@pytest.mark.parametrize(
    "status, gpus, why",
    [("FAIL", 4, "a check failed"), ("SKIP", 4, "no check passed"), ("PASS", 0, "no GPU was there"), ("PASS", 4, None)],
)
def test_what_says_nothing_of_training_there_is_no_readiness(report, status, gpus, why):
    data = json.loads(json.dumps({**ACCEPTANCE, "gpus": gpus}))
    data["checks"][0]["status"] = status
    _, out, _ = report(data, "acceptance.json", "--json")
    found = json.loads(out)
    assert ("sites/readiness.yaml" in found["files"]) is (why is None) and found["why_no_readiness"] == why
    assert why is None or f"No readiness entry: {why}." in found["files"]["PULL_REQUEST.md"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"site": None}, "--site SYSTEM"),
        ({"site": "lumi-h"}, "unknown site"),
        ({"written": "yesterday"}, "is no date"),
        ({"checks": [{"name": "x", "status": "GOOD"}]}, "PASS, FAIL, SKIP"),
        ({"checks": 3}, "neither an acceptance nor the record of a run"),
    ],
)
def test_what_is_no_report_is_refused_with_one_message(report, change, words):
    code, out, err = report({**ACCEPTANCE, **change}, "acceptance.json")
    assert code == 2 and words in err and not out


def test_a_file_of_another_system_is_refused(report, tmp_path, capsys):
    assert report(ACCEPTANCE, "acceptance.json", "--site", "lumi-g")[0] == 2
    (tmp_path / "x.json").write_text("{")
    assert main(["sites", "report", str(tmp_path / "x.json")]) == 2 and "cannot be read" in capsys.readouterr().err
    assert main(["sites", "report", str(tmp_path / "none.json")]) == 2
    assert main(["sites", "report"]) == 2


@pytest.mark.parametrize("system", sorted(p.stem for p in catalogue.SYSTEMS.glob("*.yaml"))[::6])
def test_any_profile_takes_an_entry_and_passes_its_check(system, tmp_path):
    """Whatever way its blocks are written in."""
    path = catalogue.SYSTEMS / f"{system}.yaml"
    loaded = profiles.load(system, overlay=False)
    stated = [f for f in loaded.stated_facts() if f.path.startswith("node.") and f.path != "node.gpu_numa"][:2]
    rows = [{"fact": f.path, "profile": f.value, "observed": f.value, "verdict": "confirmed"} for f in stated]
    evidence = reporting.Evidence("acceptance", system, "2026-11-29", "", "aifactory accept: 3 passed", facts=rows)
    made = reporting.files(evidence, loaded, path)
    assert (f"sites/systems/{system}.yaml" in made) is bool(stated)
    if stated:
        target = Path(shutil.copy(path, tmp_path))
        target.write_text(made[f"sites/systems/{system}.yaml"])
        assert not [f for f in check_file(target).faults if f.severity == "error"]
