"""Hostile text in every place that a user can fill: refused by a named rule, or carried literally; never parsed by a
shell.

The scripts are really run by bash (the local backend), and a canary file shows whether anything of the text was
executed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launcher_bench import fake_request, prepared

from aifactory_train.launchers.here import this_machine
from aifactory_train.launchers.request import LaunchRequest, Refusal

CANARY = "CANARY-FILE"
#: 44 values; {c} is the canary's path.
VALUES = [
    "'",
    '"',
    "''",
    '""',
    "'; touch {c}; '",
    '"; touch {c}; "',
    "$(touch {c})",
    "`touch {c}`",
    "${{IFS}}touch${{IFS}}{c}",
    "; touch {c}",
    "&& touch {c}",
    "|| touch {c}",
    "| touch {c}",
    "& touch {c} &",
    "> {c}",
    "< /etc/passwd > {c}",
    "\ntouch {c}\n",
    "a\n#SBATCH --wrap=touch",
    "a\r\ntouch {c}",
    "\ttouch {c}",
    "*",
    "?",
    "[a-z]*",
    "{{a,b}}",
    "~",
    "~root",
    "..",
    "../../etc/passwd",
    "-rf",
    "--wrap=touch {c}",
    "--",
    "-",
    "%j",
    "%x%A%a",
    "$HOME",
    "$PATH",
    "\\",
    "\\n",
    "!!",
    "#",
    "é ü ñ 漢字",
    "\u202eevil",
    "x" * 300,
    "a'b\"c$(touch {c})`d`;e|f&g\nh",
]


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / CANARY


def filled(canary: Path) -> list[str]:
    return [v.replace("{c}", str(canary)).replace("{{", "{").replace("}}", "}") for v in VALUES]


def test_there_are_forty_values():
    assert len(set(VALUES)) >= 40


@pytest.mark.parametrize("flag", ["account", "partition", "qos", "reservation", "constraint", "exclude"])
def test_identifiers_are_refused_or_plain(flag, canary):
    """What stands in a directive is a plain token: everything else is refused by name."""
    refused = 0
    for value in filled(canary):
        try:
            checked = LaunchRequest(recipe="x", **{flag: (value,) if flag == "exclude" else value}).checked()
        except Refusal as error:
            assert error.rule == "plain-identifier"
            assert error.fix
            refused += 1
            continue
        kept = getattr(checked, flag)
        kept = kept[0] if isinstance(kept, tuple) else kept
        assert not set(kept) & set(" \t\r\n'\"`$;<>()\\*?!#{}~%") and not kept.startswith("-") and len(kept) <= 128
    assert refused >= 40


def test_run_names_are_refused(canary):
    for value in filled(canary):
        with pytest.raises(Refusal) as caught:
            LaunchRequest(recipe="x", name=value).checked()
        assert caught.value.rule == "run-name"


@pytest.mark.parametrize("flag", ["run_dir", "venv", "container"])
def test_paths_are_refused_or_harmless(flag, canary):
    for value in filled(canary):
        try:
            kept = getattr(LaunchRequest(recipe="x", **{flag: value}).checked(), flag)
        except Refusal as error:
            assert error.rule in ("plain-path", "plain-identifier")
            continue
        assert not set(kept) & set("\t\r\n'\"`$;<>()\\*?!{}%|&")


def test_environment_names_are_refused(canary):
    for value in filled(canary):
        with pytest.raises(Refusal) as caught:
            LaunchRequest(recipe="x", env=((value, "1"),)).checked()
        assert caught.value.rule == "env-name"


def test_values_overrides_and_folders_are_carried_literally(tmp_path, canary, plain_recipe):
    """One run whose environment, recipe and folder hold every value: bash runs the script, the rank sees them
    unchanged.
    """
    values = filled(canary)
    program = tmp_path / "show.py"
    program.write_text(
        "import json, os, sys\n"
        "run = sys.argv[sys.argv.index('--run-dir') + 1]\n"
        "names = sorted(n for n in os.environ if n.startswith('HOSTILE_'))\n"
        "json.dump({'argv': sys.argv, 'env': {n: os.environ[n] for n in names}}, open(run + '/seen.json', 'w'))\n"
        "attempt = run + '/attempts/001/outcome-' + os.environ['RANK'] + '.json'\n"
        "json.dump({'rank': 0, 'status': 'done', 'exit_code': 0}, open(attempt, 'w'))\n"
    )
    overrides = tuple(f"about.notes={json.dumps([v])}" for v in values[-1:])
    run = tmp_path / "run with blanks é"
    request = LaunchRequest(
        recipe=str(plain_recipe),
        run_dir=str(run),
        env=tuple((f"HOSTILE_{i}", v) for i, v in enumerate(values)),
        overrides=overrides,
        backend="mpi",
        nproc=1,
        program=(str(program),),
    )
    sub = prepared(request, this_machine())
    # Without mpirun the rank program runs alone: this test is about quoting, not about MPI.
    script = Path(run / "submission" / "job.sh")
    text = script.read_text()
    begin, end = text.index("start=("), text.index(")\n", text.index("start=(")) + 2
    script.write_text(
        text[:begin] + "start=(env RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 OMPI_COMM_WORLD_RANK=0)\n" + text[end:]
    )
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr + (run / "attempts/001/rank-0.log").read_text()
    seen = json.loads((run / "seen.json").read_text())
    assert seen["env"] == {f"HOSTILE_{i}": v for i, v in enumerate(values)}
    assert str(run) in seen["argv"]
    recipe = yaml.safe_load((run / "submission" / "recipe.yaml").read_text())
    assert recipe["about"]["notes"] == [values[-1]]
    assert not canary.exists()
    assert not list(tmp_path.rglob(f"*{CANARY}*"))
    assert sub.shape.ranks == 1


def test_hostile_overrides_never_reach_a_script(tmp_path, canary, plain_recipe, lab_system):
    """An override may hold anything; it is in the resolved recipe alone."""
    for i, value in enumerate(filled(canary)):
        if any(ord(c) < 32 and c not in "\n\t\r" for c in value):
            continue
        sub = prepared(
            fake_request(plain_recipe, tmp_path / f"run{i}", overrides=(f"about.summary={json.dumps(value)}",)),
            lab_system,
        )
        stored = yaml.safe_load((sub.run_dir / "submission" / "recipe.yaml").read_text())
        assert stored["about"]["summary"] == value
        if len(value) > 3 and ("touch" in value or "漢" in value or len(value) == 300):
            for name in ("job.sh", "rank.sh"):
                assert value not in (sub.run_dir / "submission" / name).read_text()


def test_hostile_inherited_variables_are_dropped(monkeypatch):
    from aifactory_train.launchers.backends.slurm import clean_environment

    for name in (
        "SBATCH_PARTITION",
        "SBATCH_TIMELIMIT",
        "SLURM_CPU_BIND",
        "PMI_RANK",
        "SRUN_CPUS_PER_TASK",
        "SLURM_EXPORT_ENV",
    ):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    env, dropped = clean_environment()
    assert set(dropped) >= {
        "SBATCH_PARTITION",
        "SBATCH_TIMELIMIT",
        "SLURM_CPU_BIND",
        "PMI_RANK",
        "SRUN_CPUS_PER_TASK",
        "SLURM_EXPORT_ENV",
    }
    assert env["SLURM_CONF"] and "SBATCH_PARTITION" not in env


def test_hostile_text_through_the_command_line(cli, canary, plain_recipe):
    """The same through ``aifactory launch --dry-run``: refused with exit code 2 and a rule, without a traceback."""
    for value in filled(canary)[:20]:
        code, out, err = cli("launch", plain_recipe, "--site", "leonardo-booster", f"--account={value}", "--dry-run")
        assert code == 2 and "[plain-identifier]" in err and not out, (value, err)
        assert "Traceback" not in err
    assert not canary.exists()


def test_secret_looking_variables_are_refused(cli, plain_recipe):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_PASSWORD", "AWS_SECRET_ACCESS_KEY"):
        code, out, err = cli("launch", plain_recipe, "--site", "vega", "--env", f"{name}=abc123", "--dry-run")
        assert code == 2 and "[env-secret]" in err
        assert "abc123" not in err + out


@pytest.mark.parametrize(
    "value",
    [
        "https://user:pw-abc123@host/x",
        "https://host/x?access_token=abc123",
        "hf_abc123abc123abc123abc123",
        "x=AKIAABCDEFGHIJKLMNOP",
    ],
)
def test_values_that_hold_a_secret_are_refused(cli, plain_recipe, value):
    code, out, err = cli("launch", plain_recipe, "--site", "vega", "--env", f"URL={value}", "--dry-run")
    assert code == 2 and "[env-secret]" in err and "the value of URL" in err
    assert value not in err + out


def test_nothing_of_the_environment_leaks_into_scripts(tmp_path, plain_recipe, lab_system, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    sub = prepared(fake_request(plain_recipe, tmp_path / "run"), lab_system)
    for path in sub.run_dir.rglob("*"):
        if path.is_file():
            assert b"hf_verysecret" not in path.read_bytes()
    assert os.environ["HF_TOKEN"] == "hf_verysecret"
    assert sys.executable
