"""From a model folder to the model that is trained: read, check, adapt, cast."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aifactory_train.config.quantised_base import check_quantised, quantisation
from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.core.files import foreign
from aifactory_train.model import attention, attention_choice, experts, quantise, routing
from aifactory_train.model.adapters import apply_adapter, start_from_adapter
from aifactory_train.model.base import base_folder
from aifactory_train.model.causal_lm import CausalLM
from aifactory_train.model.generation_config import loading
from aifactory_train.model.head import attach_head
from aifactory_train.model.precision import Precision, apply_precision, choose_precision
from aifactory_train.model.report import ModelReport
from aifactory_train.sources.vocabulary import first_new_row

if TYPE_CHECKING:
    pass


def load_config(path: Path, recipe: Recipe):
    """The transformers configuration in ``path``, checked against what the recipe asks for."""
    from transformers import AutoConfig

    with foreign(f"model.base: {recipe.model.base}", "no usable model configuration"):
        config = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=recipe.model.trust_remote_code
        )
    check_quantised(quantisation(vars(config)), f"model.base: {recipe.model.base}", recipe.adapter.quantise_base)
    check_causal(config, recipe.model.base)
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and limit and recipe.data.sequence_length > limit:
        raise UserError(
            f"sequences of {recipe.data.sequence_length} tokens, but the model was built for {limit} positions",
            where="data.sequence_length",
            fix=f"--set data.sequence_length={limit}",
        )
    return config


def check_causal(config: Any, base: str) -> None:
    """Refuse a configuration that transformers has no causal language model for, by what it is."""
    from transformers.models.auto import modeling_auto as auto

    if config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(config, "auto_map", None):
        return
    kinds = (
        ("a vision-language model", "IMAGE_TEXT_TO_TEXT"),
        ("a model of speech", "SPEECH_SEQ_2_SEQ"),
        ("a model of speech", "CTC"),
        ("a model of sound", "TEXT_TO_WAVEFORM"),
        ("a model of sound", "AUDIO_CLASSIFICATION"),
        ("a model of images", "IMAGE_CLASSIFICATION"),
        ("an encoder-decoder", "SEQ_TO_SEQ_CAUSAL_LM"),
        ("an encoder, which sees the future", "MASKED_LM"),
    )
    found = (w for w, name in kinds if config.model_type in getattr(auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {}))
    text = getattr(config.get_text_config(decoder=True), "model_type", None)
    fix = "use a causal language model; 'aifactory models' lists the families"
    if text != config.model_type and text in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        fix = f"take the weights of its language model alone, if they are published (model_type '{text}')"
    raise UserError(
        f"'{config.model_type}' is {next(found, 'no causal language model in this transformers')}; causal language "
        "models are trained here",
        where=f"model.base: {base}",
        fix=fix,
    )


def choose_attention(recipe: Recipe, config: Any, device: str, report: ModelReport) -> str:
    """The name of ``model.attention`` in transformers' registry, where our functions are from now on."""
    attention.register()
    if recipe.model.attention == "own":
        report.add("attention", "the model's own", "transformers' eager attention: model.attention own")
        return "eager"  # what the check of the start compares with; SDPA leaves some models' caps and sinks out
    name, why = attention_choice.choose(
        recipe.model.attention,
        device,
        choose_precision(recipe, device)[0].compute,
        heads=attention_choice.heads_of(config),
        compiled=recipe.parallel.compile,
    )
    report.add("attention", name.removeprefix("aifactory_"), why)
    return name


def load_language_model(
    path: Path,
    recipe: Recipe,
    *,
    device: str,
    dtype: torch.dtype,
    report: ModelReport,
    more: dict[str, Any] | None = None,
) -> nn.Module:
    """The transformers model with our attention, weights in ``dtype``, on ``device``; ``more`` goes to
    ``from_pretrained``.
    """
    if device == "cpu":
        # transformers imports DeepSpeed where it is installed, and that prints to standard output unless told the
        # device.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # our own report says what was loaded

    config = load_config(path, recipe)
    name = choose_attention(recipe, config, device, report)
    with foreign(f"model.base: {recipe.model.base}", "the model cannot be loaded"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            output_loading_info=True,
            config=config,
            dtype=dtype,
            attn_implementation=name,
            local_files_only=True,
            trust_remote_code=recipe.model.trust_remote_code,
            use_safetensors=True,  # never unpickle weights
            **loading(path),
            **(more or {}),
        )
    model, found = loaded
    _check_complete(found, path, report)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    experts.use(model)
    return model if more else model.to(device)  # quantised weights are where they were made


