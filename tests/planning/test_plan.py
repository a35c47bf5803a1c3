"""Plans for real sites: each resolves or refuses with a reason, none exceeds the memory, more nodes never take longer
unsaid.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from common import recipe, request
from hypothesis import given, settings
from hypothesis import strategies as st

from aifactory_train import sites
from aifactory_train.config.loading import load_recipe
from aifactory_train.core.errors import UserError
from aifactory_train.model import shapes
from aifactory_train.planning import machine, plan, workload

SYSTEMS = [
    "lumi-g",
    "leonardo-booster",
    "jupiter-booster",
    "marenostrum5-acc",
    "alps-clariden",
    "karolina",
    "vega",
    "snellius-h100",
    "snellius-a100",
    "adastra-mi250x",
    "adastra-mi300a",
    "hunter",
    "helios",
    "meluxina",
]
SIZES = ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-32B", "swiss-ai/Apertus-70B-2509")


def check(found: dict) -> None:
    assert found["memory_gib"]["total"] <= found["capacity_gib"]
    parts = sum(v for k, v in found["memory_gib"].items() if k != "total")
    assert found["memory_gib"]["total"] == pytest.approx(parts, abs=0.01)
    assert (
        0
        < found["tokens_per_s_per_gpu"]["low"]
        < found["tokens_per_s_per_gpu"]["mid"]
        < found["tokens_per_s_per_gpu"]["high"]
    )
    assert 0 < found["mfu"] < 0.9 and found["mfu"] <= found["hfu"]
    assert found["mesh"]["replicate"] * found["mesh"]["shard"] == found["gpus"]
    for topic in ("engine", "activation checkpointing", "micro-batch", "kernels", "loss", "memory", "size"):
        assert any(r.startswith(topic) for r in found["reasons"]), topic
    for point in found["scaling"]:
        if point["nodes"] < found["nodes"] and point["step_seconds"] < found["step_seconds"]["total"]:
            assert any(r.startswith("scaling:") for r in found["reasons"])


@pytest.mark.parametrize("kind", ["lora", "none"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_sites_and_sizes(system, kind):
    site = sites.load(system, overlay=False)
    made = 0
    most = site.limits(site.default_partition)["max_nodes"] if site.default_partition else None
    for base in SIZES:
        for nodes in (1, min(32, most or 32)):
            try:
                found, _ = plan.make(request(site, base, nodes, kind))
            except UserError as error:
                assert error.what and error.fix, (base, nodes)
                continue
            made += 1
            check(found)
    assert made >= 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "none", "rslora", "dora"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_node_count(system, kind):
    site = sites.load(system, overlay=False)
    for base in SIZES:
        for nodes in (1, 2, 3, 4, 6, 12, 16, 32, 48, 64):
            try:
                found, _ = plan.make(request(site, base, nodes, kind))
            except UserError as error:
                assert error.what and error.fix
                continue
            check(found)


@settings(max_examples=15, deadline=None)
@given(
    system=st.sampled_from(SYSTEMS),
    base=st.sampled_from(SIZES[:3]),
    kind=st.sampled_from(["lora", "none"]),
    rows=st.integers(1, 3000),
    length=st.sampled_from([256, 1000, 4096]),
    nodes=st.integers(1, 40),
)
def test_any_batch_resolves_or_refuses(system, base, kind, rows, length, nodes):
    site = sites.load(system, overlay=False)
    asked = request(site, base, nodes, kind, rows=rows, length=length, train__micro_batch_tokens=4096)
    try:
        found, _ = plan.make(asked)
    except UserError as error:
        assert error.what and error.where
        return
    check(found)
    assert found == plan.make(asked)[0], "a plan is a pure function of its request"


def test_too_many_gpus_for_a_step():
    site = sites.load("lumi-g", overlay=False)
    with pytest.raises(UserError, match="cannot be divided over 64 GPUs") as caught:
        plan.make(request(site, SIZES[0], 8, rows=16))
    assert "train.batch_rows=64" in str(caught.value)


def test_more_nodes_than_the_site_allows():
    with pytest.raises(UserError, match="allows 4 node"):
        plan.make(request(sites.load("lumi-g", overlay=False), SIZES[0], 8, partition="small-g"))
    with pytest.raises(UserError, match="partition"):
        plan.make(request(sites.load("lumi-g", overlay=False), SIZES[0], 1, partition="nowhere"))


def test_what_does_not_fit_names_the_smallest_change():
    with pytest.raises(UserError) as caught:
        plan.make(request(sites.load("leonardo-booster", overlay=False), SIZES[3], 1, "none"))
    text = str(caught.value)
    assert "does not fit" in text and "--nodes" in text and "adapter.kind=lora" in text
    # the change that is named does make it fit
    nodes = int(text.split("--nodes ")[1].split()[0])
    plan.make(request(sites.load("leonardo-booster", overlay=False), SIZES[3], nodes, "none"))


def test_a_chip_without_bf16_is_refused():
    old = [n for n in sites.names(usable=True) if sites.load(n, overlay=False).gpu.arch == "sm_70"]
    assert old, "no profile has a V100 any more: choose another chip without bf16"
    with pytest.raises(UserError, match="no bf16"):
        plan.make(request(sites.load(old[0], overlay=False), SIZES[0], 1))
    with pytest.raises(UserError, match="bf16"):
        workload.of_recipe(recipe(SIZES[0], precision__compute="fp32"), shapes.load(SIZES[0]), None, None)


def test_adapters_on_layers_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match="none of these names"):
        plan.make(request(sites.load("lumi-g", overlay=False), SIZES[0], 1, adapter__targets=["Wqkv"]))


def test_a_machine_that_is_not_there_yet_is_refused():
    announced = next(n for n in sites.names() if sites.load(n, overlay=False).status == "announced")
    with pytest.raises(UserError, match="cannot be used today"):
        plan.make(request(sites.load(announced, overlay=False), SIZES[0], 1))


def test_every_usable_site_plans_or_refuses():
    planned = 0
    for name in sites.names(usable=True):
        try:
            check(plan.make(request(sites.load(name, overlay=False), SIZES[0], 1))[0])
            planned += 1
        except UserError as error:
            assert error.what and (error.fix or error.where), name
    assert planned >= 20


def test_auto_nodes_meets_deadline_and_budget():
    site = sites.load("leonardo-booster", overlay=False)
    free, _ = plan.make(request(site, SIZES[1], None, "none", tokens=1e9))
    quick, _ = plan.make(request(site, SIZES[1], None, "none", tokens=1e9, deadline_hours=2.0))
    assert quick["hours"] <= 2.0 and quick["nodes"] >= free["nodes"]
    smaller = [p for p in quick["scaling"] if p["nodes"] < quick["nodes"]]
    assert all(p["hours"] > 2.0 for p in smaller)
    paid, _ = plan.make(request(site, SIZES[1], None, "none", tokens=1e9, budget_gpu_hours=100.0))
    assert paid["gpu_hours"] <= 100.0
    with pytest.raises(UserError, match="no number of nodes"):
        plan.make(request(site, SIZES[1], None, "none", tokens=1e12, deadline_hours=0.01))
    with pytest.raises(UserError, match="how much there is"):
        plan.make(request(site, SIZES[1], None, "none", tokens=None, deadline_hours=2.0))


def test_unknown_size_gives_speed_but_no_hours():
    found, _ = plan.make(request(sites.load("lumi-g", overlay=False), SIZES[0], 1, tokens=None))
    assert found["hours"] is None and found["gpu_hours"] is None and found["kwh"] is None
    assert found["tokens_per_s_per_gpu"]["mid"] > 0 and any(r.startswith("size:") for r in found["reasons"])


def test_a_long_run_says_how_many_jobs():
    found, _ = plan.make(request(sites.load("leonardo-booster", overlay=False), SIZES[1], 1, "none", tokens=1e10))
    assert any(r.startswith("time limit:") for r in found["reasons"])


def test_what_the_recipe_fixes_is_kept():
    site = sites.load("lumi-g", overlay=False)
    found, _ = plan.make(
        request(
            site,
            SIZES[1],
            2,
            "none",
            parallel__engine="zero3",
            parallel__activation_checkpointing="full",
            train__micro_batch_tokens=4096,
            given=frozenset({"train.micro_batch_tokens"}),
        )
    )
    assert (found["engine"], found["activation_checkpointing"], found["micro_batch_tokens"]) == ("zero3", "full", 4096)
    found, _ = plan.make(
        request(
            site,
            SIZES[1],
            2,
            "none",
            parallel__engine="hsdp",
            parallel__shard_size=4,
            parallel__activation_checkpointing="full",
            rows=16,
        )
    )
    assert found["mesh"] == {"replicate": 4, "shard": 4}
    with pytest.raises(UserError, match="groups of 5"):
        plan.make(request(site, SIZES[1], 2, "none", parallel__engine="hsdp", parallel__shard_size=5))


def test_overrides_are_keys_of_the_recipe(tmp_path):
    site = sites.load("jupiter-booster", overlay=False)
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: {base: x/y}\ndata: {train: rows.jsonl, sequence_length: 2048}\ntrain: {batch_rows: 1024}\n",
        encoding="utf-8",
    )
    for base, nodes, kind in ((SIZES[1], 4, "none"), (SIZES[2], 4, "lora"), (SIZES[3], 16, "none")):
        found, _ = plan.make(request(site, base, nodes, kind))
        texts = [
            f"{k}={'null' if v is None else str(v).lower() if isinstance(v, bool) else v}"
            for k, v in found["overrides"].items()
        ]
        loaded = load_recipe(str(path), texts)
        assert loaded.parallel.engine == found["engine"]
        assert loaded.train.micro_batch_tokens == found["micro_batch_tokens"]
        assert loaded.parallel.activation_checkpointing == found["activation_checkpointing"]


def test_alternatives_are_slower_or_less_simple_and_fit():
    found, _ = plan.make(request(sites.load("leonardo-booster", overlay=False), SIZES[1], 4, "none"))
    assert found["alternatives"]
    for other in found["alternatives"]:
        assert other["memory_gib"] <= found["capacity_gib"] and other["slower"] >= -0.07


def test_unified_memory_keeps_a_part_for_the_host():
    hunter = sites.load("hunter", overlay=False)
    assert machine.gpu_of(hunter).memory_gib == hunter.gpu.usable_gib - machine.UNIFIED_HOST_GIB
    found, _ = plan.make(request(hunter, SIZES[3], 16, "none"))
    assert not found["offload_optimizer"]


def test_settings_equal_what_the_engine_builds():
    import torch

    from aifactory_train.model.precision import Precision
    from aifactory_train.parallel.deepspeed import deepspeed_json as engine_json
    from aifactory_train.parallel.traits import zero_stage
    from aifactory_train.planning.settings import deepspeed_json

    site = sites.load("lumi-g", overlay=False)
    precision = Precision(torch.float32, torch.bfloat16, torch.bfloat16, torch.float32)
    for stage in (1, 2, 3):
        asked = request(site, SIZES[1], 4, "lora", parallel__engine=f"zero{stage}")
        found, job = plan.make(asked)
        runs = zero_stage(stage, bf16=True, offload_optimizer=False)
        real = engine_json(asked.recipe, precision, found["gpus"], runs, asked.shape.hidden)
        assert found["settings"]["deepspeed"] == real == deepspeed_json(job)


@pytest.mark.parametrize(("stage", "offload", "runs"), [(1, False, 2), (1, True, 1), (2, False, 2), (3, False, 3)])
def test_the_stage_that_runs_is_the_one_that_is_counted(stage, offload, runs):
    """ZeRO-1 in bf16 runs as stage 2: the plan counts stage 2's gradients and says so."""
    from aifactory_train.planning import memory

    site = sites.load("lumi-g", overlay=False)
    more = {"parallel__offload_optimizer": True} if offload else {}
    found, job = plan.make(request(site, SIZES[1], 4, "none", parallel__engine=f"zero{stage}", **more))
    assert found["engine"] == job.layout.engine == f"zero{runs}" and job.layout.offload_optimizer is offload
    sharded = memory.static_state(job).gradients < 4 * job.trained_parameters
    assert offload or sharded == (runs > 1)
    assert any("runs as zero2" in line for line in found["reasons"]) is (runs != stage)


