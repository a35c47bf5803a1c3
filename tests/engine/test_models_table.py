"""The table of models: the command that answers from it, and what a family that nobody named meets."""

from __future__ import annotations

import datetime
import importlib.util
import json
import sys
from typing import Any

import helpers
import pytest

from aifactory_train.cli import main
from aifactory_train.commands import models as command
from aifactory_train.core.errors import UserError

spec = importlib.util.spec_from_file_location("benchmark_models", helpers.ROOT / "benchmarks" / "models.py")
assert spec is not None and spec.loader is not None
table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table)
#: Another tenth every day of the month.
TENTH = datetime.date.today().day % 10


def shipped() -> dict[str, Any]:
    return json.loads(command.DATA.read_text(encoding="utf-8"))


# ---- the command


def test_the_command_answers_without_torch(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    code = (
        "import sys; from aifactory_train.cli import main; "
        f"assert main(['models', {str(tmp_path)!r}]) == 0 and main(['models']) == 0; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=helpers.environment())
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM" in done.stdout and "packed" in done.stdout


def test_types_aliases_ids_and_folders_have_one_answer(tmp_path):
    rows = shipped()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    by_type = command.about("llama", rows)
    assert by_type["trains"] == "packed" and by_type["packed_equals_alone"] is True
    assert {**command.about(str(tmp_path), rows), "model": "llama"} == by_type
    assert command.about("HuggingFaceTB/SmolLM2-135M", rows)["family"] == "llama"
    alias, family = next((a, f) for a, f in rows["aliases"].items() if f in {r["family"] for r in rows["rows"]})
    assert command.about(alias, rows)["family"] == family


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lama", "did you mean"),
        ("someone/Llama-3-8B-GPTQ", "quantised (GPTQ)"),
        ("someone/unheard-of", "is not here"),
    ],
)
def test_what_cannot_be_answered_is_refused(name, words, capsys):
    assert main(["models", name]) == 2
    message = capsys.readouterr().err
    assert words in message and "fix:" in message


def test_a_quantised_folder_is_refused(tmp_path):
    config = {"model_type": "llama", "quantization_config": {"quant_method": "awq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="are quantised"):
        command.about(str(tmp_path), shipped())


def test_rows_have_the_columns_that_others_read():
    keys = {"family", "trains", "packed_equals_alone", "lora", "kernels", "planned", "exported", "gguf", "why"}
    tree = shipped()
    assert all(keys <= row.keys() for row in tree["rows"] if row["trains"] != table.FAILED)
    assert tree["summary"] == table.summary(tree["rows"])
    assert (helpers.ROOT / "docs" / "models.md").read_text(encoding="utf-8") == table.page(
        tree["rows"], tree["versions"], tree["aliases"], tree["classes"]
    )


# ---- a family nobody named


def checked(names: dict[str, str], *, quick: bool) -> list[dict[str, Any]]:
    rows = table.examined(names, 1, lambda text: None, quick)
    failed = [(row["family"], row["why"]) for row in rows if row["trains"] == table.FAILED]
    assert not failed
    assert all(row["why"] for row in rows if row["trains"] in (table.REFUSED, table.UNBUILT, table.EXCLUDED))
    return rows


def test_one_family_of_each_way_by_the_check_and_one_step():
    names = {k: v for k, v in table.families().items() if k in ("llama", "bloom", "lfm2")}
    ways = {row["family"]: row["trains"] for row in checked(names, quick=True)}
    assert ways == {"llama": "packed", "lfm2": "packed", "bloom": "one document a row, its own attention"}


@pytest.mark.slow
def test_a_tenth_of_the_families_runs_from_start_to_export():
    checked(dict(sorted(table.families().items())[TENTH::10]), quick=False)


@pytest.mark.slow
def test_all_families_train_or_say_why_not():
    rows = checked(table.families(), quick=False)
    figures = table.summary(rows)
    assert figures["share"] >= 0.85 and figures["cannot_be_built_tiny"] <= 0.05 * figures["causal_decoders"]
