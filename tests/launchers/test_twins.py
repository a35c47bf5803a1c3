"""Every Slurm system's twin, a real slurmctld configured from the profile, judges the scripts generated from the same
profile.

This proves that script, rules and profile are consistent; it does not prove that the site agrees.
"""

from __future__ import annotations

import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launcher_bench import twin
from slurm_lab import lab
from slurm_lab.twin import UNKNOWN_NODES, config, corruptions, node_count

from aifactory_train import sites
from aifactory_train.config.loading import load_recipe, recipe_ids
from aifactory_train.launchers import checks
from aifactory_train.launchers.build import build
from aifactory_train.launchers.request import LaunchRequest

pytestmark = pytest.mark.slurm
SLURM = [s for s in sites.names(usable=True) if sites.load(s, overlay=False).scheduler.kind == "slurm"]


def request_for(
    system, recipe: str, nodes: int, partition: str | None = None, qos: str | None = None, **more
) -> LaunchRequest:
    most = system.limits(partition, qos)["max_gpus"] if partition else None
    if most and system.node.gpus and most < system.node.gpus:
        more["gpus_per_node"] = most
    if system.software.needs_image:
        more["container"] = "registry.example/image:1"
    return LaunchRequest(
        recipe=recipe,
        site=system.id,
        nodes=nodes,
        partition=partition,
        account=system.access.example.get("account", "acct"),
        qos=system.access.example.get("qos", "proj") if system.access.qos == "project" else qos,
        **more,
    )


def size_limits(system, partition: str | None, qos: str | None = None) -> tuple[int, int | None]:
    """(fewest, most) nodes of a job that names this partition and QoS (its default one); most is None where nothing is
    published.
    """
    if partition is None:
        return 1, system.node.count
    limits = system.limits(partition, qos)
    most = limits["max_nodes"]
    if system.node.count is not None:
        most = min(most, system.node.count) if most else system.node.count
    return limits["min_nodes"] or 1, most


class Judge:
    """``sbatch --test-only`` against one twin, several scripts at a time."""

    def __init__(self, env: dict[str, str], folder: Path):
        self.env, self.folder, self.count = env, folder, 0

    def many(self, scripts: list[str]) -> list[tuple[bool, str]]:
        paths = []
        for script in scripts:
            self.count += 1
            path = self.folder / f"{self.count}.sh"
            path.write_text(script)
            paths.append(path)
        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(self.one, paths))

    def one(self, path: Path) -> tuple[bool, str]:
        """Whether it was accepted, and what was said; a controller that is too busy to judge is asked again."""
        for _ in range(5):
            done = subprocess.run(
                ["sbatch", "--test-only", str(path)], env=self.env, capture_output=True, text=True, timeout=60
            )
            if done.returncode == 0 or not re.search("unable to contact|timed out|connection", done.stderr, re.I):
                return done.returncode == 0, " ".join(done.stderr.split())
            time.sleep(1)
        raise RuntimeError(f"the twin does not answer: {done.stderr}")


