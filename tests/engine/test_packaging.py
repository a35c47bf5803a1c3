"""Three ways to have the program: a wheel, an editable install, and the source tree itself; and how quickly it answers.

Each installation goes into a bare virtual environment; the dependencies are lent to it through PYTHONPATH, which does
not activate this environment's own (editable) installation of the project.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import helpers
import pytest

from aifactory_train.cli import COMMANDS

ROOMS = ("aifactory_train", "kernels", "launchers", "recipes", "sites")
pytest.importorskip("setuptools", reason="building a wheel offline needs setuptools (extra: test)")


@pytest.fixture(scope="module")
def lent(tmp_path_factory) -> dict[str, str]:
    """The environment of a program in a bare virtual environment: all packages of this one but the project itself."""
    folder = tmp_path_factory.mktemp("packages")
    for place in {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}:
        for entry in Path(place).iterdir():
            own = (
                entry.name.startswith(("aifactory_train", "aifactory-train", "__editable__")) or entry.suffix == ".pth"
            )
            if not own and entry.name != "__pycache__":
                (folder / entry.name).symlink_to(entry)
    env = helpers.environment(PYTHONPATH=str(folder))
    env.pop("PYTHONHOME", None)
    return env


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the tracked files, so that building leaves nothing in the checkout and sees nothing that is not
    tracked.
    """
    target = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=helpers.ROOT, capture_output=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        names = [n for n in listed.stdout.decode().split("\0") if n]
    else:  # a source archive without git
        names = [
            str(p.relative_to(helpers.ROOT))
            for room in (*ROOMS, ".")
            for p in (helpers.ROOT / room).glob("*" if room == "." else "**/*")
            if p.is_file() and "__pycache__" not in p.parts
        ]
    for name in names:
        if not name.startswith(("tests/", "benchmarks/", "docs/")) and (helpers.ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(helpers.ROOT / name, target / name)
    for room in ROOMS[1:]:
        (target / "aifactory_train" / room).symlink_to(f"../{room}")
    return target


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    copy = shutil.copytree(source, out / "tree", symlinks=True)
    run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, copy]
    )
    (built,) = out.glob("*.whl")
    return built


def run(command: list, cwd: Path | None = None, env: dict | None = None) -> subprocess.CompletedProcess:
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def environment_with(folder: Path, lent: dict, *install: str) -> Path:
    """A bare virtual environment with the project installed; returns its ``bin``."""
    run([sys.executable, "-m", "venv", "--without-pip", folder])
    pip = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    run([*pip, *install], env=lent)
    return folder / "bin"


@pytest.fixture(scope="module")
def installed(wheel, lent, tmp_path_factory) -> Path:
    return environment_with(tmp_path_factory.mktemp("wheel-env") / "venv", lent, str(wheel))


def data_and_modules(root: Path) -> set[str]:
    """Files of the rooms, as paths below the installed package."""
    found = set()
    for room in ROOMS:
        for path in (root / room).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                inside = path.relative_to(root / room).as_posix()
                found.add(inside if room == "aifactory_train" else f"{room}/{inside}")
    return found


