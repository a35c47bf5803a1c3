"""`sites check`: the shipped data are clean, and each planted fault is caught by its name, at its place."""

from __future__ import annotations

import copy
import datetime
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aifactory_train import sites
from aifactory_train.sites import catalogue, check, finding, profiles

TODAY = datetime.date(2026, 11, 30)

LUMI, LEO, MN5 = "systems/lumi-g.yaml", "systems/leonardo-booster.yaml", "systems/marenostrum5-acc.yaml"

# (fault, file, text in it, what is planted instead)
PLANTED = [
    ("yaml", LUMI, "operator: CSC", "operator: CSC\noperator: CINECA"),
    ("yaml", LUMI, "id: lumi-g", "id: [lumi-g"),
    ("schema", LUMI, "numa_domains: 4", "numa_domain: 4"),
    ("schema", LUMI, "max_nodes: 1024, shared: false}", "max_nodes: many, shared: false}"),
    ("schema", LEO, "max_time: 30m", "max_time: half an hour"),
    ("schema", LUMI, "LUMI_STACK_VERSION: '.+'", "LUMI_STACK_VERSION: 'lumi('"),
    ("file-name", LUMI, "id: lumi-g", "id: lumi-x"),
    ("no-source", LEO, "{at: [node, interconnect], source: guide", "{at: [interconnect], source: guide"),
    ("unknown-source", LEO, "source: warpx, confidence", "source: warpz, confidence"),
    ("second-source", LUMI, "launch.cpu_bind, software.purge, access.account], source: workshop", "launch.cpu_bind], "
                                                                                              "source: nobody"),
    ("second-source", LUMI, "node.cores_usable, node.memory_gib, detect", "node.local_disk_gb, detect"),
    ("second-source", MN5, "qos.acc_interactive.max_time, internet.transfer_host, internet.compute], source: table",
     "qos.acc_interactive.max_time], source: truba"),
    ("cores", LUMI, "  cpus_are: cores\n", ""),
    ("container", LUMI, '      pattern: "*-full-*.sif"\n', ""),
    ("unused-fact", LUMI, "{at: [default_partition]", "{at: [default_partition, node.local_disk_gb]"),
    ("undated", LUMI, "date: n.d., retrieved: 2026-10-10}", "date: n.d.}"),
    ("future-date", LUMI, "date: 2026-05}", "date: 2031-05}"),
    ("expired", LUMI, "expires: 2027-05-31", "expires: 2026-11-29"),
    ("recalled", MN5, "{at: [request], source: second, confidence: documented-user}", "{at: [request], source: second, "
                                                                                "confidence: recalled}"),
    ("not-usable-fact", "systems/lumi-ai.yaml", "notes:", "node: {gpus: 4}\n\nnotes:"),
    ("missing-list", "systems/sofia.yaml", "missing: [time limit]", "missing: []"),
    ("missing-list", LUMI, "missing: [scheduler.accounting", "missing: [node.gpus, scheduler.accounting"),
    ("status-reason", "systems/lumi-ai.yaml", 'status_reason: "contract signed, expected in 2027"\n', ""),
    ("maintainer", LUMI, 'maintainer: "aifactory-train developers; nobody at the site has taken it over yet"', 'maintainer: ""'),  # noqa: E501
    ("private", LUMI, 'path: "/users/{user}"', 'path: "/users/jdoe"'),
    ("private", LEO, "modules: [profile/deeplrn,", 'modules: ["$(rm -rf x)", profile/deeplrn,'),
    ("arch", LUMI, "gpu: {sku: mi250x-gcd}", "gpu: {sku: mi250x-gcd, arch: sm_90}"),
    ("arch", LUMI, "gpu: {sku: mi250x-gcd}", "gpu: {sku: mi250x-gcd, arch: mi250}"),
    ("arch", "gpus.yaml", "arch: sm_90, memory_gib: 80", "arch: gfx942, memory_gib: 80"),
    ("gpu-constants", "gpus.yaml", "peak_tflops: {fp64: 7.8, fp32: 15.7, fp16: 125}", "peak_tflops: {fp16: 125, bf16: "
                                                                                      "125}"),
    ("gpu-constants", "gpus.yaml", "fp8_format: fnuz", "fp8_format: ocp"),
    ("cores", LUMI, "cpus_per_gpu: 7", "cpus_per_gpu: 8"),
    ("cores", LUMI, "cores_usable: 56", "cores_usable: 63"),
    ("memory", LUMI, "memory_gib: 480", "memory_gib: 500"),
    ("memory", LUMI, "memory_usable_gib: 480", "memory_usable_gib: 600"),
    ("limits", "systems/karolina.yaml", "default_time: 24h, max_time: 48h", "default_time: 72h, max_time: 48h"),
    ("limits", LUMI, "standard-g: {max_time: 2d, max_nodes: 1024", "standard-g: {max_time: 2d, min_nodes: 2000, "
                                                                   "max_nodes: 1024"),
    ("limits", MN5, "acc_ehpc: {max_time: 72h, max_nodes: 100}", "acc_ehpc: {max_time: 72h, max_nodes: 2000}"),
    ("qos", LEO, "qos: [normal, boost_qos_dbg", "qos: [normal, boost_qos_dgb"),
    ("default-partition", LUMI, "default_partition: standard-g", "default_partition: standard"),
    ("scheduler", "systems/hunter.yaml", "gpus: pbs-select", "gpus: gres"),
    ("isa", "systems/jupiter-booster.yaml", "wheels_isa: aarch64", "wheels_isa: x86_64"),
    ("binding", LUMI, "0x00fe000000000000,", ""),
    ("binding", LUMI, "0x00fe000000000000", "0x01fe000000000000"),
    ("network", "systems/arrhenius.yaml", "node_gbit_s: 800", "node_gbit_s: 400"),
    ("container", LUMI, "gpu_flag: --rocm", "gpu_flag: --nv"),
    ("environment", LUMI, "FI_MR_CACHE_MONITOR: userfaultfd\n", "FI_MR_CACHE_MONITOR: userfaultfd\n    "
                                                                "MIOPEN_USER_DB: x\n"),
    ("environment", LUMI, "FI_MR_CACHE_MONITOR: userfaultfd\n", 'FI_MR_CACHE_MONITOR: userfaultfd\n    '
                                                                'NCCL_NET_GDR_LEVEL: "3"\n'),
    ("environment", "systems/jupiter-booster.yaml", "NCCL_PROTO: Simple\n", 'NCCL_PROTO: Simple\n    '
                                                                'TORCH_NCCL_ASYNC_ERROR_HANDLING: "1"\n'),
    ("environment", "systems/vega.yaml", "OMPI_MCA_pml: ucx", 'OMPI_MCA_pml: ucx, NCCL_BLOCKING_WAIT: "1"'),
    ("schema", LUMI, 'pattern: "*-full-*.sif"', 'pattern: "$(id)*.sif"'),
    ("cores", "systems/vega.yaml", "cpus_are: threads", "cpus_are: cores"),
    ("cores", "systems/vega.yaml", "cpus_per_gpu: 64", "cpus_per_gpu: 65"),
    ("cores", "systems/vega.yaml", "  threads_per_core: 2\n", ""),
    ("limits", LEO, "min_nodes: 65, max_nodes: 256", "min_nodes: 65, max_gpus: 64"),
    ("account", LUMI, "account: project_465000000", "account: p465"),
    ("example", MN5, "account: ehpc000, qos: acc_ehpc", "account: ehpc000, qos: acc_ehpz"),
    ("members", "factories.yaml", "kind: antenna, country: CY", "kind: factory, country: CY"),
    ("country", "factories.yaml", "country: CY", "country: CX"),
    ("sector", "factories.yaml", "sectors: [manufacturing], focus", "sectors: [manufacture], focus"),
    ("link", "factories.yaml", "links: [pharos, it4lia]", "links: [pharos, it4lea]"),
    ("link", "factories.yaml", "systems: [karolina]", "systems: [carolina]"),
    ("link", "factories.yaml", "systems: [lumi-g], announced: [lumi-ai]", "systems: [lumi-g, lumi-ai]"),
    ("readiness", "readiness.yaml", "systems:", "systems: {lumi-x: {level: run, date: 2026-11-01, evidence: x}}"),
    ("readiness", "readiness.yaml", "systems:", "systems: {lumi-g: {level: tested, date: 2026-11-01, evidence: x}}"),
    ("readiness", "readiness.yaml", "systems:", "systems: {lumi-g: {level: run, date: 2026-11-01}}"),
    ("readiness", "readiness.yaml", "systems:", "systems: {hunter: {level: twin, date: 2026-11-01, evidence: x}}"),
    ("no-reason", "factories.yaml", 'systems: [], announced: [ro-ai], reason: "no documented', 'systems: [], announced: [ro-ai], focus: "no documented'),  # noqa: E501
]  # fmt: skip


