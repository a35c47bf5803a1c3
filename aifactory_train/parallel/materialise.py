"""Sharded loading: the model is built without its weights, sharded, and then every rank reads its own rows from the files.

No rank ever holds the whole model, in host memory or on the device. The skeleton's base weights are *stride-0 zeros*: host
tensors of the right shape and type that own one element. They are not meta tensors, so that adapters are initialised on them
with the same random numbers as on a loaded model, and the curve does not depend on how the model was loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from aifactory_train.errors import UserError

if TYPE_CHECKING:
    from aifactory_train.model import CausalLM

#: Parts that peft adds to the name of a base parameter.
_PEFT_PARTS = (".base_layer", ".original_module", ".modules_to_save.default")


def file_name_of(name: str) -> str | None:
    """Name in the base model's files of a parameter of :class:`~aifactory_train.model.CausalLM`; None for adapters."""
    if ".lora_" in name:
        return None
    name = name.removeprefix("model.")
    if name.startswith("base_model.model."):
        name = name.removeprefix("base_model.model.")
    for part in _PEFT_PARTS:
        name = name.replace(part, "")
    return name


def tensors_in(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file of a model folder."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in places.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        return {}
    with safe_open(single, framework="pt") as shard:
        return dict.fromkeys(shard.keys(), single)


def skeleton(config: Any, attention: str, dtype: torch.dtype) -> nn.Module:
    """The transformers model of ``config`` with stride-0 zeros in ``dtype`` for weights and real buffers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    replaced: dict[int, nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in replaced:
                zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                replaced[id(parameter)] = nn.Parameter(zeros, requires_grad=False)
            module._parameters[name] = replaced[id(parameter)]
        if any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
            _build_buffers(module, model.config)
    return model.eval()


def _build_buffers(module: nn.Module, config: Any) -> None:
    """Buffers follow from the configuration (rotary frequencies): build the module again, with memory, and take them."""
    try:
        fresh = type(module)(config)
    except TypeError:
        raise UserError(
            f"the buffers of {type(module).__name__} cannot be built from the configuration alone",
            where="model.base",
            fix="--set parallel.engine=ddp, or zero2, which load the whole model",
        ) from None
    for name, buffer in fresh._buffers.items():
        module._buffers[name] = buffer


def why_not(config: Any, folder: Path, attention: str, dtype: torch.dtype) -> str | None:
    """Why this model cannot be loaded shard by shard (None: it can): the files must name what the model names."""
    present = tensors_in(folder)
    if not present:
        return "the folder has no safetensors files"
    try:
        model = skeleton(config, attention, dtype)
    except UserError as error:
        return error.what
    missing = [name for name, _ in model.named_parameters() if name not in present]
    return f"the files have no tensor '{missing[0]}'; transformers converts them" if missing else None


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


def read_tensor(file: Path, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """One whole tensor of a safetensors file. Raises :class:`UserError` if its shape is another."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as shard:
        tensor = shard.get_tensor(name)
    _same_shape(name, list(tensor.shape), shape, file)
    return tensor


def _same_shape(name: str, stored: list[int], wanted: tuple[int, ...], file: Path) -> None:
    if tuple(stored) != wanted:
        raise UserError(f"{name} is {stored} in the file and {list(wanted)} in the model", where=str(file))


def load_rows(core: CausalLM, folder: Path) -> None:
    """Fill the row-sharded base parameters of ``core`` from ``folder``: each rank reads its own rows only."""
    from safetensors import safe_open

    places = tensors_in(folder)
    by_file: dict[Path, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in core.named_parameters():
        wanted = file_name_of(name)
        if wanted is not None:
            by_file.setdefault(places[wanted], []).append((wanted, parameter))
    for file, parameters in sorted(by_file.items()):
        with safe_open(file, framework="pt") as shard:
            for wanted, parameter in parameters:
                part = shard.get_slice(wanted)
                _same_shape(wanted, part.get_shape(), tuple(parameter.shape), file)
                with torch.no_grad():
                    if not isinstance(parameter, DTensor):
                        parameter.copy_(part[:])
                        continue
                    local, mesh = parameter.to_local(), parameter.device_mesh
                    first = min(
                        mesh.get_local_rank("shard") * -(-parameter.shape[0] // mesh.size(-1)), parameter.shape[0]
                    )
                    if local.numel():
                        local.copy_(part[first : first + local.shape[0]])
