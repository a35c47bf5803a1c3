"""What the pre-flight refuses and what it lets pass, and the interface that gloo gets: with pretended GPUs, and two
real hosts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
from test_scripts import SYSTEMS, submission, variants

from aifactory_train import sites
from aifactory_train.launchers.environment import OWNED, gloo_pattern
from aifactory_train.launchers.programs import attempt, interface, preflight
from aifactory_train.launchers.programs.interface import Interface
from aifactory_train.sites.check.rules import LEFT_TO_TORCH

GIB = 2**30
PROGRAMS = Path(preflight.__file__).parent


# ---- memory


class PretendedTorch:
    """As much of torch as ``preflight.memory`` asks: one GPU, whose driver counts ``free`` of ``total`` GiB as free."""

    uint8 = "uint8"

    def __init__(self, free: float, total: float, can_have: float, integrated: bool = False):
        self.asked = 0

        def empty(size, dtype, device):
            self.asked = size
            if size > can_have * GIB:
                raise RuntimeError("CUDA out of memory")
            return object()

        self.empty = empty
        self.cuda = SimpleNamespace(
            mem_get_info=lambda: (int(free * GIB), int(total * GIB)),
            current_device=lambda: 0,
            get_device_properties=lambda _: SimpleNamespace(is_integrated=integrated),
            empty_cache=lambda: None,
        )


#: GPU, free, total, what an allocation can get, page cache, the profile's unified_memory -> a problem?
MEMORY = [
    ("NVIDIA A100-SXM4-40GB", 39.2, 40, 39, 0, False, False),
    ("NVIDIA A100-SXM4-40GB", 20.0, 40, 20, 300, False, True),  # the host's page cache is not in this GPU's memory
    ("NVIDIA GH200 120GB", 49.9, 95, 94, 300, False, False),  # the page cache, which makes room
    ("NVIDIA GH200 120GB", 49.9, 95, 50, 300, False, True),  # another process
    ("AMD Instinct MI300A", 77.0, 128, 0, 40, True, False),
    ("AMD Instinct MI300A", 77.0, 128, 0, 40, False, False),  # known by name where the profile says nothing
    ("AMD Instinct MI300A", 40.0, 128, 128, 10, True, True),
]


@pytest.mark.parametrize("name, free, total, can_have, cached, unified, bad", MEMORY)
def test_page_cache_is_no_occupied_gpu(monkeypatch, name, free, total, can_have, cached, unified, bad):
    monkeypatch.setattr(preflight, "reclaimable", lambda node: int(cached * GIB))
    torch = PretendedTorch(free, total, can_have)
    report = {"gpu": name, "problems": []}
    preflight.memory(SimpleNamespace(unified=unified), torch, report)
    assert bool(report["problems"]) is bad, report
    if "MI300A" in name:
        assert torch.asked == 0, "the host's own memory is counted, not tried"


def test_an_integrated_gpu_is_known_by_its_properties(monkeypatch):
    monkeypatch.setattr(preflight, "reclaimable", lambda node: 60 * GIB)
    report = {"gpu": "a GPU of the future", "problems": []}
    preflight.memory(SimpleNamespace(unified=False), PretendedTorch(60, 128, 0, integrated=True), report)
    assert not report["problems"]


def test_reclaimable_memory_leaves_out_shared_memory(tmp_path):
    for node, cache in ((0, 1000), (1, 5000)):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "meminfo").write_text(
            f"Node {node} MemTotal:  99999 kB\nNode {node} Active(file): 7 kB\nNode {node} FilePages:  {cache} kB\n"
            f"Node {node} Shmem:  300 kB\nNode {node} SReclaimable:  24 kB\n"
        )
    assert preflight.reclaimable(1, str(tmp_path)) == 4724 * 1024
    assert preflight.reclaimable(None, str(tmp_path)) == (724 + 4724) * 1024


# ---- GPUs

CPU_BUILD = {"torch": "2.13.0+cpu", "cuda": None, "rocm": None, "isa": "aarch64"}
CUDA_BUILD = {**CPU_BUILD, "torch": "2.13.0+cu130", "cuda": "13.0"}


@pytest.mark.parametrize(
    "build, asked, seen, local_size, allowed, words",
    [
        (CPU_BUILD, 4, 0, 4, False, "no GPU support"),
        (CPU_BUILD, 4, 0, 4, True, None),
        (CUDA_BUILD, 4, 0, 4, False, "sees no GPU"),
        (CUDA_BUILD, 4, 4, 4, False, None),
        (CUDA_BUILD, 4, 3, 4, False, "3 of 4 GPUs"),
        (CUDA_BUILD, 4, 1, 1, False, "1 of 4 GPUs"),
        (CUDA_BUILD, 4, 1, 4, False, None),  # each rank may have its own: see below
        (CPU_BUILD, 0, 0, 2, False, None),
    ],
)
def test_a_gpu_job_without_its_gpus_does_not_begin(monkeypatch, build, asked, seen, local_size, allowed, words):
    monkeypatch.delenv("AIFACTORY_ALLOW_CPU", raising=False)
    if allowed:
        monkeypatch.setenv("AIFACTORY_ALLOW_CPU", "1")
    report = {**build, "gpus": seen, "problems": []}
    preflight.gpus_seen(SimpleNamespace(gpus=asked), local_size, report)
    if words is None:
        assert not report["problems"]
        assert ("note" in report) is allowed
    else:
        assert len(report["problems"]) == 1 and words in report["problems"][0]


def test_ranks_that_share_one_gpu_are_told_from_ranks_with_one_each():
    def problems(gpus):
        report = {"gpus": 1, "host": "h", "node": "n", "problems": []}
        places = [["h", "n", [gpu, "0", "1", "0"]] for gpu in gpus] + [["other", "m", ["a", "0", "1", "0"]]]
        preflight.same_gpu(SimpleNamespace(gpus=4), places, 4, report)
        return report["problems"]

    assert not problems("abcd")
    assert "4 ranks of this node see 1 GPUs" in problems("aaaa")[0]
    assert problems("abca")


# ---- interfaces


def some(*names: str, down: tuple[str, ...] = (), bare: tuple[str, ...] = ()) -> list[Interface]:
    return [
        Interface(n, [] if n in bare else [f"10.0.{i}.7", f"fd00::{i}"], n not in down, n == "lo")
        for i, n in enumerate(names)
    ]


@pytest.mark.parametrize(
    "pattern, found, name",
    [
        ("ib0", some("lo", "eth0", "ib0"), "ib0"),
        ("ib", some("lo", "eth0", "ib1", "ib0"), "ib0"),
        ("ib", some("lo", "ib0", "ib1", down=("ib0",)), "ib1"),
        ("ib", some("lo", "ib0", "ib1", bare=("ib0",)), "ib1"),
        ("hsn0,hsn1", some("hsn1", "hsn0"), "hsn0"),
        ("hsn", some("hsn10", "hsn2"), "hsn2"),
        ("=eth", some("eth0", "eth"), "eth"),
        ("=eth", some("eth0"), None),
        ("^docker,lo", some("lo", "docker0", "eth0"), "eth0"),
        ("^docker", some("lo", "docker0", "eth0"), "eth0"),
        ("^=eth0", some("lo", "eth0", "eth01"), "eth01"),
        ("ib0:1", some("ib0"), "ib0"),
        ("ib", some("lo", "eth0"), None),
        ("lo", some("lo", "eth0"), "lo"),
    ],
)
def test_gloo_gets_the_name_that_fits_what_nccl_was_given(pattern, found, name):
    assert interface.choose(pattern, found) == name


def test_the_family_of_addresses_is_kept():
    found = [Interface("ib0", ["fd00::1"], True, False), Interface("ib1", ["10.0.0.1"], True, False)]
    assert interface.choose("ib", found) == "ib0" and interface.choose("ib", found, 4) == "ib1"
    assert interface.decide({"NCCL_SOCKET_FAMILY": "AF_INET"}, "ib", 2, found)[0] == "ib1"


def test_what_is_given_comes_first_and_every_choice_has_its_reason(monkeypatch):
    found = some("lo", "eth0", "ib0")
    monkeypatch.setattr(interface, "own_addresses", lambda: ["10.0.1.7"])
    assert interface.decide({"GLOO_SOCKET_IFNAME": "eth0"}, "ib", 2, found)[0] == "eth0"
    assert interface.decide({"GLOO_SOCKET_IFNAME": "et"}, "ib", 2, found)[0] == "eth0"
    assert interface.decide({"NCCL_SOCKET_IFNAME": "eth"}, "ib", 2, found)[0] == "eth0"
    name, why = interface.decide({}, "hsn", 2, found)
    assert name is None and "'hsn'" in why and "eth0" in why and "10.0.1.7" in why
    name, why = interface.decide({}, "", 2, found)
    assert name is None and "no interface is named" in why
    monkeypatch.setattr(interface, "own_addresses", lambda: ["127.0.1.1"])
    monkeypatch.setattr(interface, "towards", lambda address, found: "eth0")
    assert interface.decide({"MASTER_ADDR": "10.0.1.9"}, "", 2, found)[0] == "eth0"
    assert interface.decide({"MASTER_ADDR": "10.0.1.9"}, "", 1, found)[0] is None


def test_the_program_names_an_interface_of_this_machine():
    ours = interface.interfaces()
    assert any(one.loopback and one.up and "127.0.0.1" in one.addresses for one in ours)
    done = subprocess.run(
        [sys.executable, "-S", str(PROGRAMS / "interface.py"), "--nodes", "2", "--pattern", "lo"],
        env={k: v for k, v in os.environ.items() if not k.startswith(("NCCL_", "GLOO_"))},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == next(one.name for one in ours if one.loopback) and "fits 'lo'" in done.stderr


# ---- scripts


@pytest.mark.parametrize("system_id", SYSTEMS)
def test_no_script_leaves_gloo_to_chance(system_id, plain_recipe):
    """However ranks are started, on one node or two: where interfaces are known the ranks are given them; where not,
    the script says so, and the loopback is still avoided.
    """
    system = sites.load(system_id, overlay=False)
    seen = 0
    for label, sub in variants(plain_recipe, [system_id], more=False):
        files = {f.path: f.content.decode() for f in sub.files if f.path.endswith((".sh", ".py"))}
        rank = files["submission/rank.sh"]
        assert "submission/interface.py" in files, label
        assert f'"$AIFACTORY_SUBMISSION/interface.py" --nodes {sub.shape.nodes}' in rank, label
        assert "export GLOO_SOCKET_IFNAME=$found" in rank, label
        # Nothing starts the trainer but the script that looks for the interface first.
        assert rank.index("export GLOO_SOCKET_IFNAME=$found") < rank.index('"$AIFACTORY_PYTHON" "${words[@]}"'), label
        known = gloo_pattern(system)
        assert bool(known) is any(
            [*system.interconnect.socket_interfaces, *(n for n in system.environment.set if "_SOCKET_IFNAME" in n)]
        )
        if known:
            assert "--pattern" in rank and known in rank, label
        else:
            assert "--pattern" not in rank and "The profile names no interface" in rank, label
        script = files["submission/job.sh"] if system.scheduler.kind == "kubernetes" else sub.script
        assert "export GLOO_SOCKET_FAMILY" not in script, "torch does not read it"
        for name in LEFT_TO_TORCH:
            assert not any(name in content for content in (script, *files.values())), (label, name)
        assert ("GLOO_SOCKET_FAMILY of the profile is left out" in script) is (
            "GLOO_SOCKET_FAMILY" in system.environment.set
        ), label
        seen += 1
    assert seen


@pytest.mark.parametrize("system_id", SYSTEMS)
def test_every_gpu_job_says_how_many_gpus_it_expects(system_id, plain_recipe):
    sub = submission(system_id, plain_recipe)
    text = next(f.content.decode() for f in sub.files if f.path == "submission/job.sh") or sub.script
    assert f"\nexport AIFACTORY_EXPECT_GPUS={sub.shape.gpus_per_node}\n" in text
    assert "AIFACTORY_ALLOW_CPU" not in text
    rank = next(f.content.decode() for f in sub.files if f.path == "submission/rank.sh")
    assert ("--unified" in rank) is bool(sub.system.gpu.unified_memory)
    assert "PYTHONPYCACHEPREFIX" not in rank, "every job would compile all of Python anew"


@pytest.mark.parametrize(
    ("nodes", "more", "told"),
    [
        (64, {}, True),
        (64, {"container": "/scratch/torch.sif"}, True),  # the environment lies outside of the image
        (64, {"container": "/scratch/torch.sif", "venv": "/opt/env"}, False),
        (2, {}, False),
    ],
)
def test_many_ranks_that_import_from_a_shared_file_system_are_told_so(nodes, more, told, plain_recipe):
    sub = submission("jupiter-booster", plain_recipe, nodes=nodes, **more)
    said = [note for note in sub.notes if "Thousands of ranks" in note]
    assert len(said) == told and all(note.startswith("256 ranks import Python from /") for note in said)
    assert "## Thousands of ranks" in (helpers.ROOT / "docs/launching.md").read_text(encoding="utf-8")


def test_training_on_the_cpu_can_be_allowed_by_the_user_alone(lab_system):
    assert not OWNED.fullmatch("AIFACTORY_ALLOW_CPU") and OWNED.fullmatch("AIFACTORY_EXPECT_GPUS")
    assert lab_system.environment.set["AIFACTORY_ALLOW_CPU"] == "1"


# ---- real ranks


def environment(rank: int, port: int, **more: str) -> dict[str, str]:
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(("NCCL_", "GLOO_", "AIFACTORY_"))},
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "AIFACTORY_NODE": f"n{rank}",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", **more,
    }  # fmt: skip


def together(
    folder: Path, gpus: int, starts: list[tuple[list[str], dict[str, str]]], timeout_s: int = 90
) -> dict[int, dict]:
    """The reports of two ranks of the pre-flight, each started as told."""
    program = [sys.executable, str(PROGRAMS / "preflight.py"), "--dir", str(folder), "--nodes", "2"]
    program += ["--gpus", str(gpus), "--scratch", str(folder), "--timeout", str(timeout_s)]
    ranks = [subprocess.Popen([*before, *program], env=env) for before, env in starts]
    assert [p.wait(timeout=300) for p in ranks] == [0, 0]
    return attempt.ranked(str(folder), "preflight")


def test_a_cpu_build_is_a_problem_of_the_environment_and_not_of_nodes(tmp_path):
    import torch

    if torch.version.cuda or torch.version.hip:
        pytest.skip("this torch is built for GPUs")
    folder = tmp_path / "attempts" / "001"
    folder.mkdir(parents=True)
    (folder / "attempt.json").write_text(json.dumps({"world": 2, "nodes": ["n0", "n1"]}))
    with contextlib.closing(helpers.reserved_port()) as port:
        number = port.getsockname()[1]
        reports = together(folder, 1, [([], environment(r, number)) for r in range(2)])
    assert all(not r["ok"] and "no GPU support" in r["problems"][0] for r in reports.values())
    assert attempt.main(["preflight", "--run", str(tmp_path), "--attempt", "1"]) == 1
    state, cause = attempt.diagnose(str(folder))
    assert state == "failed" and cause["kind"] == "environment" and "no GPU support" in cause["message"]
    policy = {"restarts": {"node": 3, "crash": 1}, "resubmit": "chain"}
    assert attempt.decide(str(tmp_path), 1, state, cause, "", policy)["action"] == "end"


def test_gloo_on_an_interface_that_is_not_there_has_its_own_text(tmp_path):
    with contextlib.closing(helpers.reserved_port()) as port:
        number = port.getsockname()[1]
        reports = together(tmp_path, 0, [([], environment(r, number, GLOO_SOCKET_IFNAME="nosuch0")) for r in range(2)])
    for report in reports.values():
        assert not report["ok"] and "control messages" in report["problems"][0] and "nosuch0" in report["problems"][0]


#: The pre-flight, in a world whose further groups are made and never carry anything, as in the LUMI image of August
#: 2026. The first group works.
HANGING = """
import sys, time
sys.path.insert(0, {programs!r})
import preflight, torch.distributed as dist
works = dist.all_reduce
dist.all_reduce = lambda tensor, group=None, **more: works(tensor, **more) if group is None else time.sleep(600)
preflight.GROUP_S = 1.5
preflight.main()
"""


def test_a_second_group_that_hangs_is_named_with_the_way_out(tmp_path):
    """Known fault lumi-second-group: without this the job hangs at its first step, up to the time limit."""
    folder = tmp_path / "attempts" / "001"
    folder.mkdir(parents=True)
    (folder / "attempt.json").write_text(json.dumps({"world": 2, "nodes": ["n0", "n1"]}))
    began = time.monotonic()
    with contextlib.closing(helpers.reserved_port()) as port:
        command = [sys.executable, "-c", HANGING.format(programs=str(PROGRAMS)), "--dir", str(folder), "--nodes", "2"]
        command += ["--gpus", "0", "--scratch", str(folder), "--groups", "1"]
        number = port.getsockname()[1]
        ranks = [subprocess.Popen(command, env=environment(r, number)) for r in range(2)]
        assert [p.wait(timeout=300) for p in ranks] == [0, 0]
    assert time.monotonic() - began < 120
    assert attempt.main(["preflight", "--run", str(tmp_path), "--attempt", "1"]) == 1
    state, cause = attempt.diagnose(str(folder))
    assert state == "failed" and cause["kind"] == "environment", "other nodes would do no better"
    assert "a second process group hangs" in cause["message"] and "parallel.engine=fsdp2" in cause["message"]


@pytest.mark.parametrize("engine, groups", [("ddp", None), ("fsdp2", None), ("hsdp", 8), ("zero2", 8)])
def test_the_preflight_tries_the_groups_that_the_engine_will_form(plain_recipe, engine, groups):
    sub = submission("lumi-g", plain_recipe, nodes=2, overrides=(f"parallel.engine={engine}",))
    rank = next(f.content.decode() for f in sub.files if f.path == "submission/rank.sh")
    assert (f"--groups {groups})" in rank) if groups else ("--groups" not in rank)


@contextlib.contextmanager
def two_hosts(name: str):
    """Two network namespaces joined by a cable, whose hosts' names resolve to 127.0.1.1 as Debian writes it: (command,
    address).
    """
    spaces = [f"{name}-{i}" for i in range(2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for space in spaces:
            ip("netns", "add", space)
            etc = Path("/etc/netns") / space
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {space}\n")
        ip("link", "add", "fab0", "netns", spaces[0], "type", "veth", "peer", "name", "fab0", "netns", spaces[1])
        for i, space in enumerate(spaces):
            for words in (["addr", "add", f"10.99.7.{i + 1}/24", "dev", "fab0"], ["link", "set", "fab0", "up"]):
                ip("-n", space, *words)
            ip("-n", space, "link", "set", "lo", "up")
        yield [
            ["ip", "netns", "exec", s, "unshare", "--uts", "sh", "-c", f'hostname {s} && exec "$@"', "sh"]
            for s in spaces
        ]
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)
            shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)


def can_make_hosts() -> bool:
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    try:
        with two_hosts("aft-can") as hosts:
            return all(subprocess.run([*h, "true"], capture_output=True).returncode == 0 for h in hosts)
    except (subprocess.CalledProcessError, OSError):
        return False


def test_two_hosts_whose_names_resolve_to_the_loopback_meet(tmp_path):
    """gloo by itself binds to 127.0.1.1 and the pre-flight says so; with the interface that each rank finds it
    works.
    """
    if not can_make_hosts():
        pytest.skip("no network namespaces here (they need root)")
    with two_hosts(f"aft-{os.getpid()}") as hosts:
        at = {"MASTER_ADDR": "10.99.7.1"}
        (tmp_path / "bare").mkdir()
        bare = together(tmp_path / "bare", 0, [(hosts[r], environment(r, 29871, **at)) for r in range(2)], 20)
        reported = [p for r in bare.values() for p in r["problems"]]
        assert len(bare) == 2 and any("127.0.1.1" in p and "control messages" in p for p in reported), bare
        for pattern in ("fab", ""):
            found = [
                subprocess.run(
                    [*h, sys.executable, "-S", str(PROGRAMS / "interface.py"), "--nodes", "2", "--pattern", pattern],
                    env=environment(0, 0, **at), capture_output=True, text=True, check=True,
                ).stdout.strip()
                for h in hosts
            ]  # fmt: skip
            assert found == ["fab0", "fab0"], pattern
        good = tmp_path / "good"
        good.mkdir()
        starts = [(hosts[r], environment(r, 29872, **at, GLOO_SOCKET_IFNAME="fab0")) for r in range(2)]
        reports = together(good, 0, starts)
        assert all(r["ok"] for r in reports.values()), reports


def test_the_rank_that_knows_more_than_that_it_waited_is_quoted(tmp_path):
    folder = tmp_path / "attempts" / "001"
    folder.mkdir(parents=True)
    (folder / "attempt.json").write_text(json.dumps({"world": 3, "nodes": ["a", "b", "c"]}))

    def report(rank: int, node: str, problem: str) -> None:
        value = {"rank": rank, "node": node, "ok": False, "problems": [problem]}
        (folder / f"preflight-{rank}.json").write_text(json.dumps(value))

    def verdict() -> dict:
        assert attempt.main(["preflight", "--run", str(tmp_path), "--attempt", "1"]) == 1
        return json.loads((folder / "preflight.json").read_text())

    report(0, "a", "timed out: waited 105 s for the others to form the group, with gloo on interface ib0")
    report(1, "b", "gloo, which carries the control messages, failed on 127.0.1.1: Connection refused")
    found = verdict()
    assert "1 of 3 ranks did not finish it; rank 1: gloo" in found["message"] and found["nodes"] == ["c"]
    report(2, "c", "timed out: waited 105 s for the others to form the group, with gloo on interface ib0")
    assert verdict()["rank"] == 1


# ---- images that lack something


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing on it: no compiler, no numactl."""
    empty = tmp_path / "bin"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.delenv("CC", raising=False)
    return empty


