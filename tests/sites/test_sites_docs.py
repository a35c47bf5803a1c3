"""docs/add-a-site.md, followed literally, gives a profile that passes its check and can be shared."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from aifactory_train.sites import new, reading
from aifactory_train.sites.schedulers import SCHEDULERS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "add-a-site.md"


def console_blocks() -> list[list[str]]:
    return [b.strip().splitlines() for b in re.findall(r"```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)]


def steps() -> list[tuple[list[str], str]]:
    """(command, what is typed into it) for every ``$`` line of the page."""
    found: list[tuple[list[str], str]] = []
    prompts = [f"{question}: " for _, question, _ in new.QUESTIONS]
    for block in console_blocks():
        for line in block:
            if line.startswith("$ "):
                found.append((shlex.split(line[2:], comments=True), ""))
                continue
            prompt = next((p for p in prompts if line.startswith(p)), None)
            assert prompt is not None, f"the page shows a question that is not asked: {line}"
            command, typed = found[-1]
            found[-1] = (command, typed + line[len(prompt) :] + "\n")
    return found


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of its own: what a contributor edits."""
    target = tmp_path / "checkout"
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("aifactory_train", "sites"):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=skip)
    return target


def test_the_page_literally(checkout: Path, own_config: Path) -> None:
    env = {**os.environ, "AIFACTORY_CONFIG": str(own_config), "PYTHONPATH": "", "SLURM_CONF": "/nonexistent"}

    def run(command: list[str], typed: str = "") -> subprocess.CompletedProcess[str]:
        assert command[0] == "aifactory"
        return subprocess.run(
            [sys.executable, "-m", "aifactory_train", *command[1:]],
            cwd=checkout,
            env=env,
            text=True,
            capture_output=True,
            input=typed,
            timeout=60,
        )

    reported = steps()
    assert next(c[:3] for c, _ in reported) == ["aifactory", "sites", "new"]
    profile = own_config / "sites" / "my-cluster.yaml"
    for command, typed in reported:
        if command[2] == "probe":
            continue  # needs a cluster: test_sites_probe_slurm does this step
        if "--write-index" in command:
            # Step 5 as the page says: move the file, name it in the member that offers it.
            shutil.move(profile, checkout / "sites" / "systems" / "my-cluster.yaml")
            table = checkout / "sites" / "factories.yaml"
            table.write_text(table.read_text().replace("systems: [lumi-g]", "systems: [lumi-g, my-cluster]"))
        done = run(command, typed)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        if command[2] == "new":
            assert "check: passed" in done.stdout
        if command[1:3] == ["sites", "check"]:
            assert "0 fault(s)" in done.stdout
            if profile.exists():
                _step_three(profile)
                assert "0 fault(s)" in run(["aifactory", "sites", "check", "my-cluster"]).stdout
    listed = run(["aifactory", "sites"]).stdout
    assert "my-cluster" in listed


def _step_three(profile: Path) -> None:
    """Merge the page's example into the profile, as its remark says."""
    shown = re.search(r"```yaml\n(interconnect.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert shown is not None
    example = yaml.safe_load(shown.group(1))
    raw = reading.read_yaml(profile)
    raw["access"].update(example["access"])
    raw["interconnect"] = example["interconnect"]
    raw["facts"] += example["facts"]
    profile.write_text(yaml.safe_dump(raw, sort_keys=False))


def test_the_interview_asks_what_the_page_shows() -> None:
    (command, typed), *_ = steps()
    assert command == ["aifactory", "sites", "new", "my-cluster", "--no-probe"]
    assert typed.count("\n") == len(new.QUESTIONS)


def test_answers_that_are_wrong_are_explained_and_asked_again() -> None:
    said: list[str] = []
    answers = iter(
        [
            "",
            "My Cluster",
            "Me",
            "Finland",
            "FI",
            "",
            "Me",
            "first-hand",
            "?",
            "h100",
            "h100-80",
            "",
            "forever",
            "2d",
            "",
            "0",
            "4",
            "",
            "",
            "",
            "",
            "",
            "",
        ]
    )
    got = new.interview(lambda question: next(answers), said.append, {})
    assert (
        got["name"] == "My Cluster" and got["country"] == "FI" and got["sku"] == "h100-80" and got["max_time"] == "2d"
    )
    assert any("an answer is needed" in s for s in said) and any("two letters" in s for s in said)
    assert any("did you mean" in s for s in said) and any("not a time" in s for s in said)


def test_the_scheduler_follows_from_how_gpus_are_asked_for() -> None:
    reported = {key: None for key, _, _ in new.QUESTIONS} | {
        "name": "X", "operator": "Y", "country": "FI", "maintainer": "Z", "source": "first-hand",
    }  # fmt: skip
    assert set(new.KIND_OF.values()) == set(SCHEDULERS) - {"none"}, "a scheduler that no answer leads to"
    assert len(new.KIND_OF) == sum(len(set(s.gpu_requests) - {"none"}) for s in SCHEDULERS.values()), (
        "one form, two kinds"
    )
    assert new.compose("x", reported, set())["scheduler"]["kind"] == "slurm"  # as before, where nothing is said
    for form, kind in new.KIND_OF.items():
        raw = new.compose("x", reported | {"request": form}, set())
        assert (raw["scheduler"]["kind"], raw["request"]["gpus"]) == (kind, form)


def test_what_is_not_known_is_listed_not_guessed(tmp_path: Path) -> None:
    answers = {key: None for key, _, _ in new.QUESTIONS} | {
        "name": "X", "operator": "Y", "country": "FI", "maintainer": "Z", "source": "first-hand",
    }  # fmt: skip
    raw = new.compose("x", answers, set())
    assert set(raw["missing"]) == {
        "GPU model",
        "architecture",
        "GPUs per node",
        "cores per node",
        "memory per node",
        "selector",
        "account rule",
        "time limit",
    }
    path = tmp_path / "x.yaml"
    new.write(raw, path)
    from aifactory_train.sites import check

    assert check.check_file(path).faults == []


def test_links_and_commands_of_the_pages_exist() -> None:
    for page in (PAGE, ROOT / "docs" / "sites.md"):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([\w./-]+)\)", text):
            assert (page.parent / target).exists(), target
        for name in re.findall(r"`(sites/[\w.-]+\.(?:yaml|json))`", text):
            assert (ROOT / name).exists(), name
