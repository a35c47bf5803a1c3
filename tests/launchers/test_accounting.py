"""QoS limits and accounting, on a Slurm with slurmdbd and MariaDB (root only): what Slurm's own test does not see, our
rules do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest
from launcher_bench import FAKE, LAB, submitted, wait_for
from slurm_lab import lab

from aifactory_train import sites
from aifactory_train.config.loading import load_recipe
from aifactory_train.launchers import backends, checks
from aifactory_train.launchers.build import build
from aifactory_train.launchers.request import LaunchRequest

pytestmark = pytest.mark.slurm
NEEDED = ("slurmdbd", "mariadbd", "munged", "sacctmgr")


@pytest.fixture(scope="module")
def accounting() -> Iterator[None]:
    lab.require()
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    gone = [p for p in NEEDED if shutil.which(p, path=path) is None]
    why = f"no {', '.join(gone)} here" if gone else "needs root" if os.geteuid() else None
    if why:
        if os.environ.get("AIFACTORY_REQUIRE_SLURM") == "1":
            pytest.fail(f"{why}; apt-get install --no-install-recommends slurmdbd mariadb-server munge", pytrace=False)
        pytest.skip(why)
    with lab.full_cluster() as env:
        patch = pytest.MonkeyPatch()
        patch.setenv("PATH", env["PATH"])
        patch.setenv("SLURM_CONF", env["SLURM_CONF"])
        # Only a controller that the database knows by its port is told what is added.
        ask, end = ["sacctmgr", "-n", "-P", "show", "cluster", "format=controlport"], time.time() + 60
        while (port := subprocess.run(ask, capture_output=True, text=True).stdout.strip()) in ("", "0"):
            assert time.time() < end, f"the controller does not register: '{port}'"
            time.sleep(0.2)
        for argv in (
            ["add", "qos", "short", "set", "MaxWall=10", "MaxTRESPerJob=gres/gpu=2", "MaxNodesPerJob=1"],
            ["modify", "user", "root", "set", "qos+=short"],
        ):
            subprocess.run(["sacctmgr", "-i", *argv], check=True, capture_output=True)
        yield
        patch.undo()


@pytest.fixture(scope="module")
def full_system():
    """The lab's profile with the QoS that the database holds."""
    raw = sites.load(str(LAB), overlay=False).model_dump(
        by_alias=True, exclude={"user", "readiness", "readiness_evidence"}, exclude_none=True
    )
    raw["partitions"] = {"boost": {"qos": ["normal", "short"], "max_time": "24h", "max_nodes": 3, "shared": True}}
    raw["qos"] = {"normal": {}, "short": {"max_time": "10m", "max_nodes": 1, "max_gpus": 2}}
    raw["access"] = {"account": "required", "qos": "optional"}
    raw["default_partition"] = "boost"
    raw["node"] = {"count": 4, "gpus": 4, "isa": "x86_64", "cores": 64, "cores_usable": 64, "memory_gib": 468}
    raw["request"] = {"gpus": "gres", "gres_type": "a100", "memory": "mem", "memory_gib": 4, "cpus_per_gpu": 1}
    return sites.resolve(raw)


OVER = [
    ("longer than the QoS admits", {"time_s": 3600}, "time-over-qos", "QOSMaxWallDurationPerJobLimit"),
    ("more GPUs than the QoS admits", {"gpus_per_node": 3}, "gpus-over-limit", "QOSMaxGRESPerJob"),
    ("more nodes than the QoS admits", {"nodes": 2, "gpus_per_node": 1}, "nodes-over-qos", "QOSMaxNodePerJobLimit"),
]


@pytest.mark.parametrize(("what", "more", "rule", "reason"), OVER, ids=[o[2] for o in OVER])
def test_slurm_accepts_and_holds_for_ever_what_our_rules_refuse(
    accounting, full_system, plain_recipe, tmp_path, what, more, rule, reason
):
    base = {
        "recipe": str(plain_recipe),
        "site": "lab",
        "account": "proj1",
        "qos": "short",
        "time_s": 300,
        "gpus_per_node": 1,
        "run_dir": str(tmp_path / "run"),
        "program": (str(FAKE),),
        "preflight": "off",
    }
    recipe = load_recipe(str(plain_recipe))
    sub = build(LaunchRequest(**{**base, **more}), full_system, recipe)
    assert rule in {f.rule for f in checks.check(sub, recipe, here=False) if f.level == "refuse"}
    good = build(LaunchRequest(**base), full_system, recipe)
    assert not [f for f in checks.check(good, recipe, here=False) if f.level == "refuse"]
    # The real scheduler: its own test says yes, the job then waits without end.
    from aifactory_train.launchers import runs

    runs.write(sub)
    slurm = backends.get("slurm")
    slurm.submit(sub.run_dir, test_only=True)
    job = slurm.submit(sub.run_dir)
    try:
        end = time.time() + 60
        while (found := slurm.query(job)) is not None and found.reason != reason and time.time() < end:
            time.sleep(0.3)
        assert found is not None and (found.state, found.reason) == ("pending", reason)
    finally:
        slurm.cancel(job)


def test_status_reports_gpu_hours_from_accounting(accounting, full_system, plain_recipe, tmp_path):
    run = tmp_path / "run"
    request = LaunchRequest(
        recipe=str(plain_recipe),
        site="lab",
        account="proj1",
        qos="short",
        time_s=300,
        gpus_per_node=2,
        run_dir=str(run),
        program=(str(FAKE),),
        preflight="off",
        style="srun",
        hang_s=0,
    )
    submitted(request, full_system)
    found = wait_for(run, "done", "failed", seconds=150)
    assert found["state"] == "done" and found["gpu_hours"] > 0
    slurm = backends.get("slurm")
    end = time.time() + 60
    while "gres/gpu=2" not in (account := slurm.accounting(found["jobs"][0]["id"]) or {}).get("AllocTRES", ""):
        assert time.time() < end, account
        time.sleep(0.5)
    unknown = slurm.query("999999")
    assert unknown is None
