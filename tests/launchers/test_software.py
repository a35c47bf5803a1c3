"""``aifactory env``: the right way for each site, scripts that parse, bundles that hold what they list."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from aifactory_train import sites
from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.core.files import file_digest
from aifactory_train.launchers import software

SYSTEMS = sites.names(usable=True)


@pytest.mark.parametrize("system_id", SYSTEMS)
def test_every_usable_site_gets_a_script_that_parses(system_id):
    system = sites.load(system_id, overlay=False)
    way = software.way_of(system)
    text = software.script(system, way)
    software.parses(text)
    facts = software.manifest(system, way)
    assert facts["requirements"] and facts["not_checked_here"]
    if system.node.isa:
        assert f'"$(uname -m)" = {system.node.isa}' in text
    if way.kind in ("overlay", "modules"):
        assert "--system-site-packages" in text and "--constraint" in text, "the site's torch must not be replaced"
        assert "index-url" not in text
    if system.internet.login == "none" and way.kind not in ("overlay", "modules"):
        assert way.kind == "wheelhouse" and "--no-index" in text


def test_ways_follow_the_profiles():
    ways = {
        s: software.way_of(sites.load(s, overlay=False))
        for s in ("lumi-g", "marenostrum5-acc", "jupiter-booster", "perun")
    }
    assert ways["lumi-g"].kind == "overlay" and "rocm" not in (ways["lumi-g"].index or "")
    assert ways["marenostrum5-acc"].kind == "wheelhouse" and ways["marenostrum5-acc"].isa == "x86_64"
    assert ways["jupiter-booster"].isa == "aarch64" and ways["perun"].index and "cu129" in ways["perun"].index


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed; apt-get install shellcheck"
)
def test_scripts_are_clean(tmp_path):
    seen: dict[str, Path] = {}
    for system_id in SYSTEMS:
        system = sites.load(system_id, overlay=False)
        way = software.way_of(system)
        seen.setdefault(
            f"{way.kind}-{system.launch.login_shell}-{bool(system.software.modules)}-{way.isa}",
            tmp_path / f"{system_id}.sh",
        ).write_text(software.script(system, way))
    done = subprocess.run(["shellcheck", "--format=gcc", *map(str, set(seen.values()))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[:3000]


def test_script_refuses_the_wrong_instruction_set(tmp_path):
    system = sites.load("jupiter-booster", overlay=False)
    path = tmp_path / "build.sh"
    path.write_text(software.script(system, software.way_of(system)))
    if subprocess.run(["uname", "-m"], capture_output=True, text=True).stdout.strip() == "aarch64":
        pytest.skip("this machine has the instruction set of the site")
    done = subprocess.run(
        ["bash", str(path)], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    )
    assert done.returncode == 1 and "run it there" in done.stderr


def test_bundle_holds_code_script_and_cache(tmp_path, cli):
    target = tmp_path / "bundle"
    code, out, err = cli("env", "--site", "marenostrum5-acc", "--bundle", target, "--no-wheels", "--json")
    assert code == 0, err
    facts = json.loads(out)
    with tarfile.open(target / "code.tar.gz") as archive:
        names = archive.getnames()
    assert "aifactory-train/setup.py" in names and "aifactory-train/launchers/build.py" in names
    assert not any("__pycache__" in n or ".git/" in n for n in names)
    assert facts["files"]["code.tar.gz"]["sha256"] == file_digest(target / "code.tar.gz")
    assert "--no-index" in (target / "build-env.sh").read_text()
    assert any("wheels" in m for m in facts["missing"])
    code, _, err = cli("env", "--site", "marenostrum5-acc", "--bundle", target, "--no-wheels")
    assert code == 2 and "not empty" in err


def test_bundle_refuses_a_recipe_that_was_not_fetched(tmp_path, cli):
    code, _, err = cli(
        "env",
        "--site",
        "leonardo-booster",
        "--bundle",
        tmp_path / "b",
        "--no-wheels",
        "--recipe",
        "health/phenotype-terms",
    )
    assert code == 2 and "fetch" in err


def test_foreign_wheels_are_found(tmp_path):
    def wheel(name: str, machine: int | None) -> None:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            if machine:
                archive.writestr("a/x.so", b"\x7fELF" + bytes(14) + machine.to_bytes(2, "little"))

    wheel("good-1-cp311-cp311-manylinux_2_28_aarch64.whl", 183)
    wheel("pure-1-py3-none-any.whl", None)
    wheel("tag-1-cp311-cp311-manylinux_2_28_x86_64.whl", 62)
    wheel("lies-1-cp311-cp311-manylinux_2_28_aarch64.whl", 62)
    assert software.foreign_wheels(tmp_path, "aarch64") == [
        "lies-1-cp311-cp311-manylinux_2_28_aarch64.whl",
        "tag-1-cp311-cp311-manylinux_2_28_x86_64.whl",
    ]


def test_verify_tells_what_is_missing(tmp_path):
    found = software.verify_here(sys.executable)
    assert found["packages"]["pydantic"] and not found["packages"]["aifactory_train"].startswith("FAILED")
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 3\n")
    bare.chmod(0o755)
    with pytest.raises(RunFailed):
        software.verify_here(str(bare))
    with pytest.raises(UserError):
        software.verify_here(str(tmp_path / "nothing"))


@pytest.mark.network
def test_wheels_for_another_instruction_set(tmp_path):
    """A few real wheels for aarch64, from the registry: all of them for that instruction set."""
    system = sites.load("jupiter-booster", overlay=False)
    argv = software.wheelhouse_command(system, software.way_of(system), tmp_path)
    short = [*argv[: len(argv) - len(software.requirements())], "--no-deps", "safetensors", "PyYAML"]
    done = subprocess.run(short, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-800:]
    assert len(list(tmp_path.glob("*aarch64.whl"))) == 2 and not software.foreign_wheels(tmp_path, "aarch64")