@pytest.mark.parametrize("gpus", [1, 4])
def test_a_four_bit_base_is_planned_with_the_engines_that_train_it(gpus):
    """What training refuses (parallel.refuse_quantised) is not proposed."""
    site = sites.load("lumi-g", overlay=False)
    found, _ = plan.make(request(site, SIZES[1], gpus, "lora", adapter__quantise_base="nf4"))
    assert {found["engine"], *(a["engine"] for a in found["alternatives"])} <= {"ddp", "fsdp2", "hsdp"}
    with pytest.raises(UserError, match="no engine can be used"):
        plan.make(request(site, SIZES[1], 4, "lora", adapter__quantise_base="nf4", parallel__engine="zero3"))
    with pytest.raises(UserError, match="no engine can be used"):
        plan.make(request(site, SIZES[1], 4, "dora", adapter__quantise_base="nf4", parallel__engine="fsdp2"))


def test_70b_in_four_bits_fits_a_node_of_four_64_gb():
    """A quarter of the packed base on each GPU, where a copy leaves room for the shortest steps alone."""
    from aifactory_train.planning import memory

    site = sites.load("leonardo-booster", overlay=False)
    found, job = plan.make(request(site, "meta-llama/Meta-Llama-3-70B", 1, adapter__quantise_base="nf4"))
    assert found["engine"] == "fsdp2" and job.layout.shard == 4 and job.method == "qlora"
    whole = replace(job, layout=replace(job.layout, engine="ddp", shard=1))
    packed = job.shape.packed_parameters * memory.NF4_BYTES
    saved = memory.static_state(whole).parameters - memory.static_state(job).parameters
    rest = (job.frozen_parameters - job.shape.packed_parameters) * job.bytes.frozen
    assert saved == pytest.approx(0.75 * (packed + rest), rel=0.01)


