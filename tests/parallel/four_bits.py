"""The part of ``bitsandbytes.functional`` that is used, in plain torch, for machines without the package: NF4 in blocks
of 64 with double quantisation (scales in 8 bits, linear here). Where bitsandbytes is installed it is used itself."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from aifactory_train.model import packed

_LEVELS = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.02, 0.98, 16))
_LEVELS = _LEVELS / _LEVELS.abs().max()
_OUTER = torch.linspace(-1.0, 1.0, 256)


class QuantState(SimpleNamespace):
    def __init__(self, absmax: torch.Tensor, offset: Any = None, state2: Any = None, **more: Any):
        super().__init__(absmax=absmax, offset=offset, state2=state2, nested=state2 is not None, **more)


def _nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return (values[..., None] - levels).abs().argmin(-1).to(torch.uint8)


def _blocks(values: torch.Tensor, size: int) -> torch.Tensor:
    return nn.functional.pad(values, (0, -len(values) % size)).reshape(-1, size)


def quantize_4bit(
    weight: torch.Tensor, blocksize: int = 64, compress_statistics: bool = True, quant_type: str = "nf4"
) -> tuple[torch.Tensor, QuantState]:
    values = _blocks(weight.float().reshape(-1), blocksize)
    scales = values.abs().amax(1)
    codes = _nearest(values / scales[:, None].clamp(min=1e-30), _LEVELS).reshape(-1)
    offset = scales.mean()
    outer = _blocks(scales - offset, 256)
    largest = outer.abs().amax(1)
    eight = _nearest(outer / largest[:, None].clamp(min=1e-30), _OUTER).reshape(-1)[: len(scales)]
    assert compress_statistics and weight.numel() % 2 == 0
    state2 = QuantState(largest, code=_OUTER, blocksize=256, dtype=torch.float32)
    both = (codes[: weight.numel() : 2] << 4 | codes[1 : weight.numel() : 2])[:, None]
    more = {"shape": weight.shape, "dtype": weight.dtype, "blocksize": blocksize}
    return both, QuantState(eight, offset, state2, code=_LEVELS, quant_type=quant_type, **more)


def dequantize_4bit(codes: torch.Tensor, state: Any) -> torch.Tensor:
    flat, inner = codes.reshape(-1).long(), state.state2
    values = state.code[torch.stack([flat >> 4, flat & 15], 1).reshape(-1)]
    scales = inner.code[state.absmax.long()] * inner.absmax.repeat_interleave(inner.blocksize)[: len(state.absmax)]
    scales = (scales + state.offset).repeat_interleave(state.blocksize)[: len(values)]
    return (values * scales).reshape(state.shape).to(state.dtype)


def use() -> None:
    """In place of ``bitsandbytes.functional``, where that is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        packed.bits = lambda: sys.modules[__name__]


def pack(model: Any, dtype: torch.dtype) -> None:
    """The linear layers of ``model`` but its output layer in 4 bits."""
    use()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not model.get_output_embeddings():
            packing = packed.Packing((module.out_features, module.in_features), dtype)
            model.set_submodule(name, packed.PackedLinear(packing, packing.quantise(module.weight.detach().to(dtype))))
