"""The Python API as its users meet it: examples of the docstrings and of docs/python.md run, names do not shadow rooms,
rows of every kind become the same file, results show themselves without letting anything through."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import pytest

import aifactory_train as af
from aifactory_train.api import preparing, showing
from aifactory_train.api.rows import as_source
from aifactory_train.core.errors import RunFailed, UserError

PAGE = helpers.ROOT / "docs" / "python.md"
#: Classes that a user is handed and never calls; docs/python.md uses each in an example.
BY_THE_PAGE = {"Event", "PhaseBegan", "RunStarted", "StepDone", "Evaluated", "Incident", "Saved", "Exported"} | {
    *("VerdictReached", "RunEnded", "Recipe", "UserError", "RunFailed"),
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with the tiny model, a recipe, and the run ``first`` that the examples speak of."""
    folder = tmp_path_factory.mktemp("desk")
    before = Path.cwd()
    helpers.write_model(folder / "model")
    settings = {"eval.generate_rows": 4, "eval.max_new_tokens": 8, "eval.forgetting": False, "export.verify": False}
    helpers.write_recipe(folder, folder / "model", settings=settings)
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def run(desk: Path) -> af.TrainedRun:
    """The run of the example of ``train``, which is thereby tried."""
    assert _examples(af.train, "train")
    return af.TrainedRun.open("first")


def _examples(thing: object, name: str) -> int:
    """Run the examples of a docstring and of its methods'; returns how many there are."""
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False)
    tried = 0
    for test in doctest.DocTestFinder(exclude_empty=True).find(thing, name):
        if test.examples:
            told: list[str] = []
            runner.run(test, out=told.append, clear_globs=True)
            assert not runner.failures, "".join(told)
            tried += len(test.examples)
    return tried


def test_the_example_of_train(run: af.TrainedRun) -> None:
    assert run.state == "finished"


@pytest.mark.parametrize("name", sorted(set(af.__all__) - {"train"} - BY_THE_PAGE))
def test_examples(name: str, run: af.TrainedRun) -> None:
    assert _examples(getattr(af, name), name) > 0, f"{name} has no example"


@pytest.mark.slow
def test_the_page_runs_and_names_everything(desk: Path) -> None:
    """Python blocks of docs/python.md run one after the other in one process; every stable name is in its list."""
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    scope: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE}, block {number}", "exec"), scope)
    listed = set(re.findall(r"`af\.(\w+)`", text))
    assert set(af.__all__) <= listed, set(af.__all__) - listed
    assert listed == set(af.__all__)
    for name in BY_THE_PAGE:
        assert any(f"af.{name}" in block for block in blocks), name


# ---- names


def test_no_room_is_called_like_a_stable_name() -> None:
    rooms = {found.name for found in pkgutil.iter_modules(af.__path__)}
    assert len(rooms) > 20 and not rooms & set(dir(af)) & set(af.__all__)
    assert not rooms & set(af.__all__)


@pytest.mark.slow
def test_no_name_is_lost_to_a_room() -> None:
    """Every module of the package is imported; then every stable name is still the API's own."""
    code = """
import importlib, pkgutil, sys
import aifactory_train as af
failed = []
for found in pkgutil.walk_packages(af.__path__, "aifactory_train."):
    if found.name.endswith("__main__") or ".programs" in found.name or ".model.data" in found.name:
        continue
    try:
        importlib.import_module(found.name)
    except (ImportError, RuntimeError) as error:
        failed.append(found.name)
import types
rooms = {m.name for m in pkgutil.iter_modules(af.__path__)}
assert not rooms & set(af.__all__), rooms & set(af.__all__)
for name in af.__all__:
    assert not isinstance(getattr(af, name), types.ModuleType), name
assert af.systems()[0]["id"] and af.recipe("health/phenotype-terms").id == "health/phenotype-terms"
assert af.plan("health/phenotype-terms", on="lumi-g", gpus_per_node=1, tokens=1e6)["gpus"] == 1
print(len(failed), *failed[:9])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=helpers.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_nothing_heavy_is_imported_for_the_names() -> None:
    code = """
import sys
import aifactory_train as af
assert not {"torch", "transformers", "numpy", "pydantic", "yaml"} & set(sys.modules), "at import"
for name in af.__all__:
    getattr(af, name)
