"""The 4-bit base of QLoRA (Dettmers et al. 2023, arXiv:2305.14314): NF4 with double quantisation, through bitsandbytes.

Linear layers of the base are quantised while they are read; embeddings, norms and the output layer keep their type,
adapters are trained as ever. What trains is an approximation of the base: the export joins the adapter with the
original weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from aifactory_train.config.quantised_base import quantisation
from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.model import packed
from aifactory_train.model.report import ModelReport


def loading(recipe: Recipe, device: str, compute: torch.dtype) -> dict[str, Any]:
    """More arguments of ``from_pretrained``; empty without ``adapter.quantise_base``.

    Raises :class:`UserError` where bitsandbytes is missing or cannot quantise on this device.
    """
    if recipe.adapter.quantise_base == "none":
        return {}
    check(device)
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.adapter.quantise_base,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def pack(model: nn.Module, recipe: Recipe, dtype: torch.dtype, report: ModelReport) -> None:
    """Lay every quantised weight of ``model`` into one parameter, which engines can cut (:mod:`.packed`). DoRA alone
    keeps bitsandbytes' own layers: peft takes the norms of weights that it unpacks itself."""
    count = 0 if recipe.adapter.kind == "dora" else packed.pack_linears(model, dtype)
    shown = "NF4, 4 bits, through bitsandbytes" + (f", in {count} linear layers" if count else "")
    report.add("base weights", shown, "adapter.quantise_base")


def pack_skeleton(model: Any, recipe: Recipe, device: str, compute: torch.dtype) -> None:
    """Make the linear layers of a model without weights the quantised ones that transformers would make of them."""
    from transformers.quantizers.auto import AutoHfQuantizer

    settings = loading(recipe, device, compute)
    quantizer = AutoHfQuantizer.from_config(settings["quantization_config"], pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=settings["device_map"])


def why_whole(recipe: Recipe, config: Any) -> str | None:
    """Why a quantised base cannot be read and quantised weight by weight (None: it can, or is none)."""
    if recipe.adapter.quantise_base == "none":
        return None
    if quantisation(vars(config)) is not None:
        return "the files hold 4-bit weights already"
    if config.model_type in ("gpt2", "openai-gpt"):
        return "the files hold transposed weights"
    return None


def check(device: str) -> None:
    """Quantise a small tensor and back: whether bitsandbytes works here shows only when it is asked to."""
    fix = "pip install 'aifactory-train[qlora]', or --set adapter.quantise_base=none"
    try:
        import accelerate  # noqa: F401 - transformers places quantised weights through it
        from bitsandbytes import functional
    except ImportError as error:
        raise UserError(
            f"a 4-bit base needs bitsandbytes and accelerate: {error}", where="adapter.quantise_base", fix=fix
        ) from None
    wanted = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64)
    try:
        packed, state = functional.quantize_4bit(wanted, quant_type="nf4")
        found = functional.dequantize_4bit(packed, state)
    except Exception as error:  # libraries for another device end in any kind of exception
        raise UserError(
            f"bitsandbytes cannot quantise on {device}: {(str(error).splitlines() or [type(error).__name__])[0]}",
            where="adapter.quantise_base",
            fix="install a bitsandbytes for this device, or --set adapter.quantise_base=none",
        ) from None
    if not (found - wanted).abs().max() < 0.2:  # the widest gap of NF4's 16 levels is 0.3
        raise UserError(
            f"bitsandbytes gives wrong values on {device}",
            where="adapter.quantise_base",
            fix="install a bitsandbytes for this device, or --set adapter.quantise_base=none",
        )
