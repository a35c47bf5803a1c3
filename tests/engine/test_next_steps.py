"""``aifactory`` without a command says what comes next in this folder; completion scripts complete."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import helpers
import pytest

from aifactory_train import cli
from aifactory_train.commands import next_steps

RECIPE = "id: acme/tickets\nmodel:\n  base: x\ndata:\n  train: {source: ./tickets.csv}\n"


def commands(folder: Path) -> list[str]:
    """The suggested commands, each of which has to parse."""
    found = [step.command for step in next_steps.steps(folder)]
    for command in found:
        words = shlex.split(command)[1:]
        assert cli.two_words(words) or cli.build_parser(words[0]).parse_args(words), command
    return found


def run_folder(folder: Path, name: str, state: str, **files: object) -> Path:
    run = folder / "runs" / name
    run.mkdir(parents=True)
    (run / "run.yaml").write_text(RECIPE)
    (run / "state.json").write_text(json.dumps({"state": state, "step": 3}))
    for file, tree in files.items():
        (run / f"{file}.json").write_text(json.dumps(tree))
    return run


def test_an_empty_folder_is_told_how_to_begin(tmp_path: Path) -> None:
    assert commands(tmp_path)[0] == "aifactory recipes"


def test_rows_want_a_recipe_and_a_recipe_a_training(tmp_path: Path) -> None:
    (tmp_path / "Meine Tickets.csv").write_text("Frage;Antwort\n")
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    assert commands(tmp_path) == ["aifactory recipes new my/meine-tickets --data 'Meine Tickets.csv'"]
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "tickets.yaml").write_text(RECIPE.replace("tickets.csv", "../Meine Tickets.csv"))
    (tmp_path / "acme" / "other.yaml").write_text("model: no recipe")
    assert commands(tmp_path)[:2] == [
        "aifactory prepare acme/tickets.yaml --report",
        "aifactory train acme/tickets.yaml --name tickets",
    ]
    assert not any("recipes new" in command for command in commands(tmp_path))
    run_folder(tmp_path, "tickets", "finished")
    assert commands(tmp_path) == ["aifactory chat tickets", "aifactory report tickets --html"]


def test_runs_are_told_by_their_state(tmp_path: Path) -> None:
    verdict = {
        "word": "too short",
        "sentence": "Too short: 3 steps.",
        "next": "aifactory train runs/a/run.yaml --name b",
    }
    run_folder(tmp_path, "a", "finished", eval={"verdict": verdict})
    (first, report) = next_steps.steps(tmp_path)
    assert (first.command, first.why) == (verdict["next"], "a: Too short: 3 steps.") and report.command.endswith(
        "--html"
    )
    for state in ("stopped", "failed", "running"):  # nobody is at work in the last one
        folder = tmp_path / state
        run_folder(folder, "a b", state)
        status, again = commands(folder)
        assert status == "aifactory status 'a b'"
        assert again == "aifactory train 'runs/a b/run.yaml' --name 'a b' --resume auto"
    (tmp_path / "damaged").mkdir()
    (run_folder(tmp_path / "damaged", "x", "finished") / "state.json").write_text("{")
    assert commands(tmp_path / "damaged") == ["aifactory verify x"]


def test_the_program_says_it_and_lists_its_commands_when_asked(tmp_path: Path) -> None:
    done = helpers.cli(cwd=tmp_path)
    assert done.returncode == 0 and "aifactory recipes" in done.stdout and "--help" in done.stdout, done.stderr
    assert str(tmp_path) in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    done = helpers.cli("completion", shell, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(command in done.stdout for command in cli.COMMANDS) and "gpus-per-node" in done.stdout
    if shell != "bash":
        return
    (tmp_path / "complete").write_text(done.stdout)
    script = """
source ./complete
ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _shtab_aifactory; echo "${COMPREPLY[@]}"; }
ask aifactory comp; ask aifactory plan --dead; ask aifactory export first --format g
"""
    told = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.stdout.splitlines() == ["completion", "--deadline", "gguf"], told.stdout + told.stderr
