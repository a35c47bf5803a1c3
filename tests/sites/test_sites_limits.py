"""What a site refuses: requests beyond a published limit, and machines that nobody can use today."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aifactory_train import sites
from aifactory_train.core.errors import UserError
from aifactory_train.sites import broken_limit, catalogue, reading

SYSTEMS = {name: sites.load(name, overlay=False) for name in sites.names(usable=True)}


def test_the_first_broken_limit_is_told() -> None:
    leonardo, lumi = SYSTEMS["leonardo-booster"], SYSTEMS["lumi-g"]
    assert broken_limit(leonardo, "boost_usr_prod", "normal", 64) is None
    assert "normal allows 64 node" in str(broken_limit(leonardo, "boost_usr_prod", "normal", 65))
    assert "bprod allows 256 node" in str(broken_limit(leonardo, "boost_usr_prod", "boost_qos_bprod", 257))
    assert "bprod allows 1-00:00:00, 2-00:00:00 is asked for" in str(
        broken_limit(leonardo, "boost_usr_prod", "boost_qos_bprod", 100, 48 * 3600)
    )
    assert "standard-g allows 1024 node" in str(broken_limit(lumi, "standard-g", None, 1025))
    with pytest.raises(UserError, match="no partition 'boost'"):
        broken_limit(leonardo, "boost", None, 1)
    assert (
        broken_limit(SYSTEMS["marenostrum5-acc"], "acc", "acc_debug", 9)
        == "acc/acc_debug allows 8 node(s), 9 are asked for"
    )
    assert (
        broken_limit(SYSTEMS["karolina"], "qgpu_big", None, 4) == "qgpu_big needs at least 17 node(s), 4 are asked for"
    )


def test_jobs_are_offline_where_nodes_have_no_published_internet() -> None:
    assert SYSTEMS["leonardo-booster"].offline and SYSTEMS["vega"].offline
    assert SYSTEMS["vega"].internet.compute is None
    assert not SYSTEMS["lumi-g"].offline
    assert "NCCL_NET_PLUGIN" in SYSTEMS["alps-clariden"].environment.avoid


def test_a_machine_that_nobody_can_use_is_refused_with_advice() -> None:
    with pytest.raises(UserError, match="LUMI-AI cannot be used today") as refused:
        sites.require_usable(sites.load("lumi-ai"))
    assert "aifactory sites lumi-ai" in str(refused.value.fix)
    sites.require_usable(SYSTEMS["lumi-g"])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SYSTEMS)), st.integers(1, 3000), st.one_of(st.none(), st.integers(1, 720_000)))
def test_a_request_passes_exactly_where_every_limit_of_its_place_holds(
    name: str, nodes: int, seconds: int | None
) -> None:
    system = SYSTEMS[name]
    for partition in system.partitions:
        qos, _ = system.qos_of(partition)
        limits, gpus = system.limits(partition, qos), nodes * (system.node.gpus or 1)
        holds = (
            (limits["min_nodes"] or 1) <= nodes <= (limits["max_nodes"] or nodes)
            and gpus <= (limits["max_gpus"] or gpus)
            and (seconds or 1) <= (limits["max_time"] or seconds or 1)
        )
        assert (broken_limit(system, partition, qos, nodes, seconds) is None) is holds


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
