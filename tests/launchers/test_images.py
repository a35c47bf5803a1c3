"""Images: which file of a site's folder, what is mounted, and the refusal where a bare host cannot train."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from aifactory_train import sites
from aifactory_train.config.loading import load_recipe
from aifactory_train.launchers import checks, software
from aifactory_train.launchers.build import build
from aifactory_train.launchers.request import LaunchRequest

ALPS = ["alps-clariden", "alps-daint", "alps-bristen"]
TAG = "u24r70f21m50t210-20260415_130625"
FIVE = [f"lumi-multitorch-{kind}-{TAG}.sif" for kind in ("rocm", "libfabric", "mpich", "torch", "full")]


def made(name: str, recipe_file: Path, overlay=None, settings=(), **more):
    system = sites.load(name, overlay=overlay or False)
    recipe = load_recipe(str(recipe_file), list(settings))
    account = system.access.example.get("account", "acct")
    request = LaunchRequest(recipe=str(recipe_file), overrides=tuple(settings), site=name, account=account, **more)
    return build(request, system, recipe), recipe


def refused(sub, recipe) -> dict:
    return {f.rule: f for f in checks.check(sub, recipe, here=False) if f.level == "refuse"}


# ---- LUMI: one of five images


def chosen(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The very lines of the script that choose the image, run by bash over a folder of ours."""
    start, end = script.index("\nimage=") + 1, script.index("export AIFACTORY_IMAGE=$image")
    lines = re.sub(r"^image=.*", f"image={folder}", script[start:end], count=1)
    die = 'die() { echo "aifactory: $1" >&2; exit 1; }\n'
    return subprocess.run(
        ["bash", "-c", f'set -uo pipefail\n{die}{lines}\nprintf %s "$image"'],
        capture_output=True,
        text=True,
        timeout=20,
    )


def test_lumi_takes_the_full_image_of_the_five(plain_recipe, tmp_path):
    sub, _ = made("lumi-g", plain_recipe)
    for name in (*FIVE, f"{FIVE[4]}.sha256", "notes.txt"):
        (tmp_path / name).touch()
    done = chosen(sub.script, tmp_path)
    assert (done.returncode, Path(done.stdout).name) == (0, FIVE[4]), done.stderr
    (tmp_path / FIVE[4]).unlink()
    done = chosen(sub.script, tmp_path)
    assert done.returncode == 1 and "no *-full-*.sif in" in done.stderr and "container_image" in done.stderr


def test_the_environment_of_lumi_is_built_in_the_same_image(tmp_path):
    system = sites.load("lumi-g", overlay=False)
    text = software.script(system, software.way_of(system))
    for name in FIVE:
        (tmp_path / name).touch()
    start = text.index("\nimage=") + 1
    lines = re.sub(r"^image=.*", f"image={tmp_path}", text[start : text.index('mkdir -p "$(dirname', start)], count=1)
    done = subprocess.run(["bash", "-c", f'{lines}\nprintf %s "$image"'], capture_output=True, text=True, timeout=20)
    assert Path(done.stdout).name == FIVE[4], done.stderr


def test_a_folder_of_your_own_images_is_taken_as_before(plain_recipe, tmp_path):
    """The profile's pattern is for the site's folder; yours may hold any name, or be the image itself (a sandbox)."""
    sub, _ = made("lumi-g", plain_recipe, container="/scratch/project_465000000/images")
    assert Path(chosen(sub.script, tmp_path).stdout) == tmp_path
    (tmp_path / "mine.sif").touch()
    assert Path(chosen(sub.script, tmp_path).stdout).name == "mine.sif"


def test_a_reference_to_a_registry_is_not_looked_for_on_disk(plain_recipe):
    sub, _ = made("alps-clariden", plain_recipe, container="nvcr.io#nvidia/pytorch:25.06-py3")
    assert '[ -e "$image" ]' not in sub.script and "AIFACTORY_IMAGE" in sub.script
    sub, _ = made("alps-clariden", plain_recipe, container="/capstor/images/torch.sqsh")
    assert '[ -e "$image" ]' in sub.script


# ---- Alps


@pytest.mark.parametrize("name", ALPS)
def test_alps_without_image_or_uenv_is_refused_with_the_two_commands(name, cli, plain_recipe):
    argv = ["launch", plain_recipe, "--site", name, "--account", "g123", "--dry-run"]
    code, out, err = cli(*argv)
    assert code == 2 and out == "" and "Traceback" not in err
    assert "[image-needed]" in err and "cscs-docs" in err
    assert "--container IMAGE" in err and "--directive=--uenv=NAME/VERSION:TAG --directive=--view=VIEW" in err
    for way in (
        ["--container", "/capstor/images/torch.sqsh"],
        ["--container", "nvcr.io#nvidia/pytorch:25.06-py3"],
        ["--directive=--uenv=pytorch/v2.8.0:v1", "--directive=--view=default"],
    ):
        code, out, err = cli(*argv, *way)
        assert code == 0 and out.startswith("#!/bin/bash"), err
    assert "#SBATCH --uenv=pytorch/v2.8.0:v1\n" in out