af.systems(), af.recipe("health/phenotype-terms")
af.plan("health/phenotype-terms", on="lumi-g", gpus_per_node=1, tokens=1e6)
af.launch(
    "health/phenotype-terms", on="lumi", account="project_465000001", time="1h", dry_run=True,
    settings={"train.batch_rows": 8},
)
assert not {"torch", "transformers"} & set(sys.modules), "planning and launching"
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=helpers.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_is_no_name_is_not_offered() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = af.trian  # type: ignore[attr-defined]


# ---- rows


def test_rows_of_every_kind_are_the_same_file(tmp_path: Path) -> None:
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    rows = [{"prompt": f"Wie heißt {n}?", "completion": f"Nummer {n}"} for n in range(5)]
    kinds = [rows, (row for row in rows), pandas.DataFrame(rows), datasets.Dataset.from_list(rows)]
    kinds += [datasets.Dataset.from_list(rows).to_iterable_dataset()]
    files = {as_source(kind, "mine", tmp_path, "data") for kind in kinds}
    assert len(files) == 1
    (file,) = files
    assert [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()] == rows
    assert [p.name for p in tmp_path.iterdir()] == [Path(file).name]  # nothing is left beside


def test_cells_that_json_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import datetime

    numpy, pandas = pytest.importorskip("numpy"), pytest.importorskip("pandas")
    when = pandas.Timestamp("2026-11-30")
    row = {"n": numpy.int64(3), "x": float("nan"), "v": numpy.array([1.5, 2]), "t": when, "gone": pandas.NaT}
    row |= {"day": datetime.date(2026, 1, 2), "na": pandas.NA, "ok": numpy.bool_(True)}
    read = json.loads(Path(as_source([row], "mine", tmp_path, "data")).read_text())
    assert read == {"n": 3, "x": None, "v": [1.5, 2.0], "t": "2026-11-30T00:00:00", "gone": None} | {
        "day": "2026-01-02",
        "na": None,
        "ok": True,
    }
    assert "3 cells are not a number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ["no rows"]),
        ([{"a": 1}, "b"], ["row 2", "str"]),
        ({"prompt": ["a"], "completion": ["b"]}, ["mapping", "list of mappings"]),
        (7, ["int is not rows"]),
        ([{"a": float("inf")}], ["row 1", "'a'", "infinite"]),
        ([{"a": {"b": object()}}], ["row 1", "a.b", "object"]),
        ([{"a": "\ud800"}], ["row 1", "surrogate"]),
    ],
)
def test_what_is_no_row_is_refused_by_number(rows: Any, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        as_source(rows, "mine", tmp_path, "data")
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_data_set_of_several_splits_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    both = datasets.DatasetDict({k: datasets.Dataset.from_list([{"a": 1}]) for k in ("train", "test")})
    with pytest.raises(UserError, match="several splits: train, test"):
        as_source(both, "mine", tmp_path, "data")


# ---- recipes


def test_a_new_recipe_is_made_once_and_what_was_changed_in_it_counts(desk: Path) -> None:
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1), "customer": f"C{n % 7}"} for n in range(40)]
    made = {"data": rows, "base": "model", "licence": "own", "folder": "made"}
    first = af.recipe("acme/sums", **made)  # type: ignore[arg-type]
    (file,) = Path("made").glob("*.yaml")
    file.write_text(file.read_text().replace("batch_rows: 4", "batch_rows: 2"))
    again = af.recipe("acme/sums", **made, settings={"train.epochs": 3})  # type: ignore[arg-type]
    assert (first.train.batch_rows, again.train.batch_rows, again.train.epochs) == (4, 2, 3.0)
    other = af.recipe("acme/sums", **{**made, "group_by": "customer"})  # type: ignore[arg-type]
    assert other.data.split_by is not None and len(list(Path("made").glob("*.yaml"))) == 2


def test_a_known_recipe_with_other_rows(desk: Path) -> None:
    rows = helpers.chat_rows(30, start=2000)
    found = af.recipe("recipe.yaml", data=rows, licence="own", folder="other")
    assert Path(found.data.train[0].source).parent.name == "other" and found.data.train[0].licence == "own"
    assert not found.data.eval  # the recipe's held-out rows say nothing of these
    held = af.recipe("recipe.yaml", data=rows, held_out=helpers.chat_rows(5, start=3000), folder="other")
    assert held.data.eval and Path(held.data.eval[0].source).is_file()
    with pytest.raises(UserError, match="task: is for a new recipe"):
        af.recipe("recipe.yaml", data=rows, task="chat")
    with pytest.raises(UserError, match="licence: goes with data"):
        af.recipe("recipe.yaml", licence="own")


