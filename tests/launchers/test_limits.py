"""Published limits as a request meets them: taken at the limit, refused above (and below a minimum), for every
profile.
"""

from __future__ import annotations

import pytest

from aifactory_train import sites
from aifactory_train.config.loading import load_recipe
from aifactory_train.launchers import checks
from aifactory_train.launchers.build import build
from aifactory_train.launchers.request import LaunchRequest

SYSTEMS = {name: sites.load(name, overlay=False) for name in sites.names(usable=True)}
FIELDS = ("max_nodes", "min_nodes", "max_gpus", "nodes")
SIZE_RULES = {"nodes-over-partition", "nodes-over-qos", "nodes-under-minimum", "nodes-over-machine", "gpus-over-limit"}


def places():
    """(system, partition, QoS or None) of every combination in which a limit on size is stated."""
    for name, system in SYSTEMS.items():
        for key, part in system.partitions.items():
            if part.purpose == "data":
                continue
            for qos in part.qos or [None]:
                stated = [part, system.qos[qos]] if qos else [part]
                if any(getattr(limit, field, None) for limit in stated for field in FIELDS):
                    yield name, key, qos


def refusals(name: str, recipe, nodes: int, partition: str | None = None, qos: str | None = None, **more) -> dict:
    """Rule -> finding of everything that refuses such a job."""
    system = SYSTEMS[name]
    fields = {"recipe": "plain", "site": name, "account": system.access.example.get("account", "acct"), **more}
    request = LaunchRequest(nodes=nodes, partition=partition, qos=qos, **fields)
    sub = build(request, system, recipe, files=False)
    return {f.rule: f for f in checks.check(sub, recipe, here=False) if f.level == "refuse"}


@pytest.fixture(scope="module")
def recipe(plain_recipe):
    return load_recipe(str(plain_recipe))


