"""Linear layers whose frozen weight lies in memory as 4-bit codes and their scales, behind each other in one parameter.

bitsandbytes keeps the codes of a weight, the scales of their blocks, the scales of those and an offset as tensors of
their own, of which a module's parameters show the first alone. One run of bytes is a parameter like any other: an
engine that shards cuts it evenly among its ranks, gathers it with its block and lets it go again. The arithmetic is
bitsandbytes': the same bytes become the same weight, once for every product.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

#: Every section begins at a multiple of so many bytes, so that it can be read in its own type.
ALIGNMENT = 16


def bits() -> Any:
    """bitsandbytes' functions."""
    from bitsandbytes import functional

    return functional


@dataclass(frozen=True)
class Packing:
    """How a weight of ``shape`` lies in a run of bytes.

    dtype: what the weight is unpacked to; kind: bitsandbytes' name of the 16 levels; block: values that share a scale;
    nested: scales that share a scale of their own (double quantisation; 0: scales are fp32).
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    kind: str = "nf4"
    block: int = 64
    nested: int = 256

    @classmethod
    def of(cls, state: Any) -> Packing:
        """That of a weight with bitsandbytes' ``QuantState``."""
        out, into = state.shape
        nested = state.state2.blocksize if state.nested else 0
        return cls((int(out), int(into)), state.dtype, state.quant_type, state.blocksize, nested)

    @functools.cached_property
    def sections(self) -> dict[str, tuple[torch.dtype, int, int]]:
        """Name -> type, number of elements, first byte."""
        values = math.prod(self.shape)
        scales = -(-values // self.block)
        parts = [("scales", torch.uint8 if self.nested else torch.float32, scales)]
        if self.nested:
            parts = [("outer", torch.float32, -(-scales // self.nested)), ("offset", torch.float32, 1), *parts]
        found: dict[str, tuple[torch.dtype, int, int]] = {}
        at = 0
        for name, dtype, count in [*parts, ("codes", torch.uint8, -(-values // 2))]:
            found[name] = (dtype, count, at)
            at += -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return found

    @property
    def nbytes(self) -> int:
        dtype, count, first = self.sections["codes"]
        return first + count * dtype.itemsize

    def pack(self, codes: torch.Tensor, state: Any) -> torch.Tensor:
        """uint8 ``[nbytes]`` of bitsandbytes' codes and ``QuantState``."""
        whole = torch.zeros(self.nbytes, dtype=torch.uint8, device=codes.device)
        for tensor, first in _sections_of(codes, state, self):
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            whole[first : first + len(flat)] = flat
        return whole

    def quantise(self, weight: torch.Tensor) -> torch.Tensor:
        """uint8 ``[nbytes]`` of ``weight`` (``shape``, in ``dtype``)."""
        codes, state = bits().quantize_4bit(
            weight.contiguous(), blocksize=self.block, compress_statistics=bool(self.nested), quant_type=self.kind
        )
        return self.pack(codes, state)

    def dequantise(self, whole: torch.Tensor) -> torch.Tensor:
        """The weight, ``shape`` in ``dtype``, of ``whole``: uint8 ``[nbytes]``."""
        functional = bits()
        if whole.dtype != torch.uint8:
            whole = whole.to(
                torch.uint8
            )  # FSDP2 of older torch casts what it gathers; 0 to 255 come through as they are
        part = {
            name: whole[first : first + count * dtype.itemsize].view(dtype)
            for name, (dtype, count, first) in self.sections.items()
        }
        levels, outer_levels = _levels(self.kind, whole.device)
        more: dict[str, Any] = {}
        if self.nested:
            outer = functional.QuantState(
                absmax=part["outer"], code=outer_levels, blocksize=self.nested, dtype=torch.float32
            )
            more = {"offset": part["offset"].reshape(()), "state2": outer}
        state = functional.QuantState(
            absmax=part["scales"],
            shape=torch.Size(self.shape),
            code=levels,
            blocksize=self.block,
            quant_type=self.kind,
            dtype=self.dtype,
            **more,
        )
        return functional.dequantize_4bit(part["codes"].reshape(-1, 1), state)


def _sections_of(codes: torch.Tensor, state: Any, packing: Packing) -> Iterator[tuple[torch.Tensor, int]]:
    tensors = {"codes": codes, "scales": state.absmax}
    if packing.nested:
        tensors |= {"outer": state.state2.absmax, "offset": state.offset}
    for name, (_, _, first) in packing.sections.items():
        yield tensors[name], first


@functools.lru_cache(maxsize=16)
def _levels(kind: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The levels that codes stand for, and those that codes of scales stand for; bitsandbytes' own tables."""
    _, state = bits().quantize_4bit(
        torch.ones(64, 64, device=device), blocksize=64, compress_statistics=True, quant_type=kind
    )
    return state.code, state.state2.code


class _Product(torch.autograd.Function):
    """``x`` times the unpacked weight, as bitsandbytes computes it: the bytes are kept for backward, not the weight."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, whole: torch.Tensor, bias: torch.Tensor | None, packing: Packing
    ) -> torch.Tensor:
        ctx.packing = packing
        ctx.save_for_backward(whole)
        return F.linear(x, packing.dequantise(whole).to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (whole,) = ctx.saved_tensors
        gradient = gradients[0]
        back = gradient @ ctx.packing.dequantise(whole).to(gradient.dtype) if ctx.needs_input_grad[0] else None
        return back, None, None, None


class PackedLinear(nn.Linear):
    """A frozen linear layer. ``weight`` is uint8 ``[packing.nbytes]``; ``whole``: its content, or memory for it."""

    def __init__(self, packing: Packing, whole: torch.Tensor, bias: torch.Tensor | None = None):
        nn.Module.__init__(self)  # nn.Linear's would make a weight of its own
        self.out_features, self.in_features = packing.shape
        self.packing = packing
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _Product.apply(input, self.weight, self.bias, self.packing)  # type: ignore[no-any-return, no-untyped-call]


def pack_linears(model: nn.Module, dtype: torch.dtype) -> int:
    """Make a :class:`PackedLinear` of every ``Linear4bit`` of ``model``, with its bytes; how many there were.

    Layers on the meta device become layers of zeros that own one byte, of which the content is read later; ``dtype``:
    what is quantised then.
    """
    from bitsandbytes.nn import Linear4bit

    found = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    for name in found:
        model.set_submodule(name, _packed(model.get_submodule(name), dtype))
    return len(found)


def _packed(module: Any, dtype: torch.dtype) -> PackedLinear:
    weight, bias = module.weight, module.bias
    if not weight.is_meta:
        packing = Packing.of(weight.quant_state)
        return PackedLinear(packing, packing.pack(weight, weight.quant_state), None if bias is None else bias.detach())
    shape, nested = (module.out_features, module.in_features), 256 if weight.compress_statistics else 0
    packing = Packing(shape, dtype, weight.quant_type, weight.blocksize, nested)
    zeros = torch.zeros((), dtype=torch.uint8).expand(packing.nbytes)
    return PackedLinear(packing, zeros, None if bias is None else torch.zeros((), dtype=dtype).expand(bias.shape))


def pieces_of(parameter: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """``(tensor, first byte)`` of all that ``parameter`` holds on this rank: of bitsandbytes' weights also the scales,
    where :class:`Packing` would put them."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return [(parameter, 0)]
    return list(_sections_of(parameter, state, Packing.of(state)))