def test_shipped_data_have_no_fault_and_every_numeric_fact_a_source() -> None:
    report = check.check_room(today=TODAY)
    assert [f"{f.where}: {f.name}: {f.what}" for f in report.faults] == []
    assert report.numeric_facts == report.numeric_covered > 400
    assert report.facts == report.covered


def test_copied_room_is_clean_and_faults_across_files_are_caught(
    room: Path, edit: Callable[[str, str, str], Path]
) -> None:
    assert check.check_room(room, TODAY).faults == []
    edit(LEO, "aliases: [leonardo]", "aliases: [leonardo, lumi]")
    edit("factories.yaml", "systems: [helios, athena]", "systems: [helios]")
    found = {(f.name, f.where.split(":")[0]) for f in check.check_room(room, TODAY).faults}
    assert ("orphan", "athena.yaml") in found and "duplicate-name" in {name for name, _ in found}


@pytest.fixture(scope="module")
def systems() -> dict[str, sites.System]:
    return {name: sites.load(name, overlay=False) for name in finding.shipped()}


@pytest.mark.parametrize(("fault", "name", "old", "new"), PLANTED, ids=[f"{i}-{p[0]}" for i, p in enumerate(PLANTED)])
def test_planted_fault_is_caught_by_name(
    fault: str, name: str, old: str, new: str, tmp_path: Path, systems: dict[str, sites.System]
) -> None:
    text = (catalogue.ROOM / name).read_text(encoding="utf-8")
    assert old in text, f"{old!r} is not in {name}: the fault cannot be planted"
    path = tmp_path / Path(name).name
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    if name == "factories.yaml":
        faults = list(check.check_members(path, systems, TODAY))
    elif name == "readiness.yaml":
        path.write_text(new + "\n", encoding="utf-8")
        faults = list(check.check_readiness(path, systems, TODAY))
    elif name == "gpus.yaml":
        faults = list(check.check_catalogue(path, TODAY))
    else:
        faults = check.check_file(path, TODAY).faults
    hits = [f for f in faults if f.name == fault]
    assert hits, f"not caught; found: {[(f.name, f.what) for f in faults]}"
    assert all(f.severity == "error" for f in hits)
    assert any(path.name in f.where for f in hits)


