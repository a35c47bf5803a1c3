"""Launching tells what the site bills in its own unit, keeps a budget in it, and warns of faults that are known."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from test_scripts import submission

from aifactory_train import sites
from aifactory_train.cli import main
from aifactory_train.config.loading import load_recipe
from aifactory_train.core.errors import UserError
from aifactory_train.launchers import checks
from aifactory_train.launchers.caches import cache_root, make_shared
from aifactory_train.launchers.checks import Context, known
from aifactory_train.planning import plan_for

LUMI = ["--site", "lumi-g", "--account", "project_465000000", "--nodes", "2", "--time", "4h", "--dry-run"]


def test_lumi_is_told_64_gpu_hours_and_32_billed(cli, plain_recipe):
    code, _, err = cli("launch", plain_recipe, *LUMI)
    assert code == 0 and "at most 64.0 GPU-hours; the site bills at most 32 GPU-hours (one MI250X module" in err
    code, out, _ = cli("launch", plain_recipe, *LUMI, "--chain", "1", "--json")
    billed = json.loads(out)["billed_most"]
    assert billed["amount"] == 64 and billed["unit"] == "GPU-hours" and "2 node(s) x 8 h x 4" in billed["how"]


@pytest.mark.parametrize("budget, code", [("32", 0), ("31.9", 2), ("0", 2), ("-1", 2)])
def test_a_budget_in_the_unit_of_the_site_is_kept(cli, plain_recipe, budget, code):
    got, out, err = cli("launch", plain_recipe, *LUMI, f"--site-budget={budget}")
    assert got == code, err
    if code and float(budget) > 0:
        assert "[site-budget]" in err and "32 GPU-hours" in err and "2 node(s) x 4 h x 4" in err and not out


def test_a_budget_is_refused_where_the_rate_is_not_published(cli, plain_recipe, tmp_path):
    job = ["--site", "vega", "--account", "d2026-users", "--dry-run", "--time", "1h"]
    code, _, err = cli("launch", plain_recipe, *job)
    assert code == 0 and "what the site bills for them is not published" in err
    code, _, err = cli("launch", plain_recipe, *job, "--site-budget", "10")
    assert code == 2 and "not published" in err and "accounting.unit" in err
    own = tmp_path / "vega.yaml"
    own.write_text(
        "overlay_for: vega\nuser: {site_budget: 100}\n"
        "corrections: {accounting.unit: core-hours, accounting.per_gpu_hour: 32}\n"
    )
    code, _, err = cli("launch", plain_recipe, *job, "--site-file", own)
    assert code == 2 and "up to 128 core-hours, your budget is 100" in err


def test_more_jobs_than_the_queue_takes_of_one_user_are_refused(cli, plain_recipe, tmp_path):
    seeds = ",".join(str(i) for i in range(211))
    code, _, err = cli("launch", plain_recipe, *LUMI, "--array", f"train.seed={seeds}")
    assert code == 2 and "211 jobs, LUMI-G takes 210 of one user" in err and "lumi-userguide" in err
    own = tmp_path / "lumi.yaml"
    own.write_text("overlay_for: lumi-g\ncorrections: {queue.max_submitted: 500}\n")
    code, _, err = cli("launch", plain_recipe, *LUMI, "--array", f"train.seed={seeds}", "--site-file", own)
    assert code == 0, err


def test_launch_warns_of_a_known_fault_before_the_job(cli, plain_recipe):
    image = "/appl/local/laifs/containers/lumi-multitorch-u24r70f21m50t210-20260807_115122/lumi-multitorch-full-x.sif"
    code, _, err = cli("launch", plain_recipe, *LUMI, "--container", image, "--set", "parallel.engine=hsdp")
    assert code == 0 and "[known-fault] hang" in err and "lumi-second-group" in err and "engine=fsdp2" in err
    code, _, err = cli("launch", plain_recipe, *LUMI, "--container", image, "--set", "parallel.engine=fsdp2")
    assert code == 0 and "known-fault" not in err
    code, _, err = cli("launch", plain_recipe, *LUMI, "--env", "NCCL_ASYNC_ERROR_HANDLING=1")
    assert code == 0 and "nccl-async-errors-old-name" in err
    code, out, _ = cli("launch", plain_recipe, *LUMI, "--env", "NCCL_ASYNC_ERROR_HANDLING=1", "--json")
    told = [f for f in json.loads(out)["findings"] if f["rule"] == "known-fault"]
    assert told[0]["level"] == "warn" and "47286" in told[0]["fact"] and told[0]["fix"]


@pytest.mark.parametrize("system_id", sites.names(usable=True))
def test_what_a_script_sets_by_itself_is_never_what_is_known_to_be_at_fault(plain_recipe, system_id):
    """The profile's variables and ours together, as a job of two nodes gets them."""
    system = sites.load(system_id, overlay=False)
    several = system.max_nodes != 1 and system.scheduler.kind not in ("kubernetes", "torque")
    sub = submission(system_id, plain_recipe, nodes=2 if several else 1)
    context = Context(sub, load_recipe(str(plain_recipe)), here=False, submitting=False)
    found = checks.RULES["known-fault"](context)
    blamed = [f for f in found if any(x.id in f.what and x.where.variables for x in known.known_faults.known())]
    assert not blamed, blamed


