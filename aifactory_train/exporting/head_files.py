"""What the export of a head has besides weights: a classifier's configuration, and what was chosen on held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aifactory_train.config.head_block import names
from aifactory_train.config.schema import Recipe
from aifactory_train.core.files import read_json, write_json
from aifactory_train.core.output import note
from aifactory_train.model.head import configured, plain_class
from aifactory_train.run.folder import RunFolder

#: Beside the weights: labels, temperature, thresholds.
HEAD_FILE = "head.json"


#: What a head reads: a text, or (True) a conversation with its answer.
_READS = {
    False: "tokenizer(text, truncation=True, max_length=sequence_length)",
    True: "tokenizer.apply_chat_template(messages)",
}


def classifier_config(config: Any, recipe: Recipe, pad_id: int | None) -> Any:
    """The configuration of transformers' classifier on a model of ``config``. The padding token says where a text in a
    batch ends.
    """
    architecture = plain_class(config, recipe).__name__
    config = configured(config, recipe)
    config.architectures = [architecture]
    config.get_text_config().pad_token_id = config.pad_token_id = pad_id
    return config


def write_head_file(folder: Path, recipe: Recipe, chosen: dict[str, Any] | None) -> None:
    """:data:`HEAD_FILE`: what each output means, and what was ``chosen`` on held-out rows for these weights."""
    assert recipe.methods.head is not None
    content: dict[str, Any] = {
        "kind": recipe.methods.head.kind,
        "labels": names(recipe),
        "sequence_length": recipe.data.sequence_length,
        "reads": "the last token that is no padding of " + _READS[recipe.methods.head.kind == "reward"],
    }
    if chosen is None and recipe.methods.head.kind != "reward":
        note("the export has no temperature and no thresholds: its weights were not evaluated, or on too few rows")
    write_json(folder / HEAD_FILE, {**content, **(chosen or {})})


def chosen_for(run: RunFolder, *, live: bool, again: bool) -> dict[str, Any] | None:
    """What was chosen on held-out rows for the weights of an export: of a training that has just ended (``live``), or
    of an earlier export that is merged (``again``). Another checkpoint's were not evaluated: None.
    """
    file, inside = (run.eval_file, "after") if live else (run.export / "adapter" / HEAD_FILE, None)
    if not (live or again) or not file.is_file():
        return None
    found = read_json(file, dict)
    if inside is not None:
        return (found.get(inside) or {}).get("calibration")
    return {key: found[key] for key in ("temperature", "thresholds", "rows") if key in found} or None


def use_of(recipe: Recipe) -> str:
    """Lines of Python for the model card, behind ``model`` and ``tokenizer``: from a text to calibrated labels."""
    assert recipe.methods.head is not None
    if recipe.methods.head.kind == "reward":
        return (
            'messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]\n'
            'inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")\n'
            "reward = model(**inputs).logits[0, 0]  # only differences between answers to one question mean something"
        )
    start = (
        'head = json.load(open("THIS FOLDER/head.json"))\n'
        'inputs = tokenizer("a text", truncation=True, max_length=head["sequence_length"], return_tensors="pt")\n'
        'logits = model(**inputs).logits[0] / head.get("temperature", 1.0)\n'
    )
    if recipe.methods.head.kind == "multi_label":
        return (
            start + "scores = model(**inputs).logits[0].sigmoid().tolist()  # thresholds are of these\n"
            'limits = head.get("thresholds", [0.5] * len(scores))\n'
            'given = [l for l, p, t in zip(head["labels"], scores, limits) if p >= t]\n'
            "probabilities = logits.sigmoid()  # calibrated"
        )
    return start + 'label, probabilities = head["labels"][logits.argmax()], logits.softmax(0)  # calibrated'
