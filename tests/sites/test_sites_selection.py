"""Selection: what follows from the hardware, with reasons; a pure function."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aifactory_train import sites
from aifactory_train.core.errors import UserError
from aifactory_train.sites import Needs, broken_limit, catalogue, reading, select

SYSTEMS = {name: sites.load(name, overlay=False) for name in sites.names(usable=True)}


def test_every_choice_has_a_reason_and_rests_on_stated_facts() -> None:
    for system in SYSTEMS.values():
        chosen = select(system)
        assert {"precision", "attention", "sharding", "launcher", "kernel key", "internet", "placement"} <= set(
            chosen.choices
        )
        assert len(chosen.reasons) == len(chosen.choices)
        for choice in chosen.choices.values():
            assert choice.reason
        assert chosen.kernel_key == (system.gpu.arch, system.gpu.sku)


def test_precision_follows_the_chip() -> None:
    assert select(SYSTEMS["jean-zay-v100"]).precision == "fp16"
    assert select(SYSTEMS["jean-zay-v100"]).attention == ("sdpa", "eager")
    assert select(SYSTEMS["lumi-g"]).precision == "bf16"
    with pytest.raises(UserError, match=r"V100 32 GB \(sm_70\) has no bf16"):
        select(SYSTEMS["jean-zay-v100"], Needs(precision="bf16"))
    with pytest.raises(UserError, match="has no fp8"):
        select(SYSTEMS["lumi-g"], Needs(precision="fp8"))
    hunter = select(SYSTEMS["hunter"], Needs(precision="fp8"))
    assert hunter.fp8_format == "fnuz" and any("fnuz" in w for w in hunter.warnings)
    assert select(SYSTEMS["marenostrum5-acc"], Needs(precision="fp8")).fp8_format == "ocp"
    with pytest.raises(UserError, match="'bf17' is not a precision"):
        select(SYSTEMS["lumi-g"], Needs(precision="bf17"))


def test_an_environment_for_another_machine_is_refused() -> None:
    with pytest.raises(UserError, match="built for x86_64, the compute nodes of JUPITER Booster are aarch64"):
        select(SYSTEMS["jupiter-booster"], Needs(environment_isa="x86_64"))
    with pytest.raises(UserError, match=r"built for cuda, LUMI-G has gfx90a \(rocm\)"):
        select(SYSTEMS["lumi-g"], Needs(environment_backend="cuda"))
    assert any("x86_64, compute nodes aarch64" in w for w in select(SYSTEMS["arrhenius"]).warnings)


def test_placement_keeps_to_the_limits() -> None:
    assert select(SYSTEMS["lumi-g"], Needs(nodes=2, hours=60)).partition == "small-g"
    assert select(SYSTEMS["leonardo-booster"], Needs(nodes=3, hours=60)).qos == "boost_qos_lprod"
    assert select(SYSTEMS["leonardo-booster"], Needs(nodes=65)).qos == "boost_qos_bprod"
    with pytest.raises(UserError, match=r"normal allows 64 node.*bprod allows 256 node"):
        select(SYSTEMS["leonardo-booster"], Needs(nodes=257))
    with pytest.raises(UserError, match="standard-g allows 1024 node"):
        select(SYSTEMS["lumi-g"], Needs(nodes=1025))
    with pytest.raises(UserError, match=r"bprod allows 1-00:00:00, 2-00:00:00 is asked for"):
        select(SYSTEMS["leonardo-booster"], Needs(nodes=100, hours=48))
    with pytest.raises(UserError, match="no partition 'boost'"):
        select(SYSTEMS["leonardo-booster"], Needs(partition="boost"))
    assert (
        broken_limit(SYSTEMS["marenostrum5-acc"], "acc", "acc_debug", 9)
        == "acc/acc_debug allows 8 node(s), 9 are asked for"
    )
    assert (
        broken_limit(SYSTEMS["karolina"], "qgpu_big", None, 4) == "qgpu_big needs at least 17 node(s), 4 are asked for"
    )


def test_gpus_are_counted_as_the_scheduler_counts() -> None:
    with pytest.raises(UserError, match="a node of LUMI-G has 8 \\(counted as one GCD"):
        select(SYSTEMS["lumi-g"], Needs(gpus_per_node=16))


def test_offline_settings_where_nodes_have_no_published_internet() -> None:
    assert select(SYSTEMS["leonardo-booster"]).env["HF_HUB_OFFLINE"] == "1"
    assert "not published" in select(SYSTEMS["vega"]).choices["internet"].reason
    assert "HF_HUB_OFFLINE" not in select(SYSTEMS["lumi-g"]).env
    assert "NCCL_NET_PLUGIN" in select(SYSTEMS["alps-clariden"]).must_not_set


def test_a_machine_that_nobody_can_use_is_refused_with_advice() -> None:
    with pytest.raises(UserError, match="LUMI-AI cannot be used today") as refused:
        select(sites.load("lumi-ai"))
    assert "aifactory sites lumi-ai" in str(refused.value.fix)


def test_sharding_follows_the_size() -> None:
    vega = SYSTEMS["vega"]
    assert select(vega, Needs(nodes=2, state_gib=10)).engine == "ddp"
    assert (
        select(vega, Needs(nodes=2, state_gib=80)).engine,
        select(vega, Needs(nodes=2, state_gib=80)).shard_group,
    ) == ("hsdp", 4)
    big = select(vega, Needs(nodes=4, state_gib=300))
    assert (big.engine, big.shard_group, big.replicas) == ("fsdp", 16, 1)
    assert any("do not fit" in w for w in select(vega, Needs(nodes=1, state_gib=900)).warnings)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(SYSTEMS)),
    st.integers(1, 3000),
    st.one_of(st.none(), st.floats(0.1, 200)),
    st.one_of(st.none(), st.floats(0.1, 5000)),
)
def test_selection_is_pure_and_never_breaks_a_published_limit(
    name: str, nodes: int, hours: float | None, state: float | None
) -> None:
    system = SYSTEMS[name]
    needs = Needs(nodes=nodes, hours=hours, state_gib=state)
    try:
        chosen = select(system, needs)
    except UserError as error:
        assert error.fix
        return
    assert chosen == select(system, needs)
    if chosen.partition:
        seconds = int(hours * 3600) if hours else None
        assert broken_limit(system, chosen.partition, chosen.qos, nodes, seconds) is None
    world = nodes * (system.node.gpus or 1)
    assert chosen.shard_group * chosen.replicas <= world and chosen.shard_group >= 1


def test_a_limit_on_gpus_counts_the_gpus_that_a_job_takes() -> None:
    lumi = catalogue.SYSTEMS / "lumi-g.yaml"
    limited = sites.resolve(
        reading.read_yaml(lumi),
        overlay=sites.read_overlay({"corrections": {"partitions.small-g.max_gpus": 8}}, "lumi-g"),
    )
    assert limited.limits("small-g")["max_nodes"] == 1
    assert "1 node" in str(broken_limit(limited, "small-g", None, 2))
    assert broken_limit(limited, "small-g", None, 4, None, 2) is None
    assert "4 node" in str(broken_limit(limited, "small-g", None, 5, None, 1))
    assert broken_limit(limited, "small-g", None, 1, None, 8) is None
