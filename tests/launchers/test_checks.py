"""Wrong requests are refused before submission, each by a named rule that says the fact and the fix."""

from __future__ import annotations

import json

import pytest

from aifactory_train import sites
from aifactory_train.config.loading import load_recipe
from aifactory_train.launchers import checks
from aifactory_train.launchers.build import build
from aifactory_train.launchers.request import LaunchRequest

LUMI = ["--site", "lumi-g", "--account", "project_465000001"]
LEO = ["--site", "leonardo-booster", "--account", "AIFAC_x"]
MN5 = ["--site", "marenostrum5-acc", "--account", "ehpc123"]

#: (what is wrong, arguments, the rule that must refuse it)
WRONG = [
    ("no account where one is needed", ["--site", "lumi-g"], "account-required"),
    ("an account of another form", ["--site", "lumi-g", "--account", "465000001"], "account-form"),
    ("a CPU account at a GPU site", ["--site", "jean-zay-h100", "--account", "abc"], "account-"),
    ("a partition that does not exist", [*LUMI, "--partition", "standart-g"], "partition-known"),
    ("more nodes than the partition admits", [*LUMI, "--nodes", "1025"], "nodes-over-partition"),
    ("more nodes than a small partition admits", [*LUMI, "--partition", "small-g", "--nodes", "5"], "nodes-over-partition"),
    ("more nodes than the QoS admits", [*LEO, "--qos", "boost_qos_lprod", "--nodes", "9"], "nodes-over-qos"),
    ("more nodes than the default QoS admits", [*MN5, "--nodes", "101"], "nodes-over-qos"),
    ("fewer nodes than the partition wants", ["--site", "karolina", "--account", "OPEN-1-1", "--partition", "qgpu_big", "--nodes", "2"], "nodes-under-minimum"),
    ("more nodes than the default QoS admits at Leonardo", [*LEO, "--nodes", "65"], "nodes-over-qos"),
    ("fewer nodes than the QoS wants", [*LEO, "--qos", "boost_qos_bprod", "--nodes", "2"], "nodes-under-minimum"),
    ("more GPUs than the QoS admits", ["--site", "jean-zay-h100", "--account", "abc@h100", "--nodes", "140"], "gpus-over-limit"),
    ("a partition that was seen down", ["--site", "jupiter-booster", "--account", "x", "--partition", "largebooster"], "partition-up"),
    ("a bare host without NCCL's plug-in", ["--site", "alps-clariden", "--account", "g123"], "image-needed"),
    ("a variable with which jobs hang", [*LUMI, "--env", "NCCL_NET_GDR_LEVEL=PHB"], "env-avoid"),
    ("no node", [*LUMI, "--nodes", "0"], "nodes-positive"),
    ("a negative number of nodes", [*LUMI, "--nodes", "-3"], "nodes-positive"),
    ("more GPUs than a node has", [*LEO, "--gpus-per-node", "5"], "gpus-per-node"),
    ("modules counted instead of GCDs", [*LUMI, "--gpus-per-node", "16"], "gpus-per-node"),
    ("no GPU", [*LEO, "--gpus-per-node", "0"], "gpus-per-node"),
    ("part of a node where whole nodes are given", [*LUMI, "--gpus-per-node", "4"], "whole-nodes"),
    ("part of several nodes", ["--site", "snellius-h100", "--nodes", "2", "--gpus-per-node", "2"], "partial-nodes"),
    ("more processes than GPUs", [*LEO, "--nproc", "8"], "ranks-per-gpu"),
    ("too few processes for the fixed ratio of cores", ["--site", "sofia", "--gpus-per-node", "4", "--nproc", "0"], "nodes-positive"),
    ("no process where each is a task", ["--site", "hunter", "--nproc", "0"], "nodes-positive"),
    ("longer than the partition admits", [*LUMI, "--time", "3-00:00:00"], "time-over-partition"),
    ("longer than the QoS admits", [*LEO, "--qos", "boost_qos_dbg", "--time", "1h"], "time-over-qos"),
    ("longer than a development QoS admits", ["--site", "jean-zay-h100", "--account", "abc@h100", "--qos", "qos_gpu_h100-dev", "--time", "4h"], "time-over-qos"),
    ("a time that is none", [*LUMI, "--time", "soon"], "time-form"),
    ("a bare number as time", [*LUMI, "--time", "60"], "time-form"),
    ("a minute", [*LUMI, "--time", "00:01:00"], "time-too-short"),
    ("more grace than time", [*LUMI, "--time", "00:10:00", "--grace", "400"], "time-too-short"),
    ("a QoS that does not exist", [*LEO, "--qos", "boost_qos_debug"], "qos-known"),
    ("a QoS where there is none", [*LUMI, "--qos", "normal"], "qos-not-taken"),
    ("no QoS where the project's name is one", ["--site", "discoverer-plus"], "qos-required"),
    ("a QoS of another partition", [*MN5, "--partition", "accinteractive", "--qos", "acc_ehpc"], "qos-goes-with-partition"),
    ("an option that breaks NCCL there", [*LUMI, "--directive=--gpus-per-task=1"], "directive-never"),
    ("an option that the launcher writes", [*LUMI, "--directive=--nodes=7"], "directive-never"),
    ("a run folder that compute nodes do not see", ["--site", "jupiter-booster", "--account", "jureap1", "--run-dir", "/p/project1/x/run"], "run-folder-visible"),
    ("a run folder on a node's own disk", [*LUMI, "--run-dir", "/tmp/run"], "run-folder-on-shared-disk"),
    ("a run folder in a small home", [*LUMI, "--run-dir", "/users/USERNAME/run"], "run-folder-quota"),
    ("a variable that breaks the site", [*LUMI, "--env", "MIOPEN_USER_DB=/tmp/x"], "env-avoid"),
    ("a variable of the launcher", [*LUMI, "--env", "RANK=3"], "env-owned"),
    ("a variable that changes the shell", [*LUMI, "--env", "BASH_ENV=/tmp/x"], "env-owned"),
    ("a secret", [*LUMI, "--env", "HF_TOKEN=x"], "env-secret"),
    ("more than the budget", [*LUMI, "--nodes", "8", "--budget", "10"], "budget"),
    ("a budget of nothing", [*LUMI, "--budget", "0"], "budget-positive"),
    ("Slurm where PBS runs", ["--site", "hunter", "--backend", "slurm"], "backend-matches-scheduler"),
    ("PBS where Slurm runs", [*LUMI, "--backend", "pbspro"], "backend-matches-scheduler"),
    ("a backend that does not exist", [*LUMI, "--backend", "lsf"], "backend-known"),
    ("a style that the scheduler lacks", [*LUMI, "--style", "mpi"], "style-supported"),
    ("automatic restarts where a person must submit", ["--site", "hunter", "--resubmit", "chain"], "human-submits"),
    ("a machine that does not exist yet", ["--site", "lumi-ai"], "site-usable"),
    ("several nodes on one machine", ["--nodes", "2"], "nodes-one-here"),
    ("a sweep on one machine", ["--array", "train.seed=1,2"], "array-size"),
    ("a sweep of a thousand", [*LUMI, "--array", "train.seed=" + ",".join(map(str, range(1000)))], "array-size"),
    ("a sweep over nothing", [*LUMI, "--array", "train.seed="], "array-size"),
    ("a sweep without a key", [*LUMI, "--array", "=1,2"], "name-equals-value"),
    ("a sweep and a chain", [*LUMI, "--array", "train.seed=1,2", "--chain", "2"], "array-and-chain"),
    ("bf16 on a GPU without it", ["--site", "jean-zay-v100", "--account", "abc@v100", "--set", "precision.compute=bf16"], "precision-supported"),
    ("a shard size that divides nothing", [*LUMI, "--set", "parallel.engine=hsdp", "--set", "parallel.shard_size=3"], "engine-fits-ranks"),
    ("restarts of an unknown kind", [*LUMI, "--restarts", "reboot=2"], "restarts-form"),
    ("torchrun on two nodes that do not know their rank", ["--site", "hunter", "--style", "torchrun", "--nodes", "2"], "nodes-startable"),
    ("two nodes of pods", ["--site", "eidf-gpu", "--account", "eidf000ns", "--container", "r/i:1", "--nodes", "2"], "kubernetes-one-node"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "argv", "rule"), WRONG, ids=[w[0].replace(" ", "-") for w in WRONG])
