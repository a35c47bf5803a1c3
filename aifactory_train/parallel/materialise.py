"""Sharded loading: the model is built without its weights, sharded, and then every rank reads its own rows from the
files.

No rank ever holds the whole model, in host memory or on the device. The skeleton's base weights are *stride-0 zeros*:
host tensors of the right shape and type that own one element. They are not meta tensors, so that adapters are
initialised on them with the same random numbers as on a loaded model, and the curve does not depend on how the model
was loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from aifactory_train.model.packed import PackedLinear
from aifactory_train.model.weight_files import file_name_of, same_shape, tensors_in

if TYPE_CHECKING:
    from aifactory_train.model.causal_lm import CausalLM


def slots(core: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each parameter is used, by its identity: a tied weight has several places."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in core.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, name))
    return found


def to_meta(core: nn.Module) -> None:
    """Stride-0 zeros become meta tensors, which FSDP2 shards without memory; adapters stay as they are."""
    for places in slots(core).values():
        module, name = places[0]
        parameter = module._parameters[name]
        assert parameter is not None
        if parameter.numel() > 1 and not any(parameter.stride()):
            empty = nn.Parameter(torch.empty_like(parameter, device="meta").contiguous(), parameter.requires_grad)
            for owner, slot in places:
                owner._parameters[slot] = empty


def to_memory(core: nn.Module, device: str) -> None:
    """Memory on ``device`` for the shards that are still meta; their content is undefined until :func:`load_rows`."""
    places = list(slots(core).values())
    core._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)  # what to_empty does, for these alone
    for (first, name), *others in places:
        for owner, slot in others:
            owner._parameters[slot] = first._parameters[name]


def load_rows(core: CausalLM, folder: Path, device: str = "cpu") -> None:
    """Fill the row-sharded base parameters of ``core`` from ``folder``: each rank reads its own rows only. Of weights
    that are quantised (on ``device``) every rank reads one whole after the other and keeps its share: their scales
    depend on all of them."""
    from safetensors import safe_open

    places = tensors_in(folder)
    packings = {id(m.weight): m.packing for m in core.modules() if isinstance(m, PackedLinear)}
    by_file: dict[Path, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in core.named_parameters():
        wanted = file_name_of(name)
        if wanted is not None:
            by_file.setdefault(places[wanted], []).append((wanted, parameter))
    for file, parameters in sorted(by_file.items()):
        with safe_open(file, framework="pt") as shard:
            for wanted, parameter in parameters:
                part, packing = shard.get_slice(wanted), packings.get(id(parameter))
                same_shape(wanted, part.get_shape(), tuple(parameter.shape if packing is None else packing.shape), file)
                with torch.no_grad():
                    if packing is not None:
                        part = packing.quantise(part[:].to(device, packing.dtype))
                    if not isinstance(parameter, DTensor):
                        parameter.copy_(part[:])
                        continue
                    local, mesh = parameter.to_local(), parameter.device_mesh
                    first = min(
                        mesh.get_local_rank("shard") * -(-parameter.shape[0] // mesh.size(-1)), parameter.shape[0]
                    )
                    if local.numel():
                        local.copy_(part[first : first + local.shape[0]])