def test_dims_are_kept_and_shown():
    site = sites.load("lumi-g", overlay=False)

    def asked(**dims):
        return plan.make(request(site, SIZES[1], 2, "none", parallel__dims=dims))[0]

    assert asked()["dims"]["dp_shard"] == asked()["mesh"]["shard"]
    found = asked(dp_replicate=2)
    assert found["dims"] == {"dp_replicate": 2, "dp_shard": 8, "tp": 1, "cp": 1, "ep": 1}
    assert found["engine"] == "hsdp"
    with pytest.raises(UserError, match="no engine can be used") as refused:
        asked(dp_replicate=3)
    assert refused.value.where == "parallel.dims"
    with pytest.raises(UserError, match="cannot be divided into groups of 3"):
        asked(dp_shard=3)


def test_an_open_engine_is_not_tried_under_two_names():
    site = sites.load("lumi-g", overlay=False)
    found, _ = plan.make(request(site, SIZES[1], 4, "none"))
    assert "zero1" not in {found["engine"], *(a["engine"] for a in found["alternatives"])}


def test_mean_document_length_shortens_attention_not_memory():
    from dataclasses import replace

    from aifactory_train.planning.size import Size

    site = sites.load("lumi-g", overlay=False)
    long = request(site, SIZES[1], 1, length=8192, rows=64, train__micro_batch_tokens=8192)
    short = replace(long, size=Size(1e8, 1e8 / 500, 500.0, 0.5, "test"))
    a, b = plan.make(long)[0], plan.make(short)[0]
    assert b["tokens_per_s_per_gpu"]["mid"] > a["tokens_per_s_per_gpu"]["mid"]
    assert b["step_tokens"] < a["step_tokens"]


