"""Known faults: told where they apply and nowhere else, with sources; no default contradicts a newer source."""

from __future__ import annotations

import datetime

import pytest

from aifactory_train import sites
from aifactory_train.cli import main
from aifactory_train.commands import doctor
from aifactory_train.core.errors import UserError
from aifactory_train.sites import known_faults
from aifactory_train.sites.check.services import check_services
from aifactory_train.sites.known_faults import Situation, applicable, contradictions, version_in
from aifactory_train.sites.reading import read_yaml
from aifactory_train.sites.resolving import resolve

GUIDE_IMAGE = "/appl/local/laifs/containers/lumi-multitorch-u24r70f21m50t210-20260415_130625/x-full-y.sif"
AUGUST = "/appl/local/laifs/containers/lumi-multitorch-u24r70f21m50t210-20260807_115122/x-full-y.sif"


def told(**more) -> set[str]:
    system = more.pop("system", None)
    return {
        f.id for f in applicable(Situation(sites.load(system, overlay=False) if system else None, **more))
    }  # fmt: skip


def test_there_are_at_least_twelve_each_with_a_source_a_date_and_an_end():
    found = known_faults.known()
    assert len(found) >= 12 and len({f.id for f in found}) == len(found)
    for fault in found:
        assert fault.source.title and (fault.source.date != "n.d." or fault.source.retrieved)
        assert fault.remedy and fault.what and fault.expires > datetime.date(2026, 11, 30)
        assert any(fault.where.model_dump(exclude_defaults=True).values()), f"{fault.id} would be told to everybody"
    assert sum(f.source.url is not None for f in found) >= 12


LUMI = {"system": "lumi-g", "image": GUIDE_IMAGE, "variables": {"FI_MR_CACHE_MONITOR": "userfaultfd"}, "nodes": 2}


@pytest.mark.parametrize(
    "situation, expected",
    [
        (LUMI, set()),
        ({**LUMI, "variables": {**LUMI["variables"], "NCCL_NET_GDR_LEVEL": "3"}}, {"lumi-gdr-level"}),
        ({**LUMI, "variables": {**LUMI["variables"], "NCCL_NET_GDR_LEVEL": "PHB"}, "nodes": 1}, set()),
        ({**LUMI, "variables": {}}, {"lumi-memory-monitor"}),
        ({**LUMI, "variables": None}, set()),  # nothing is known of the variables
        ({**LUMI, "image": AUGUST, "engine": "hsdp"}, {"lumi-second-group"}),
        ({**LUMI, "image": AUGUST, "engine": "fsdp2"}, set()),
        ({**LUMI, "engine": "hsdp"}, set()),  # the guide's image
        ({**LUMI, "image": "/scratch/me/torch.sif"}, {"rccl-libfabric-122"}),
        ({**LUMI, "nodes": 8}, {"cxi-tree-connect"}),
        ({"packages": {"deepspeed": "0.18.1"}, "engine": "zero2"}, {"deepspeed-zero2-gradients"}),
        ({"packages": {"deepspeed": "0.19.3"}, "engine": "zero2"}, {"deepspeed-zero2-used-twice"}),
        ({"packages": {"deepspeed": "0.19.8"}, "engine": "zero2"}, set()),
        ({"packages": {"deepspeed": "0.18.1"}, "engine": "zero3"}, set()),
        ({"packages": {"torch": "2.9.1+cu128"}, "variables": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}},
         {"torch-alloc-conf-29"}),
        ({"packages": {"torch": "2.10.0"}, "variables": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}}, set()),
        ({"packages": {"torch": "2.7.0", "flash-attn": "2.7.4.post1"}}, {"flash-attn-274-abi"}),
        ({"variables": {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}}, {"nccl-async-errors-off"}),
        ({"variables": {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}}, set()),
        ({"system": "jupiter-booster", "flags": ("--gpus-per-task=1",)}, {"jupiter-gpus-per-task", "gh200-page-cache"}),
        ({"system": "leonardo-booster", "nodes": 64, "variables": {}}, set()),
    ],
)  # fmt: skip
def test_a_fault_is_told_where_all_its_conditions_hold(situation, expected):
    assert told(**situation) == expected


@pytest.mark.parametrize(
    "version, wanted, inside",
    [("2.9.1+cu128", "==2.9", True), ("2.10.0", "==2.9", False), ("0.18.3", ">=0.17.6,<0.18.3", False),
     ("0.17.6", ">=0.17.6,<0.18.3", True), ("0.19.3", "<=0.19.3", True), ("2.13", ">2.9", True), ("dev", ">=0", True),
     ("2.7.4.post1", "==2.7.4", True), ("0.19.3.1", "<=0.19.3", False)],
)  # fmt: skip
def test_versions_are_compared_by_their_leading_numbers(version, wanted, inside):
    assert version_in(version, wanted) is inside