@pytest.mark.parametrize("system_id", SLURM)
def test_twin_accepts_what_we_allow_and_nothing_more(system_id: str, tmp_path: Path, record_property):
    lab.require()
    system = sites.load(system_id, overlay=False)
    recipes = recipe_ids()
    assert recipes
    cases: list[tuple[str, str, str | None]] = []  # label, script, rule that refused it
    expected: list[bool] = []

    def add(label: str, request: LaunchRequest, recipe, allowed: bool) -> None:
        sub = build(request, system, recipe, files=False)
        refused = [f.rule for f in checks.check(sub, recipe, here=False) if f.level == "refuse"]
        # A reservation that a QoS goes with is not there in the twin.
        script = re.sub(r"^#SBATCH --reservation=.*\n", "", sub.script, flags=re.M)
        cases.append((label, script, refused[0] if refused else None))
        expected.append(allowed)

    default = system.default_partition or next(iter(system.partitions), None)
    fewest, most = size_limits(system, default)
    for recipe_id in recipes:
        recipe = load_recipe(recipe_id)
        for nodes in sorted({fewest, most or UNKNOWN_NODES}):
            add(f"{recipe_id} on {nodes}", request_for(system, recipe_id, nodes, default), recipe, True)
        if most:
            add(f"{recipe_id} on {most + 1}", request_for(system, recipe_id, most + 1, default), recipe, False)
    recipe = load_recipe(recipes[0])
    for key in system.partitions:
        low, high = size_limits(system, key)
        if system.partitions[key].state == "down":
            # Slurm holds such a job for ever; it is ours to say so. Which reservation opens it only the site knows.
            add(f"{key} is down", request_for(system, recipes[0], low, key), recipe, False)
            continue
        for style in ("torchrun", "srun"):
            for nodes in sorted({low, high or UNKNOWN_NODES}):
                if system.partitions[key].purpose != "data":
                    add(
                        f"{key} {style} on {nodes}",
                        request_for(system, recipes[0], nodes, key, style=style),
                        recipe,
                        True,
                    )
        if high:
            add(f"{key} on {high + 1}", request_for(system, recipes[0], high + 1, key), recipe, False)
        time = system.limits(key)["max_time"]
        if time and system.partitions[key].purpose != "data":
            add(f"{key} for {time} s", request_for(system, recipes[0], low, key, time_s=time), recipe, True)
            add(f"{key} for {time + 60} s", request_for(system, recipes[0], low, key, time_s=time + 60), recipe, False)

        for qos in system.partitions[key].qos[1:]:  # the first was named by default
            if system.partitions[key].purpose == "data":
                continue
            low, high = size_limits(system, key, qos)
            time = system.limits(key, qos)["max_time"]
            limit = {"time_s": time} if time else {}
            for nodes in sorted({low, high or UNKNOWN_NODES}):
                request = request_for(system, recipes[0], nodes, key, qos, **limit)
                add(f"{key}, {qos} on {nodes}", request, recipe, True)
            if high:
                add(f"{key}, {qos} on {high + 1}", request_for(system, recipes[0], high + 1, key, qos), recipe, False)
            if low > 1:
                add(f"{key}, {qos} on {low - 1}", request_for(system, recipes[0], low - 1, key, qos), recipe, False)
            if time:
                request = request_for(system, recipes[0], low, key, qos, time_s=time + 60)
                add(f"{key}, {qos} for {time + 60} s", request, recipe, False)

    good = build(request_for(system, recipes[0], fewest, default), system, recipe, files=False).script
    broken = corruptions(good, system)
    assert len(broken) >= 10
    with twin(config(system)) as env:
        judge = Judge(env, tmp_path)
        # Where our own rules refuse, the scheduler is not asked: that is the order in which a user meets them.
        asked = [i for i, (_, _, rule) in enumerate(cases) if rule is None]
        verdicts = dict(zip(asked, judge.many([cases[i][1] for i in asked]), strict=True))
        for i, (label, _, rule) in enumerate(cases):
            accepted = rule is None and verdicts[i][0]
            assert expected[i] or rule, f"{system_id}, {label}: above a limit, and no rule of ours says so first"
            assert accepted is expected[i], (
                f"{system_id}, {label}: expected {'yes' if expected[i] else 'no'}, our rule {rule}, twin "
                f"{verdicts.get(i)}"
            )
        for name, (accepted, said) in zip(broken, judge.many(list(broken.values())), strict=True):
            assert not accepted, f"{system_id}: the twin accepted a script with {name}: {said}"
    record_property("judged", len(asked) + len(broken))


def test_every_slurm_system_is_judged():
    assert len(SLURM) >= 30
    assert all(node_count(sites.load(s, overlay=False)) >= 1 for s in SLURM)


def test_twin_refuses_what_only_its_reserved_cores_forbid(tmp_path):
    """LUMI's 64-core jobs never run: the twin knows it from the reserved cores, which a plain node line would not
    tell.
    """
    lab.require()
    system = sites.load("lumi-g", overlay=False)
    recipe_id = recipe_ids()[0]
    script = build(request_for(system, recipe_id, 1), system, load_recipe(recipe_id), files=False).script
    full = script.replace("--cpus-per-task=7", "--cpus-per-task=8").replace(
        "#SBATCH --nodes=1", "#SBATCH --nodes=1\n#SBATCH --threads-per-core=1"
    )
    with twin(config(system)) as env:
        ok, wrong = Judge(env, tmp_path).many([script, full])
    assert ok[0] and not wrong[0], (ok, wrong)