def test_gpus_of_other_nodes_are_reached_over_the_network():
    site = sites.load("leonardo-booster", overlay=False)

    def travels(nodes: int, per_node: int) -> float:
        asked = request(site, SIZES[1], nodes, "none", rows=64, gpus_per_node=per_node, parallel__engine="fsdp2")
        return plan.make(asked)[0]["step_seconds"]["communication_total"]

    assert travels(4, 1) > 2 * travels(1, 4) and travels(2, 2) > 2 * travels(1, 4)
    with pytest.raises(UserError, match="4 GPUs, 0 are asked for"):
        plan.make(request(site, SIZES[0], 1, gpus_per_node=0))


def test_nodes_of_one_gpu_need_no_links_inside():
    from dataclasses import replace

    from aifactory_train.planning import timing

    single = sites.load("elja-1gpu", overlay=False)
    _, job = plan.make(request(single, SIZES[0], 2, "none", rows=64))
    unknown = replace(job, links=replace(job.links, in_node_gb_s=None))
    assert timing.predict(unknown) == timing.predict(job)


def test_a_step_of_tokens_is_named_as_such():
    site = sites.load("lumi-g", overlay=False)
    asked = request(site, SIZES[0], 8, rows=None, length=2048, train__batch_tokens=16 * 2048)
    with pytest.raises(UserError, match="cannot be divided over 64 GPUs") as caught:
        plan.make(asked)
    assert caught.value.where == "train.batch_tokens" and f"train.batch_tokens={64 * 2048}" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("system", "gpus", "more", "fix"),
    [
        ("leonardo-booster", 4, {"parallel__engine": "ddp"}, "parallel.engine=fsdp2"),
        ("leonardo-booster", 1, {}, "parallel.engine=fsdp2"),
        ("leonardo-booster", 4, {"adapter__quantise_base": "nf4", "parallel__engine": "ddp"}, "parallel.engine=fsdp2"),
        ("hunter", 4, {}, "parallel.offload_optimizer=false"),
    ],
)
def test_an_offload_that_cannot_be_is_refused_with_what_mends_it(system, gpus, more, fix):
    site = sites.load(system, overlay=False)

    def asked(**other):
        return request(site, SIZES[0], 1, rows=64, gpus_per_node=gpus, **{**more, **other})

    with pytest.raises(UserError, match="no engine can be used") as caught:
        plan.make(asked(parallel__offload_optimizer=True))
    assert str(caught.value.fix).startswith(f"--set {fix}")
    change = {"parallel__offload_optimizer": False} if "offload" in fix else {"parallel__engine": "fsdp2"}
    plan.make(asked(**{"parallel__offload_optimizer": True, **change}))


