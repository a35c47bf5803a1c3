"""What ``aifactory`` says without a command: what comes next in this folder."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from aifactory_train.core.errors import UserError

#: Entries of a folder that are looked at, and suggestions of a kind that are shown.
_ENTRIES, _SHOWN = 2000, 3
#: Blocks that every recipe has.
_RECIPE = (re.compile(r"^model:", re.MULTILINE), re.compile(r"^data:", re.MULTILINE))


@dataclass(frozen=True)
class Step:
    """A command, and why it comes next."""

    command: str
    why: str


def show(folder: Path) -> None:
    """Print what comes next in ``folder``."""
    found = steps(folder)
    width = max(len(step.command) for step in found)
    print(f"What comes next in {folder.resolve()}:\n")
    for step in found:
        gap = " " * (width - len(step.command)) if width <= 60 else f"\n{' ' * 6}"
        print(f"  {step.command}{gap}  {step.why}")
    print("\nAll commands: aifactory --help; of one: aifactory COMMAND --help.")


def steps(folder: Path) -> list[Step]:
    """Commands that fit what lies in ``folder``: runs that wait for something, recipes that nobody trained, rows
    without a recipe; else how to begin. Reads names, states and verdicts, and changes nothing."""
    runs = _runs(folder)
    found = [step for run in runs[:_SHOWN] for step in _after(run)]
    entries = _entries(folder)
    trained = {_recipe_of(run) for run in runs}
    recipes = [p for p in entries if p.suffix in (".yaml", ".yml") and _is_recipe(p)]
    for path in [p for p in recipes if _id_of(p) not in trained][:_SHOWN]:
        name = _shown(path, folder)
        found.append(Step(f"aifactory prepare {name} --report", "look at the rows of this recipe"))
        found.append(Step(f"aifactory train {name} --name {shlex.quote(path.stem)}", "train it here"))
        found.append(Step(f"aifactory plan {name} --site lumi-g", "or what it takes and costs at a site"))
    texts = [p.read_text(encoding="utf-8", errors="replace") for p in recipes]
    for path in [p for p in entries if _is_data(p) and not any(p.name in text for text in texts)][:_SHOWN]:
        new = f"aifactory recipes new my/{_plain(path.stem)} --data {_shown(path, folder)}"
        found.append(Step(new, "a recipe for these rows"))
    if not found:
        found = [
            Step("aifactory recipes", "recipes by sector, ready to train"),
            Step("aifactory recipes new my/task --data FILE", "a recipe for rows of your own"),
            Step("aifactory sites", "the AI Factories and their systems"),
            Step("aifactory doctor", "what this machine can do"),
        ]
    return found


def _entries(folder: Path) -> list[Path]:
    """Files of the folder and of the folders in it (where ``recipes new`` puts recipes), without hidden ones and
    runs."""
    found: list[Path] = []
    for place in [folder, *sorted(p for p in folder.iterdir() if p.is_dir() and p.name not in ("runs", "aifactory"))]:
        if place != folder and place.name.startswith((".", "_")):
            continue
        try:
            with os.scandir(place) as entries:
                names = [e.name for e, _ in zip(entries, range(_ENTRIES), strict=False) if e.is_file()]
        except OSError:
            continue  # somebody else's
        found += [place / name for name in sorted(names) if not name.startswith(".")]
    return found


def _runs(folder: Path) -> list[Path]:
    """Run folders, the one that changed last first."""
    return sorted((p.parent for p in (folder / "runs").glob("*/run.yaml")), key=_changed, reverse=True)


def _changed(run: Path) -> float:
    state = run / "state.json"
    return (state if state.exists() else run).stat().st_mtime


def _after(run: Path) -> list[Step]:
    from aifactory_train.core.files import object_or_nothing
    from aifactory_train.evaluation.verdict import Verdict
    from aifactory_train.run.folder import RunFolder

    folder, name = RunFolder(run), shlex.quote(run.name)
    try:
        state = folder.state()["state"]
        verdict = Verdict.read(object_or_nothing(folder.eval_file))
    except UserError:
        return [Step(f"aifactory verify {name}", "a file of this run is damaged")]
    if state == "running" and folder.is_live():
        return [Step(f"aifactory report {name} --serve", "follow the run that trains now")]
    if state == "finished":
        report = Step(f"aifactory report {name} --html", "its report")
        if verdict is None:
            return [Step(f"aifactory chat {name}", f"try {run.name}"), report]
        return [Step(verdict.next, f"{run.name}: {verdict.sentence}"), report]
    what = "stopped" if state in ("stopped", "running") else state
    again = f"aifactory train {shlex.quote(str(Path('runs') / run.name / 'run.yaml'))} --name {name} --resume auto"
    return [Step(f"aifactory status {name}", f"{run.name} {what}: why"), Step(again, "go on from its last checkpoint")]


def _recipe_of(run: Path) -> str | None:
    """The id of the recipe that a run was trained with."""
    try:
        return _id_of(run / "run.yaml")
    except OSError:
        return None


def _is_recipe(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return all(block.search(text) for block in _RECIPE)


def _id_of(path: Path) -> str | None:
    found = re.search(r"^id:\s*['\"]?([^\s'\"#]+)", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return found[1] if found else None


def _is_data(path: Path) -> bool:
    from aifactory_train.data import documents, read_sheets, readers

    if documents.is_about(path) or path.name.endswith(".report.json"):
        return False
    table = path.suffix.lower() in readers.TABLE_SUFFIXES - {".json"} or read_sheets.is_sheet(path)
    return table or documents.kind_of(path) in ("PDF", "Word", "PowerPoint", "EPUB")


def _plain(stem: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", stem.casefold()).strip("-._") or "rows"


def _shown(path: Path, folder: Path) -> str:
    return shlex.quote(path.relative_to(folder).as_posix())
