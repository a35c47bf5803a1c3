"""What is asked before and after a job: what it costs, how one gets in, who helps; and access for all 32 members."""

from __future__ import annotations

import datetime
import json

import pytest

from aifactory_train import sites
from aifactory_train.cli import main
from aifactory_train.core.errors import UserError
from aifactory_train.sites.access import access_file
from aifactory_train.sites.billing import bill, gpu_hours_of
from aifactory_train.sites.centres import Centre, centre_of, with_centre
from aifactory_train.sites.check.services import check_services
from aifactory_train.sites.services import SECTIONS

#: The twelve largest machines that run jobs today, and two more of a factory each.
LARGEST = [
    "jupiter-booster", "lumi-g", "leonardo-booster", "alps-clariden", "alps-daint", "marenostrum5-acc", "arrhenius",
    "jean-zay-h100", "meluxina", "hunter", "karolina", "vega", "snellius-h100", "juwels-booster",
]  # fmt: skip


def test_lumi_bills_a_gpu_hour_for_a_module_of_two_gcds():
    """By hand, from LUMI's billing policy: on standard-g whole nodes are billed, one node-hour is 4 GPU-hours (a node
    has four MI250X modules of two GCDs), so 2 nodes x 4 h = 2 x 4 x 4 = 32. Slurm counts 2 x 8 x 4 = 64 GCD-hours.
    """
    lumi = sites.load("lumi-g", overlay=False)
    found = bill(lumi, 2, 4, partition="standard-g")
    assert found is not None and (found.amount, found.unit) == (32, "GPU-hours")
    # The policy's own examples: 4 nodes for 24 h on standard-g, 2 GCDs for 24 h on small-g.
    assert bill(lumi, 4, 24, partition="standard-g").amount == 384
    assert bill(lumi, 1, 24, partition="small-g", gpus_per_node=2).amount == 24
    assert bill(lumi, 1, 24, partition="standard-g", gpus_per_node=2).amount == 96, "the whole node, whatever is taken"
    assert gpu_hours_of(lumi, 32, partition="standard-g") == 64


@pytest.mark.parametrize(
    "system, nodes, hours, gpus, amount, unit",
    [
        ("jupiter-booster", 1, 1, 1, 288, "core-hours"),  # nodes are exclusive
        ("leonardo-booster", 1, 1, 4, 32, "core-hours"),
        ("leonardo-booster", 1, 10, 1, 80, "core-hours"),
        ("marenostrum5-acc", 2, 3, 1, 480, "core-hours"),
        ("karolina", 1, 8, 1, 1, "node-hours"),  # one of eight GPUs
        ("snellius-h100", 1, 1, 4, 768, "SBU"),
        ("snellius-a100", 1, 1, 1, 128, "SBU"),
        ("alps-clariden", 1, 2, 1, 2, "node-hours"),
        ("jean-zay-h100", 2, 1, 4, 8, "GPU-hours"),
    ],
)
def test_each_site_bills_in_its_own_unit(system, nodes, hours, gpus, amount, unit):
    loaded = sites.load(system, overlay=False)
    found = bill(loaded, nodes, hours, gpus_per_node=gpus, partition=loaded.default_partition)
    assert found is not None and (found.amount, found.unit) == (amount, unit), found


def test_what_a_site_has_not_published_has_no_bill_and_no_budget():
    vega = sites.load("vega", overlay=False)
    assert bill(vega, 1, 1) is None
    with pytest.raises(UserError, match="not published"):
        gpu_hours_of(vega, 10)
    own = sites.load("vega", overlay={"corrections": {"accounting.unit": "core-hours", "accounting.per_gpu_hour": 32}})
    assert bill(own, 1, 1, gpus_per_node=4).amount == 128


@pytest.mark.parametrize("system", LARGEST)
def test_the_largest_systems_answer_every_question_or_say_whom_to_ask(system):
    loaded = sites.load(system, overlay=False)
    for key in SECTIONS:
        section = getattr(loaded, key)
        assert not section.unanswered(), (key, section.unanswered())
        assert all(len(ask) > 5 for ask in section.unknown.values())
    assert loaded.access.login_hosts or system == "jureca-dc"
    stated = [f for f in loaded.stated_facts() if f.path.split(".")[0] in SECTIONS]
    assert len(stated) >= 5 and all(f.url or (f.source and f.date) for f in stated)


def test_sites_shows_cost_login_queue_data_help_and_what_is_unknown(capsys):
    assert main(["sites", "lumi-g"]) == 0
    out = capsys.readouterr().out
    for words in ("billed in", "GPU-hours; 4 a node and hour", "lumi-allocations", "lumi-quota", "model cache",
                  "need-help", "accounting.per_node_hour", "centre-guide: lumi-userguide @6c3a26c",
                  "not published; ask:", "queue.default_time", "known faults", "lumi-gdr-level"):  # fmt: skip
        assert words in out, words