def test_wrong_requests_are_refused(cli, plain_recipe, monkeypatch, what, argv, rule):
    monkeypatch.setenv("USER", "USERNAME")
    code, out, err = cli("launch", plain_recipe, *argv, "--dry-run")
    assert code == 2, (what, err)
    assert f"[{rule}" in err, (what, err)
    assert out == "" and "Traceback" not in err
    assert "fix:" in err, (what, err)


def test_more_than_thirty_rules_refuse():
    assert len({rule for _, _, rule in WRONG}) >= 30
    assert len(checks.RULES) >= 50 and all(rule.text for rule in checks.RULES.values())


def test_facts_carry_their_source(cli, plain_recipe):
    _, _, err = cli("launch", plain_recipe, *LUMI, "--nodes", "1025", "--dry-run")
    assert "lumi-userguide" in err and "documented" in err


def test_all_broken_rules_are_told_at_once(cli, plain_recipe):
    _, _, err = cli(
        "launch", plain_recipe, *LUMI, "--nodes", "1025", "--time", "9-00:00:00", "--gpus-per-node", "9", "--dry-run"
    )
    assert all(f"[{r}]" in err for r in ("nodes-over-partition", "time-over-partition", "gpus-per-node"))


def test_what_only_the_site_can_tell_is_said_and_changes_nothing(cli, plain_recipe):
    code, out, err = cli("launch", plain_recipe, *LUMI, "--dry-run")
    assert code == 0 and out.startswith("#!/bin/bash")
    for rule in ("model-staged", "data-staged", "container-present", "modules-present", "scratch-space"):
        assert f"not checked here: [{rule}]" in err
    assert "not checked" not in out


