"""Reading machines: recorded outputs of the vendors' tools, detection of this one, and Slurm's words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aifactory_train import sites
from aifactory_train.core.errors import UserError
from aifactory_train.sites import detection, new, probe

DATA = Path(__file__).parent / "data"

LSCPU_GRACE = """\
Architecture:                       aarch64
CPU(s):                             288
Thread(s) per core:                 1
Core(s) per socket:                 72
Socket(s):                          4
Model name:                         Neoverse-V2
NUMA node(s):                       36
"""

# As a login node of a two-partition machine prints it (sinfo -h -e -o '%R|%D|%c|%X|%Y|%Z|%m|%l|%L|%G|%f|%s').
SINFO = """\
cpu|128|256|2|64|2|245000|3-00:00:00|1:00:00|(null)|(null)|1-infinite
gpu*|30|64|1|64|1|480000|1-00:00:00|n/a|gpu:a100:4(S:0-3)|a100,nvme|1-16
gpu*|2|64|1|64|1|240000|1-00:00:00|n/a|gpu:a100:2(S:0)|a100|1-16
gpu_dev|4|64|1|64|1|480000|30:00|n/a|gpu:a100:4(S:0-3),nvme:1|a100,nvme|1-2
"""


# -- vendors' tools
# --------------------------------------------------------------------------------------------------------------


def test_recorded_nvidia_smi_of_four_a100() -> None:
    devices = detection.parse_nvidia_smi((DATA / "nvidia-smi-4xa100.csv").read_text())
    assert len(devices) == 4
    assert {(d.name, d.memory_mib, d.arch, d.driver) for d in devices} == {
        ("NVIDIA A100-SXM4-80GB", 81920, "sm_80", "580.105.08")
    }
    assert detection.match_sku(devices[0]) == "a100-80"


def test_recorded_nvidia_smi_with_other_columns() -> None:
    (device,) = detection.parse_nvidia_smi((DATA / "nvidia-smi-h100.csv").read_text())
    assert (device.memory_mib, device.arch, device.driver) == (81559, "sm_90", "580.82.07")
    assert detection.match_sku(device) == "h100-80"


def test_an_unknown_device_has_no_constants() -> None:
    devices = detection.parse_nvidia_smi((DATA / "nvidia-smi-unknown.csv").read_text())
    assert len(devices) == 2 and devices[0].arch == "sm_107"
    assert detection.match_sku(devices[0]) is None


def test_nvidia_smi_without_header_units_and_values() -> None:
    (device,) = detection.parse_nvidia_smi("NVIDIA GH200 120GB, 97871, 9.0, 570.1, [N/A]\n")
    assert (device.memory_mib, device.arch, device.power_limit_w) == (97871, "sm_90", None)
    assert detection.match_sku(device) == "gh200-96"
    assert detection.parse_nvidia_smi("No devices were found\n") == []


def test_recorded_rocm_smi_counts_dies_and_skips_the_warning() -> None:
    devices = detection.parse_rocm_smi((DATA / "rocm-smi-mi250.json").read_text())
    assert len(devices) == 2  # two dies of one module: what Slurm and HIP count too
    assert (devices[0].memory_mib, devices[0].driver, devices[0].vendor) == (65520, "6.2.4", "amd")
    assert detection.match_sku(devices[0]) == "mi250x-gcd"


def test_recorded_rocm_smi_of_a_card_that_no_system_has() -> None:
    (device,) = detection.parse_rocm_smi((DATA / "rocm-smi-mi210.json").read_text())
    assert device.name == "Instinct MI210" and detection.match_sku(device) is None
    with pytest.raises(ValueError, match="no JSON"):
        detection.parse_rocm_smi("Driver not initialized (amdgpu not found in modules)")


def test_lscpu_of_a_grace_node() -> None:
    cpu = detection.parse_lscpu(LSCPU_GRACE)
    assert (cpu["isa"], cpu["sockets"], cpu["cores"], cpu["threads_per_core"], cpu["numa_domains"]) == (
        "aarch64",
        4,
        288,
        1,
        36,
    )
    assert detection.parse_lscpu("")["cores"] is None
    # GPU memory shows as NUMA domains without cores: those with cores are what a profile states.
    cores = "".join(f"NUMA node{i} CPU(s): {i * 72}-{i * 72 + 71}\n" for i in range(4))
    memory = "".join(f"NUMA node{i} CPU(s):\n" for i in range(4, 36))
    assert detection.parse_lscpu(LSCPU_GRACE + cores + memory)["numa_domains"] == 4
    assert sites.load("jupiter-booster", overlay=False).node.numa_domains == 4
    assert sites.identify(names=["jpbo-024-02"], env={}, cluster="") == "jupiter-booster"


def test_a_partition_that_is_up_again_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "run_tool", lambda command: None)
    system = sites.load("jupiter-booster", overlay=False)
    groups = probe.parse_sinfo("largebooster|5884|288|4|72|1|878535|12:00:00|1:00:00|gpu:4|(null)|1-infinite\n")
    for state, reported in (("UP", "up"), ("DOWN", None)):
        record = {"PartitionName": "largebooster", "State": state}
        seen = probe.Observation(groups=groups, partitions={"largebooster": record})
        found = {d.path: d.observed for d in probe.compare(system, seen, {})}
        assert found.get("partitions.largebooster.state") == reported


# -- this machine
# ----------------------------------------------------------------------------------------------------------------


def _tool(folder: Path, name: str, output: Path) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat '{output}'\n")
    path.chmod(0o755)


def test_local_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "run_tool", lambda command: None)
    system = sites.detect()
    assert system.id == "local" and system.usable and system.node.gpus is None and system.gpu.arch is None
    assert system.node.cores_usable and system.node.cores and system.node.cores_usable <= system.node.cores
    assert system.node.memory_gib and system.node.memory_gib > 0.5
    fact = system.provenance("node.cores")
    assert fact is not None and fact.confidence == "detected"
    assert (system.gpu.peak_tflops, system.launch.style) == ({}, "torchrun")


def test_local_with_gpus_as_the_driver_reports_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tool(tmp_path, "nvidia-smi", DATA / "nvidia-smi-4xa100.csv")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    system = sites.load("local")
    assert (system.node.gpus, system.gpu.sku, system.gpu.arch, system.gpu.memory_visible_mib) == (
        4,
        "a100-80",
        "sm_80",
        81920,
    )
    assert system.gpu.has_bf16


def test_an_overlay_corrects_this_machine_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "run_tool", lambda command: None)
    system = sites.load("local", overlay={"corrections": {"node.gpus": 2}, "user": {"work_dir": "/data"}})
    assert (system.node.gpus, system.user.work_dir) == (2, "/data")
    reported, read = system.provenance("node.gpus"), system.provenance("node.cores")
    assert reported is not None and reported.confidence == "user" and read is not None and read.confidence == "detected"


def test_local_with_an_unknown_gpu_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tool(tmp_path, "nvidia-smi", DATA / "nvidia-smi-unknown.csv")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    system = sites.load("local")
    assert system.gpu.sku is None and system.gpu.peak_tflops == {} and system.gpu.memory_gib == 288
    assert any("not in the catalogue" in n.text for n in system.notes)


def test_a_driver_tool_that_answers_nonsense_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "words").write_text("Driver not initialized\n")
    _tool(tmp_path, "rocm-smi", tmp_path / "words")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert any("rocm-smi" in n.text for n in sites.detect().notes)


def test_identify_by_host_cluster_and_refusal_of_two() -> None:
    assert sites.identify(names=["uan03"], env={}, cluster="") == "lumi-g"
    assert sites.identify(names=["lrdn0042"], env={}, cluster="") == "leonardo-booster"
    assert sites.identify(names=["vglogin0001.vega.pri"], env={}, cluster="") == "vega"
    assert sites.identify(names=["laptop"], env={}, cluster="") is None
    with pytest.raises(UserError, match="jean-zay-a100 and jean-zay-h100"):
        sites.identify(names=["jean-zay3"], env={}, cluster="")


# -- Slurm's words
# ---------------------------------------------------------------------------------------------------------------


def test_sinfo_groups() -> None:
    groups = probe.parse_sinfo(SINFO)
    assert [(g.partition, g.nodes, g.gpus, g.gpu_type) for g in groups] == [
        ("cpu", 128, 0, None), ("gpu", 30, 4, "a100"), ("gpu", 2, 2, "a100"), ("gpu_dev", 4, 4, "a100"),
    ]  # fmt: skip
    assert groups[1].max_time == 86400 and groups[3].max_time == 1800 and groups[1].features == ("a100", "nvme")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1-00:00:00", 86400),
        ("12:00:00", 43200),
        ("30:00", 1800),
        ("infinite", None),
        ("n/a", None),
        ("7-12:30:05", 649805),
    ],
)
def test_slurm_times(text: str, seconds: int | None) -> None:
    assert probe.slurm_seconds(text) == seconds


@given(st.integers(1, 16), st.sampled_from([None, "a100", "h100", "mi250"]), st.booleans(), st.booleans())
def test_gres_strings(count: int, kind: str | None, sockets: bool, more: bool) -> None:
    text = (
        "gpu"
        + (f":{kind}" if kind else "")
        + f":{count}"
        + ("(S:0-1)" if sockets else "")
        + (",nvme:1,craynetwork:4" if more else "")
    )
    assert probe.parse_gres(text) == (count, kind)


@given(st.text(alphabet="gpu:a10(S-),null ", max_size=30))
def test_gres_never_fails(text: str) -> None:
    count, _ = probe.parse_gres(text)
    assert count >= 0


def test_scontrol_records_with_blanks_in_values() -> None:
    (record,) = probe.parse_scontrol(
        "NodeName=n1 Arch=aarch64 CPUEfctv=56 OS=Linux 5.14.21 #1 SMP PREEMPT Tue Jan 9 RealMemory=491520 Gres=gpu:8 "
        "CoreSpecCount=8"
    )
    assert record["OS"].startswith("Linux 5.14") and record["RealMemory"] == "491520" and record["CoreSpecCount"] == "8"


def test_bootstrap_takes_the_partition_with_most_gpu_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "run_tool", lambda command: None)
    seen = probe.Observation(groups=probe.parse_sinfo(SINFO), version="24.05.8")
    answers, remarks = new.bootstrap(seen)
    assert (answers["partition"], answers["gpus"], answers["cores"], answers["max_time"]) == ("gpu", 4, 64, "24h")
    assert answers["request"] == "gres" and answers["gres_type"] == "a100" and remarks
    with pytest.raises(UserError, match="no GPU partition 'gpus' here \\(did you mean 'gpu'"):
        new.bootstrap(seen, "gpus")
    assert new.bootstrap(probe.Observation())[0] == {}


def test_hardware_is_compared_inside_a_job_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "run_tool", lambda command: None)
    system = sites.load("leonardo-booster")
    device = detection.parse_nvidia_smi((DATA / "nvidia-smi-4xa100.csv").read_text())
    login = probe.Observation(devices=device, machine="x86_64", cpu=detection.parse_lscpu(LSCPU_GRACE))
    assert probe.compare(system, login, {}) == []
    job = probe.Observation(devices=device, machine="x86_64", cpu=detection.parse_lscpu(LSCPU_GRACE), in_job=True)
    found = {d.path: d.observed for d in probe.compare(system, job, {})}
    assert found == {
        "node.isa": "aarch64",
        "node.numa_domains": 36,
        "gpu.sku": "a100-80",
        "gpu.memory_visible_mib": 81920,
    }


def test_no_difference_where_a_partition_has_no_published_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "run_tool", lambda command: None)
    text = SINFO.replace("gpu_dev", "tesla").replace("gpu*", "proxima")
    differences = probe.compare(sites.load("proxima"), probe.Observation(groups=probe.parse_sinfo(text)), {})
    by_path = {d.path: d for d in differences}
    assert by_path["partitions.proxima.max_time"].kind == "differs"
    assert by_path["partitions.proxima.max_time"].correction == "24h"
    assert by_path["node.cores"].kind == "new"


def test_a_new_profile_says_what_slurm_enforces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every GPU partition, whether memory must be asked for, whether an account must, and what the type of the GPUs may
    mean.
    """
    monkeypatch.setattr(probe, "run_tool", lambda command: None)
    config = {"SelectTypeParameters": "CR_CORE_MEMORY", "AccountingStorageEnforce": "associations,limits,qos"}
    seen = probe.Observation(groups=probe.parse_sinfo(SINFO), config=config)
    seen.partitions = {"gpu": {"DefMemPerCPU": "1000", "MinNodes": "2"}, "gpu_dev": {"MaxNodes": "2"}}
    answers, remarks = new.bootstrap(seen)
    assert answers["account"] == "required" and answers["memory_rule"] == "mem"
    assert any("DefMemPerCPU=1000" in r for r in remarks) and any("AccountingStorageEnforce" in r for r in remarks)
    said: list[str] = []
    asked = {k: "" for k, _, _ in new.QUESTIONS} | {
        "name": "n",
        "operator": "o",
        "country": "FI",
        "maintainer": "m",
        "source": "first-hand",
    }
    prompts = {f"{question}: ": asked[key] for key, question, _ in new.QUESTIONS}
    raw = new.compose("x", new.interview(prompts.__getitem__, said.append, answers), set(answers))
    assert any("a100-40" in s and "a100-80" in s for s in said), said
    assert set(raw["partitions"]) == {"gpu", "gpu_dev"} and raw["partitions"]["gpu"]["min_nodes"] == 2
    assert raw["partitions"]["gpu_dev"] == {"max_time": "30m", "max_nodes": 2, "nodes": 4}
    assert raw["request"]["memory"] == "mem" and raw["request"]["memory_gib"] == int(raw["node"]["memory_usable_gib"])
    new.write(raw, tmp_path / "x.yaml")
    system = sites.load(str(tmp_path / "x.yaml"))
    assert system.partitions["gpu_dev"].max_nodes == 2
    unmanaged = probe.Observation(config={"SelectTypeParameters": "CR_CORE", "AccountingStorageEnforce": "none"})
    assert probe.memory_rule(unmanaged, "gpu") == ("none", "scontrol show config SelectTypeParameters=CR_CORE")
    assert probe.account_rule(unmanaged) is None and probe.memory_rule(probe.Observation(), "gpu") is None


