"""The README of an exported model: what it is made of, under which licences, how well it does, and how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train import __version__
from aifactory_train.config.head_block import embeds
from aifactory_train.config.schema import Recipe
from aifactory_train.core.figures import FIGURES, measured
from aifactory_train.core.templates import render
from aifactory_train.exporting.embedding_files import use_of_vectors
from aifactory_train.exporting.head_files import use_of
from aifactory_train.record.render.common import cell, inline
from aifactory_train.run.folder import RunFolder
from aifactory_train.sources import licences

if TYPE_CHECKING:
    from aifactory_train.data import PreparedData


def model_card(run: RunFolder, recipe: Recipe, data: PreparedData, kind: str, dtype: str) -> str:
    """The card as text, with the metadata block that the Hugging Face hub reads (built by its own card classes)."""
    from huggingface_hub import ModelCard, ModelCardData

    from aifactory_train.model.base import claimed_name, public_base

    base, _ = public_base(recipe)
    before, after = _results(run)
    result = licences.result_licence(recipe)
    licence, licence_name = _licence(result)
    task, use = _use(recipe, kind)
    metadata = ModelCardData(
        base_model=_public(base),
        datasets=sorted({s.source for s in recipe.data.train if _is_hub(s.source)}) or None,
        language=recipe.about.languages or None,
        library_name={"adapter": "peft", "gguf": "gguf"}.get(kind, "transformers"),
        pipeline_tag=task,
        license=licence,
        license_name=licence_name,
        tags=["aifactory-train", recipe.about.sector, recipe.adapter.kind if kind != "model" else "full fine-tuning"],
        model_name=run.path.resolve().name,
        eval_results=_for_the_hub(task, data, after) or None,
    )
    body = render(
        Path(__file__).with_name("model_card.md.j2"),
        recipe=recipe,
        kind=kind,
        what=_KINDS[kind],
        version=__version__,
        base=base,
        hub=_is_hub(base),
        dtype=dtype,
        claimed=claimed_name(recipe),
        sources=[*recipe.data.train, *(recipe.data.eval or [])],
        licence=result,
        rows=after.get("rows") or before.get("rows"),
        figures=_figures(before, after),
        training=_training(recipe, data),
        use=use,
        cell=cell,
        code=_code,
        public=_public,
        inline=inline,
        quoted=json.dumps,
    )
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}"))


def _for_the_hub(task: str, data: PreparedData, after: dict[str, Any]) -> list[Any]:
    """Figures on held-out rows as the hub's card classes take them."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=task,
            dataset_type="held-out",
            dataset_name=", ".join(data.evals) or "held-out rows",
            metric_type=name,
            metric_name=label,
            metric_value=round(float(after[name]), 6),
        )
        for name, (label, _) in FIGURES.items()
        if isinstance(after.get(name), (int, float))
    ]


def _figures(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str, Any]]:
    """Label, base, this model and its interval of every held-out figure."""
    return [
        (label, measured(before.get(name)), measured(after.get(name)), (after.get("ci") or {}).get(name))
        for name, (label, _) in FIGURES.items()
        if before.get(name) is not None or after.get(name) is not None
    ]


def _use(recipe: Recipe, kind: str) -> tuple[str, str | None]:
    """The hub's name of the task, and of a head the lines of Python that use it."""
    if embeds(recipe):
        return "sentence-similarity", use_of_vectors(recipe, kind)
    return ("text-generation", None) if recipe.methods.head is None else ("text-classification", use_of(recipe))


_KINDS = {
    "adapter": "Low-rank adapter (PEFT)",
    "merged": "Merged weights",
    "model": "Fine-tuned weights",
    "gguf": "GGUF file of the fine-tuned weights",
}


def _results(run: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Held-out figures before and after training, empty where there are none."""
    try:
        found = json.loads(run.eval_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, {}
    return found.get("before") or {}, found.get("after") or {}


def _training(recipe: Recipe, data: PreparedData) -> str:
    settings, train_set = recipe.train, data.train
    batch = f"{settings.batch_rows} rows" if settings.batch_rows else f"{settings.batch_tokens} tokens"
    adapter = recipe.adapter
    what = "all weights" if adapter.kind == "none" else f"{adapter.kind} rank {adapter.rank}, alpha {adapter.alpha:g}"
    if settings.freeze:
        what += f" but {', '.join(settings.freeze)}"
    average = settings.average
    mean = ""
    if average is not None:
        how = f"exponential, {average.decay:g}" if average.kind == "ema" else "of all steps the same"
        mean = f" The weights are a mean over the steps ({how}) from step {average.start_step} on."
    return (
        f"{len(train_set):,} documents, {int(train_set.lengths.sum()):,} tokens of which "
        f"{int(train_set.supervised.sum()):,} carry loss; {what}; {settings.optimizer}, peak learning rate "
        f"{settings.learning_rate:g} ({settings.schedule}), {batch} a step, seed {settings.seed}.{mean}"
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
