"""Configuration files that tuning writes: merged, never mislabelled, and found again on a device of one's own."""

import json

import pytest

from aifactory_train.commands import kernels as command
from aifactory_train.kernels import hardware, registry
from aifactory_train.sites.catalogue import gpu_catalogue
from aifactory_train.sites.schema import Gpu


def entry(kernel, dtypes=("bf16", "fp16"), block=1024):
    return {"kernel": kernel, "match": {"dtype": list(dtypes)}, "config": {"block": block}, "status": "modelled"}


BODY = {"arch": "gfx90a", "toolchain": {"triton": "3.9.0", "torch": "2.13.0"}}


def test_tuning_one_operator_leaves_the_others(tmp_path):
    from aifactory_train.kernels.workbench import tune

    path = tmp_path / "gfx90a.json"
    tune.write(path, BODY, [entry("swiglu_fwd"), entry("swiglu_fwd", ["fp32"])])
    tune.write(path, BODY, [entry("geglu_fwd")])
    tune.write(path, BODY, [entry("swiglu_fwd", block=4096)])
    found = [(e["kernel"], e["match"]["dtype"][0], e["config"]["block"]) for e in registry.load(path)["entries"]]
    assert sorted(found) == [("geglu_fwd", "bf16", 1024), ("swiglu_fwd", "bf16", 4096), ("swiglu_fwd", "fp32", 1024)]


@pytest.mark.parametrize(
    "change,message", [({"toolchain": {"triton": "3.8.0"}}, "recorded with Triton"), ({"arch": "sm_80"}, "is for")]
)
def test_entries_of_another_compiler_or_chip_are_not_mixed(tmp_path, change, message):
    from aifactory_train.kernels.workbench import tune

    path = tmp_path / "x.json"
    tune.write(path, BODY, [entry("swiglu_fwd")])
    before = path.read_text()
    with pytest.raises(ValueError, match=message):
        tune.write(path, BODY | change, [entry("geglu_fwd")])
    assert path.read_text() == before
    tune.write(path, BODY | change, [entry("swiglu_fwd")])  # nothing of the other would stay


@pytest.fixture
def devices(monkeypatch):
    """The table of devices, restored afterwards."""
    monkeypatch.setattr(hardware, "SKUS", dict(hardware.SKUS))


OWN = {
    "model": "H20 like",
    "vendor": "nvidia",
    "arch": "sm_90",
    "memory_gib": 96,
    "memory_bandwidth_gb_s": 4000,
    "compute_units": 78,
    "peak_tflops": {"bf16": 148},
}


def test_a_gpu_of_ones_own_is_not_taken_for_another(devices):
    found = command._device(Gpu(**OWN), "my-lab")
    assert (found.name, found.units, found.bandwidth, found.peak_bf16) == ("H20-like", 78, 4e12, 148e12)
    assert hardware.sku("H20-like", "sm_90") == found
    same = command._device(Gpu(**OWN | {"compute_units": 132, "memory_bandwidth_gb_s": 3900}), "my-lab")
    assert same.name == "H100-94"
    other = command._device(Gpu(**OWN | {"compute_units": 132}), "lab")
    assert other.name == "H100-94"  # 4.0 and 3.9 TB/s are one figure
    assert command._device(Gpu(**OWN | {"compute_units": None}), "my-lab") is None


@pytest.mark.parametrize("name", [n for n, e in gpu_catalogue().items() if e.get("arch") in hardware.TARGETS])
def test_every_gpu_of_the_catalogue_is_the_device_it_was(name, devices):
    wanted = {"a100-pcie-40": "A100-40", "h200-141": "H200", "gh200-96": "GH200"}
    found = command._of_catalogue(name)
    if hardware.sku(name) or name in wanted:
        assert found is not None and found.name.lower() == wanted.get(name, name).lower()
    elif found is not None:
        entry = gpu_catalogue()[name]
        assert found.units == entry["compute_units"] or "units" in found.recalled


def test_a_device_is_known_by_the_file_that_was_written_for_it(devices, tmp_path, monkeypatch):
    """On the device itself the driver's figures lead to the file; by name it is found everywhere."""
    from aifactory_train.kernels.workbench import tune

    mine = command._device(Gpu(**OWN), "my-lab")
    kernel = registry.operator("swiglu").kernels[0]
    tune.write(
        tmp_path / f"{mine.name}.json", tune.describe(hardware.TARGETS["sm_90"], mine), [entry(kernel.name, block=2048)]
    )
    del hardware.SKUS[mine.name]
    monkeypatch.setattr(registry, "config_folders", lambda: [tmp_path, registry.CONFIGS])
    registry.learn.cache_clear()
    try:
        version = json.loads((tmp_path / "H20-like.json").read_text())["toolchain"]["triton"]
        chosen = registry.select("swiglu", "sm_90", "H20-like", "bf16", (8, 4096), triton=version)
        assert chosen.provenance[kernel.name].level == "H20-like" and chosen.config[kernel.name]["block"] == 2048
        assert hardware.identify("sm_90", 78, 96 << 30, "NVIDIA H20") == mine
        assert hardware.identify("sm_90", 132, 94 * 10**9, "NVIDIA H100").name == "H100-94"
    finally:
        registry.learn.cache_clear()


def test_site_gives_the_name_that_a_file_is_written_under(devices, monkeypatch):
    from aifactory_train import sites

    monkeypatch.setattr(sites, "load", lambda name: type("System", (), {"gpu": Gpu(**OWN)}))
    assert command._chip("my-lab") == ("sm_90", "H20-like")