def test_the_wheel_holds_every_file_of_every_room_and_nothing_beside_them(source, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {n.split("/")[0].split("-")[0] for n in names} == {"aifactory_train"}  # no top-level kernels, sites, ...
    inside = {n.removeprefix("aifactory_train/") for n in names if n.startswith("aifactory_train/")}
    expected = data_and_modules(source)
    assert expected - inside == set(), "lost on the way into the wheel"
    assert inside - expected == set(), "in the wheel but not in the source"
    assert any(n.startswith("kernels/") and n.count("/") == 2 for n in inside)  # nested folders are among them


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
        assert any(n.endswith("LICENSE") for n in archive.namelist())
    assert metadata["Requires-Python"] == ">=3.10"
    assert {"train", "deepspeed", "mpi", "test"} <= set(metadata.get_all("Provides-Extra"))
    needs = metadata.get_all("Requires-Dist")
    always = {n.split(">")[0].split("=")[0].split(";")[0].strip().lower() for n in needs if "extra ==" not in n}
    assert not always & {"torch", "triton", "transformers", "numpy", "deepspeed"}  # login nodes have none of them
    for need in needs:
        if need.startswith(("torch>", "torch=", "torch<", "triton")):
            assert "==" not in need.split(";")[0] and "<" not in need.split(";")[0], (
                f"{need} could replace a site's build"
            )


_IMPORT_ALL = """
import importlib, pathlib, sys
import aifactory_train
root = pathlib.Path(aifactory_train.__file__).parent
assert str(root).startswith(sys.argv[1]), root
roots = [pathlib.Path(p) for p in aifactory_train.__path__]
names = set()
for base in roots:
    for path in base.rglob("*.py"):
        parts = path.relative_to(base).with_suffix("").parts
        outside = ("tests", "benchmarks", "docs", "aifactory_train")
        if "__pycache__" in parts or path.name == "setup.py" or parts[0] in outside:
            continue
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        names.add(".".join(("aifactory_train", *parts)))
names.discard("aifactory_train.__main__")
failed = []
for name in sorted(names):
    try:
        module = importlib.import_module(name)
        assert str(module.__file__ or module.__path__).find(sys.argv[2]) >= 0, (name, module.__file__)
    except Exception as error:
        failed.append(f"{name}: {type(error).__name__}: {error}")
print(len(names))
assert not failed, failed
"""


def test_every_module_of_an_installed_wheel_imports_outside_the_checkout(installed, lent, tmp_path):
    home = str(installed.parent)
    done = run([installed / "python", "-c", _IMPORT_ALL, home, home], cwd=tmp_path, env=lent)
    assert int(done.stdout.split()[-1]) > 60


def test_console_script_and_data_files_of_an_installed_wheel(installed, lent, tmp_path):
    helped = run([installed / "aifactory", "--help"], cwd=tmp_path, env=lent)
    for command in COMMANDS:
        assert command in helped.stdout
    shown = run([installed / "aifactory", "config", "show", "health/phenotype-terms"], cwd=tmp_path, env=lent)
    assert "phenotype" in shown.stdout
    sites = run([installed / "aifactory", "sites", "--json"], cwd=tmp_path, env=lent)
    assert sites.stdout.count("\n") == 1


def test_an_editable_install_follows_the_source(source, lent, tmp_path):
    tree = shutil.copytree(source, tmp_path / "tree", symlinks=True)
    binaries = environment_with(tmp_path / "venv", lent, "-e", str(tree))
    (tmp_path / "elsewhere").mkdir()
    probe = (
        "import aifactory_train as a, aifactory_train.kernels as k, aifactory_train.sites as s, "
        "aifactory_train.recipes as r, "
        "aifactory_train.launchers as l; print(a.__file__, k.__path__[0], s.__path__[0], r.__path__[0], l.__path__[0])"
    )
    done = run([binaries / "python", "-c", probe], cwd=tmp_path / "elsewhere", env=lent)
    assert all(p.startswith(str(tree)) for p in done.stdout.split()), done.stdout
    # a change is there without a new installation
    (tree / "recipes" / "health" / "new-one.yaml").write_text("model: {base: m}\ndata: {train: rows.jsonl}\n")
    run([binaries / "aifactory", "config", "show", "health/new-one"], cwd=tmp_path / "elsewhere", env=lent)


def test_the_source_tree_runs_without_any_installation(source, lent, tmp_path):
    run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"])
    python = tmp_path / "venv" / "bin" / "python"
    run([python, "-m", "aifactory_train", "--help"], cwd=source, env=lent)
    shown = run([python, "-m", "aifactory_train", "config", "show", "health/phenotype-terms"], cwd=source, env=lent)
    assert "phenotype" in shown.stdout
    probe = (
        "import aifactory_train.kernels, aifactory_train.sites, aifactory_train.recipes, aifactory_train.launchers, "
        "sys;"
        "print(sys.modules['aifactory_train.kernels'].__path__[0])"
    )
    done = run([python, "-c", probe], cwd=source, env=lent)
    assert Path(done.stdout.strip()).samefile(source / "kernels")
    probe = (
        "import importlib.util as u; assert not u.find_spec('aifactory_train.tests'), 'the folder of tests is no "
        "part of the package'"
    )
    run([python, "-c", probe], cwd=source, env=lent)
    # transformers looks for a package named kernels: from the root it must not take ours for it
    probe = (
        "from transformers.utils import is_kernels_available; assert not is_kernels_available() or "
        "__import__('importlib.metadata').metadata.version('kernels')"
    )
    run([python, "-c", probe], cwd=source, env=lent)


# ---- login nodes: quick, and without the heavy packages

HEAVY = {"torch", "transformers", "numpy", "pandas", "datasets", "peft", "deepspeed", "triton"}
_WITHOUT_HEAVY = """
import sys
from aifactory_train.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
loaded = sorted(set(sys.modules) & {heavy!r})
sys.stderr.write("HEAVY:" + ",".join(loaded))
sys.exit(code)
"""


def heavy_modules(*arguments: str, cwd: Path) -> list[str]:
    """Heavy packages that a command imported."""
    script = _WITHOUT_HEAVY.replace("{heavy!r}", repr(HEAVY))
    done = run([sys.executable, "-c", script, *arguments], cwd=cwd, env=helpers.environment())
    return [n for n in done.stderr.rpartition("HEAVY:")[2].split(",") if n]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["recipes"],
        ["recipes", "--json"],
        ["sites"],
        ["sites", "--json"],
        ["config", "show", "health/phenotype-terms"],
    ],
    ids=" ".join,
)
def test_listing_imports_nothing_heavy(arguments, tmp_path):
    assert heavy_modules(*arguments, cwd=tmp_path) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_without_heavy_imports(command, tmp_path):
    assert heavy_modules(command, "--help", cwd=tmp_path) == []


def test_the_probe_sees_heavy_imports(tmp_path):
    assert "torch" in heavy_modules("doctor", cwd=tmp_path)


def test_help_takes_less_than_0_4_seconds(tmp_path):
    """Processor time of the child, best of seven: the figure that does not depend on what else this machine does."""
    script = Path(sys.executable).with_name("aifactory")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "aifactory_train"]
    best = min(processor_seconds([*command, "--help"], tmp_path) for _ in range(7))
    print(f"aifactory --help: {best:.3f} s")
    assert best < 0.4


def processor_seconds(command: list[str], cwd: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=cwd, env={**os.environ}, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