def test_the_plan_is_billed_in_the_unit_of_the_site(plain_recipe, tmp_path):
    recipe = load_recipe(
        "health/phenotype-terms", ["model.base=meta-llama/Llama-3.1-8B", "train.batch_rows=64", "train.max_steps=10"]
    )
    for system, gpus, factor in (("lumi-g", 8, 0.5), ("leonardo-booster", 4, 8)):
        plan, _ = plan_for(recipe, sites.load(system, overlay={"user": {"site_budget": 1000}}), 1)
        assert plan["billed"]["amount"] == pytest.approx(plan["hours"] * gpus * factor, rel=0.01, abs=2e-3)
        assert plan["billed_share"] == pytest.approx(plan["billed"]["amount"] / 1000, rel=0.01, abs=1e-5)
    plan, _ = plan_for(recipe, sites.load("vega", overlay=False), 1)
    assert plan["hours"] and plan["billed"] is None and plan["billed_share"] is None


# ---- one cache for all of a project


def test_jobs_and_fetch_agree_where_the_cache_lies(plain_recipe, monkeypatch):
    monkeypatch.delenv("AIFACTORY_CACHE", raising=False)
    monkeypatch.delenv("HF_HOME", raising=False)
    user = {"account": "project_465000000", "work_dir": "/scratch/project_465000000/me"}
    own = sites.load("lumi-g", overlay={"user": user})
    shared = sites.load("lumi-g", overlay={"user": {**user, "cache": "shared"}})
    assert cache_root(own) == user["work_dir"] and cache_root(own, shared=True) == "/scratch/project_465000000"
    assert cache_root(shared) == "/scratch/project_465000000"
    named = sites.load("lumi-g", overlay={"user": {**user, "cache": "/flash/project_465000000/models"}})
    assert cache_root(named) == "/flash/project_465000000/models"
    from aifactory_train.launchers.build import build
    from aifactory_train.launchers.request import LaunchRequest

    request = LaunchRequest(recipe=str(plain_recipe), site="lumi-g", account=user["account"], nodes=1)
    script = build(request, shared, load_recipe(str(plain_recipe))).script
    assert "export AIFACTORY_CACHE=/scratch/project_465000000/aifactory-cache\n" in script
    assert "export HF_HOME=/scratch/project_465000000/hf\n" in script


@pytest.mark.parametrize(
    "system, user, words",
    [("lumi-g", {}, "account is not known"), ("hunter", {}, "a workspace, shared with ws_share"),
     ("karolina", {"account": "OPEN-00-00"}, "project is not known")],
)  # fmt: skip
def test_a_shared_cache_that_is_not_known_says_what_to_do(system, user, words):
    with pytest.raises(UserError, match=words):
        cache_root(sites.load(system, overlay={"user": user}), shared=True)


def test_a_shared_cache_is_the_groups_and_is_filled_there_alone(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "r.yaml"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "a"}\n' * 4)
    recipe.write_text("model: {base: ./model}\ndata: {train: {source: ./rows.jsonl, licence: own}}\n")
    own = tmp_path / "karolina.yaml"
    own.write_text(
        "overlay_for: karolina\nuser: {project: p}\n"
        f"corrections: {{data.model_cache: '{tmp_path}/proj/{{project}}'}}\n"
    )
    fetch = ["fetch", str(recipe), "--only", "data", "--site", "karolina", "--site-file", str(own), "--shared"]
    before = dict(os.environ)
    assert main(fetch) == 2 and "is not on this machine" in capsys.readouterr().err
    root = tmp_path / "proj" / "p"
    root.mkdir(parents=True)
    assert main(fetch) == 0
    out = capsys.readouterr()
    assert f"cache: {root}/aifactory-cache" in out.err and "cache: shared" in out.err
    manifest = root / "aifactory-cache" / "manifests" / "local--r.json"
    assert manifest.is_file() and stat.S_IMODE(manifest.parent.stat().st_mode) == 0o2770
    assert manifest.stat().st_mode & stat.S_IRGRP
    assert {k: os.environ.get(k) for k in ("AIFACTORY_CACHE", "HF_HOME")} == {
        k: before.get(k) for k in ("AIFACTORY_CACHE", "HF_HOME")
    }
    assert main(["fetch", str(recipe), "--shared"]) == 2 and "goes with --site" in capsys.readouterr().err


def test_an_own_folder_of_somebody_else_is_left_as_it_is(tmp_path):
    make_shared(str(tmp_path), sites.load("karolina", overlay=False))
    assert Path(tmp_path / "hf" / "hub").is_dir() and Path(tmp_path / "aifactory-cache" / "prepared").is_dir()
