"""Selection: cheap, torch-free, complete, and honest about where launch parameters come from."""

import json
import logging
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aifactory_train.kernels import OPERATORS, hardware, registry, select
from aifactory_train.kernels.registry import operator

CONFIGS = sorted(registry.CONFIGS.glob("*.json"))


def test_names_are_the_contract():
    assert OPERATORS == (
        "adamw8bit",
        "attention",
        "cross_entropy",
        "geglu",
        "grouped_linear",
        "layer_norm",
        "linear_cross_entropy",
        "linear_dpo",
        "lora_linear",
        "rms_norm",
        "rms_norm_residual",
        "rope",
        "swiglu",
    )


def test_selecting_loads_neither_torch_nor_triton():
    code = (
        "import sys; from aifactory_train.kernels import select, OPERATORS\n"
        "from aifactory_train.kernels.registry import operator\n"
        "for o in OPERATORS: select(o, 'gfx942', 'MI300A', 'bf16', operator(o).checks[0])\n"
        "assert not {'torch', 'triton', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@given(
    op=st.sampled_from(OPERATORS),
    arch=st.sampled_from(sorted(hardware.TARGETS)),
    dtype=st.sampled_from(["bf16", "fp16", "fp32"]),
    data=st.data(),
)
def test_every_shape_has_a_configuration_for_every_kernel(op, arch, dtype, data):
    spec = operator(op)
    shape = {d: data.draw(st.integers(1, 1 << 20), label=d) for d in spec.dims}
    sku = data.draw(st.sampled_from([None, *(s.name for s in hardware.skus_of(arch))]))
    chosen = select(op, arch, sku, dtype, shape)
    assert chosen.implementation == "triton"
    for kernel in spec.kernels:
        constants = kernel.constexprs(chosen.config[kernel.name], dtype, shape)
        assert all(not isinstance(v, int) or v >= -1 for v in constants.values())
        for name in ("BLOCK", "ROWS", "HEADS", "HALF", "BM", "BN", "BR", "GROUPS"):
            value = constants.get(name, 1)
            assert value & (value - 1) == 0, (name, value)


def test_cpu_and_unknown_chips_take_torch_with_a_reason():
    for arch in ("cpu", "sm_70", "gfx1100"):
        chosen = select("rms_norm", arch, None, "bf16", (8, 64))
        assert chosen.implementation == "torch" and chosen.reason


@pytest.mark.parametrize(
    "bad,message",
    [
        (("rms_nrm", "sm_90", None, "bf16", (8, 64)), "unknown operator"),
        (("rms_norm", "sm_90", None, "int8", (8, 64)), "use bf16, fp16 or fp32"),
        (("rms_norm", "sm_90", None, "bf16", (8,)), "shape of rms_norm is (rows, hidden)"),
        (("rms_norm", "sm_90", None, "bf16", {"rows": 8}), "missing: hidden"),
    ],
)
def test_bad_requests_are_named(bad, message):
    with pytest.raises((KeyError, ValueError)) as error:
        select(*bad)
    assert message in str(error.value)


# ---- provenance


@pytest.fixture
def folder(tmp_path):
    """A folder with the shipped defaults and one measured entry for the MI300A's RMSNorm, recorded with Triton
    9.9.0.
    """
    (tmp_path / "default.json").write_text((registry.CONFIGS / "default.json").read_text())
    kernel = operator("rms_norm").kernels[0]
    body = {
        "schema": 1, "arch": "gfx942", "toolchain": {"triton": "9.9.0"},
        "entries": [{
            "kernel": kernel.name, "match": {"dtype": ["bf16"], "hidden": {"gt": 2048, "le": 4096}},
            "config": {"block": 4096, "rows": 1, "num_warps": 16, "num_stages": 1}, "status": "measured",
            "measured": {"us": 12.5}, "kernel_sha256": kernel.digest,
        }],
    }  # fmt: skip
    path = tmp_path / "MI300A.json"
    path.write_text(json.dumps(body))
    return tmp_path


