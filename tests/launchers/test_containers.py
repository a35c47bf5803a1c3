"""Container engines: the script of ``aifactory env`` enters each the way it is entered, with the right folders mounted,
and a launch that has no image or no environment yet is told the commands that make them.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from aifactory_train import sites
from aifactory_train.config.loading import load_recipe
from aifactory_train.launchers import checks, container, software
from aifactory_train.launchers.build import build
from aifactory_train.launchers.request import LaunchRequest

#: Each engine that a profile names or may name: (runtime, a system, its image, the program that enters it).
ENGINES = [
    ("singularity", "lumi-g", "full.sif", "singularity"),
    ("apptainer", "snellius-h100", "torch.sif", "apptainer"),
    ("enroot-pyxis", "deucalion-a100-40", "torch.sqsh", "srun"),
    ("cscs-ce", "alps-clariden", "torch.sqsh", "srun"),
    ("sarus", "alps-daint", "torch.sqsh", "sarus"),
]

#: Stands for every program: notes its words, and runs what stands behind the options and the image.
STUB = """#!/bin/bash
printf '%s\\n' "$(basename "$0")" "$@" > "$LOGS/$(date +%s%N)-$(basename "$0")"
while [ $# -gt 0 ]; do
  case $1 in exec | run | -* | *.sif | *.sqsh) shift ;; *) break ;; esac
done
exec "$@"
"""
PYTHON = """#!/bin/bash
case "$*" in
  *"-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
  *"pip freeze"*) echo torch==2.8.0 ;;
  *"pip install"*) printf '%s\\n' "$@" > "$LOGS/pip" ;;