def test_an_image_with_compiler_and_headers_needs_no_remark():
    if shutil.which("gcc") is None or not Path(preflight.sysconfig.get_paths()["include"], "Python.h").is_file():
        pytest.skip("this machine lacks them")
    assert preflight.toolchain() is None


def test_an_image_without_a_compiler_is_told(bare):
    assert "no C compiler" in preflight.toolchain()


def test_an_image_without_python_s_headers_is_told(tmp_path, monkeypatch):
    if shutil.which("gcc") is None or Path("/usr/include/Python.h").exists():
        pytest.skip("no gcc, or headers that it finds by itself")
    monkeypatch.setattr(preflight.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.delenv("CPATH", raising=False)
    monkeypatch.delenv("C_INCLUDE_PATH", raising=False)
    assert "Python.h" in preflight.toolchain() and "No such file" in preflight.toolchain()


def test_a_compiler_that_does_not_run_is_told(monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert "/nowhere/cc does not run" in preflight.toolchain()


def test_the_preflight_passes_without_compiler_and_numactl_and_says_what_that_costs(tmp_path, bare):
    folder = tmp_path / "attempts" / "001"
    folder.mkdir(parents=True)
    (folder / "attempt.json").write_text(json.dumps({"world": 2, "nodes": ["n0", "n1"]}))
    with contextlib.closing(helpers.reserved_port()) as port:
        number = port.getsockname()[1]
        starts = [([], environment(r, number, AIFACTORY_ALLOW_CPU="1", PATH=str(bare))) for r in range(2)]
        reports = together(folder, 1, starts)
    assert all(report["ok"] and "no C compiler" in report["kernels"] for report in reports.values()), reports
    assert attempt.main(["preflight", "--run", str(tmp_path), "--attempt", "1"]) == 0
    verdict = json.loads((folder / "preflight.json").read_text())
    assert verdict["ok"] and set(verdict["kernels"]) == {"n0", "n1"}