def pick(folder, triton="9.9.0", shape=(8192, 4096), sku="MI300A"):
    chosen = select("rms_norm", "gfx942", sku, "bf16", shape, configs=folder, triton=triton)
    return chosen, chosen.provenance["rms_norm_fwd"]


def test_a_matching_entry_is_used_and_named(folder):
    chosen, source = pick(folder)
    assert (source.status, source.level, source.triton, source.notes) == ("measured", "MI300A", "9.9.0", ())
    assert chosen.config["rms_norm_fwd"]["num_warps"] == 16


def test_another_triton_version_is_not_used_silently(folder, caplog):
    registry._warn.cache_clear()
    with caplog.at_level(logging.WARNING):
        chosen, source = pick(folder, triton="9.9.1")
    assert source.status == "default" and source.level == "default"
    assert source.notes == ("MI300A.json: recorded with Triton 9.9.0, running 9.9.1",)
    assert "recorded with Triton 9.9.0" in caplog.text
    assert "recorded with Triton 9.9.0" in chosen.describe()


def test_another_kernel_digest_is_not_used_silently(folder):
    path = folder / "MI300A.json"
    path.write_text(path.read_text().replace(operator("rms_norm").kernels[0].digest, "0" * 64))
    _, source = pick(folder)
    assert source.level == "default" and "another version of rms_norm_fwd" in source.notes[0]


def test_the_digest_follows_the_source(tmp_path):
    from aifactory_train.kernels import spec

    kernel = operator("rms_norm").kernels[0]
    changed = tmp_path / "triton_kernels.py"
    changed.write_bytes(kernel.source.read_bytes() + b"\n# edited\n")
    assert spec._digest(changed) != kernel.digest


def test_other_devices_and_sizes_do_not_get_it(folder):
    assert pick(folder, sku="MI300X")[1].level == "default"  # same architecture, another device
    assert pick(folder, shape=(8192, 8192))[1].level == "default"
    _, source = pick(folder, sku="MI999")
    assert "unknown SKU 'MI999'" in source.notes