esac
"""


def system_with(runtime: str, name: str, tmp_path: Path):
    """A profile whose containers are of that runtime, with a work folder of ours."""
    system = sites.load(name, overlay={"user": {"work_dir": str(tmp_path / "work"), "account": None}})
    box = system.software.containers[0].model_copy(update={"runtime": runtime})
    return system.model_copy(update={"software": system.software.model_copy(update={"containers": [box]})})


def built(runtime: str, name: str, image: str, tmp_path: Path, monkeypatch) -> tuple[list[list[str]], Path]:
    """Run the script of ``aifactory env`` with stand-ins for every program: (calls of the engine, folder made)."""
    monkeypatch.setattr(software, "source_root", lambda: str(tmp_path / "checkout"))
    for folder in ("bin", "logs", "work", "checkout"):
        (tmp_path / folder).mkdir()
    (tmp_path / image).touch()
    system = system_with(runtime, name, tmp_path)
    request = LaunchRequest(recipe="env", site=name, container=str(tmp_path / image))
    text = software.script(system, software.way_of(system, request), request)
    software.parses(text)
    for program in ("singularity", "apptainer", "srun", "sarus"):
        (tmp_path / "bin" / program).write_text(STUB)
    (tmp_path / "bin" / "python3").write_text(PYTHON)
    (tmp_path / "bin" / "uname").write_text(f"#!/bin/bash\necho {system.node.isa}\n")
    (tmp_path / "bin" / "module").write_text("#!/bin/bash\n")
    for path in (tmp_path / "bin").iterdir():
        path.chmod(0o755)
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "LOGS": str(tmp_path / "logs"), "HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-c", f"module() {{ :; }}; {text}"], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "built: " in done.stdout, done.stderr
    calls = [p.read_text().splitlines() for p in sorted((tmp_path / "logs").glob("[0-9]*"))]
    return calls, Path(container.env_folder(system))


def mounted(call: list[str]) -> list[str]:
    """Folders that a call of an engine mounts."""
    tomllib = pytest.importorskip("tomllib")
    found: list[str] = []
    for word in call:
        name, _, value = word.partition("=")
        if name == "--bind":
            found.append(value)
        elif name == "--mount":
            found.append(value.split("source=")[1].split(",")[0])
        elif name == "--container-mounts":
            found += [pair.split(":")[0] for pair in value.split(",")]
        elif name == "--environment":
            found += tomllib.loads(Path(value).read_text())["mounts"]
    return found


@pytest.mark.parametrize(("runtime", "name", "image", "program"), ENGINES, ids=[e[0] for e in ENGINES])
def test_the_environment_is_built_inside_the_engine(runtime, name, image, program, tmp_path, monkeypatch):
    calls, folder = built(runtime, name, image, tmp_path, monkeypatch)
    assert len(calls) >= 5 and {call[0] for call in calls} == {program}
    assert (folder / "bin" / "python").exists(), "what is built lies on this machine, not in a container that is gone"
    for call in calls:
        mounts = mounted(call)
        for path in (str(folder), str(tmp_path / "checkout")):
            assert any(path == m or path.startswith(m + "/") for m in mounts), (path, call)
        if runtime == "cscs-ce":
            tomllib = pytest.importorskip("tomllib")
            (file,) = [w.partition("=")[2] for w in call if w.startswith("--environment=")]
            assert tomllib.loads(Path(file).read_text())["image"] == str(tmp_path / image)
        else:
            assert any(str(tmp_path / image) in word for word in call), call
    assert f"{tmp_path}/checkout[train]" in (tmp_path / "logs" / "pip").read_text()


def test_every_gpu_system_gets_the_right_thing(tmp_path):
    """Whatever the engine: a script that parses, over the image that is given, and never with another torch."""
    seen = set()
    for name in sites.names(usable=True):
        system = sites.load(name, overlay=False)
        request = LaunchRequest(recipe="env", site=name, container="/images/torch.sqsh")
        way = software.way_of(system, request)
        text = software.script(system, way, request)
        software.parses(text)
        assert way.kind == "overlay" and "index-url" not in text and "inside() {" in text, name
        seen.add(system.software.containers[0].runtime if system.software.containers else None)
        commands = container.image_commands(system)
        if system.software.containers and system.gpu.vendor:
            assert commands and f"--site {name} --container {commands[0]} " in commands[2] + " ", name
    assert {"singularity", "apptainer", "enroot-pyxis", "cscs-ce"} <= seen


def test_a_uenv_is_asked_for_by_the_script_too():
    system = sites.load("alps-clariden", overlay=False)
    text = software.script(system, software.way_of(system))
    assert "run this inside a uenv (uenv start" in text and "enroot import --output" in text
    assert text.index("import torch") < text.index("-m venv"), "nothing is made before torch is known to be there"


def test_env_takes_an_image(cli):
    code, out, err = cli("env", "--site", "alps-clariden", "--container", "/capstor/torch.sqsh", "--json")
    assert code == 0 and json.loads(out)["torch_from"] == "image /capstor/torch.sqsh", err


def refusals(name: str, recipe_file: Path, overlay, **more) -> dict:
    system = sites.load(name, overlay=overlay)
    recipe = load_recipe(str(recipe_file))
    account = system.access.example.get("account", "acct")
    sub = build(LaunchRequest(recipe="plain", site=name, account=account, **more), system, recipe, files=False)
    return {f.rule: f for f in checks.check(sub, recipe, here=True) if f.level == "refuse"}


def test_at_the_site_an_image_without_its_environment_is_refused(plain_recipe, tmp_path):
    overlay = {"user": {"work_dir": str(tmp_path)}}
    image = tmp_path / "torch.sif"
    image.touch()
    found = refusals("snellius-h100", plain_recipe, overlay, container=str(image))["environment-present"]
    assert f"aifactory env --site snellius-h100 --container {image} --output build-env.sh" in found.fix
    assert "bash build-env.sh" in found.fix
    own = refusals("snellius-h100", plain_recipe, overlay, container=str(image), venv="/opt/venv")
    assert "environment-present" not in own, "a Python of the image is not looked for on this side of it"
    python = tmp_path / "env-snellius-h100" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/usr/bin/a-python-of-the-image")  # leads nowhere on this side
    assert "environment-present" not in refusals("snellius-h100", plain_recipe, overlay, container=str(image))


def test_at_the_site_a_python_without_torch_is_refused(plain_recipe, monkeypatch):
    from aifactory_train.launchers.checks import software as rules

    assert "environment-present" not in refusals("vega", plain_recipe, False)
    real = rules.find_spec
    monkeypatch.setattr(rules, "find_spec", lambda name: None if name == "torch" else real(name))
    found = refusals("vega", plain_recipe, False)["environment-present"]
    assert "'aifactory env --site vega --output build-env.sh', then 'bash build-env.sh'" in found.fix
    assert "environment-present" not in refusals("helios", plain_recipe, False), "its modules may bring torch"