@pytest.mark.parametrize(
    ("name", "partition", "qos"), [pytest.param(*p, id="-".join(filter(None, p))) for p in places()]
)
def test_taken_at_the_limit_and_refused_above(name, partition, qos, recipe):
    system = SYSTEMS[name]
    part, limit = system.partitions[partition], system.qos.get(qos) if qos else None
    stated = [p for p in (part, limit) if p is not None]
    gpus = min([system.node.gpus or 1, *[p.max_gpus for p in stated if p.max_gpus]])
    nodes = [n for p in stated for n in (p.max_nodes, getattr(p, "nodes", None)) if n]
    nodes += [p.max_gpus // gpus for p in stated if p.max_gpus] + ([system.node.count] if system.node.count else [])
    most, fewest = min(nodes, default=None), max([p.min_nodes or 1 for p in stated])

    def refused(count: int, per_node: int = gpus) -> set[str]:
        return set(refusals(name, recipe, count, partition, qos, gpus_per_node=per_node)) & SIZE_RULES

    assert not refused(fewest), "the smallest job that is stated to be possible"
    if most:
        assert not refused(most)
        assert refused(most + 1)
    if fewest > 1:
        assert refused(fewest - 1) == {"nodes-under-minimum"}
    for p in stated:
        if p.max_gpus and system.node.gpus and p.max_gpus < system.node.gpus:
            assert refused(1, p.max_gpus + 1) == {"gpus-over-limit"}


def times():
    """(system, partition, QoS or None, seconds) of every combination in which a limit of time is stated."""
    for name, system in SYSTEMS.items():
        for key, part in system.partitions.items():
            for qos in part.qos or [None]:
                limit = system.limits(key, qos)["max_time"]
                if part.purpose != "data" and limit:
                    yield name, key, qos, limit


@pytest.mark.parametrize(
    ("name", "partition", "qos", "limit"), [pytest.param(*t, id="-".join(filter(None, t[:3]))) for t in times()]
)
def test_time_is_taken_at_the_limit_and_refused_above(name, partition, qos, limit, recipe):
    nodes = SYSTEMS[name].limits(partition, qos)["min_nodes"] or 1
    rules = {"time-over-partition", "time-over-qos"}
    more = {"gpus_per_node": 1} if SYSTEMS[name].node.gpus else {}
    assert not set(refusals(name, recipe, nodes, partition, qos, time_s=limit, **more)) & rules
    assert set(refusals(name, recipe, nodes, partition, qos, time_s=limit + 60, **more)) & rules


def test_many_places_have_a_limit():
    found = list(places())
    assert len(found) >= 50 and len({name for name, _, _ in found}) >= 25
    assert len([*times()]) >= 60


@pytest.mark.parametrize(
    ("name", "nodes", "qos", "rule", "reported"),
    [
        ("leonardo-booster", 64, None, None, ""),
        ("leonardo-booster", 65, None, "nodes-over-qos", "--qos boost_qos_bprod"),
        ("leonardo-booster", 65, "boost_qos_bprod", None, ""),
        ("leonardo-booster", 256, "boost_qos_bprod", None, ""),
        ("leonardo-booster", 257, "boost_qos_bprod", "nodes-over-qos", "256 or fewer"),
        ("leonardo-booster", 2, "boost_qos_bprod", "nodes-under-minimum", "--qos normal"),
        ("leonardo-booster", 3, "boost_qos_dbg", "nodes-over-qos", "--qos normal"),
        ("leonardo-booster", 3, "boost_qos_lprod", None, ""),
        ("leonardo-booster", 8, "boost_qos_lprod", "nodes-over-qos", "correct qos.boost_qos_lprod.max_nodes"),
        ("jean-zay-h100", 128, "qos_gpu_h100-t3", None, ""),
        ("jean-zay-h100", 129, "qos_gpu_h100-t3", "gpus-over-limit", "--nodes 128 or fewer"),
        ("jean-zay-h100", 16, "qos_gpu_h100-t4", None, ""),
        ("jean-zay-h100", 17, "qos_gpu_h100-t4", "gpus-over-limit", "--qos qos_gpu_h100-t3"),
        ("jean-zay-h100", 9, "qos_gpu_h100-dev", "gpus-over-limit", "--nodes 8 or fewer"),
        ("karolina", 16, None, None, ""),
        ("karolina", 17, None, "nodes-over-partition", "--partition qgpu_big"),
        ("juwels-booster", 384, None, None, ""),
        ("juwels-booster", 385, None, "nodes-over-partition", "--partition largebooster"),
    ],
)
def test_limits_by_name(name, nodes, qos, rule, reported, recipe):
    time_s = 1800 if qos and ("dbg" in qos or "dev" in qos) else 4 * 3600
    found = refusals(name, recipe, nodes, qos=qos, time_s=time_s)
    assert set(found) - {"account-form"} == ({rule} if rule else set())
    if rule:
        assert reported in found[rule].fix and found[rule].fact, found[rule]


def test_a_correction_admits_what_the_profile_does_not(recipe):
    system = sites.load("leonardo-booster", overlay={"corrections": {"qos.boost_qos_lprod.max_nodes": 8}})
    request = LaunchRequest(recipe="plain", site=system.id, account="a", nodes=8, qos="boost_qos_lprod")
    assert not [f for f in checks.check(build(request, system, recipe), recipe, here=False) if f.level == "refuse"]


def test_a_partition_that_was_seen_down_wants_a_reservation(recipe):
    found = refusals("jupiter-booster", recipe, 1, "largebooster")
    assert set(found) == {"partition-up"}
    assert "--partition booster" in found["partition-up"].fix and "2026-09-02" in found["partition-up"].fact
    assert not refusals("jupiter-booster", recipe, 1, "largebooster", reservation="bigday")
    assert not refusals("jupiter-booster", recipe, 1)
    assert "largebooster" not in str(refusals("jupiter-booster", recipe, 5700)["nodes-over-partition"].fix)


@pytest.mark.parametrize(
    ("name", "account", "taken"),
    [
        ("musica", "p201368", True),
        ("musica", "p70000", True),
        ("musica", "x201368", False),
        ("musica", "p7000", False),
        ("vsc5-a100", "p73209", True),
        ("arrhenius", "NAISS2026-1-2-GPU", True),  # Slurm folds accounts to lower case
        ("arrhenius", "naiss2026-1-2-cpu", False),
        ("jupiter-booster", "e-dev-2026d09-000", True),
        ("marenostrum5-acc", "etur00", True),
        ("jean-zay-h100", "abc", False),
    ],
)
def test_accounts_that_are_in_use_are_taken(name, account, taken, recipe):
    qos = SYSTEMS[name].access.example.get("qos")
    found = refusals(name, recipe, 1, qos=qos, account=account)
    assert bool({"account-form", "account-suffix"} & set(found)) is not taken


def test_cpus_are_counted_as_the_scheduler_counts_them(recipe):
    """Vega's Slurm counts hardware threads: all of a node's 256 are asked for, and a rank computes on its 32 cores."""
    system = SYSTEMS["vega"]
    for style, cpus in (("torchrun", 256), ("srun", 64)):
        request = LaunchRequest(recipe="plain", site="vega", account="p-users", style=style)
        sub = build(request, system, recipe, files=False)
        assert f"#SBATCH --cpus-per-task={cpus}\n" in sub.script and f"--cpus-per-task={cpus}\n" in sub.script
        assert "export OMP_NUM_THREADS=32\n" in sub.script
        assert not [f for f in checks.check(sub, recipe, here=False) if f.level == "refuse"]


def test_no_cores_are_asked_for_that_a_node_lacks(recipe):
    """Threads of ranks on a node never exceed its cores, and what Slurm is asked for never exceeds its CPUs."""
    for name, system in SYSTEMS.items():
        cores = system.node.cores_usable or system.node.cores
        if cores is None or system.scheduler.kind not in ("slurm", "pbspro", "torque"):
            continue
        request = LaunchRequest(recipe="plain", site=name, account=system.access.example.get("account", "a"))
        shape = build(request, system, recipe, files=False).shape
        threads = system.node.threads_per_core or 1 if system.request.cpus_are == "threads" else 1
        assert (shape.cpus_per_rank or 0) * shape.ranks_per_node <= cores, name
        assert (shape.cpus_per_task or 0) * shape.tasks_per_node <= cores * threads, name


@pytest.mark.parametrize(
    "name", ["jean-zay-h100", "jean-zay-a100", "jean-zay-v100", "deucalion-a100-40", "helios", "perun"]
)
def test_login_shell_where_modules_need_one(name, recipe):
    system = SYSTEMS[name]
    request = LaunchRequest(recipe="plain", site=name, account=system.access.example["account"])
    script = build(request, system, recipe, files=False).script
    assert script.startswith("#!/bin/bash -l\n")
    assert ("module purge" in script) is name.startswith("jean-zay")  # on Deucalion it loses the modules for good


@pytest.mark.parametrize("name", sorted(n for n, s in SYSTEMS.items() if s.scheduler.kind in ("slurm", "pbspro")))
def test_no_default_variable_contradicts(name, recipe):
    """A variable is given once, and none that the profile says to avoid (by name, or with this value)."""
    system = SYSTEMS[name]
    request = LaunchRequest(
        recipe="plain",
        site=name,
        nodes=2,
        account=system.access.example.get("account", "a"),
        qos=system.access.example.get("qos", "proj") if system.access.qos == "project" else None,
    )
    lines = build(request, system, recipe, files=False).script.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("# Environment of every rank"))
    end = next(i for i, line in enumerate(lines) if line.startswith("# What you gave with --env"))
    given = [line.removeprefix("export ").split("=", 1) for line in lines[begin:end] if line.startswith("export ")]
    names = [variable for variable, _ in given]
    assert len(names) == len(set(names)) >= 5
    for variable, value in given:
        assert variable not in system.environment.avoid
        assert f"{variable}={value.strip(chr(39))}" not in system.environment.avoid
    assert name != "lumi-g" or dict(given)["FI_MR_CACHE_MONITOR"] == "userfaultfd"
    assert name != "lumi-g" or any(
        line.startswith("unset ") and "NCCL_NET_GDR_LEVEL" in line.split() for line in lines[begin:end]
    )
