"""What the export of an embedding model has besides weights: sentence-transformers' description of it, and the gate's
comparison of vectors.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F

from aifactory_train.config.schema import Recipe
from aifactory_train.core.files import write_json
from aifactory_train.exporting.gate import FP32_LIMIT, GateVerdict, judge, relative

#: Beside the weights: how a vector is read, and what it is for.
EMBEDDING_FILE = "embedding.json"
#: What cosines are divided by where they are compared as logits.
TEMPERATURE = 0.05


def write_embedding_files(folder: Path, recipe: Recipe, kind: str, width: int) -> None:
    """:data:`EMBEDDING_FILE`; beside whole weights also the files by which sentence-transformers loads the folder."""
    head = recipe.methods.head
    assert head is not None
    length = recipe.data.sequence_length
    content = {
        "kind": "embedding",
        "pooling": head.pooling,
        "normalise": head.normalise,
        "dimensions": width,
        "matryoshka": sorted(head.matryoshka or []),
        "sequence_length": length,
        "reads": "tokenizer(text, truncation=True, max_length=sequence_length)",
    }
    write_json(folder / EMBEDDING_FILE, content)
    if kind == "adapter":
        return
    names = ["Transformer", "Pooling", *(["Normalize"] if head.normalise else [])]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{name}",
            "type": f"sentence_transformers.models.{name}",
        }
        for i, name in enumerate(names)
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    likeness = "cosine" if head.normalise else "dot"
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": likeness},
    )
    pooling = {
        "word_embedding_dimension": width,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": head.pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": head.pooling == "last_token",
        "include_prompt": True,
    }
    (folder / "1_Pooling").mkdir()
    write_json(folder / "1_Pooling" / "config.json", pooling)
    if head.normalise:
        (folder / "2_Normalize").mkdir()
        write_json(folder / "2_Normalize" / "config.json", {})


def judge_vectors(
    kind: str, dtype: str, expected: list[torch.Tensor], found: list[torch.Tensor], *, bound: float | None = None
) -> GateVerdict:
    """Compare vectors, lists of fp32 ``[1, D]``: in fp32 the vectors themselves (``bound``: default 1e-5), else the
    likeness of each text to the others (cosines over :data:`TEMPERATURE`) by the limits of logits. Anything not finite
    fails.
    """
    bound = FP32_LIMIT if bound is None else bound
    known = F.normalize(torch.cat(expected), dim=1)
    others = F.normalize(torch.cat(found), dim=1)
    likeness = [[(rows @ known.t()) / TEMPERATURE] for rows in (known, others)]
    verdict = judge(kind, dtype, *likeness, bound=bound)
    difference = relative(expected, found)
    passed = difference <= bound if dtype == "fp32" else verdict.passed  # NaN fails either way
    limit = f"relative difference at most {bound:.0e}" if dtype == "fp32" else f"likeness of texts: {verdict.limit}"
    return dataclasses.replace(
        verdict, rows=len(expected), places=len(expected), difference=difference, passed=bool(passed), limit=limit
    )


def use_of_vectors(recipe: Recipe, kind: str) -> str:
    """Lines of Python for the model card, behind ``model`` and ``tokenizer``: the vector of a text."""
    head = recipe.methods.head
    assert head is not None
    read = "[0, -1]" if head.pooling == "last_token" else "[0].mean(dim=0)"
    model = "model.get_base_model().base_model" if kind == "adapter" else "model"
    return (
        'how = json.load(open("THIS FOLDER/embedding.json"))\n'
        'inputs = tokenizer("a text", truncation=True, max_length=how["sequence_length"], return_tensors="pt")\n'
        f"vector = {model}(**inputs).last_hidden_state{read}"
        + ("\nvector = vector / vector.norm()" if head.normalise else "")
    )