@pytest.mark.parametrize(
    "change,message",
    [
        ({"schema": 2}, "schema 2"),
        ({"entries": [{"kernel": "k", "match": {}, "config": {}}]}, "lacks status"),
        ({"entries": [{"kernel": "k", "match": {}, "config": {}, "status": "tuned"}]}, "status 'tuned'"),
        ({"entries": [{"kernel": "k", "match": {}, "config": {}, "status": "measured"}]}, "'measured' block"),
        (
            {"entries": [{"kernel": "k", "match": {}, "config": {}, "status": "modelled"}], "toolchain": {}},
            "must name the Triton version",
        ),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "X.json"
    path.write_text(json.dumps({"schema": 1, "toolchain": {"triton": "3.9.0"}, "entries": []} | change))
    with pytest.raises(ValueError, match=message) as error:
        registry.load(path)
    assert str(path) in str(error.value)


# ---- the shipped files


def test_default_names_no_kernel_that_is_gone():
    names = {e["kernel"] for e in registry.load(registry.CONFIGS / "default.json")["entries"]}
    assert names <= {k.name for op in OPERATORS for k in operator(op).kernels}


@given(
    op=st.sampled_from(OPERATORS), arch=st.sampled_from(sorted(hardware.TARGETS)),
    dtype=st.sampled_from(["bf16", "fp16", "fp32"]), data=st.data(),
)  # fmt: skip
def test_every_kernel_has_a_configuration_without_any_file(op, arch, dtype, data):
    """What a new operator lives on: the first moderate configuration of its own space, for every shape."""
    shape = {d: data.draw(st.integers(1, 1 << 20), label=d) for d in operator(op).dims}
    chosen = select(op, arch, None, dtype, shape, configs=registry.CONFIGS / "none")
    for kernel in operator(op).kernels:
        assert kernel.constexprs(chosen.config[kernel.name], dtype, shape)
        assert (chosen.provenance[kernel.name].status, chosen.provenance[kernel.name].level) == ("default", "space")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_files_are_current_and_claim_nothing_measured(path):
    data = registry.load(path)
    kernels = {k.name: k for op in OPERATORS for k in operator(op).kernels}
    known = {*hardware.SKUS, *hardware.TARGETS, "wave32", "wave64", "default"}
    assert path.stem in known
    for entry in data["entries"]:
        kernel = kernels[entry["kernel"]]
        assert entry["status"] != "measured" or entry["measured"]["date"]
        if entry["status"] != "default":
            assert entry["kernel_sha256"] == kernel.digest, (
                f"{entry['kernel']}: run `aifactory kernels tune --write` again"
            )
            assert entry["static"]["spills"] == 0 and entry["static"]["load_bytes"] == 16


# ---- devices


def test_devices_are_told_apart():
    gib = 1 << 30
    cases = [
        ("gfx942", 228, 128 * gib, "AMD Instinct MI300A", "MI300A"),
        ("gfx942", 304, 192 * gib, "AMD Instinct MI300X", "MI300X"),
        ("gfx90a", 110, 64 * gib, "AMD Instinct MI250X", "MI250X-GCD"),
        ("sm_90", 132, 80 * gib, "NVIDIA H100 80GB HBM3", "H100-80"),
        ("sm_90", 132, 64 * gib, "NVIDIA H100", "H100-64"),
        ("sm_90", 132, 95 * gib, "NVIDIA GH200 120GB", "GH200"),
        ("sm_80", 108, 40 * gib, "NVIDIA A100-SXM4-40GB", "A100-40"),
        ("sm_80", 108, 64 * gib, "NVIDIA A100-SXM-64GB", "A100-64"),
    ]
    for arch, units, memory, name, want in cases:
        found = hardware.identify(arch, units, memory, name)
        assert found and found.name == want, (name, found)
    assert hardware.identify("gfx942", 100, 64 * gib, "?") is None
    assert hardware.identify("sm_70", 80, 16 * gib, "V100") is None


def test_chunks_follow_the_balance_of_the_machine():
    """At least twice 4 x balance (fp32 gradient traffic hidden behind the GEMM), at most four times that plus
    rounding.
    """
    for sku in hardware.SKUS.values():
        rows = hardware.chunk_rows(sku)
        assert 8 * sku.balance <= rows <= 16 * sku.balance + 1, sku.name
        assert rows & (rows - 1) == 0
    assert hardware.chunk_rows(hardware.SKUS["MI250X-GCD"]) < hardware.chunk_rows(hardware.SKUS["H100-64"])


def test_occupancy_follows_the_published_cliffs():
    mi300 = hardware.TARGETS["gfx942"]
    cliffs = {64: 8, 72: 7, 80: 6, 96: 5, 128: 4, 168: 3, 256: 2, 257: 1}
    for registers, waves in cliffs.items():
        assert hardware.occupancy(mi300, registers, 0, 4) == waves  # blocks of four waves, one a SIMD
    assert hardware.occupancy(mi300, 32, 32768, 4) == 2
    assert hardware.occupancy(hardware.TARGETS["sm_90"], 255, 0, 8) == 1
    assert hardware.occupancy(hardware.TARGETS["gfx1250"], 64, 0, 4) is None


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "limit"),
    [
        ("gfx942", 256, 0, 4, "registers"),
        ("gfx942", 32, 40000, 4, "LDS"),
        ("gfx942", 32, 0, 8, "registers, waves"),
        ("sm_90", 255, 0, 8, "registers"),
        ("sm_90", 32, 120000, 4, "shared memory"),
        ("sm_90", 16, 0, 8, "threads"),
        ("sm_90", 16, 0, 1, "blocks"),
        ("gfx1250", 64, 0, 4, None),
    ],
)
def test_what_limits_the_blocks_is_named(target, registers, shared, warps, limit):
    chip = hardware.TARGETS[target]
    assert hardware.limiter(chip, registers, shared, warps) == limit
    limits = hardware.block_limits(chip, registers, shared, warps)
    assert hardware.occupancy(chip, registers, shared, warps) == (min(limits.values()) if limits else None)