def test_settings_are_what_they_are_in_python(desk: Path) -> None:
    values = {
        "train.epochs": 2,
        "eval.forgetting": False,
        "train.max_steps": None,
        "about.title": "7",
        "eval.metrics": [],
    }
    found = af.recipe("recipe.yaml", settings={**values, "eval.label_separator": "; ", "data.labels": ["01", "02"]})
    assert (found.train.epochs, found.eval.forgetting, found.train.max_steps) == (2.0, False, None)
    assert (found.about.title, found.eval.label_separator, found.data.labels) == ("7", "; ", ["01", "02"])
    again = af.recipe(found, settings={"train.epochs": 5})
    assert (again.train.epochs, again.about.title, again.eval.label_separator) == (5.0, "7", "; ")
    with pytest.raises(UserError, match="did you mean 'epochs'"):
        af.recipe("recipe.yaml", settings={"train.epoch": 2})
    with pytest.raises(UserError, match="settings: train"):
        af.recipe("recipe.yaml", settings={"train.epochs": {1, 2}})


# ---- training


def test_a_callback_that_fails_ends_nothing_and_signals_are_given_back(
    desk: Path, run: af.TrainedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[str] = []

    def tells(event: af.Event) -> None:
        heard.append(type(event).__name__)

    def fails(event: af.Event) -> None:
        raise ValueError("of the caller")

    before = signal.getsignal(signal.SIGTERM)
    again = af.train("recipe.yaml", name="heard", settings={"train.max_steps": 2}, callbacks=[fails, tells], quiet=True)
    assert again.state == "finished" and signal.getsignal(signal.SIGTERM) is before
    order = [name for name in heard if name != "PhaseBegan"]
    expected = [
        "RunStarted",
        "Evaluated",
        "StepDone",
        "StepDone",
        "Saved",
        "Evaluated",
        "VerdictReached",
        "Exported",
        "RunEnded",
    ]
    assert order == expected
    assert "of the caller" in capsys.readouterr().err


def test_wrong_requests_are_refused(desk: Path, run: af.TrainedRun) -> None:
    for arguments, words in (
        ({"ranks": 2, "callbacks": [print]}, "callbacks"),
        ({"ranks": 0}, "ranks"),
        ({"name": "x", "run_dir": "y"}, "run_dir"),
        ({"name": "first", "resume": "auto"}, "finished"),
        ({"settings": {"train.lr": 1}}, "learning_rate"),
    ):
        with pytest.raises(UserError, match=words):
            af.train("recipe.yaml", quiet=True, **arguments)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no run 'fisrt'"):
        af.load("fisrt")
    with pytest.raises(UserError, match="does not go with --format gguf"):
        af.export("first", format="gguf", merge=True)
    with pytest.raises(UserError, match="did you mean 'lumi-g'"):
        af.plan("health/phenotype-terms", on="lumig")
    with pytest.raises(UserError, match="Atlantis"):
        af.systems(country="Atlantis")
    with pytest.raises(UserError, match="invalid choice"):
        af.export("first", format="zip")
    assert af.plan("health/phenotype-terms", on="lumi", gpus_per_node=1, tokens=1e6)["site"] == "lumi-g"


def test_ranks_from_outside_have_to_name_the_run(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="every rank has to mean the same folder"):
        af.train("recipe.yaml")


def test_training_outside_the_main_thread_is_refused(desk: Path) -> None:
    import threading

    told: list[Exception] = []

    def there() -> None:
        try:
            af.train("recipe.yaml", name="threaded")
        except UserError as error:
            told.append(error)

    thread = threading.Thread(target=there)
    thread.start()
    thread.join()
    assert "main thread" in str(told[0]) and not Path("runs/threaded").exists()


@pytest.mark.slow
def test_several_ranks_for_the_caller(desk: Path, run: af.TrainedRun) -> None:
    two = af.train("recipe.yaml", name="two", ranks=2, quiet=True)
    losses = [[row["loss"] for row in found.metrics] for found in (run, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    with pytest.raises(RunFailed, match="2 ranks failed"):
        af.train("recipe.yaml", name="bad", ranks=2, quiet=True, settings={"data.train": "nowhere.jsonl"})


# ---- what is shown


def test_the_verdict_of_a_run_is_kept_and_said(run: af.TrainedRun) -> None:
    """In eval.json, in the record (without the command, which names a path), at the top of the report."""
    verdict = run.verdict
    assert verdict is not None and run.after["answers"]["count"] == 3
    record = json.loads((run.path / "record.json").read_text())
    assert record["verdict"]["sentence"] == verdict.sentence and "next" not in record["verdict"]
    page = run.report().read_text()
    assert 0 < page.index(verdict.sentence.partition("'")[0]) < page.index("<main")


def test_results_show_themselves(run: af.TrainedRun) -> None:
    shown = run._repr_html_()
    assert "<svg" in shown and "bits per byte" in shown and "95 % of the difference" in shown
    assert run.verdict is not None and "verdict" in shown and run.verdict.next.split()[0] == "aifactory"
    assert "What colour is the" in shown  # a sample
    assert "<script" not in shown and "http" not in re.sub(r"xmlns=\S+", "", shown)
    plan = af.plan("health/phenotype-terms", on="lumi-g", gpus_per_node=1, tokens=1e6)
    for thing in (plan, af.systems(), af.prepare("recipe.yaml")):
        assert thing._repr_html_().startswith('<div class="aifactory-result">')
    assert "first" in af.evaluate(run, data="eval.jsonl", rows=2, generate=False)._repr_html_()


HOSTILE = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</style><script>x</script>", "{{7*7}}", "&lt;"]


def test_texts_of_rows_never_become_markup(run: af.TrainedRun, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "hostile"
    shutil.copytree(run.path, copy)
    results = json.loads((copy / "eval.json").read_text())
    results["after"]["samples"] = [{"prompt": h, "expected": h, "answer": h} for h in HOSTILE]
    results["verdict"]["sentence"] = HOSTILE[0]
    (copy / "eval.json").write_text(json.dumps(results))
    shown = af.TrainedRun.open(copy)._repr_html_()
    assert "<script" not in shown and "<img" not in shown
    assert shown.count("</style>") == 1 and "{{7*7}}" in shown
    assert "&lt;script&gt;" in shown
    assert "<b>" not in showing.fragment("<b>", [showing.table(["<b>"], [["<b>", "<b>"]])])


def test_a_private_run_shows_no_texts(run: af.TrainedRun, tmp_path: Path) -> None:
    import shutil

    import yaml

    copy = tmp_path / "private"
    shutil.copytree(run.path, copy)
    tree = yaml.safe_load((copy / "run.yaml").read_text())
    tree["privacy"]["profile"] = "sensitive"
    (copy / "run.yaml").write_text(yaml.safe_dump(tree))
    shown = af.TrainedRun.open(copy)._repr_html_()
    assert "What colour is the" not in shown and "withheld" in shown


def test_the_surface_is_typed() -> None:
    """Everything public has annotations, and the package says that it is typed."""
    import inspect

    assert (helpers.ROOT / "aifactory_train" / "py.typed").is_file()
    for found in pkgutil.iter_modules([str(helpers.ROOT / "aifactory_train" / "api")]):
        module = importlib.import_module(f"aifactory_train.api.{found.name}")
        for name, thing in vars(module).items():
            if inspect.isfunction(thing) and thing.__module__ == module.__name__:
                hints = set(thing.__annotations__)
                assert hints >= {*inspect.signature(thing).parameters, "return"}, f"{module.__name__}.{name}"
    assert preparing.FOLDER == "aifactory"


# ---- notebooks


NOTEBOOKS = sorted((helpers.ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code cells of each, one after the other in one process; what a cell ends with shows itself, as in a
    notebook."""
    import ast

    monkeypatch.setenv("NOTEBOOK_BASE", str(desk / "model"))
    scope: dict[str, Any] = {}
    shown = 0
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]), f"{path.name}, cell {number}")
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{path.name}, cell {number}", "exec"), scope)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"{path.name}, cell {number}", "eval"), scope)  # type: ignore[attr-defined]
            shown += hasattr(value, "_repr_html_") and "aifactory-result" in value._repr_html_()
    assert shown >= 2


def test_notebooks_are_kept_without_outputs() -> None:
    assert len(NOTEBOOKS) == 2
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs") and not cell.get("execution_count"), path.name