def test_submitting_away_from_the_site_is_refused(cli, plain_recipe, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = cli("launch", plain_recipe, *LUMI)
    assert code == 2 and "[scheduler-here]" in err and "[model-staged]" in err


def test_a_large_job_wants_confirmation(plain_recipe, lab_system):
    system = sites.load("lumi-g", overlay=False)
    recipe = load_recipe(str(plain_recipe))

    def rules(**more):
        sub = build(
            LaunchRequest(recipe=str(plain_recipe), site="lumi-g", nodes=16, account="project_465000001", **more),
            system,
            recipe,
        )
        return {f.rule for f in checks.check(sub, recipe, here=False, submitting=True) if f.level == "refuse"}

    assert "confirm-cost" in rules()
    assert "confirm-cost" not in rules(confirmed=True)


def test_budget_counts_every_task_and_link(plain_recipe):
    system = sites.load("leonardo-booster", overlay=False)
    recipe = load_recipe(str(plain_recipe))
    base = {
        "recipe": str(plain_recipe),
        "site": "leonardo-booster",
        "account": "a",
        "time_s": 3600,
        "budget_gpu_hours": 4.0,
    }
    for more, refused in (({}, False), ({"array": (("train.seed", ("1", "2")),)}, True), ({"chain": 1}, True)):
        sub = build(LaunchRequest(**base, **more), system, recipe)
        found = {f.rule for f in checks.check(sub, recipe, here=False) if f.level == "refuse"}
        assert ("budget" in found) is refused, more


def test_environment_for_another_instruction_set_is_refused(tmp_path, plain_recipe):
    system = sites.load("jupiter-booster", overlay=False)
    recipe = load_recipe(str(plain_recipe))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_bytes(b"\x7fELF" + bytes(14) + (62).to_bytes(2, "little"))
    sub = build(
        LaunchRequest(recipe=str(plain_recipe), site=system.id, account="jureap1", venv=str(tmp_path)), system, recipe
    )
    found = {f.rule: f for f in checks.check(sub, recipe, here=False)}
    assert found["environment-isa"].level == "refuse" and "aarch64" in found["environment-isa"].what


def test_overlay_supplies_account_and_paths(cli, plain_recipe, tmp_path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(
        "overlay_for: lumi-g\nuser: {account: project_465000009, work_dir: /scratch/project_465000009/me, venv: /scratch/project_465000009/me/env}\n"
    )
    code, out, _ = cli("launch", plain_recipe, "--site", "lumi-g", "--site-file", overlay, "--dry-run")
    assert code == 0
    assert "#SBATCH --account=project_465000009" in out
    assert "--output=/scratch/project_465000009/me/runs/" in out


def test_json_holds_the_decision_and_the_reasons(cli, plain_recipe):
    code, out, _ = cli("launch", plain_recipe, *LUMI, "--nodes", "2", "--dry-run", "--explain", "--json")
    found = json.loads(out)
    assert code == 0 and found["ranks"] == 16 and found["script"].startswith("#!/bin/bash")
    assert len(found["explained"]) > 60 and all(line["why"] for line in found["explained"])


def findings_of(recipe_file, *settings, **asked):
    recipe = load_recipe(str(recipe_file), list(settings))
    asked = {"site": "local", **asked}
    sub = build(LaunchRequest(recipe=str(recipe_file), **asked), sites.load(asked["site"], overlay=False), recipe)
    return {f.rule: f for f in checks.check(sub, recipe, here=True) if f.level == "refuse"}


@pytest.mark.parametrize(("missing", "refused"), [((), False), (("bitsandbytes",), True), (("accelerate",), True)])
def test_a_four_bit_base_wants_its_packages_and_no_gpu(plain_recipe, monkeypatch, missing, refused):
    """bitsandbytes quantises on CPUs too: what it can do on this device is asked by training, not guessed here."""
    from aifactory_train.launchers.checks import software

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(software, "find_spec", lambda name: None if name in missing else object())
    found = findings_of(plain_recipe, "adapter.kind=lora", "adapter.quantise_base=nf4")
    assert ("quantisation-supported" in found) is refused
    assert not refused or missing[0] in found["quantisation-supported"].what


def test_a_four_bit_base_wants_the_engine_that_training_accepts(plain_recipe):
    four_bit = ("adapter.kind=lora", "adapter.quantise_base=nf4")
    asked = {"site": "leonardo-booster", "account": "a"}
    assert "quantisation-supported" not in findings_of(plain_recipe, *four_bit, "parallel.engine=ddp", **asked)
    assert "quantisation-supported" not in findings_of(plain_recipe, *four_bit, "parallel.engine=fsdp2", **asked)
    found = findings_of(plain_recipe, *four_bit, "parallel.engine=zero3", **asked)
    assert "zero3 cannot hold a 4-bit base" in found["quantisation-supported"].what