def test_every_member_says_where_to_run_how_to_get_access_and_whom_to_ask(capsys):
    members = sites.members()
    assert len(members) == 32
    file = access_file()
    for member in members:
        assert main(["sites", member["id"]]) == 0
        out = capsys.readouterr().out
        run, access, ask = (out.split(f"\n{label}: ")[1] if label != "how" else out.split("how to get access:\n")[1]
                            for label in ("where to run today", "how", "whom to ask"))  # fmt: skip
        assert run.splitlines()[0].strip()
        names = [file.routes[route].name for route in file.members[member["id"]].routes]
        assert names and all(name in access for name in names) and "http" in access
        assert "http" in ask or "@" in ask, member["id"]
        assert ("not published by the member" in ask) is file.members[member["id"]].unknown


def test_access_is_in_the_json_of_a_member(capsys):
    assert main(["sites", "hearts", "--json"]) == 0
    access = json.loads(capsys.readouterr().out)["access"]
    assert access["contact_known"] and access["routes"][0]["id"] == "cscs-user-lab" and access["routes"][0]["as_of"]


def test_a_profile_wins_over_its_centre_key_by_key():
    centre = Centre.model_validate(
        {"operator": "X", "systems": ["m"], "sources": {"s": {"title": "t", "date": "2026-01"}},
         "sections": {"help": {"support": "a@b", "documentation": "https://c", "unknown": {"status": "a@b"}}},
         "facts": [{"at": ["help"], "source": "s", "confidence": "documented"}]}
    )  # fmt: skip
    own = {
        "id": "m",
        "help": {"support": "me@here"},
        "facts": [{"at": ["help"], "source": "mine", "confidence": "user"}],
    }
    merged = with_centre(own, centre)
    assert merged["help"] == {"support": "me@here", "documentation": "https://c", "unknown": {"status": "a@b"}}
    assert merged["facts"][0]["at"] == ["help.documentation"] and merged["facts"][0]["source"] == "centre-s"
    assert merged["facts"][-1] == own["facts"][0]
    answered = with_centre({"id": "m", "help": {"status": "https://d"}}, centre)
    assert answered["help"]["status"] == "https://d" and "unknown" not in answered["help"]


def test_every_centre_runs_systems_that_can_be_used():
    assert centre_of("lumi-g") is not None and centre_of("lumi-ai") is None and centre_of("nothing") is None
    names = [name for name in sites.names(usable=True) if centre_of(name) is not None]
    assert set(LARGEST) <= set(names)


@pytest.mark.parametrize(
    "file, old, new, fault",
    [
        ("centres/csc.yaml", "systems: [lumi-g]", "systems: [lumi-g, lumi-h]", "centre"),
        ("centres/csc.yaml", "    quota_command: lumi-quota\n", "", "unanswered"),
        (
            "centres/csc.yaml",
            "facts:\n",
            "facts:\n  - {at: [energy], source: guide, confidence: documented}\n",
            "centre",
        ),
        ("centres/bsc.yaml", "systems: [marenostrum5-acc]", "systems: [lumi-g]", "centre"),
        ("access.yaml", "  czai: {", "  czar: {", "access"),
        ("access.yaml", "routes: [naiss, playground", "routes: [naisse, playground", "access"),
        ("access.yaml", "  brain-plus-plus: {unknown: true", "  brain-plus-plus: {unknown: false", "schema"),
    ],
)
def test_faults_of_centres_and_access_are_found(room, edit, all_systems, file, old, new, fault):
    edit(file, old, new)
    assert fault in {found.name for found in check_services(room, all_systems, datetime.date.today())}


def test_a_key_cannot_be_answered_and_unknown_at_once():
    both = {"help.unknown": {"support": "somebody"}}
    with pytest.raises(UserError, match="'support' is stated and named as unknown"):
        sites.load("lumi-g", overlay={"corrections": both})


def test_a_route_of_an_operator_names_one_that_is_there(tmp_path):
    """A name that no profile has would lead nowhere, and nobody would notice."""
    import shutil

    from aifactory_train.sites import catalogue, fleet
    from aifactory_train.sites.check.services import check_access

    systems = {s.id: s for s in fleet.load_all()}
    for name in ("factories.yaml", "access.yaml"):
        shutil.copy(catalogue.ROOM / name, tmp_path / name)
    today = datetime.date(2026, 12, 1)
    assert not list(check_access(tmp_path, systems, today))
    text = (tmp_path / "access.yaml").read_text(encoding="utf-8")
    for was, becomes in (
        ("operator: CSCS", "operator: CSC Switzerland"),
        ("systems: [lumi-g, leo", "systems: [lumi, leo"),
    ):
        assert was in text
        (tmp_path / "access.yaml").write_text(text.replace(was, becomes), encoding="utf-8")
        found = list(check_access(tmp_path, systems, today))
        assert found and {fault.name for fault in found} == {"access"}