def _check_complete(found: dict[str, Any], path: Path, report: ModelReport) -> None:
    """Refuse a model of which the files lack a part: transformers starts it with random numbers. What they hold besides
    is reported.
    """
    missing, unused = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"the weight files lack {', '.join(missing[:3])}{more}: the model would begin with random numbers there",
            where=str(path),
            fix="take the model folder anew from where it comes from; config.json must fit to its weights "
            "(tie_word_embeddings)",
        )
    if unused:
        report.add("weights not used", f"{len(unused)} tensors: {', '.join(unused[:3])}", "the model has no such parts")


def check_vocabulary(model: Any, tokenizer) -> None:
    """Every token id that the tokenizer can produce has an embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        raise UserError(
            f"the tokenizer has ids up to {highest}, the model's embedding has {rows} rows",
            where="model.base",
            fix="use the tokenizer that belongs to this model",
        )


def build_model(
    recipe: Recipe,
    path: Path,
    tokenizer,
    *,
    device: str,
    precision: Precision,
    report: ModelReport,
    sharded: bool = False,
) -> CausalLM:
    """Load, check, adapt, cast and wrap, in this order.

    ``sharded``: build without weights where the files allow it; the engine reads each rank's rows
    (``CausalLM.unread``).

    ``path`` is the recipe's base (:func:`aifactory_train.sources.resolve_model`); with ``model.start_from`` the weights
    come from :func:`base_folder` instead.
    """
    whole = recipe.adapter.kind == "none"
    scaling = recipe.model.rope_scaling
    if scaling is not None:
        report.add("positions", f"{scaling.kind}, {scaling.factor:g} times the base's", "model.rope_scaling")
    if recipe.model.start_from:
        path = base_folder(recipe)
        report.add("base weights", str(path), "model.start_from")
    # Weights that will be trained are read in their own type: going through bf16 would round an fp32 base for good.
    dtype = precision.parameters if whole else precision.frozen
    unread = path if sharded and _loads_by_shard(path, recipe, device=device, dtype=dtype, report=report) else None
    if unread is not None:
        model = empty_language_model(path, recipe, device=device, dtype=dtype, report=report)
        if recipe.adapter.quantise_base != "none":
            quantise.pack_skeleton(model, recipe, device, precision.compute)
    else:
        more = quantise.loading(recipe, device, precision.compute)
        model = load_language_model(path, recipe, device=device, dtype=dtype, report=report, more=more)
    if recipe.adapter.quantise_base != "none":
        quantise.pack(model, recipe, dtype, report)
    if tokenizer is not None:
        check_vocabulary(model, tokenizer)
    model = apply_adapter(model, recipe, report)
    if recipe.model.start_from:
        start_from_adapter(model, recipe, report)
    apply_precision(model, precision)
    core = CausalLM(model, recipe.train.loss_chunk_tokens, own=recipe.model.attention == "own")
    core.routing = routing.watch(model, core.language_model, recipe, report, device)
    core.unread = unread
    attach_head(core, recipe, dtype=precision.parameters, report=report)
    if recipe.model.vocabulary is not None and recipe.model.vocabulary.train == "new":
        core.first_moving_row = first_new_row(path)
        report.add("embeddings", f"rows from {core.first_moving_row} on are trained", "model.vocabulary.train new")
    return core


def _loads_by_shard(path: Path, recipe: Recipe, *, device: str, dtype: torch.dtype, report: ModelReport) -> bool:
    """Whether every rank may read its own rows of the weights alone; the reason if not goes into the report."""
    from aifactory_train.model.weight_files import why_not

    if recipe.adapter.kind == "dora":
        reason: str | None = "DoRA starts from the norms of the base weights"
    elif recipe.model.start_from and recipe.adapter.train_embeddings:
        reason = "the embeddings come from an earlier run"
    elif recipe.model.trust_remote_code:
        reason = "the model's own code decides how it is loaded"
    else:
        config = load_config(path, recipe)
        reason = quantise.why_whole(recipe, config) or why_not(
            config, path, choose_attention(recipe, config, device, ModelReport()), dtype
        )
    report.add(
        "loading",
        "each rank its shard" if reason is None else "the whole model on each rank",
        reason or "sharded engine",
    )
    return reason is None


def empty_language_model(
    path: Path, recipe: Recipe, *, device: str, dtype: torch.dtype, report: ModelReport
) -> nn.Module:
    """The same model as :func:`load_language_model` without memory for its weights (stride-0 zeros on the host)."""
    from aifactory_train.model.weight_files import skeleton

    config = load_config(path, recipe)
    model = skeleton(config, choose_attention(recipe, config, device, report), dtype)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    experts.use(model)
    return model
