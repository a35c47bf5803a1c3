"""The command: JSON keys, table, page, speed, no torch, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import helpers
import pytest

RECIPE = """model: {base: meta-llama/Llama-3.1-8B}
adapter: {kind: none}
data: {train: rows.jsonl, sequence_length: 4096}
train: {batch_rows: 512}
"""
BASE = ["--site", "leonardo-booster", "--nodes", "8", "--tokens", "1e9"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def run(recipe: Path | str, *args: str, code: str | None = None) -> subprocess.CompletedProcess:
    start = ["-c", code] if code else ["-m", "aifactory_train"]
    return subprocess.run(
        [sys.executable, *start, "plan", str(recipe), *args], capture_output=True, text=True, timeout=120
    )


def test_json_keys(recipe):
    done = run(recipe, *BASE, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    keys = (
        "engine mesh micro_batch grad_accum activation_checkpointing kernels memory_gib capacity_gib "
        "tokens_per_s_per_gpu hours gpu_hours kwh reasons alternatives"
    )
    assert set(keys.split()) <= set(found)
    assert set(found["tokens_per_s_per_gpu"]) == {"low", "mid", "high"} and "total" in found["memory_gib"]
    assert found["gpu_hours"] == pytest.approx(found["hours"] * found["gpus"], rel=1e-3)


def test_fast_and_without_torch(recipe):
    code = (
        "import sys; from aifactory_train.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'rich'} & set(sys.modules); assert not heavy, "
        "heavy; sys.exit(code)"
    )

    helpers.costs_little(lambda: run(recipe, *BASE, "--json", code=code), seconds=0.5, times=3.5)


class _Checker(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not any(k.startswith("on") or k in ("src", "href") for k, _ in attrs)
        if tag not in ("meta", "line", "rect", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("rect", "circle", "line", "polyline"):
            return
        assert self.open.pop() == tag


def test_table_and_page(recipe, tmp_path):
    page = tmp_path / "plan.html"
    done = run(recipe, *BASE, "--html", str(page))
    assert done.returncode == 0, done.stderr
    for word in ("engine", "tokens/s per GPU", "Memory per GPU", "Why", "To train with this plan", "GPU-hours"):
        assert word in done.stdout
    checker = _Checker()
    text = page.read_text(encoding="utf-8")
    checker.feed(text)
    assert not checker.open and "script" not in checker.tags and text.count("<svg viewBox") == 2
    assert "style=" not in text  # it can stand in a page whose policy forbids inline styles
    done = run(recipe, *BASE, "--html", str(tmp_path / "no" / "plan.html"))
    assert done.returncode == 2 and "cannot be written" in done.stderr


def test_text_of_a_user_is_escaped(tmp_path):
    from aifactory_train.planning import page

    plan = json.loads(run(_write(tmp_path), *BASE, "--json").stdout)
    plan["base"] = "<script>x</script>"
    assert "<script>" not in page.render(plan)


def _write(folder: Path) -> Path:
    path = folder / "r.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--site", "lumi-h"], ["lumi-g"]),
        (["--site", "lumi-g", "--nodes", "0"], ["--nodes 0"]),
        (["--site", "lumi-g", "--nodes", "two"], ["--nodes two"]),
        (["--site", "lumi-g", "--nodes", "2", "--deadline", "3"], ["--nodes auto"]),
        (["--site", "lumi-g", "--tokens", "-5"], ["--tokens"]),
        (["--site", "lumi-g", "--nodes", "auto", "--deadline", "nan"], ["--deadline"]),
        (["--site", "lumi-g", "--nodes", "5000"], ["1024"]),
        (["--site", "lumi-g", "--set", "model.base=mistralai/Mixtral-9x7B-v0.1"], ["not known", "--model-config"]),
        (
            ["--site", "lumi-g", "--set", "model.base=openai/gpt-oss-20b"],
            ["quantised (mxfp4)", "--set model.base=unsloth/gpt-oss-20b-BF16"],
        ),
        (
            ["--site", "lumi-g", "--set", "data.sequence_length=262144", "--set", "train.micro_batch_tokens=262144"],
            ["131072 positions"],
        ),
        (["--site", "lumi-g", "--nodes", "100"], ["cannot be divided"]),
        (["--site", "lumi-g", "--gpus-per-node", "9"], ["8 GPUs"]),
        (["--site", "lumi-g", "--set", "parallel.engin=ddp"], ["did you mean"]),
        (["--site", "lumi-g", "--model-config", "nowhere.json"], ["no config.json"]),
    ],
)
def test_bad_input(recipe, args, words):
    done = run(recipe, *args)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def test_a_mixture_of_experts_without_formulae_is_refused(recipe, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "jetmoe", "num_local_experts": 8}), encoding="utf-8")
    done = run(recipe, "--site", "lumi-g", "--model-config", str(file))
    assert done.returncode == 2 and "mixture of experts" in done.stderr


def test_prepared_data_give_the_size(recipe, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    folder = cache / "prepared" / "local-r-0123456789abcdef"
    folder.mkdir(parents=True)
    report = {
        "recipe": "local/r",
        "sets": {"train": {"tokens": 4_000_000, "documents": 10_000, "supervised": 1_000_000}},
    }
    (folder / "prepared.json").write_text(json.dumps({"report": report}), encoding="utf-8")
    monkeypatch.setenv("AIFACTORY_CACHE", str(cache))
    found = json.loads(run(recipe, "--site", "leonardo-booster", "--nodes", "4", "--json").stdout)
    assert found["size"]["tokens_per_epoch"] == 4_000_000 and "prepared" in found["size"]["source"]
    assert found["steps"] == 20  # 10,000 documents, 512 a step
    assert found["step_tokens"] == pytest.approx(512 * 400)
    (folder / "prepared.json").write_text("{", encoding="utf-8")
    found = json.loads(run(recipe, "--site", "leonardo-booster", "--nodes", "4", "--json").stdout)
    assert found["hours"] is None and "unknown" in found["size"]["source"]


def test_the_settings_can_be_copied_as_one_line(recipe):
    found = json.loads(run(recipe, *BASE, "--json").stdout)
    shown = run(recipe, *BASE).stdout.splitlines()
    line = shown[shown.index("To train with this plan:") + 1]
    assert line.count("--set ") == len(found["overrides"]) and len(line) > 110
    for key in found["overrides"]:
        assert f"--set {key}=" in line


def test_the_overlay_names_partition_and_qos(recipe, tmp_path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("overlay_for: lumi-g\nuser: {partition: small-g, qos: of-my-own}\n", encoding="utf-8")
    small = ["--site", "lumi-g", "--tokens", "1e9", "--site-file", str(overlay), "--nodes"]
    assert json.loads(run(recipe, *small, "4", "--json").stdout)["partition"] == "small-g"
    refused = run(recipe, *small, "8")
    assert refused.returncode == 2 and "small-g allows 4 node(s)" in refused.stderr
    other = run(recipe, *small, "8", "--partition", "standard-g", "--json")
    assert json.loads(other.stdout)["partition"] == "standard-g"


def test_a_part_of_a_node_where_nodes_are_whole_is_said(recipe):
    small = [
        "--site",
        "lumi-g",
        "--nodes",
        "1",
        "--gpus-per-node",
        "1",
        "--tokens",
        "1e9",
        "--set",
        "model.base=Qwen/Qwen3-0.6B",
    ]
    reported = run(recipe, *small, "--set", "train.batch_rows=16").stdout
    assert "whole nodes: standard-g gives (and bills) all 8 GPUs of a node" in " ".join(reported.split())
    assert "--partition small-g" in reported
    assert "whole nodes" not in run(recipe, *small, "--set", "train.batch_rows=16", "--partition", "small-g").stdout
