"""Fixtures of the launcher's tests: a recipe that needs nothing, the mini-cluster as a site, and ways to run the
command line.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_lab import lab

from aifactory_train import sites
from aifactory_train.config.loading import load_recipe
from aifactory_train.launchers import backends, runs
from aifactory_train.launchers.build import build
from aifactory_train.launchers.follow import status_of
from aifactory_train.launchers.request import LaunchRequest
from aifactory_train.launchers.submission import Submission

HERE = Path(__file__).resolve().parent
FAKE = HERE / "fake_trainer.py"
LAB = HERE / "lab.yaml"


@pytest.fixture(scope="session")
def plain_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid recipe whose model and data need not exist: enough for everything but training."""
    path = tmp_path_factory.mktemp("recipe") / "plain.yaml"
    path.write_text(
        "model: {base: some/model, licence: MIT}\ndata: {train: {source: some/data, licence: MIT}}\ntrain: "
        "{max_steps: 4, batch_rows: 4096}\n"
    )
    return path


@pytest.fixture(scope="session")
def lab_system():
    return sites.load(str(LAB), overlay=False)


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """``cli("launch", …)`` → (exit code, standard output, standard error), in an empty folder and without a user's
    overlays.
    """
    from aifactory_train.cli import main

    monkeypatch.setenv("AIFACTORY_CONFIG", str(tmp_path / "config"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(a) for a in argv])
        except SystemExit as error:  # argparse
            code = int(error.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture(scope="session")
def cluster() -> Iterator[dict[str, str]]:
    """Four fake nodes of a real Slurm, for the whole session; its environment is put into this process."""
    lab.require()
    with lab.mini_cluster(4) as env:
        patch = pytest.MonkeyPatch()
        for name in [n for n in os.environ if n.startswith(("SLURM_", "SBATCH_"))]:
            patch.delenv(name)
        patch.setenv("PATH", env["PATH"])
        patch.setenv("SLURM_CONF", env["SLURM_CONF"])
        yield env
        patch.undo()


@contextlib.contextmanager
def twin(template: str) -> Iterator[dict[str, str]]:
    """A controller alone, killed at once afterwards: it holds nothing worth saving."""
    with tempfile.TemporaryDirectory(prefix="aft-twin-") as name:
        folder = Path(name)
        for sub in ("etc", "state", "run", "log"):
            (folder / sub).mkdir()
        conf = folder / "etc" / "slurm.conf"
        port = lab.free_port_block(1)
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        conf.write_text(template.replace("@DIR@", str(folder)).replace("@USER@", user).replace("@PORT@", str(port)))
        (folder / "etc" / "gres.conf").write_text("")
        env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        env["PATH"] += ":/usr/sbin:/sbin"
        env["SLURM_CONF"] = str(conf)
        with open(folder / "log" / "out", "wb") as log:
            process = subprocess.Popen(["slurmctld", "-D"], env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            end = time.time() + 60
            while "is UP" not in subprocess.run(["scontrol", "ping"], env=env, capture_output=True, text=True).stdout:
                if process.poll() is not None or time.time() > end:
                    raise RuntimeError("the twin did not come up:\n" + (folder / "log" / "out").read_text()[-1500:])
                time.sleep(0.05)
            yield env
        finally:
            process.kill()
            process.wait()


def fake_request(recipe: Path, run_dir: Path, **more) -> LaunchRequest:
    """A request that runs the stand-in trainer: two nodes, two ranks each, no pre-flight."""
    settings = {
        "recipe": str(recipe),
        "site": str(LAB),
        "nodes": 2,
        "gpus_per_node": 2,
        "time_s": 600,
        "style": "srun",
        "preflight": "off",
        "program": (str(FAKE),),
        "hang_s": 0,
        "run_dir": str(run_dir),
    }
    settings.update(more)
    return LaunchRequest(**settings)


def prepared(request: LaunchRequest, system, *, python: str = sys.executable) -> Submission:
    """The submission, written to its run folder."""
    sub = build(request, system, load_recipe(request.recipe, list(request.overrides)))
    runs.write(sub)
    return sub


def submitted(request: LaunchRequest, system) -> Submission:
    sub = prepared(request, system)
    backend = backends.get(sub.shape.backend)
    runs.remember_jobs(sub.run_dir, [backend.submit(sub.run_dir)])
    return sub


def wait_for(run: Path, *states: str, seconds: float = 90, attempts: int = 0) -> dict:
    """Status of the run once it is in one of the states and has begun so many attempts."""
    end = time.time() + seconds
    while True:
        found = status_of(run)
        if found["state"] in states and len(found["attempts"]) >= attempts:
            return found
        if time.time() > end:
            logs = "\n".join(
                f"## {p}\n{p.read_text(errors='replace')[-1500:]}"
                for p in [*run.glob("logs/*"), *run.glob("attempts/*/*.log")]
            )
            raise AssertionError(f"still {found['state']} after {seconds} s: {found}\n{logs}")
        time.sleep(0.3)
