"""The studio's whole path in a real browser, from a file of rows to an export, with the tiny model; and that killing
the studio in the middle of a training ends no run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest

from aifactory_train.run.folder import RunFolder

from .conftest import Browser, studio_for

MODULES = Path(__file__).parents[1] / "record" / "node_modules"


def rows(folder: Path) -> Path:
    """A file of questions and answers."""
    path = folder / "tickets.csv"
    lines = [f'"What colour is door {i}?","Door {i} is red, as door {i * 7} is."' for i in range(40)]
    path.write_text("question,answer\n" + "\n".join(lines) + "\n")
    return path


@pytest.mark.slow
def test_the_whole_path_in_chromium(tmp_path: Path, tiny_model_dir: Path) -> None:
    """No console errors, no request to another machine, no accessibility fault that axe-core knows, on a desktop in the
    light and on a phone in the dark. Screenshots go to $AIFACTORY_SCREENSHOTS."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    modules = Path(os.environ.get("AIFACTORY_NODE_MODULES", MODULES))
    if not (chromium and shutil.which("node") and (modules / "axe-core").is_dir()):
        assert not os.environ.get("AIFACTORY_REQUIRE_BROWSER"), "chromium, node or axe-core is missing"
        pytest.skip("needs chromium, node and: npm install --ignore-scripts --prefix tests/record")
    out = Path(os.environ.get("AIFACTORY_SCREENSHOTS", tmp_path / "shots"))
    desk, elsewhere = tmp_path / "desk", tmp_path / "elsewhere"
    for folder in (out, desk, elsewhere):
        folder.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("browser.mjs")
    with studio_for(desk) as studio:
        words = ["node", script, chromium, modules, f"{studio.own}/?token={studio.token}", rows(elsewhere)]
        done = subprocess.run(
            [*map(str, words), str(tiny_model_dir), str(out)], capture_output=True, text=True, timeout=580, check=False
        )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    print(seen["times"])
    assert seen["foreign"] == [] and seen["errors"] == []
    assert seen["violations"] == [] and seen["overflow"] == []
    assert seen["visited"] == ["data", "recipe", "where", "plan", "run", "results", "/report", "/compare"]
    assert seen["address"] == "/data" and seen["cookie"] == "" and seen["first"] == "skip"
    assert "is red" in seen["learnt"] and "What colour" not in seen["learnt"]
    assert "max_steps: 4" in seen["yaml"] and "# Written by" in seen["yaml"]
    assert seen["members"] == 32 and seen["parts"] > 3
    assert seen["state"] == "done" and seen["charts"] >= 4 and all(seen["outputs"]) and seen["updateMs"] < 100
    assert seen["verdict"] and seen["exported"] == ["runs/first/export/adapter", "runs/first/export/merged"]
    assert RunFolder(desk / "runs" / "first").state()["step"] == 4


@pytest.mark.slow
def test_killing_the_studio_ends_no_training(tmp_path: Path, tiny_model_dir: Path) -> None:
    helpers.write_recipe(tmp_path, tiny_model_dir, settings={"eval.forgetting": False, "train.max_steps": 6})
    command = [sys.executable, "-m", "aifactory_train", "studio", "--port", "0", "--no-browser"]
    studio = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=helpers.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert studio.stdout is not None
    address = studio.stdout.readline().strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32,}", address)  # on the first line
    browser = Browser(address)
    browser.enter()
    assert browser.post("/run/start", recipe="recipe.yaml", name="mine") == (303, "/run?run=mine")
    run = RunFolder(tmp_path / "runs" / "mine")
    end = time.time() + 300
    while not run.config_file.is_file() and time.time() < end:
        time.sleep(0.2)
    assert run.state()["state"] != "finished"
    os.killpg(studio.pid, signal.SIGKILL)
    studio.wait(20)
    while run.state()["state"] not in ("finished", "failed", "stopped") and time.time() < end:
        time.sleep(0.5)
    assert run.state()["state"] == "finished" and run.state()["step"] == 6, (
        tmp_path / "aifactory/mine.log"
    ).read_text()
