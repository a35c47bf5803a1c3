"""The 4-bit base of QLoRA (Dettmers et al. 2023, arXiv:2305.14314): NF4 with double quantisation, through bitsandbytes.

Linear layers of the base are quantised while they are read; embeddings, norms and the output layer keep their type,
adapters are trained as ever. What trains is an approximation of the base: the export joins the adapter with the
original weights.
"""

from __future__ import annotations

from typing import Any

import torch

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError


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
