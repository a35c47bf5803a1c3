"""A finished run's model, for evaluation, chat and export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aifactory_train.config.schema import Recipe
from aifactory_train.core import compat
from aifactory_train.core.errors import UserError
from aifactory_train.model import experts
from aifactory_train.model.base import base_folder
from aifactory_train.model.causal_lm import CausalLM
from aifactory_train.model.head import IN_ADAPTER
from aifactory_train.model.report import ModelReport
from aifactory_train.model.weight_files import Source, TensorFiles
from aifactory_train.private import profile, vault
from aifactory_train.run.folder import RunFolder

if TYPE_CHECKING:
    pass


def load_tensors(core: CausalLM, tensors: Source) -> None:
    parameters = dict(core.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def adapter_tensors(folder: Path) -> Source:
    """Tensors of an exported adapter by their keys; an encrypted one is decrypted in memory."""
    return TensorFiles.single(folder / "adapter_model.safetensors")


def load_adapter(core: CausalLM, folder: Path) -> None:
    from peft import set_peft_model_state_dict

    tensors = vault.load_tensors(folder / "adapter_model.safetensors")
    if core.head is not None:
        with torch.no_grad():
            core.head.weight.copy_(tensors.pop(IN_ADAPTER))
    set_peft_model_state_dict(core.model, tensors)


def with_adapter(base: Any, adapter: Path) -> Any:
    """``base`` with the exported adapter; an encrypted one is decrypted in memory."""
    from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict

    weights = adapter / "adapter_model.safetensors"
    if weights.is_file():
        return PeftModel.from_pretrained(base, str(adapter), autocast_adapter_dtype=False)
    model = get_peft_model(base, PeftConfig.from_pretrained(str(adapter)), autocast_adapter_dtype=False)
    set_peft_model_state_dict(model, vault.load_tensors(weights))
    return model


def nothing_exported(run: RunFolder) -> UserError:
    """The refusal where a model is needed that was not exported yet."""
    fix = "finish it (aifactory train ... --resume auto); the export follows the last step"
    return UserError("this run has exported nothing yet", where=str(run.path), fix=fix)


def load_classifier(run: RunFolder, device: str) -> tuple[Any, Any, Path]:
    """transformers' own classifier from the export of a run with a head, in fp32 and eval mode: ``(model, tokenizer,
    exported folder)``. Raises :class:`UserError` where the run has no head, or has exported nothing.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    recipe = run.load_config()
    profile.enforce(recipe, run.path)
    if recipe.methods.head is None:
        fix = "its answers: aifactory eval, aifactory chat; labels need methods.head in the recipe"
        raise UserError("this run trained no head, so it gives no labels", where=str(run.path), fix=fix)
    if recipe.methods.head.kind == "embedding":
        raise UserError("this run trained embeddings, which are no labels", where=str(run.path))
    if recipe.methods.head.kind == "reward":
        fix = "the README of its export shows how an answer gets its reward"
        raise UserError("this run trained a reward model, which gives no labels", where=str(run.path), fix=fix)
    adapter, whole = run.export / "adapter", run.export / "model"
    how: dict[str, Any] = {"local_files_only": True, "dtype": torch.float32, "use_safetensors": True}
    if vault.holds(adapter / "adapter_model.safetensors"):
        folder = adapter
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        base = AutoModelForSequenceClassification.from_pretrained(str(base_folder(recipe)), config=config, **how)
        with compat.quiet_peft():
            model: Any = with_adapter(base, adapter)
    elif (whole / "config.json").is_file():
        folder = whole
        model = AutoModelForSequenceClassification.from_pretrained(str(folder), **how)
    else:
        raise nothing_exported(run)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(str(folder), local_files_only=True), folder


def load_embedder(run: RunFolder, device: str) -> tuple[Any, Any, Path]:
    """transformers' model without output layer from the export of an embedding run, in fp32 and eval mode: ``(model,
    tokenizer, exported folder)``. Raises :class:`UserError` where the run has exported nothing.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    recipe = run.load_config()
    profile.enforce(recipe, run.path)
    how: dict[str, Any] = {"local_files_only": True, "dtype": torch.float32, "use_safetensors": True}
    adapter = run.export / "adapter"
    if vault.holds(adapter / "adapter_model.safetensors"):
        base = AutoModelForCausalLM.from_pretrained(str(base_folder(recipe)), **how)
        with compat.quiet_peft():
            folder, model = adapter, with_adapter(base, adapter).get_base_model().base_model
    elif (run.export / "model" / "config.json").is_file():
        folder = run.export / "model"
        model = AutoModel.from_pretrained(str(folder), **how)
    else:
        raise nothing_exported(run)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(str(folder), local_files_only=True), folder


def load_trained(run: RunFolder, device: str) -> tuple[CausalLM, Any, Recipe]:
    """The trained model of a run for use (chat, eval): ``(model, tokenizer, recipe)``, with our attention, in eval
    mode.

    Raises :class:`UserError` when the run has exported nothing.
    """
    from transformers import AutoTokenizer

    from aifactory_train.model.loading import load_language_model
    from aifactory_train.model.precision import choose_precision

    recipe = run.load_config()
    if recipe.methods.head is not None:
        gives = {"reward": "rewards", "embedding": "vectors"}.get(recipe.methods.head.kind, "labels")
        use = (
            "the README of its export shows how" if gives == "rewards" else f"aifactory predict {run.path} --data FILE"
        )
        raise UserError(
            f"this run trained a head: it gives {gives} and writes no text",
            where=str(run.path),
            fix=f"{use}; its held-out figures are in eval.json",
        )
    profile.enforce(recipe, run.path)
    precision, _ = choose_precision(recipe, device)
    report = ModelReport()
    adapter, whole = run.export / "adapter", run.export / "model"
    if vault.holds(adapter / "adapter_model.safetensors"):
        base = load_language_model(base_folder(recipe), recipe, device=device, dtype=precision.frozen, report=report)
        with compat.quiet_peft():
            model: Any = with_adapter(base, adapter)
        experts.use_factors(model)
        folder = adapter
    elif (whole / "config.json").is_file():
        model = load_language_model(whole, recipe, device=device, dtype=precision.compute, report=report)
        folder = whole
    else:
        raise nothing_exported(run)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=recipe.model.trust_remote_code
    )
    return CausalLM(model, own=recipe.model.attention == "own").eval(), tokenizer, recipe
