"""Counters of a node, from stand-ins: real shared libraries behind ctypes and a fake ``/sys``."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aifactory_train.core.errors import UserError
from aifactory_train.core.missing import is_missing
from aifactory_train.energy import meter as meters
from aifactory_train.energy import readers, total


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the stand-in libraries")
    target = tmp_path_factory.mktemp("lib") / "fake_counters.so"
    source = Path(__file__).with_name("fake_counters.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(target), str(source)], check=True)
    return str(target)


class Node:
    """A fake node: ``/sys`` trees and the file behind the libraries."""

    def __init__(self, root: Path, monkeypatch):
        self.root, self.counters = root, root / "counters.txt"
        monkeypatch.setenv("FAKE_COUNTERS", str(self.counters))

    def gpus(self, *values: int) -> None:
        self.counters.write_text("".join(f"{i} {v}\n" for i, v in enumerate(values)))

    def pm(self, node: int, *accelerators: int) -> None:
        folder = self.root / "sys/cray/pm_counters"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "energy").write_text(f"{node} J 1700000000000000 us\n")
        for i, value in enumerate(accelerators):
            (folder / f"accel{i}_energy").write_text(f"{value} J 1700000000000000 us\n")

    def rapl(self, package: int, dram: int = 0, wrap: int = 262_143_328_850) -> None:
        top = self.root / "sys/class/powercap"
        for zone, kind, value in (
            ("intel-rapl:0", "package-0", package),
            ("intel-rapl:0:0", "core", 10 * package),
            ("intel-rapl:0:1", "dram", dram),
            ("intel-rapl:1", "psys", 100 * package),
        ):
            (top / zone).mkdir(parents=True, exist_ok=True)
            (top / zone / "name").write_text(kind + "\n")
            (top / zone / "energy_uj").write_text(f"{value}\n")
            (top / zone / "max_energy_range_uj").write_text(f"{wrap}\n")


@pytest.fixture
def node(tmp_path, monkeypatch) -> Node:
    return Node(tmp_path, monkeypatch)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def metered(found, unavailable, path: Path, clock: Clock, devices: int = 0) -> meters.NodeMeter:
    return meters.NodeMeter(path, found, unavailable, devices=devices, clock=clock)


def test_nvml_counts_the_ranks_devices_only(node, library):
    node.gpus(1000, 5_000_000, 9_000_000)
    mine = [readers.MeteredDevice(uuid="00000001-aaaa-bbbb-cccc-dddddddddddd")]
    reader = readers.Nvml(mine, library)
    assert reader.expected == 1
    assert reader.read() == {"gpu-00000001-aaaa-bbbb-cccc-dddddddddddd": 5000.0}
    assert len(readers.Nvml([], library).read()) == 3


@pytest.mark.parametrize("second", ["zero", "same"])
def test_mi250x_package_is_counted_once(node, library, second):
    """Four GCDs are two packages, whether the second die reads 0 or repeats the first."""
    gcds = [readers.MeteredDevice(pci=f"0000:{0xC1 + i:02x}:00", model="AMD Instinct MI250X") for i in range(4)]

    def values(a, b):
        return (a, 0, b, 0) if second == "zero" else (a, a, b, b)

    node.gpus(*values(1_000_000, 2_000_000))
    reader = readers.AmdSmi(gcds, library)
    one = meters.Sum(reader)
    one.sample(0.0)
    node.gpus(*values(3_000_000, 5_000_000))
    one.sample(10.0)
    assert sum(one.joules.values()) == pytest.approx(5_000_000 * 15.259e-6, rel=1e-6)
    assert reader.expected == 2 and one.covered_s == pytest.approx(10.0)
    # each GCD of an MI300X-like card is a device of its own
    single = readers.AmdSmi([readers.MeteredDevice(pci="0000:c1:00", model="AMD Instinct MI300X")], library)
    assert single.expected == 1 and len(single.read()) == 1


def test_pm_counters_and_rapl(node):
    node.pm(1000, 300, 400)
    node.rapl(5_000_000, 1_000_000)
    found, why = readers.find_readers([], root=node.root, nvml="libnothing.so", amdsmi="libnothing.so")
    assert {r.name: r.boundary for r in found} == {"pm_counters": "node", "pm_accel": "device", "rapl": "cpu"}
    assert set(why) == {"nvml", "amdsmi"} and "not here" in why["nvml"]
    by_name = {r.name: r for r in found}
    assert by_name["pm_counters"].read() == {"node": 1000.0}
    # core is part of the package and psys contains it: neither is added
    assert by_name["rapl"].read() == {"0": 5.0, "0:1": 1.0}


def test_rapl_wraps(node):
    node.rapl(262_000_000_000)
    one = meters.Sum(readers.Rapl(node.root / "sys/class/powercap"))
    one.sample(0.0)
    node.rapl(100_000_000)  # 143.3 J to the end of the range, 100 J after it
    one.sample(10.0)
    assert one.joules["0"] == pytest.approx(262_143.32885 - 262_000 + 100)
    assert one.notes == []


def test_a_counter_that_starts_again_is_noted(node):
    node.pm(5000)
    one = meters.Sum(readers.PmCounters(node.root / "sys/cray/pm_counters"))
    one.sample(0.0)
    node.pm(70)
    one.sample(10.0)
    assert one.joules == {"node": 70.0}
    assert "started again" in one.notes[0]


@given(st.lists(st.integers(0, 300_000_000), min_size=2, max_size=30), st.integers(0, 262_143_328_850))
def test_wrapping_never_loses_or_invents(steps, start):
    """Whatever the start and the steps (each less than a range), the sum is what was used."""
    wrap = 262_143_328_850

    class Counter:
        name, boundary, expected = "rapl", "cpu", 1
        value = start

        def read(self):
            return {"0": self.value / 1e6}

        def wrap(self, counter):
            return wrap / 1e6

    counter = Counter()
    one = meters.Sum(counter)
    one.sample(0.0)
    for i, step in enumerate(steps):
        counter.value = (counter.value + step) % wrap
        one.sample(float(i + 1))
    assert one.joules["0"] == pytest.approx(sum(steps) / 1e6, abs=1e-3)


def test_missing_permission_is_named(node, monkeypatch):
    node.rapl(5_000_000)
    real = Path.read_text

    def refuse(self, *args, **kwargs):
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(readers.Unavailable, match="root only"):
        readers.Rapl(node.root / "sys/class/powercap")


# ---- two ranks, two nodes, one total


def run_node(node, library, folder: Path, host: str, before, after, *, ranks: int, seconds: float) -> None:
    """Every rank asks for a meter as the recorder does; only the first of the node gets one."""
    clock = Clock()
    node.gpus(*before)
    open_meters = []
    for local_rank in range(ranks):
        if local_rank != 0:
            continue
        found, why = readers.find_readers([], root=node.root, nvml=library, amdsmi="libnothing.so")
        open_meters.append(metered(found, why, folder / f"energy-{host}.json", clock, devices=ranks))
        open_meters[-1].sample()
    node.gpus(*after)
    clock.now = seconds
    for meter in open_meters:
        meter.sample(final=True)


def test_two_ranks_count_the_node_once(node, library, tmp_path):
    attempt = tmp_path / "attempts" / "001"
    run_node(node, library, attempt, "n1", (0, 0), (7_200_000, 10_800_000), ranks=2, seconds=100.0)
    run_node(node, library, attempt, "n2", (0, 0), (3_600_000, 0), ranks=2, seconds=100.0)
    nodes = total.read_nodes([attempt])
    assert len(nodes) == 2
    found = total.summarise(nodes, node_seconds=200.0, pue=(1.2, "test"), grid=(50.0, "test"))
    assert found["device_kwh"] == pytest.approx(21_600 / 3.6e6)
    assert found["coverage_pct"]["device"] == 100.0
    assert found["source"] == {"device": "nvml"}
    assert found["facility_kwh"] == pytest.approx(1.2 * 21_600 / 3.6e6)
    assert found["carbon_kg"] == pytest.approx(found["facility_kwh"] * 0.05)
    assert any("lower bound" in note for note in found["notes"])
    assert found["mwh_2sf"] == "6.0e-06"


def test_missing_reader_lowers_coverage(node, library, tmp_path):
    attempt = tmp_path / "attempts" / "001"
    run_node(node, library, attempt, "n1", (0,), (3_600_000,), ranks=2, seconds=100.0)
    run_node(node, "libnothing.so", attempt, "n2", (0,), (3_600_000,), ranks=2, seconds=100.0)
    found = total.summarise(total.read_nodes([attempt]), node_seconds=200.0)
    assert found["device_kwh"] == pytest.approx(3600 / 3.6e6)  # not doubled
    assert found["coverage_pct"] == {"device": 50.0}
    assert is_missing(found["facility_kwh"]) and is_missing(found["pue"]["value"]) and is_missing(found["carbon_kg"])


def test_nothing_readable_invents_nothing(tmp_path):
    found = total.summarise([], node_seconds=50.0)
    assert is_missing(found["measured_kwh"]) and is_missing(found["mwh_2sf"])
    assert found["device_kwh"] is None and found["estimate"] is None


def test_estimate_is_labelled():
    found = total.summarise([], node_seconds=3600.0, tdp_w=(700.0, "data sheet"), device_seconds=4 * 3600.0)
    assert found["estimated_kwh"] == pytest.approx(2.8)
    assert is_missing(found["measured_kwh"])
    assert "estimate" in found["method"] and "nothing was measured" in found["estimate"]


def test_node_counter_speaks_for_the_node(node):
    node.pm(0, 0, 0)
    clock = Clock()
    found, why = readers.find_readers([], root=node.root, nvml="libnothing.so", amdsmi="libnothing.so")
    path = node.root / "attempts/001/energy-n1.json"
    meter = metered(found, why, path, clock)
    meter.sample()
    node.pm(7200, 1800, 1800)
    clock.now = 10.0
    meter.sample(final=True)
    summary = total.summarise(total.read_nodes([path.parent]), node_seconds=10.0)
    assert summary["node_kwh"] == pytest.approx(0.002) and summary["device_kwh"] == pytest.approx(0.001)
    assert summary["measured_kwh"] == summary["node_kwh"]  # devices are inside the node: not added
    assert summary["boundary"] == "node"


def test_a_reader_that_dies_does_not_end_the_meter(tmp_path):
    class Dying:
        name, boundary, expected = "nvml", "device", 1
        calls = 0

        def read(self):
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("GPU has fallen off the bus")
            return {"gpu": 10.0 * self.calls}

        def wrap(self, counter):
            return None

    clock = Clock()
    meter = metered([Dying()], {}, tmp_path / "energy-x.json", clock)
    for second in range(5):
        clock.now = float(second)
        meter.sample()
    written = json.loads((tmp_path / "energy-x.json").read_text())
    assert "fallen off" in written["error"]
    assert written["readers"]["nvml"]["joules"]["gpu"] == 40.0  # the counter is cumulative: the gap is bridged


def test_sacct():
    text = "123|COMPLETED|7200000|3600|2\n123|REQUEUED|3600000|1800|2\n"
    found = total.parse_sacct(text, "123")
    assert found == {"joules": 10_800_000.0, "node_seconds": 10_800.0, "job": "123"}
    summary = total.summarise([], node_seconds=10_800.0, sacct=found)
    assert summary["node_kwh"] == pytest.approx(3.0) and summary["source"] == {"node": "slurm_acct"}
    with pytest.raises(UserError, match="no energy"):
        total.parse_sacct("9|COMPLETED|0|10|1\n", "9")
    with pytest.raises(UserError, match="knows no job"):
        total.parse_sacct("", "9")
    broken = total.summarise([], node_seconds=10.0, sacct={"joules": 1e12, "node_seconds": 10.0, "job": "1"})
    assert broken["node_kwh"] is None and any("not believed" in n for n in broken["notes"])


def test_a_site_that_is_no_profile_is_said_and_nothing_is_known_of_it(capsys):
    from aifactory_train.energy import site_factors

    found = site_factors("no-such-machine")
    assert found["site"] == "no-such-machine" and found["pue"] is None and found["grid"] is None
    assert "no-such-machine" in capsys.readouterr().err
    assert site_factors("lumi-g")["site"] == "lumi-g" and site_factors(None) == {"site": None}