def test_automatic_nodes_keep_to_the_partitions_least():
    """A QoS of 65 nodes and more takes no job of one: neither the choice nor its curve has fewer."""
    site = sites.load("leonardo-booster", overlay=False)
    asked = {"qos": "boost_qos_bprod", "tokens": 1e9, "train__batch_rows": 1024}
    found, _ = plan.make(request(site, SIZES[0], None, "lora", **asked))
    assert site.limits("boost_usr_prod", "boost_qos_bprod")["min_nodes"] == 65
    assert found["nodes"] == 65 and min(p["nodes"] for p in found["scaling"]) == 65
    free, _ = plan.make(request(site, SIZES[0], None, "lora", **{**asked, "qos": None}))
    assert free["nodes"] < 65


def test_more_nodes_are_offered_with_the_rows_that_they_need():
    with pytest.raises(UserError) as caught:
        plan.make(request(sites.load("leonardo-booster", overlay=False), SIZES[3], 1, "none", train__batch_rows=4))
    fix = str(caught.value.fix)
    assert "--nodes" in fix and "--set train.batch_rows=" in fix and "larger steps" in fix
    nodes, rows = int(fix.split("--nodes ")[1].split()[0]), int(fix.split("batch_rows=")[1].split()[0])
    plan.make(request(sites.load("leonardo-booster", overlay=False), SIZES[3], nodes, "none", train__batch_rows=rows))


def test_more_nodes_than_the_site_has_are_not_proposed():
    site = sites.load("lumi-g", overlay=False)

    def proposed(**more) -> str:
        with pytest.raises(UserError, match="does not fit") as caught:
            plan.make(request(site, SIZES[3], 1, "none", gpus_per_node=1, parallel__offload_optimizer=False, **more))
        return str(caught.value.fix)

    assert "--nodes " in proposed()
    small = site.limits("small-g")["max_nodes"]
    assert small == 4 and "--nodes" not in proposed(partition="small-g")


def test_steps_do_not_span_epochs():
    from dataclasses import replace

    import numpy as np

    from aifactory_train.data.sampler import Sampler
    from aifactory_train.planning.size import Size

    site = sites.load("leonardo-booster", overlay=False)
    for rows, epochs in ((17, 3.0), (1000, 2.5), (16, 1.0), (100, 0.3)):
        asked = request(site, SIZES[0], 1, rows=16, train__epochs=epochs)
        asked = replace(asked, size=Size(rows * 100.0, float(rows), 100.0, None, "test"))
        assert plan.make(asked)[0]["steps"] == Sampler(np.full(rows, 100), batch_rows=16).steps(epochs)