def test_no_default_of_a_profile_contradicts_a_newer_source():
    for name in sites.names(usable=True):
        assert not contradictions(sites.load(name, overlay=False)), name


KEPT = "    FI_MR_CACHE_MONITOR: userfaultfd\n"


@pytest.mark.parametrize(
    "new, what",
    [(KEPT + '    NCCL_NET_GDR_LEVEL: "3"\n', "set.NCCL_NET_GDR_LEVEL"), ("", "without FI_MR_CACHE_MONITOR")],
)
def test_a_planted_contradiction_is_caught(room, edit, all_systems, new, what):
    """The very defect of the first profile: training material of 2025-05 set what an issue of 2026 found to hang."""
    path = edit("systems/lumi-g.yaml", KEPT, new)
    systems = {**all_systems, "lumi-g": resolve(read_yaml(path), path)}
    found = [f for f in check_services(room, systems, datetime.date.today()) if f.name == "contradiction"]
    assert len(found) == 1 and what in found[0].what and "(2025-05)" in found[0].what and "2026" in found[0].what


@pytest.mark.parametrize(
    "name, old, new, what",
    [
        (
            "lumi-g",
            "lumi-multitorch-u24r70f21m50t210-20260415_130625",
            "lumi-multitorch-u24r64f21m43t29-20260225_1",
            "0.image",
        ),
        ("jupiter-booster", "[--threads-per-core=1]", "[--threads-per-core=1, --gpus-per-task=1]", "launch.srun_flags"),
        ("jupiter-booster", "  never: [--gpus-per-task]", "  flags: [--gpus-per-task=1]", "request.flags"),
        ("alps-daint", 'MPICH_GPU_SUPPORT_ENABLED: "0"', 'MPICH_GPU_SUPPORT_ENABLED: "1"', "set.MPICH_GPU"),
    ],
)
def test_a_default_of_any_kind_is_held_against_the_sources(edit, name, old, new, what):
    """Images and options of the scheduler as much as variables, by a source of today."""
    path = edit(f"systems/{name}.yaml", old, new)
    system = resolve(read_yaml(path), path)
    aged = [
        f.model_copy(update={"source": f.source.model_copy(update={"date": "2026-11-30"})})
        for f in known_faults.known()
    ]
    assert any(what in default for _, default, _ in contradictions(system, tuple(aged)))
    assert not contradictions(sites.load(name, overlay=False)), "as it is shipped, nothing is against it"


def test_a_newer_source_of_the_profile_is_no_contradiction():
    lumi = sites.load("lumi-g", overlay=False)
    fault = next(f for f in known_faults.known() if f.id == "lumi-memory-monitor")
    set_wrong = fault.model_copy(
        update={"where": fault.where.model_copy(update={"unset": [], "variables": {"FI_MR_CACHE_MONITOR": ".*"}})}
    )
    assert contradictions(lumi, (set_wrong,)), "of the same day: looked at"
    older = fault.source.model_copy(update={"date": "2025-01"})
    assert not contradictions(lumi, (set_wrong.model_copy(update={"source": older}),))


@pytest.mark.parametrize(
    "old, new, fault",
    [
        ("systems: [jupiter-booster]", "systems: [jupiter-bosster]", "known-fault"),
        ("- id: lumi-second-group", "- id: lumi-gdr-level", "known-fault"),
        ("expires: 2027-05-31", "expires: 2026-05-31", "known-fault"),
        ('packages: {torch: "==2.9"}', 'packages: {torch: "2.9"}', "schema"),
        ('image: "20260807_115122"', 'image: "2026(0807"', "schema"),
        ("date: 2026-05-05", "date: 2036-05-05", "future-date"),
        ("effect: hang", "effect: odd", "schema"),
    ],
)
def test_faults_of_the_file_are_found(room, edit, all_systems, old, new, fault):
    edit("known-faults.yaml", old, new)
    assert fault in {found.name for found in check_services(room, all_systems, datetime.date.today())}


def test_an_expired_entry_is_told_and_said_to_be_old():
    old = known_faults.known()[0].model_copy(update={"expires": datetime.date(2026, 1, 1)})
    assert old.expired and "expired on 2026-01-01" in old.sentence()
    assert "expired" not in known_faults.known()[0].sentence()


def test_a_file_that_is_none_of_ours_is_refused_with_its_line(tmp_path):
    (tmp_path / "faults.yaml").write_text("faults:\n- id: x\n  effect: hang\n")
    with pytest.raises(UserError, match="where"):
        known_faults.read(tmp_path / "faults.yaml")


def test_doctor_tells_what_is_known_of_this_machine(monkeypatch):
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    told = doctor._known_faults()
    assert "nccl-async-errors-off" in {fault["id"] for fault in told} and all(f["said"] for f in told)


def test_env_tells_what_is_known_of_the_site(capsys):
    assert main(["env", "--site", "alps-clariden"]) == 0
    assert "cscs-eager-messages" in capsys.readouterr().err