def test_alps_takes_an_environment_that_brings_the_plugin(plain_recipe):
    overlay = {"corrections": {"software.needs_image": False}}
    assert not refused(*made("alps-clariden", plain_recipe, overlay=overlay))
    overlay = {"user": {"container_image": "/capstor/images/torch.sqsh"}}
    assert not refused(*made("alps-clariden", plain_recipe, overlay=overlay))


def test_only_machines_that_say_so_need_an_image():
    needing = [s for s in sites.names(usable=True) if sites.load(s, overlay=False).software.needs_image]
    assert sorted(needing) == sorted(ALPS)


def test_the_environment_of_alps_goes_over_the_torch_of_a_uenv():
    way = software.way_of(sites.load("alps-clariden", overlay=False))
    assert way.kind == "modules" and way.index is None and "uenv" in way.why


def file_of(sub, name: str) -> str:
    return next(f.content.decode() for f in sub.files if f.path == name)


def paths_read(sub) -> set[str]:
    """Every path of the host that the ranks are given: their Python, run folder, cache, Hugging Face cache, data,
    model.
    """
    script = sub.script
    found = {
        re.search(rf"^export {name}=(\S+)$", script, re.M).group(1) for name in ("AIFACTORY_PYTHON", "AIFACTORY_CACHE")
    }
    found.add(re.search(r"^base=(\S+)$", script, re.M).group(1))
    found |= set(re.findall(r"^export \w+=(/\S+)$", script, re.M)) - {
        re.search(r"^image=(\S+)$", script, re.M).group(1)
    }
    for name in ("submission/rank.sh", "submission/node.sh"):
        body = re.sub(r"^#.*", "", file_of(sub, name), flags=re.M)
        found |= {p for p in re.findall(r"(?<![\w$}/])(/\w[\w./-]+)", body) if not p.startswith(("/dev/", "/tmp"))}
    text = file_of(sub, "submission/recipe.yaml")
    return found | set(re.findall(r"(?:source|base): (/\S+)", text))


@pytest.mark.parametrize("name", ALPS)
@pytest.mark.parametrize("with_work", [True, False])
def test_the_edf_mounts_all_that_the_script_reads(name, with_work, plain_recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("AIFACTORY_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", "/iopsstor/scratch/cscs/me/hf")
    user = {"container_binds": ["/capstor/store/group", "/iopsstor/a:/inside"]}
    if with_work:
        user["work_dir"] = "/capstor/scratch/cscs/me"
    data = tmp_path / "rows"
    data.mkdir()
    settings = [
        f"data.train.0.source={json.dumps(str(data / 'rows.jsonl'))}",
        'model.base="/capstor/store/models/base"',
    ]
    sub, recipe = made(
        name,
        plain_recipe,
        overlay={"user": user},
        settings=settings,
        container="/capstor/images/torch.sqsh",
        run_dir="/ritom/scratch/cscs/me/run",
        array=(("data.train.0.source", ("/capstor/one/a.jsonl", "/capstor/two/b.jsonl")),),
    )
    assert not refused(sub, recipe)
    edf = pytest.importorskip("tomllib").loads(file_of(sub, "submission/environment.toml"))
    assert edf["image"] == "/capstor/images/torch.sqsh"
    assert edf["annotations"]["com"]["hooks"]["aws_ofi_nccl"]["enabled"] == "true"
    mounts = dict(m.split(":") for m in edf["mounts"])
    assert mounts.pop("/iopsstor/a") == "/inside"
    assert all(source == target for source, target in mounts.items())
    read = paths_read(sub)
    assert any(f"env-{name}/bin/python" in path for path in read) and str(data / "rows.jsonl") in read
    read |= {"/capstor/store/group", "/capstor/one", "/capstor/two", "/iopsstor/scratch/cscs/me/hf"}
    read |= {"/capstor/scratch/cscs/me"} if with_work else set()
    for path in read:
        assert any(path == m or path.startswith(m + "/") for m in mounts), (
            f"{path} is read and not mounted: {edf['mounts']}"
        )
    assert f"--environment={sub.run_dir}/submission/environment.toml" in sub.script


@pytest.mark.parametrize("name", [*ALPS, "vega", "karolina"])
@pytest.mark.parametrize("cache", ["shared", "/store/mine", None])
def test_both_caches_are_inside_the_container_wherever_they_lie(name, cache, plain_recipe, monkeypatch):
    """HF_HOME of a shared cache or of the home was exported and not mounted."""
    monkeypatch.delenv("AIFACTORY_CACHE", raising=False)
    monkeypatch.delenv("HF_HOME", raising=False)
    user = {"account": "g000", "project": "a00", "work_dir": "/scratch/me", **({"cache": cache} if cache else {})}
    if cache == "shared":
        overlay = {"user": user, "corrections": {"data.model_cache": "/store/{project}"}}
    else:
        overlay = {"user": user}
    sub, _ = made(name, plain_recipe, overlay=overlay, container="/images/torch.sqsh")
    text = sub.script + "".join(f.content.decode() for f in sub.files if f.path.endswith((".toml", "rank.sh")))
    for variable in ("AIFACTORY_CACHE", "HF_HOME"):
        folder = re.search(rf"^export {variable}=(\S+)$", sub.script, re.M).group(1)
        parents = [folder, *(str(p) for p in Path(folder).parents if str(p) != "/")]
        assert any(f"{p}:{p}" in text or f"--bind={p} " in text or f"--bind={p}'" in text for p in parents), folder
    assert 'mkdir -p "${AIFACTORY_CACHE:-$run}" "${HF_HOME:-$run}"' in sub.script


def test_folders_that_your_variables_name_are_mounted_where_they_are(plain_recipe, monkeypatch):
    there = {"/iopsstor/a", "/iopsstor/b/x.txt", "/opt/tools", "/tmp/x", "/iopsstor/hf"}
    real = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: str(path) in there or real(path))
    user = {
        "env": {
            "TABLES": "/iopsstor/a:/iopsstor/b/x.txt:/opt/tools",
            "PAGE": "https://x.example/y",
            "HF_HOME": "/iopsstor/hf",
        }
    }
    sub, _ = made(
        "alps-clariden",
        plain_recipe,
        overlay={"user": user},
        container="/capstor/i.sqsh",
        env=(("SCRATCHPAD", "/tmp/x"), ("LIST", "/iopsstor/c")),
    )
    edf = file_of(sub, "submission/environment.toml")
    for folder in ("/iopsstor/a", "/iopsstor/b", "/iopsstor/hf"):
        assert f'"{folder}:{folder}"' in edf
    for folder in ("/opt/tools", "/tmp/x", "/iopsstor/c", "x.example"):
        assert folder not in edf
    assert any("LIST=/iopsstor/c" in note and "not mounted" in note and "PAGE" not in note for note in sub.notes)


