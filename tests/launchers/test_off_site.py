"""A script that is written elsewhere says so; what it notes down at the site holds no secret."""

from __future__ import annotations

import subprocess

import pytest

SLURM = [
    ["--site", "lumi-g", "--account", "project_465000001"],
    ["--site", "alps-clariden", "--account", "g123", "--container", "/capstor/images/torch.sqsh"],
    ["--site", "leonardo-booster", "--account", "AIFAC_x"],
]
SECRETS = {
    "HF_TOKEN": "hf_abc",
    "HF_HUB_TOKEN": "hf_def",
    "HF_PASSWORD": "hunter2",
    "AIFACTORY_API_KEY": "key-ghi",
    "SLURM_JWT_SECRET": "jkl",
}
KEPT = {"SLURM_JOB_ID": "17", "NCCL_DEBUG": "WARN", "HF_HOME": "/cache", "MASTER_PORT": "1234"}


@pytest.mark.parametrize("where", SLURM, ids=lambda w: w[1])
def test_no_secret_of_the_site_s_environment_gets_into_the_run_folder(cli, plain_recipe, tmp_path, where):
    code, script, err = cli("launch", plain_recipe, *where, "--dry-run")
    assert code == 0, err
    start = script.index("env | grep")
    line = script[start : script.index("environment.txt", start)] + 'environment.txt"'
    env = {"PATH": "/usr/bin:/bin", "dir": str(tmp_path), "UNRELATED": "x", **SECRETS, **KEPT}
    subprocess.run(["bash", "-c", f"set -uo pipefail\n{line}"], env=env, check=True, timeout=20)
    noted = dict(text.split("=", 1) for text in (tmp_path / "environment.txt").read_text().splitlines())
    assert noted == KEPT


def test_a_script_written_elsewhere_says_so(cli, plain_recipe):
    code, script, err = cli("launch", plain_recipe, *SLURM[0], "--dry-run")
    assert code == 0 and "this is not LUMI-G" in err and "login node" in err
    assert "this is not" not in script
    _, _, here = cli("launch", plain_recipe, "--dry-run")
    assert "this is not" not in here
