"""Code that a model's repository ships: named before it runs, written into the record, and only where it was asked
for.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import helpers
import pytest

from aifactory_train.config.loading import load_recipe
from aifactory_train.core.errors import UserError
from aifactory_train.sources import sha256
from aifactory_train.sources.remote_code import code_of, recorded
from aifactory_train.training.start import train

CODE = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM

print("the code of the repository runs", file=sys.stderr)

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""

QUIET = {
    **dict.fromkeys(("eval.before", "eval.after", "eval.forgetting", "export.automatic", "record.pack"), False),
    "train.max_steps": 1,
}


@pytest.fixture
def own_model(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base whose classes lie in its own folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own-llama"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "modeling_own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own-llama",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_run_says_whose_code_runs_before_it_does_and_records_it(tmp_path, own_model, capsys):
    path = helpers.write_recipe(tmp_path / "r", own_model, rows=12, settings=QUIET)
    with pytest.raises(UserError):
        train(load_recipe(str(path)), tmp_path / "refused")
    assert "the code of the repository runs" not in capsys.readouterr().err

    assert train(load_recipe(str(path), ["model.trust_remote_code=true"]), tmp_path / "run") == 0
    said = capsys.readouterr().err
    warned = said.index("warning: model.trust_remote_code: code that comes with")
    assert warned < said.index("the code of the repository runs")
    assert f"'{own_model}'" in said and "modeling_own.py" in said[warned:].splitlines()[0]
    base = json.loads((tmp_path / "run/record.json").read_text())["base"]
    file = own_model / "modeling_own.py"
    assert base["remote_code"] == [{"path": "modeling_own.py", "bytes": file.stat().st_size, "sha256": sha256(file)}]


def test_nothing_is_said_of_a_base_without_code(tiny_recipe, tiny_model_dir, capsys):
    from aifactory_train.data import load_tokenizer

    assert recorded(load_recipe(str(tiny_recipe))) is False
    recipe = load_recipe(str(tiny_recipe), ["model.trust_remote_code=true"])
    load_tokenizer(recipe)
    assert "brings no code: take it out" in capsys.readouterr().err and recorded(recipe) == []


def test_classes_of_another_repository_are_named(tmp_path):
    classes = {
        "AutoConfig": "org/other--config.C",
        "AutoTokenizer": [None, "org/third--tokens.T"],
        "AutoModel": "own.M",
    }
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": classes}))
    assert code_of(tmp_path) == [{"repository": "org/other"}, {"repository": "org/third"}]
