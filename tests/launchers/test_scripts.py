"""The generated scripts: what every one of them must and must not contain, whatever the site."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import directives
import helpers
import pytest

from aifactory_train import sites
from aifactory_train.config.loading import load_recipe
from aifactory_train.launchers import backends
from aifactory_train.launchers.build import build
from aifactory_train.launchers.explain import explain
from aifactory_train.launchers.files import finish
from aifactory_train.launchers.here import this_machine
from aifactory_train.launchers.request import LaunchRequest

SYSTEMS = sites.names(usable=True)
SLURM = [s for s in SYSTEMS if sites.load(s, overlay=False).scheduler.kind == "slurm"]


def submission(system_id: str, recipe: Path, **more):
    system = this_machine() if system_id == "here" else sites.load(system_id, overlay=False)
    base = {"recipe": str(recipe), "site": system_id, "account": system.access.example.get("account", "acct")}
    if system.access.qos == "project":
        base["qos"] = system.access.example.get("qos", "proj")
    if system.scheduler.kind == "kubernetes":
        base["container"] = "registry.example/image:1"
    return build(LaunchRequest(**{**base, **more}), system, load_recipe(str(recipe), list(more.get("overrides", ()))))


def variants(recipe: Path, systems=SYSTEMS, *, more: bool = True):
    """Every system × style × {1, 2 nodes}, and the local backends (``more``): (label, submission)."""
    for system_id in systems:
        kind = sites.load(system_id, overlay=False).scheduler.kind
        for style in backends.of_scheduler(kind or "none").styles:
            for nodes in (1, 2) if kind in ("slurm", "pbspro") else (1,):
                yield f"{system_id}-{style}-{nodes}", submission(system_id, recipe, style=style, nodes=nodes)
    if not more:
        return
    yield "array", submission("vega", recipe, array=(("train.seed", ("1", "2")),))
    yield "own container", submission("vega", recipe, container="/ceph/images/torch.sif")
    for backend in ("local", "mpi"):
        yield backend, submission("here", recipe, backend=backend, nproc=2)


def shell_files(sub) -> dict[str, bytes]:
    return {f.path: f.content for f in finish(sub) if f.path.endswith(".sh")}


def kind_of(sub, text: str) -> str:
    """A script with what shellcheck cannot judge differently made equal: comments' values, single exports, modules,
    options.
    """
    same = (
        text.replace(str(sub.run_dir), "RUN")
        .replace(sub.system.id, "SITE")
        .replace(sub.system.name, "SITE")
        .replace(sub.name, "NAME")
    )
    same = re.sub(r"(?m)^(#SBATCH|#PBS|#!).*\n", "", same)
    same = re.sub(r"(?m)^(export [A-Z_0-9]+=[A-Za-z0-9_,.:/'\" -]*\n)+", "EXPORTS\n", same)
    same = re.sub(r"(?m)^(module (load|use) .*\n)+", "MODULES\n", same)
    same = re.sub(r"(?m)^(  -{0,2}[A-Za-z0-9_=:,./'-]+\n)+(?=\))", "OPTIONS\n", same)
    same = re.sub(r"(?m)^image=.*\n|^unset [A-Z_ ]+\n|--bind=\S+|^helper=.*\n", "", same)
    return re.sub(r"\d+", "0", same)


def shellcheck(folder: Path) -> int:
    files = sorted(str(p) for p in folder.glob("*.sh"))
    done = subprocess.run(["shellcheck", "--format=gcc", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[:4000]
    return len(files)


needs_shellcheck = pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed; apt-get install shellcheck"
)


@needs_shellcheck
def test_shellcheck_is_clean_on_every_kind_of_script(plain_recipe, tmp_path):
    """Scripts that differ only in what shellcheck cannot judge (values of exports, modules, options) are checked
    once.
    """
    seen: set[str] = set()
    for i, (_, sub) in enumerate(variants(plain_recipe)):
        for path, content in shell_files(sub).items():
            key = kind_of(sub, content.decode())
            if key not in seen:
                seen.add(key)
                (tmp_path / f"{i}-{Path(path).name}").write_bytes(content)
    assert shellcheck(tmp_path) >= 10


@pytest.mark.slow
@needs_shellcheck
def test_shellcheck_is_clean_on_every_script(plain_recipe, tmp_path):
    for i, (_, sub) in enumerate(variants(plain_recipe)):
        for path, content in shell_files(sub).items():
            (tmp_path / f"{i}-{Path(path).name}").write_bytes(content)
    assert shellcheck(tmp_path) > 300


def test_bash_parses_every_script(plain_recipe, tmp_path):
    for i, (label, sub) in enumerate(variants(plain_recipe)):
        if i % 7:
            continue
        for path, content in shell_files(sub).items():
            file = tmp_path / Path(path).name
            file.write_bytes(content)
            done = subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True)
            assert done.returncode == 0, (label, path, done.stderr)


@pytest.mark.parametrize("system_id", SLURM)
def test_directives_are_literal_and_first(system_id, plain_recipe):
    sub = submission(system_id, plain_recipe)
    found = directives.sbatch(sub.script)
    names = [d.option for d in found]
    once = [n for n in names if names.count(n) > 1 and n not in ("--gres",)]
    assert not once, once
    for wanted in (
        "--job-name",
        "--nodes",
        "--ntasks-per-node",
        "--time",
        "--signal",
        "--output",
        "--open-mode",
        "--export",
    ):
        assert wanted in names
    assert sub.script.splitlines()[1].startswith("#SBATCH")


@pytest.mark.parametrize("system_id", SLURM)
def test_script_keeps_the_rules_that_cost_others_a_job(system_id, plain_recipe):
    for style in ("torchrun", "srun"):
        sub = submission(system_id, plain_recipe, style=style, nodes=2, preflight="on")
        text = sub.script
        code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
        assert "export SLURM_EXPORT_ENV=ALL" in code
        assert "--kill-on-bad-exit=1" in code and "--wait=60" in code
        assert "set -uo pipefail" in code and not re.search(r"set -[a-z]*e[a-z]*\b", code)
        assert "--gpus-per-task" not in text and "--export=" not in code
        assert "bash -c" not in code and "eval" not in code and "pgrep" not in code
        assert "|| echo localhost" not in code and "29500" not in code
        for flag in sub.system.request.never:
            assert flag not in [d.option for d in directives.sbatch(text)]
        for name in sub.system.environment.avoid:
            assert f"export {name}=" not in code
        if sub.system.offline:
            assert "export HF_HUB_OFFLINE=1" in code
        rank = next(f.content.decode() for f in sub.files if f.path == "submission/rank.sh")
        assert "TRITON_CACHE_DIR" in rank and "MIOPEN_USER_DB_PATH" in rank and "mkdir -p" in rank
        if sub.shape.cpus_per_task:
            assert f"--cpus-per-task={sub.shape.cpus_per_task}" in code


@pytest.mark.parametrize("system_id", SYSTEMS)
def test_every_line_is_explained(system_id, plain_recipe):
    sub = submission(system_id, plain_recipe)
    if sub.shape.backend == "kubernetes":
        pytest.skip("a manifest is data; its keys are Kubernetes' own")
    lines = explain(sub)
    assert len(lines) > 50
    missing = [line.text for line in lines if not line.why or line.why == "structure of the script"]
    assert not missing, missing
    facts = [line for line in lines if line.fact]
    assert facts, "nothing rests on a fact of the profile"
    assert all(line.source for line in facts)
    assert any(line.source != "not published" for line in facts)


def test_reserved_cores_and_masks_only_on_whole_nodes(plain_recipe):
    whole = submission("lumi-g", plain_recipe)
    part = submission("lumi-g", plain_recipe, partition="small-g", gpus_per_node=2)
    assert "--cpu-bind=mask_cpu:" in whole.script and "--cpu-bind=mask_cpu" not in part.script
    assert "--cpus-per-task=7" in whole.script


@pytest.mark.parametrize("system_id", SLURM)
def test_head_address_follows_the_profile(system_id, plain_recipe):
    sub = submission(system_id, plain_recipe, nodes=2)
    head = sub.system.launch.head_address
    expected = {
        "nodeaddr": "NodeAddr",
        "hostname": "hostname -s",
        "fqdn": "hostname -f",
        "suffix": f"){head.suffix}",
        "interface": f"dev {head.interface}",
    }
    assert expected[head.strategy] in sub.script
    assert "getent" in sub.script, "a name that does not resolve must end the job"


def test_pyxis_flags_only_where_pyxis_is(plain_recipe):
    for system_id in SLURM:
        sub = submission(system_id, plain_recipe, container="/shared/images/torch.sif")
        runtimes = [c.runtime for c in sub.system.software.containers[:1]]
        assert ("--container-image" in sub.script) is (runtimes == ["enroot-pyxis"]), system_id


def test_pbs_script_follows_the_grammar(plain_recipe):
    sub = submission("hunter", plain_recipe, nodes=2)
    found = {d.option: d.value for d in directives.pbspro(sub.script) if d.option != "-l"}
    resources = [d.value for d in directives.pbspro(sub.script) if d.option == "-l"]
    assert any(r and r.startswith("select=2:node_type=mi300a") for r in resources) and "walltime=04:00:00" in resources
    assert len(found["-N"]) <= 15
    assert "mpiexec" in sub.script and "--cpu-bind" in sub.script
    for bad in (
        "#PBS -l select=0:x=1",
        "#PBS -l select=two",
        "#PBS -l walltime=2-00:00:00",
        "#PBS --nodes=1",
        "#PBS -N a b",
        "#PBS -l select=1:ncpus=0",
    ):
        with pytest.raises(Exception, match="line"):
            directives.pbspro(sub.script.replace("#PBS -j oe", bad, 1))


def test_torque_script_follows_the_grammar(plain_recipe):
    sub = submission("rudens", plain_recipe)
    resources = [d.value for d in directives.torque(sub.script) if d.option == "-l"]
    assert "nodes=1:ppn=56:gpus=4" in resources
    for bad in ("#PBS -l nodes=0", "#PBS -l select=1", "#PBS -l walltime=soon", "#PBS -N 1abc", "#PBS -Z x"):
        with pytest.raises(Exception, match="line"):
            directives.torque(sub.script.replace("#PBS -j oe", bad, 1))


def test_kubernetes_manifest_is_valid(plain_recipe):
    import yaml

    sub = submission("eidf-gpu", plain_recipe)
    documents = list(yaml.safe_load_all(sub.script))
    assert [d["kind"] for d in documents] == ["ConfigMap", "Job"]
    job = documents[1]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"].endswith("-user-queue")
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for document in documents:
        validate.validate(document, "1.31", strict=True)
    broken = {**job, "spec": {**job["spec"], "paralelism": 2}}
    with pytest.raises(Exception):  # noqa: B017 - the validator's own error classes differ by version
        validate.validate(broken, "1.31", strict=True)


@pytest.mark.parametrize("system_id", ["lumi-g", "leonardo-booster", "hunter", "eidf-gpu", "jupiter-booster"])
def test_dry_run_is_fast_and_without_torch(system_id, plain_recipe, tmp_path):
    """Processor time, because wall time on a busy machine says nothing about the program; the import list is exact."""
    account = sites.load(system_id, overlay=False).access.example.get("account", "acct")
    code = (
        "import sys\n"
        "from aifactory_train.cli import main\n"
        f"words = ['launch', {str(plain_recipe)!r}, '--site', {system_id!r}, '--account', {account!r}, '--dry-run']\n"
        "rc = main(words)\n"
        "assert not {'torch', 'transformers', 'numpy', 'rich'} & sys.modules.keys(), sys.modules.keys()\n"
        "sys.exit(rc)\n"
    )
    command = [sys.executable, "-c", code]
    helpers.costs_little(
        lambda: subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False), seconds=0.5, times=4
    )


@pytest.mark.parametrize("system_id", SLURM)
def test_the_record_of_a_run_knows_its_site(system_id, plain_recipe):
    assert f"\nexport AIFACTORY_SITE={system_id}\n" in submission(system_id, plain_recipe).script


def test_node_local_folder_comes_from_the_profile(plain_recipe):
    from aifactory_train.launchers.context import LOCAL_PATH

    said = [f.path for f in sites.load("perun", overlay=False).filesystems if f.role == "node-local"]
    assert said == ["/work/$SLURM_JOB_ID"]
    assert '\nlocal_base="/work/$SLURM_JOB_ID"/aifactory-' in submission("perun", plain_recipe).script
    assert "\nlocal_base=/mnt/local/aifactory-" in submission("proxima", plain_recipe).script
    for text in ("/a$(id)", "/a`id`", '/a"b', "/a b", "/${x}", "/a;b", "rel", "/a\nb", "/$lower"):
        assert not LOCAL_PATH.fullmatch(text), text


@pytest.mark.parametrize(
    ("torch", "numactl", "bound"), [("2.9.1+rocm6.4", True, True), ("2.8.0", True, False), ("2.13.0", False, False)]
)
def test_ranks_are_bound_only_where_torch_and_numactl_can(torch, numactl, bound, plain_recipe, tmp_path):
    system_id = next(s for s in SYSTEMS if sites.load(s, overlay=False).launch.torchrun_numa_binding)
    files = shell_files(submission(system_id, plain_recipe, style="torchrun"))
    text = next(content for path, content in files.items() if path.endswith("node.sh")).decode()
    asked = re.search(r'^if [^\n]*?("\$AIFACTORY_PYTHON" -c .*?^fi$)', text, re.S | re.M)
    assert asked is not None and "--numa-binding" not in text[: asked.start()]
    (tmp_path / f"torch-{torch}.dist-info").mkdir()
    (tmp_path / f"torch-{torch}.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {torch}\n")
    (tmp_path / "bin").mkdir()
    if numactl:
        (tmp_path / "bin" / "numactl").write_text("#!/bin/sh\n")
        (tmp_path / "bin" / "numactl").chmod(0o755)
    script = f"options=()\nif {asked[1]}\nprintf '%s' \"${{options[*]}}\"\n"
    env = {"AIFACTORY_PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "PATH": str(tmp_path / "bin")}
    done = subprocess.run(["/bin/bash", "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("--numa-binding=") is bound and bool(done.stderr) is not bound


@pytest.mark.parametrize("system_id", ["lumi-g", "leonardo-booster"])
def test_what_nccl_does_after_an_error_is_left_to_torch(system_id, plain_recipe):
    """Its mode 1 calls ncclCommAbort, which may hang; torch's own default (3) does not."""
    assert all(b"ASYNC_ERROR_HANDLING" not in f.content for f in finish(submission(system_id, plain_recipe)))
