"""The commands that use a run, on a run that the command line itself trained; exit codes; JSON alone on standard
output.
"""

from __future__ import annotations

import io
import json
import shutil
import sys

import helpers
import pytest

from aifactory_train import cli
from aifactory_train.core import output
from aifactory_train.core.errors import UserError


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_model_dir):
    """A finished run: four steps of LoRA on the tiny model, with answers, exported with its gate."""
    folder = tmp_path_factory.mktemp("finished")
    settings = {
        "eval.metrics": ["bits_per_byte", "perplexity", "exact_match", "token_f1"],
        "eval.generate_rows": 4,
        "eval.max_new_tokens": 6,
        "logging.tensorboard": False,
    }
    recipe = helpers.write_recipe(folder, tiny_model_dir, settings=settings)
    done = helpers.cli("train", recipe, "--run-dir", folder / "run", cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def command(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code and both streams of a command in this process."""
    capsys.readouterr()
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def one_line(out: str):
    """Standard output as the one line of JSON that it must be."""
    assert out.endswith("\n") and out.count("\n") == 1, out
    return json.loads(out)


# ---- a finished run


def test_what_a_run_leaves(run_dir):
    results = json.loads((run_dir / "eval.json").read_text())
    for moment in ("before", "after"):
        assert results[moment]["bits_per_byte"] > 0
        low, high = results[moment]["ci"]["bits_per_byte"]
        assert low <= results[moment]["bits_per_byte"] <= high
    assert results["after"]["bits_per_byte"] < results["before"]["bits_per_byte"]
    for name in (
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "tokenizer.json",
        "chat_template.jinja",
    ):
        assert (run_dir / "export" / "adapter" / name).is_file(), name
    verdict = json.loads((run_dir / "export" / "adapter" / "verification.json").read_text())
    assert verdict["passed"] and verdict["difference"] <= 1e-6


def test_eval_of_the_held_out_file_gives_the_run_s_own_figures(run_dir, capsys, tmp_path):
    out_file = tmp_path / "predictions.jsonl"
    code, out, _ = command(
        capsys, "eval", run_dir, "--data", run_dir.parent / "eval.jsonl", "--out", out_file, "--json"
    )
    assert code == 0
    summary = one_line(out)
    after = json.loads((run_dir / "eval.json").read_text())["after"]
    assert summary["rows"] == after["rows"] == 12
    assert summary["bits_per_byte"] == pytest.approx(after["bits_per_byte"], rel=1e-6)
    assert summary["perplexity"] == pytest.approx(after["perplexity"], rel=1e-5)
    rows = [json.loads(line) for line in out_file.read_text().splitlines()]
    assert [r["id"] for r in rows] == [f"row-{i}" for i in range(500, 512)]
    assert all(
        {"prompt", "expected", "answer", "loss", "bits_per_byte", "exact_match", "token_f1"} <= set(r) for r in rows
    )
    weighted = sum(r["loss"] * r["tokens"] for r in rows) / sum(r["tokens"] for r in rows)
    assert weighted == pytest.approx(summary["loss"], rel=1e-9)


def test_eval_takes_other_shapes_of_rows_and_names_their_faults(run_dir, capsys, tmp_path):
    rows = helpers.write_jsonl(
        tmp_path / "qa.jsonl", [{"prompt": f"Is {i} even?", "completion": "Yes."} for i in range(3)] * 2
    )
    code, out, _ = command(
        capsys, "eval", run_dir, "--data", rows, "--no-generate", "--out", tmp_path / "p.jsonl", "--json"
    )
    assert code == 0 and one_line(out)["rows"] == 6  # repeated rows are scored as often as they stand
    code, out, _ = command(capsys, "eval", run_dir, "--data", rows, "--rows", 2, "--out", tmp_path / "p.jsonl")
    assert code == 0 and "2 rows of" in out and "bits per byte" in out
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 2

    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    code, out, err = command(capsys, "eval", run_dir, "--data", tmp_path / "bad.jsonl", "--json")
    assert code == 2 and out == "" and "bad.jsonl:2" in err
    code, _, err = command(capsys, "eval", run_dir, "--data", tmp_path / "none.jsonl")
    assert code == 2 and "none.jsonl" in err
    code, _, err = command(capsys, "eval", run_dir, "--data", rows, "--rows", 0)
    assert code == 2 and "--rows" in err


def test_chat_answers_and_holds_a_conversation(run_dir, capsys, monkeypatch):
    code, out, _ = command(
        capsys, "chat", run_dir, "--prompt", "What colour is the door?", "--max-new-tokens", 5, "--json"
    )
    assert code == 0
    said = one_line(out)
    assert said["prompt"] == "What colour is the door?" and isinstance(said["answer"], str)
    code, plain, _ = command(capsys, "chat", run_dir, "--prompt", "What colour is the door?", "--max-new-tokens", 5)
    assert code == 0 and plain == said["answer"] + "\n"  # greedy: the same again

    monkeypatch.setattr(sys, "stdin", io.StringIO("What colour is the door?\nAnd the boat?\n\nnot read\n"))
    code, out, _ = command(capsys, "chat", run_dir, "--max-new-tokens", 5)
    assert code == 0 and out.splitlines()[0] == said["answer"] and len(out.splitlines()) == 2


def test_chat_drops_old_turns_and_refuses_what_cannot_fit(run_dir, capsys, monkeypatch):
    long = "Is it? " * 40
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{long}\n{long}\n{long}\n"))
    code, _, err = command(capsys, "chat", run_dir, "--max-new-tokens", 4, "--system", "Be brief.")
    assert code == 0 and "oldest turn was dropped" in err
    code, _, err = command(capsys, "chat", run_dir, "--prompt", long * 10)
    assert code == 2 and "do not fit the model's 512 positions" in err
    code, _, err = command(capsys, "chat", run_dir, "--json")
    assert code == 2 and "--prompt" in err
    code, _, err = command(capsys, "chat", run_dir, "--prompt", "x", "--max-new-tokens", 0)
    assert code == 2 and "--max-new-tokens" in err


def test_export_merges_later(run_dir, capsys, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    code, _, err = command(capsys, "export", copy)
    assert code == 2 and "exported already" in err
    code, out, _ = command(capsys, "export", copy, "--merge", "--dtype", "fp32", "--json")
    assert code == 0
    reported = one_line(out)
    assert reported["gate"]["merged"]["difference"] <= 1e-5
    assert (copy / "export" / "merged" / "model.safetensors").is_file()


def test_export_of_a_checkpoint_gives_the_same_adapter(run_dir, capsys, tmp_path):
    """The files of the last checkpoint, read without an engine, against what the training exported from memory."""
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    before = (copy / "export" / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(copy / "export")
    code, out, err = command(capsys, "export", copy, "--no-verify")
    assert code == 0, err
    assert "not compared" in out and "step 4" in err
    assert (copy / "export" / "adapter" / "adapter_model.safetensors").read_bytes() == before
    (state,) = (copy / "checkpoints" / "step-4").glob("state-*.safetensors")
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    code, _, err = command(capsys, "export", copy, "--step", 4)
    assert code == 2 and "SHA-256" in err
    code, _, err = command(capsys, "export", copy, "--step", 3)
    assert code == 2 and "there are: 4" in err


def test_report_tells_what_the_run_recorded(run_dir, capsys, tmp_path):
    code, out, _ = command(capsys, "report", run_dir, "--json")
    assert code == 0
    reported = one_line(out)
    results = json.loads((run_dir / "eval.json").read_text())
    assert reported["before"] == results["before"] and reported["after"] == results["after"]


def test_runs_are_found_by_name_and_misspelt_ones_suggested(run_dir, capsys, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "colours").symlink_to(run_dir)
    monkeypatch.chdir(tmp_path)
    code, _, _ = command(capsys, "report", "colours", "--json")
    assert code == 0
    for name in ("chat", "eval --data x.jsonl", "export", "report"):
        words = name.split()
        code, out, err = command(capsys, words[0], "colors", *words[1:])
        assert code == 2 and out == "" and "did you mean 'colours'" in err


def test_a_run_without_export_says_so(run_dir, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copy(run_dir / "run.yaml", tmp_path / "empty")
    for arguments in (["chat", "--prompt", "x"], ["eval", "--data", run_dir.parent / "eval.jsonl"], ["export"]):
        code, _, err = command(capsys, arguments[0], tmp_path / "empty", *arguments[1:])
        assert code == 2 and "exported nothing yet" in err, err


# ---- doctor


def test_doctor_sees_this_machine(capsys):
    import torch
    import transformers

    code, out, _ = command(capsys, "doctor", "--json")
    assert code == 0
    found = one_line(out)
    assert found["packages"]["torch"] == torch.__version__ == found["torch"]
    assert found["packages"]["transformers"] == transformers.__version__
    assert found["launchers"]["torchrun"]
    assert len(found["devices"]) == torch.cuda.device_count()
    assert set(found["choices"]) == {"attention", "precision", "engine"}
    assert all(choice["why"] for choice in found["choices"].values())
    code, out, _ = command(capsys, "doctor")
    assert code == 0 and "would choose: attention" in out


def test_doctor_without_torch_still_answers(tmp_path):
    """As on a login node: torch can be neither found nor imported."""
    script = (
        "import sys, importlib.metadata as m\n"
        "for name in ('torch', 'transformers', 'peft', 'numpy'): sys.modules[name] = None\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name in ('torch', 'transformers'): raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "from aifactory_train.cli import main\n"
        "sys.exit(main(['doctor', '--json']))\n"
    )
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=helpers.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = one_line(done.stdout)
    assert (
        found["torch"] is None
        and found["choices"] == {}
        and any("torch is not installed" in p for p in found["problems"])
    )


# ---- the frame of all commands


def test_unknown_and_missing_commands(capsys):
    code, out, err = command(capsys, "trian")
    assert code == 2 and out == "" and "did you mean 'train'" in err
    code, out, _ = command(capsys)
    assert code == 0 and "commands" in out
    with pytest.raises(SystemExit) as end:
        cli.main(["chat", "run", "--promt", "x"])
    assert end.value.code == 2


def test_exit_codes_follow_the_error(capsys, monkeypatch):
    from aifactory_train.commands import doctor
    from aifactory_train.core.errors import RunFailed

    for error, code in ((UserError("wrong", where="a.b", fix="c"), 2), (RunFailed("broke"), 1)):
        monkeypatch.setattr(doctor, "examine", lambda error=error: (_ for _ in ()).throw(error))
        found, out, err = command(capsys, "doctor", "--json")
        assert found == code and out == "" and error.what in err
    assert "fix: c" in str(UserError("wrong", fix="c"))


def test_libraries_cannot_write_between_the_json(capsys, monkeypatch):
    """What a library prints while a --json command runs goes to standard error."""
    from aifactory_train.commands import doctor

    def chatty():
        print("[WARNING] a library speaks")
        return {"fine": True}

    monkeypatch.setattr(doctor, "examine", chatty)
    code, out, err = command(capsys, "doctor", "--json")
    assert code == 0 and one_line(out) == {"fine": True} and "a library speaks" in err
    before = sys.stdout
    with pytest.raises(ValueError), output.json_only():
        raise ValueError
    assert sys.stdout is before
    with pytest.raises(ValueError):
        output.print_json({"not": float("nan")})  # JSON has no NaN