def test_values_of_your_site_file_come_instead_of_the_defaults(plain_recipe):
    """They were dropped without a word wherever the launcher has a value of its own."""
    env = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "3", "HF_HOME": "/data/hf", "NCCL_PROTO": "Simple", "MINE": "1"}
    for name in ("alps-clariden", "lumi-g", "hunter", "jupiter-booster"):
        image = {"container": "/capstor/i.sqsh"} if name.startswith("alps") else {}
        sub, _ = made(name, plain_recipe, overlay={"user": {"env": env}}, **image)
        exports = re.findall(r"^export (\w+)=(\S+)$", sub.script, re.M)
        for variable, value in env.items():
            assert [v for n, v in exports if n == variable] == [value], (name, variable)


def test_an_edf_of_your_own_is_told_what_it_must_mount(plain_recipe):
    sub, _ = made("alps-clariden", plain_recipe, container="/users-edf/mine.toml")
    assert any("its mounts must cover" in note and "env-alps-clariden" in note for note in sub.notes)
    assert "--environment=/users-edf/mine.toml" in sub.script


def test_every_runtime_gets_the_same_folders(plain_recipe):
    """A venv that you name lies inside the container too, and so do local data; a Python of the image stays the
    image's.
    """
    settings = ['data.train.0.source="/projects/x/data/rows.jsonl"']
    for name in ("deucalion-a100-40", "lumi-g", "vega"):
        sub, _ = made(name, plain_recipe, settings=settings, container="/projects/x/t.sif", venv="/projects/y/env")
        text = sub.script + file_of(sub, "submission/rank.sh")
        for folder in ("/projects/x/data", "/projects/y/env", str(sub.run_dir)):
            assert f"--bind={folder}" in text or f"{folder}:{folder}" in text, (name, folder)
        sub, _ = made(name, plain_recipe, container="/projects/x/t.sif", venv="/opt/venv")
        text = sub.script + file_of(sub, "submission/rank.sh")
        assert "--bind=/opt" not in text and "/opt/venv:" not in text


def test_a_folder_that_a_mount_cannot_name_is_said(plain_recipe):
    settings = ['data.train.0.source="/projects/a:b/rows.jsonl"']
    sub, _ = made("vega", plain_recipe, settings=settings, container="/projects/x/t.sif")
    assert any("/projects/a:b is not mounted" in note for note in sub.notes)
    assert "/projects/a:b" not in sub.script
