"""Profiles: loading, provenance, overlays, names, limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aifactory_train import sites
from aifactory_train.core.errors import UserError
from aifactory_train.sites import catalogue, fields, index, paths, schema

USABLE = sites.names(usable=True)

#: Ids that the project's own documents and other rooms name.
NAMED = [
    "lumi-g", "leonardo-booster", "jupiter-booster", "marenostrum5-acc", "karolina", "alps-clariden", "adastra-mi250x",
    "adastra-mi300a", "hunter", "jean-zay-h100", "helios", "snellius-h100", "vega", "meluxina",
]  # fmt: skip

#: Every machine that the site reference names, by the id or alias under which it is found here.
REFERENCE = [
    "lumi", "lumi-ai", "leonardo", "lisa", "it4lia-ai", "jupiter", "juwels", "jureca-dc", "jarvis", "mn5", "bsc-ai", "meluxina",
    "meluxina-ai", "meluxina-cloud", "karolina", "karolaina", "vega", "slaif-ai", "discoverer+", "discoverer", "discoverer++",
    "deucalion-a100-40", "deucalion-a100-80", "clariden", "daint", "santis", "bristen", "beverin", "eidf", "cirrus", "isambard-ai",
    "musica", "musica-b200", "vsc5-a100", "vsc5-a40", "aiat-ai", "komondor", "komondor-ai", "helios", "athena", "gaia-ai", "eagle",
    "proxima", "piast-ai", "arrhenius", "mimer-ai", "jean-zay-h100", "jean-zay-a100", "jean-zay-v100", "adastra", "adastra-mi300a",
    "joliot-curie", "irene", "alice-recoque", "hunter", "hammerhai-ai", "horeka-a100", "horeka-h100", "horeka-h200", "horeka2", "snellius",
    "snellius-a100", "nlaif-ai", "sofia", "hortense", "hortense-a100-40", "lucia", "perun", "devana", "finisterrae3",
    "1healthai-system", "elja", "elja-1gpu", "aifa-ice-test", "rudens", "saifa-kragujevac", "cyclone", "daedalus", "aris", "caspir",
    "ro-ai", "litai-ai",
]  # fmt: skip


# -- the 32 --------------------------------------------------------------------------------------------------------------------


def test_exactly_32_members_each_with_a_system_or_a_reason() -> None:
    members = sites.members()
    kinds = [m["kind"] for m in members]
    assert (len(members), kinds.count("factory"), kinds.count("antenna")) == (32, 19, 13)
    for m in members:
        assert {"id", "name", "kind", "country", "sectors", "links", "systems", "announced", "reason"} <= set(m)
        assert m["systems"] or m["reason"], m["id"]
        assert m["sectors"] or m["sectors_reason"], m["id"]
        assert (m["kind"] == "factory") or m["links"], m["id"]
        assert len(m["country"]) == 2
        for system in m["systems"]:
            assert system in USABLE


def test_every_machine_of_the_reference_is_there() -> None:
    for name in REFERENCE:
        assert sites.load(name).id
    assert len([s for s in USABLE if s != "generic-slurm"]) >= 28


def test_the_ids_others_rely_on_are_usable() -> None:
    assert set(NAMED) <= set(USABLE)


def test_a_factory_without_a_machine_answers_with_its_links_and_refuses() -> None:
    with pytest.raises(UserError, match="no system that can be used today") as refused:
        sites.load("saifa")
    assert "leonardo-booster" in str(refused.value.fix)
    with pytest.raises(UserError, match="factory, not a system") as named:
        sites.load("it4lia")
    assert "leonardo-booster" in str(named.value.fix)


@pytest.mark.parametrize(
    ("wrong", "reported"),
    [
        ("lumi-gg", "lumi-g"),  # a system
        ("hamerhai", "hammerhai"),  # a factory
        ("cinecca", "CINECA"),  # a host
        ("finlnd", "Finland"),  # a country
        ("snelius", "snellius"),  # an alias or name
    ],
)
def test_unknown_site_says_what_was_meant(wrong: str, reported: str) -> None:
    with pytest.raises(UserError) as refused:
        sites.load(wrong)
    assert reported in str(refused.value)


@pytest.mark.parametrize("place", ["Spain", "ES", "CINES", "KIT", "IDRIS"])
def test_host_or_country_is_refused_with_its_systems(place: str) -> None:
    with pytest.raises(UserError) as refused:
        sites.load(place)
    assert any(s in str(refused.value.fix) for s in USABLE)


# -- resolved values and provenance ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded() -> dict[str, sites.System]:
    return {name: sites.load(name, overlay=False) for name in USABLE}


@pytest.mark.parametrize("name", USABLE)
def test_every_stated_fact_has_provenance(name: str, loaded: dict[str, sites.System]) -> None:
    system = loaded[name]
    facts = list(system.stated_facts())
    data = system.model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert {f.path for f in facts} == {p for p, _ in paths.fact_leaves(data)}
    for fact in facts:
        assert fact.source and fact.confidence
        assert fact.date != "n.d." or fact.retrieved
        assert fact.confidence != "recalled" or fact.path.startswith("gpu.")


@pytest.mark.parametrize("name", USABLE)
def test_defaults_and_derived_values_hold_together(name: str, loaded: dict[str, sites.System]) -> None:
    system = loaded[name]
    for partition in system.partitions:
        limits = system.limits(partition)
        assert limits["max_nodes"] is None or limits["max_nodes"] >= (limits["min_nodes"] or 1)
    if system.gpu_network_gb_s:
        assert system.node.gpus and abs(system.gpu_network_gb_s * system.node.gpus - (system.node_gb_s or 0)) < 1e-9
    text = json.dumps(system.as_dict())
    assert json.loads(text)["provenance"]
    assert system.access.example is not None


def test_the_values_that_others_read() -> None:
    lumi = sites.load("lumi-g")
    assert (lumi.gpu.arch, lumi.gpu.memory_gib, lumi.node.gpus, lumi.gpu.peak_tflops["bf16"]) == (
        "gfx90a",
        64,
        8,
        191.5,
    )
    assert lumi.gpu.counted_as and lumi.node_gb_s == 100 and lumi.gpu_network_gb_s == 12.5
    assert lumi.limits("standard-g") == {
        "max_time": 172800, "max_nodes": 1024, "max_gpus": None, "max_running_jobs": None, "min_nodes": None, "default_time": None,
    }  # fmt: skip
    jupiter = sites.load("jupiter")
    assert jupiter.node.isa == "aarch64" and jupiter.launch.output_must_be_under == ["/e"] and jupiter.offline
    jean = sites.load("jean-zay-v100")
    assert not jean.gpu.has_bf16 and jean.gpu.arch == "sm_70"
    assert sites.load("hunter").gpu.fp8_format == "fnuz"
    fact = lumi.provenance("partitions.standard-g.max_time")
    assert fact is not None and (fact.value, fact.date, fact.confidence) == (172800, "2024-10", "documented")
    assert lumi.provenance("node.local_disk_gb") is None
    with pytest.raises(UserError, match=r"did you mean 'node\.gpus'"):
        lumi.provenance("node.gpu")


def test_partition_and_qos_that_do_not_exist_there() -> None:
    leonardo = sites.load("leonardo-booster")
    with pytest.raises(UserError, match="no partition 'boost_usr_prd' \\(did you mean 'boost_usr_prod'"):
        leonardo.partition("boost_usr_prd")
    with pytest.raises(UserError, match="no QoS 'boost_qos_debug'"):
        leonardo.qos_of("boost_usr_prod", "boost_qos_debug")
    with pytest.raises(UserError, match="does not go with partition"):
        sites.load("marenostrum5-acc").qos_of("acc", "acc_interactive")
    assert leonardo.limits("boost_usr_prod", "boost_qos_lprod")["max_nodes"] == 3
    assert leonardo.limits("boost_usr_prod", "boost_qos_dbg")["max_time"] == 1800


def test_partition_equals_qos_where_the_site_wants_it() -> None:
    name, limits = sites.load("musica").qos_of("zen4_0768_h100x4")
    assert name == "zen4_0768_h100x4" and limits is not None and limits.max_time == 72 * 3600


# -- overlays and profiles of one's own ------------------------------------------------------------------------------------------


def test_overlay_carries_the_users_values_and_corrections(own_config: Path) -> None:
    folder = own_config / "sites"
    folder.mkdir(parents=True)
    (folder / "lumi-g.yaml").write_text(
        "overlay_for: lumi-g\nuser: {account: project_465009999, work_dir: /scratch/project_465009999/me}\n"
        "corrections: {partitions.dev-g.max_nodes: 16, energy.pue: 1.04}\n"
    )
    system = sites.load("lumi-g")
    assert system.user.account == "project_465009999"
    assert system.limits("dev-g")["max_nodes"] == 16
    fact = system.provenance("partitions.dev-g.max_nodes")
    assert fact is not None and fact.confidence == "user"
    other = system.provenance("partitions.dev-g.max_time")
    assert other is not None and other.confidence == "documented"
    assert sites.load("lumi-g", overlay=False).user.account is None


def test_overlay_file_can_stand_for_the_site(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("overlay_for: vega\nuser: {account: my-project-users}\n")
    assert sites.load(str(path)).id == "vega"
    assert sites.load("vega", overlay=path).user.account == "my-project-users"
    with pytest.raises(UserError, match="this overlay is for 'vega', not for 'karolina'"):
        sites.load("karolina", overlay=path)


def test_site_file_may_hold_a_whole_profile(tmp_path: Path) -> None:
    path = tmp_path / "vega.yaml"
    path.write_text(catalogue.SYSTEMS.joinpath("vega.yaml").read_text().replace("memory_gib: 512", "memory_gib: 1024"))
    assert sites.load("vega", overlay=path).node.memory_gib == 1024
    with pytest.raises(UserError, match="this profile is of 'vega', not of 'karolina'"):
        sites.load("karolina", overlay=path)


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("overlay_for: lumi-g\nuser: {acount: x}\n", r"unknown key 'acount' \(did you mean 'account'"),
        ("overlay_for: lumi-g\nusr: {account: x}\n", r"unknown key 'usr' \(did you mean 'user'"),
        ("overlay_for: lumi-g\ncorrections: {nodes.gpus: 4}\n", r"did you mean 'node'"),
        ("overlay_for: lumi-g\ncorrections: {node.gpus: four}\n", "valid integer"),
        ("overlay_for: lumi-g\ncorrections: {node.gpus.x: 4}\n", "leads into a plain value"),
        ("overlay_for: lumi-g\ncorrections: {gpu.arch: sm_9}\n", "not an architecture name"),
        ("user: {account: x}\n", "'overlay_for' is missing"),
        ("- a\n- b\n", "mapping"),
        ("overlay_for: [\n", "not valid YAML"),
        ("overlay_for: lumi-g\noverlay_for: vega\n", "given twice"),
    ],
)
def test_wrong_overlay_is_refused_with_its_place(tmp_path: Path, text: str, reported: str) -> None:
    path = tmp_path / "overlay.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=reported) as refused:
        sites.load("lumi-g", overlay=path)
    wrong_in = 1 if text.startswith(("user", "-")) else 2
    assert f"overlay.yaml:{wrong_in}" in str(refused.value) or text.startswith("-"), (
        "the overlay is at fault, not the profile"
    )


def test_a_wrong_key_in_a_profile_names_file_line_and_key(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        catalogue.SYSTEMS.joinpath("vega.yaml").read_text().replace("cores_usable: 128", "cores_usabel: 128")
    )
    with pytest.raises(UserError, match=r"unknown key 'cores_usabel' \(did you mean 'cores_usable'") as refused:
        sites.load(str(path))
    line = int(str(refused.value.where).split(":")[1])
    assert "cores_usabel" in path.read_text().splitlines()[line - 1]


def test_a_profile_past_its_day_is_expired(tmp_path: Path) -> None:
    path = tmp_path / "vega.yaml"
    path.write_text(catalogue.SYSTEMS.joinpath("vega.yaml").read_text().replace("expires: 2027", "expires: 2020"))
    system = sites.load(str(path))
    assert system.expired


def test_generic_slurm_becomes_usable_with_an_overlay() -> None:
    overlay = {
        "user": {"account": "me", "partition": "gpu"},
        "corrections": {
            "node.gpus": 4,
            "gpu.sku": "h100-80",
            "partitions.gpu.max_time": "24h",
            "default_partition": "gpu",
        },
    }
    system = sites.load("generic-slurm", overlay=overlay)
    assert system.node.gpus == 4
    assert system.default_partition == "gpu" and system.user.partition == "gpu"
    assert sites.broken_limit(system, "gpu", None, 2, 3 * 3600) is None


def test_correction_of_the_gpu_brings_its_constants() -> None:
    system = sites.load("elja", overlay={"corrections": {"gpu.sku": "a100-80"}})
    assert system.gpu.memory_gib == 80
    fact = system.provenance("gpu.sku")
    assert fact is not None and fact.confidence == "user"


def test_keys_with_dots_are_one_key(tmp_path: Path) -> None:
    path = tmp_path / "dotted.yaml"
    text = (
        (catalogue.SYSTEMS / "vega.yaml")
        .read_text()
        .replace("id: vega", "id: dotted")
        .replace("\n  gpu: {", "\n  gpu.a100: {")
    )
    path.write_text(
        text.replace("partition: gpu,", "partition: gpu.a100,")
        .replace("_partition: gpu\n", "_partition: gpu.a100\n")
        .replace("partitions.gpu.", "partitions.gpu.a100.")
    )
    from aifactory_train.sites import check

    assert check.check_file(path).faults == []
    system = sites.load(str(path), overlay={"corrections": {"partitions.gpu.a100.max_time": "12h"}})
    assert system.limits("gpu.a100")["max_time"] == 12 * 3600
    fact = system.provenance("partitions.gpu.a100.nodes")
    assert fact is not None and fact.value == 60
    label = sites.load("eidf").provenance("request.node_selector.nvidia.com/gpu.product")
    assert label is not None and label.value == "NVIDIA-H100-80GB-HBM3"


# -- times -----------------------------------------------------------------------------------------------------------------------


@given(st.integers(min_value=1, max_value=400 * 86400))
def test_times_survive_both_ways(seconds: int) -> None:
    assert fields.parse_duration(fields.slurm_time(seconds)) == seconds
    assert fields.parse_duration(fields.compact_time(seconds)) == seconds


@given(st.text(max_size=12))
def test_any_text_is_a_time_or_refused(text: str) -> None:
    try:
        assert fields.parse_duration(text) > 0
    except ValueError as error:
        assert str(error)


# -- the built index -------------------------------------------------------------------------------------------------------------


def test_index_is_fresh_and_rebuilt_when_files_differ(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = json.loads(index.INDEX.read_text(encoding="utf-8"))
    assert stored == index.build_index()
    assert stored["digest"] == index.digest()
    monkeypatch.setattr(index, "ROOM", room)
    target = room / "systems" / "vega.yaml"
    target.write_text(target.read_text().replace("name: Vega GPU", "name: Vega XL"))
    assert index.digest() != stored["digest"]


def test_a_stale_index_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from aifactory_train.sites import check

    monkeypatch.setattr(index, "digest", lambda: "other")
    faults = list(check.index_fresh())
    assert faults and "--write-index" in str(faults[0].fix)


def test_exported_schemas_are_fresh_and_accept_the_profiles() -> None:
    for which, name in (("profile", "site.schema.json"), ("overlay", "overlay.schema.json")):
        stored = json.loads((catalogue.ROOM / name).read_text(encoding="utf-8"))
        assert stored == json.loads(json.dumps(schema.json_schema(which))), "aifactory sites check --write-index"
    assert stored["properties"]["overlay_for"]["type"] == "string"
    profile = json.loads((catalogue.ROOM / "site.schema.json").read_text(encoding="utf-8"))
    assert profile["additionalProperties"] is False
    assert profile["$defs"]["Partition"]["properties"]["max_time"]["anyOf"][0]["type"] == ["string", "integer"]