def test_a_gpu_of_ones_own_is_written_as_in_the_catalogue(tmp_path: Path) -> None:
    """``id`` and ``like``; and every fault of a profile is told at once."""
    import yaml

    from aifactory_train.sites import check
    from aifactory_train.sites.resolving import resolve

    raw = yaml.safe_load((sites.catalogue.SYSTEMS / "sofia.yaml").read_text())
    raw["gpu"] = {"id": "H20-like", "like": "h100-80", "memory_gib": 96, "compute_units": 78}
    for fact in raw["facts"]:
        own = ["gpu.model", "gpu.memory_gib", "gpu.compute_units"]
        fact["at"] = [p for path in fact["at"] for p in (own if path in ("gpu", "gpu.sku") else [path])]
    gpu = resolve(raw).gpu
    assert (gpu.sku, gpu.model, gpu.arch, gpu.memory_gib, gpu.compute_units) == (None, "H20-like", "sm_90", 96, 78)
    assert (
        gpu.memory_bandwidth_gb_s == 3350 and gpu.device_names == [] and "GPU model" not in resolve(raw).core_missing()
    )
    file = tmp_path / "sofia.yaml"
    file.write_text(yaml.safe_dump(raw))
    assert not [f for f in check.check_file(file).faults if f.name in ("schema", "missing-list")]
    with pytest.raises(UserError, match="unknown GPU 'h1'"):
        resolve({**raw, "gpu": {"id": "x", "like": "h1"}})
    with pytest.raises(UserError, match=r"unknown key 'colour'.* \(and 2 more: node.size unknown, gpu.speed unknown\)"):
        resolve(
            {
                **raw,
                "access": {**raw["access"], "colour": 1},
                "node": {**raw["node"], "size": 2},
                "gpu": {"sku": "h200-141", "speed": 3},
            }
        )
