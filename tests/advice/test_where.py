"""The ranking: what holds for every row, what each wish rules out, and that it is what the planner says."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import helpers
import pytest

from aifactory_train import sites
from aifactory_train.advice.page import page as render
from aifactory_train.advice.routes import Applicant, Need, country_code, routes_to
from aifactory_train.advice.sizing import Demand, Fit, NoFit, Sizer
from aifactory_train.advice.where import REASONS, Wishes, rank
from aifactory_train.cli import main
from aifactory_train.config.loading import load_recipe
from aifactory_train.core.errors import UserError
from aifactory_train.planning import plan_for

NINE = ["model.base=utter-project/EuroLLM-9B-Instruct", "train.batch_rows=64", "train.max_steps=null"]
TOKENS = 2e7


@pytest.fixture(scope="module")
def demand() -> Demand:
    return Demand.of(load_recipe("health/phenotype-terms", NINE), TOKENS)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main(["where", *args])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_json_is_one_line_with_the_keys_that_others_rely_on(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "health/phenotype-terms", "--country", "FI", "--sme", "--json")
    assert code == 0 and err == "" and out.count("\n") == 1
    rows = json.loads(out)["sites"]
    assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
    index = {s for m in sites.members() for key in ("systems", "announced", "unsuitable") for s in m[key]}
    assert {row["id"] for row in rows} == index, "every system of the 32, whatever its state"
    for row in rows:
        assert {"id", "fits", "why", "hours", "gpu_hours", "billed", "kwh", "access", "readiness"} <= set(row)
        assert row["billed"] is None or set(row["billed"]) == {"unit", "amount"}
    assert rows[0]["id"] == "lumi-g" and rows[0]["fits"]


@pytest.mark.parametrize(
    "wishes",
    [
        Wishes(),
        Wishes(Applicant("FI", "sme")),
        Wishes(Applicant("CH", None), deadline_hours=0.5, budget_gpu_hours=2, sensitive=True),
    ],
)
def test_every_row_has_its_reason_and_every_figure_its_source(demand: Demand, wishes: Wishes) -> None:
    rows = rank(demand, wishes)
    assert [row["fits"] for row in rows] == sorted((row["fits"] for row in rows), reverse=True)
    for row in rows:
        assert row["why"] and (row["excluded_by"] in REASONS) is not row["fits"]
        if row["fits"]:
            assert row["access"] and row["nodes"] and row["gpus_per_node"]
        for column in ("hours", "gpu_hours", "kwh", "co2_kg", "billed", "internet"):
            assert row[column] is None or row["sources"][column]["source"], (row["id"], column)
        for route in row["access"]:
            assert route["link"].startswith("https://") and route["source"] and route["as_of"] and route["contact"]
        assert row["fits"] or row["excluded_by"] != "access" or not row["access"]


def test_the_figures_are_those_of_the_plan(demand: Demand) -> None:
    rows = [row for row in rank(demand, Wishes()) if row["fits"]]
    assert len(rows) > 30
    for row in rows[::4]:
        system = sites.load(row["id"], overlay=False)
        plan, _ = plan_for(demand.recipe, system, row["nodes"], gpus_per_node=row["gpus_per_node"], tokens=TOKENS)
        for key in ("hours", "gpu_hours", "kwh", "co2_kg"):
            assert row[key] == plan[key], (row["id"], key)
        billed = plan["billed"] and {key: plan["billed"][key] for key in ("unit", "amount")}
        assert row["billed"] == billed


def test_a_deadline_takes_the_nodes_that_the_plan_takes(demand: Demand) -> None:
    more = 0
    for name in ("leonardo-booster", "lumi-g", "snellius-a100"):
        system = sites.load(name, overlay=False)
        plan, _ = plan_for(demand.recipe, system, None, deadline_hours=0.2, tokens=TOKENS)
        fit = Sizer(demand, deadline_hours=0.2).of(system)
        assert isinstance(fit, Fit) and (fit.nodes, fit.figures["hours"]) == (plan["nodes"], plan["hours"]), name
        more += plan["nodes"] > 1
    assert more >= 2
    never = Sizer(demand, deadline_hours=0.001).of(sites.load("vega", overlay=False))
    assert isinstance(never, NoFit) and never.kind == "deadline" and "h on" in never.why
    dear = Sizer(demand, budget_gpu_hours=0.1).of(sites.load("vega", overlay=False))
    assert isinstance(dear, NoFit) and dear.kind == "budget" and "GPU-hours" in dear.why


@pytest.mark.parametrize(
    "wishes",
    [
        Wishes(Applicant("IE", None)),
        Wishes(Applicant(None, "sme")),
        Wishes(deadline_hours=0.3),
        Wishes(budget_gpu_hours=1.0),
        Wishes(sensitive=True),
    ],
)
def test_a_wish_only_takes_sites_away(demand: Demand, wishes: Wishes) -> None:
    every = {row["id"] for row in rank(demand, Wishes()) if row["fits"]}
    some = {row["id"] for row in rank(demand, wishes) if row["fits"]}
    assert some < every


def test_a_step_with_fewer_rows_than_a_node_has_gpus_takes_fewer_of_them() -> None:
    rows = {row["id"]: row for row in rank(Demand.of(load_recipe("health/phenotype-terms", [])), Wishes())}
    lumi = rows["lumi-g"]
    assert lumi["fits"] and (lumi["nodes"], lumi["gpus_per_node"]) == (1, 4), "four rows a step, eight GCDs a node"
    assert lumi["billed"]["amount"] == pytest.approx(4 * lumi["hours"], abs=6e-4), "standard nodes are billed whole"


def test_a_large_job_closes_small_routes() -> None:
    leonardo = sites.load("leonardo-booster", overlay=False)
    small, closed = routes_to(leonardo, Applicant("IT", "sme"), Need(gpu_hours=10, node_hours=2.5))
    assert "playground" in {r["id"] for r in small} and any("AI for Science" in why for why in closed)
    large, closed = routes_to(leonardo, Applicant("IT", "sme"), Need(gpu_hours=60_000, node_hours=15_000))
    left = {r["id"] for r in large}
    assert not left & {"playground", "fast-lane", "benchmark", "development"} and {"large-scale", "regular"} <= left
    assert any("60,000 GPU-hours" in why for why in closed)
    lumi = sites.load("lumi-g", overlay=False)
    billed, _ = routes_to(lumi, Applicant(), Need(gpu_hours=8_000, billed_gpu_hours=4_000, node_hours=1_000))
    assert "playground" in {r["id"] for r in billed}, "its GPU-hours are those of the bill: modules, not GCDs"


def test_a_country_whose_part_in_the_programme_is_not_known_is_to_be_asked_about() -> None:
    found, _ = routes_to(sites.load("vega", overlay=False), Applicant("CH", "sme"), Need())
    assert found and {route["status"] for route in found} == {"ask"}


def test_a_share_leads_through_the_member_of_the_country() -> None:
    found, _ = routes_to(sites.load("meluxina", overlay=False), Applicant("IE", "sme"), Need())
    national = next(route for route in found if route["id"] == "national")
    assert national["through"] == "aif-irl" and "ICHEC" in national["note"] and "Kay" in national["source"]


def test_sensitive_data_of_a_recipe_count_without_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "health/phenotype-terms", "--set", "privacy.profile=sensitive", "--json")
    answer = json.loads(out)
    assert answer["asked"]["sensitive"] and [r["id"] for r in answer["sites"] if r["fits"]] == ["lumi-g"]


def test_your_own_answer_of_a_site_counts(demand: Demand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sites").mkdir()
    text = "overlay_for: vega\ncorrections: {data.sensitive: agreement, data.sensitive_rule: our contract of 2026}\n"
    (tmp_path / "sites" / "vega.yaml").write_text(text)
    monkeypatch.setenv("AIFACTORY_CONFIG", str(tmp_path))
    vega = next(r for r in rank(demand, Wishes(sensitive=True)) if r["id"] == "vega")
    assert vega["fits"] and "our contract of 2026" in vega["why"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--country", "finnland"], ["did you mean 'Finland'", "--country"]),
        (["--country", "US"], ["no country that takes part", "leave it out"]),
        (["--deadline", "soon"], ["--deadline soon", "3d, 36h"]),
        (["--deadline", "-3"], ["--deadline -3"]),
        (["--deadline", "nan"], ["positive number of hours"]),
        (["--budget", "0"], ["--budget"]),
        (["--tokens", "inf"], ["--tokens"]),
        (["--deadline", "3d", "--set", "train.max_steps=null"], ["--tokens", "prepare"]),
        (["--set", "adapter.targets=[nothing]"], ["adapter.targets"]),
    ],
)
def test_bad_input_is_refused_by_name(capsys: pytest.CaptureFixture[str], args: list[str], words: list[str]) -> None:
    code, out, err = run(capsys, "health/phenotype-terms", *args)
    assert code == 2 and out == "" and all(word in err for word in words), err


def test_countries_by_name_and_letters() -> None:
    assert country_code("finland") == country_code(" fi ") == "FI" and country_code("no") == "NO"
    assert country_code("uk") == "GB" and country_code("EL") == "GR"  # what people and the EU write
    with pytest.raises(UserError, match="no country"):
        country_code("")


def test_the_table_says_what_to_do_next(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "health/phenotype-terms", "--country", "finland", "--sme", "--deadline", "36h")
    assert code == 0 and "for an SME in FI, within 36 h" in out
    command = "aifactory plan health/phenotype-terms --site lumi-g --nodes 1 --gpus-per-node 4"
    assert command in out and "aifactory sites lumi-aif" in out and "left out" in out
    assert main(command.split()[1:]) == 0


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.members: dict[str, str] = {}
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if "data-member" in values:
            self.members[str(values["data-member"])] = str(values["data-state"])
        if tag in ("script", "link", "img", "iframe") or "src" in values or any(k.startswith("on") for k in values):
            self.fetched.append(tag)


def test_the_page_shows_the_32_and_fetches_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    told = ["health/phenotype-terms", "--country", "IE", "--sme", "--html"]
    code, out, err = run(capsys, *told, str(tmp_path / "w.html"), "--json")
    assert code == 0, err
    text = (tmp_path / "w.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert set(page.members) == {m["id"] for m in sites.members()} and not page.fetched
    assert page.members["meluxina-aif"] == "fits" and page.members["aif-irl"] == "linked"
    assert page.members["litai"] == "none"
    assert "<b>bold" not in render({**json.loads(out), "base": "<b>bold</b>"})
    code, _, err = run(capsys, *told, str(tmp_path / "no" / "w.html"))
    assert code == 2 and "--html" in err


def test_all_systems_in_a_second_without_torch() -> None:
    code = (
        "import sys; from aifactory_train.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'jinja2'} & set(sys.modules); assert not heavy, heavy; "
        "sys.exit(code)"
    )
    sets = [word for text in NINE for word in ("--set", text)]
    command = ["where", "health/phenotype-terms", "--country", "FI", "--sme", "--tokens", "2e7", "--json", *sets]

    started = [sys.executable, "-c", code, *command]
    helpers.costs_little(
        lambda: subprocess.run(started, capture_output=True, text=True, timeout=120, check=False), seconds=1.0, times=7
    )
