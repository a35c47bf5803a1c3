"""A base's generation settings that transformers would not save are repaired by name before the training, whatever they
are.
"""

from __future__ import annotations

import json

import pytest
from transformers import GenerationConfig

from aifactory_train.core.errors import UserError
from aifactory_train.model.generation_config import loading, read_base


def base(folder, tree):
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return folder


@pytest.mark.parametrize(
    ("tree", "kept", "said", "loadable"),
    [
        # the author meant sampling
        ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9, "do_sample": True}, "do_sample", True),
        ({"top_k": 20, "do_sample": None}, {"top_k": 20, "do_sample": True}, "top_k is given", True),
        (
            {"temperature": 0.7, "num_return_sequences": 3},
            {"do_sample": True, "num_return_sequences": 3},
            "true",
            False,
        ),
        # or said that no sampling is wanted
        ({"temperature": 0.6, "do_sample": False}, {"temperature": None, "do_sample": False}, "temperature: 0.6", True),
        ({"length_penalty": 2.0, "max_length": 99}, {"length_penalty": None, "max_length": 99}, "length_penalty", True),
        (
            {"max_new_tokens": 0, "max_length": 99},
            {"max_new_tokens": None, "max_length": 99},
            "max_new_tokens: 0",
            False,
        ),
        ({"max_new_tokens": "5"}, {"max_new_tokens": None}, "max_new_tokens", False),
        ({"early_stopping": "perhaps"}, {"early_stopping": None}, "early_stopping", False),
        ({"watermarking_config": 3}, {"watermarking_config": None}, "watermarking_config", False),
        ({"streamer": 1, "max_length": 9}, {"max_length": 9}, "streamer", False),
        ({"output_scores": True}, {"output_scores": None}, "output_scores", True),
    ],
)
def test_mended_by_name(tmp_path, tree, kept, said, loadable):
    found = read_base(base(tmp_path / "base", tree))
    assert said in found.describe() and found.loadable is loadable
    for key, value in kept.items():
        assert getattr(found.config, key) == value, key
    found.config.eos_token_id, found.config.pad_token_id = [2, 7], 3
    found.config.save_pretrained(tmp_path / "saved")
    again = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert again.eos_token_id == [2, 7]
    assert not read_base(tmp_path / "saved").repaired
    assert bool(loading(tmp_path / "base")) is not loadable


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 7]},
        {"pad_token_id": -1, "eos_token_id": 2, "_from_model_config": True},  # the export sets its own
        {"num_return_sequences": 2, "num_beams": 4, "length_penalty": 2.0},
    ],
)
def test_what_goes_together_stays_as_it_is(tmp_path, tree):
    found = read_base(base(tmp_path / "base", tree))
    assert not found.repaired and found.loadable and not loading(tmp_path / "base")
    assert found.config.to_dict() == GenerationConfig.from_pretrained(tmp_path / "base").to_dict()


def test_no_file_is_no_settings(tmp_path):
    assert read_base(tmp_path).config.to_dict() == GenerationConfig().to_dict()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"temperature": ', ":1: is not JSON"),
        ("", "is not JSON"),
        ("[1]", "not a JSON object but a list"),
        ("[" * 100_000, "is not JSON"),
        ('{"top_k": ' + "1" * 5000 + "}", "is not JSON"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path, text, words):
    with pytest.raises(UserError, match=words) as caught:
        read_base(base(tmp_path / "base", text))
    assert "generation_config.json" in str(caught.value.where) and caught.value.fix