ODD: list[object] = [None, True, [], {}, "", "x", -1, 0, 3.5, ["a"], {"a": 1}, [{"b": 2}], 10**30, "a.b", [[1]], {1: 2}]


def _places(data: object, prefix: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in pairs:
        yield (*prefix, key)
        yield from _places(value, (*prefix, key))


@functools.cache
def _source(name: str) -> tuple[Any, list[tuple[object, ...]]]:
    path = catalogue.SYSTEMS / name if (catalogue.SYSTEMS / name).exists() else catalogue.ROOM / name
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    return raw, sorted(_places(raw), key=str)


def test_facts_that_rest_on_one_repository_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A second source takes a fact off the list; what has none stays on it, by name."""
    from aifactory_train.cli import main
    from aifactory_train.sites.confirmed import confirmed_by, single

    karolina = sites.load("karolina", overlay=False)
    assert "second" in confirmed_by(karolina, "partitions.qgpu.max_time")
    alone = single(karolina)
    assert "partitions.qgpu.max_time" not in alone and "software.modules" in alone
    bare = single(karolina.model_copy(update={"confirmed": []}))
    assert set(alone) < set(bare) and "partitions.qgpu.max_time" in bare
    assert main(["sites", "check", "karolina"]) == 0
    assert f"resting on one user's repository alone: {', '.join(alone)}" in capsys.readouterr().out


#: The twelve largest systems, and what one user alone was found to say of what a job asks for there.
ALONE = {"meluxina": {"request.cpus_per_gpu"}, "vega": {"partitions.gpu.max_time"}}
LARGEST = [
    *("lumi-g", "jupiter-booster", "leonardo-booster", "marenostrum5-acc", "alps-clariden", "jean-zay-h100"),
    *("arrhenius", "helios", "karolina", "snellius-h100", "meluxina", "vega"),
]


@pytest.mark.parametrize("name", LARGEST)
def test_what_a_job_asks_for_has_two_sources_at_the_largest(name: str) -> None:
    """The account's form, the partition's time, GPUs and cores: each from documentation, or from two users at least."""
    from aifactory_train.sites.confirmed import single

    system = sites.load(name, overlay=False)
    part = f"partitions.{system.default_partition}"
    asked = {"access.account", "access.account_suffix", "request.gpus", "request.cpus_per_gpu", "node.gpus"}
    asked |= {f"{part}.max_time", f"{part}.max_nodes", f"{part}.constraint"}
    asked |= {f"qos.{q}.max_time" for q in system.partitions[system.default_partition or ""].qos}
    assert asked & set(single(system)) == ALONE.get(name, set())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_gives_faults_never_a_crash(tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(
        st.sampled_from(["lumi-g.yaml", "hunter.yaml", "eidf-gpu.yaml", "factories.yaml", "gpus.yaml", "sources.yaml"])
    )
    shipped, places = _source(name)
    place = data.draw(st.sampled_from(places))
    raw = target = copy.deepcopy(shipped)
    for key in place[:-1]:
        target = target[key]
    if data.draw(st.booleans()):
        target[place[-1]] = data.draw(st.sampled_from(ODD))
    else:
        del target[place[-1]]
    path = tmp_path / name
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    if name == "factories.yaml":
        faults = check.guarded(path, lambda p: check.check_members(p, {}, TODAY))
    elif name == "gpus.yaml":
        faults = check.guarded(path, lambda p: check.check_catalogue(p, TODAY))
    elif name == "sources.yaml":
        faults = check.guarded(path, lambda p: check.check_sources(p, TODAY))
    else:
        faults = check.check_file(path, TODAY).faults
    assert all(f.name in check.FAULTS and f.what and f.where for f in faults)


def test_every_fault_is_planted_once_and_described() -> None:
    planted = {p[0] for p in PLANTED}
    assert planted <= set(check.FAULTS)
    elsewhere = {"index", "duplicate-name", "orphan", "centre", "unanswered", "access", "known-fault", "contradiction"}
    assert set(check.FAULTS) - planted == elsewhere  # planted in tests of their own
    assert len(PLANTED) >= 20


def test_a_fault_names_file_and_line(edit: Callable[[str, str, str], Path]) -> None:
    path = edit(LUMI, "cpus_per_gpu: 7", "cpus_per_gpu: 9")
    fault = next(f for f in check.check_file(path, TODAY).faults if f.name == "cores")
    line = int(fault.where.split(":")[1])
    assert "cpus_per_gpu: 9" in path.read_text().splitlines()[line - 1]
    assert fault.fix == "at most 7"


def test_complete_means_core_facts_from_a_source() -> None:
    system = profiles.load("snellius-a100")
    assert system.gpu.memory_gib == 40  # remembered: shipped, marked, and not counted as known
    fact = system.provenance("gpu.sku")
    assert fact is not None and fact.confidence == "recalled"
    assert system.core_missing() == ["GPU model"] and not system.complete
    assert profiles.load("lumi-g").complete


def test_what_is_said_to_be_tried_names_what_tried_it() -> None:
    """A twin's evidence is the test that judges every usable Slurm system."""
    root = Path(__file__).resolve().parents[2]
    entries = yaml.safe_load(catalogue.READINESS.read_text(encoding="utf-8"))["systems"]
    twins = {name for name, entry in entries.items() if entry["level"] == "twin"}
    judged = {s for s in sites.names(usable=True) if sites.load(s, overlay=False).scheduler.kind == "slurm"}
    assert twins and twins <= judged
    for name in twins:
        assert (root / entries[name]["evidence"].split(",")[0]).is_file()
        assert sites.load(name, overlay=False).readiness == "twin"
