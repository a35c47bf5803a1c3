"""Weights in safetensors files, and a model without them: what the file calls a parameter, and a skeleton of stride-0
zeros.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aifactory_train.core.errors import UserError
from aifactory_train.core.files import foreign, read_json
from aifactory_train.private import vault
from aifactory_train.sources.model_folder import check_weight_index

if TYPE_CHECKING:
    pass


#: Parts that peft adds to the name of a base parameter.
_PEFT_PARTS = (".base_layer", ".original_module", ".modules_to_save.default")


def file_name_of(name: str) -> str | None:
    """Name in the base model's files of a parameter of :class:`~aifactory_train.model.causal_lm.CausalLM`; None for
    adapters and heads.
    """
    if ".lora_" in name or name.startswith("head."):
        return None
    name = name.removeprefix("model.")
    if name.startswith("base_model.model."):
        name = name.removeprefix("base_model.model.")
    for part in _PEFT_PARTS:
        name = name.replace(part, "")
    return name


def tensors_in(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file of a model folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        check_weight_index(folder)
        places = read_json(index, {"weight_map": dict})["weight_map"]
        return {name: folder / file for name, file in places.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        return {}
    with vault.open_tensors(single) as shard:
        return dict.fromkeys(shard.keys(), single)


def skeleton(config: Any, attention: str | None, dtype: torch.dtype, *, classifies: bool = False) -> nn.Module:
    """The transformers model of ``config`` with stride-0 zeros in ``dtype`` for weights and real buffers;
    ``classifies``: its classifier."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    with foreign("model.base", "no model can be built from its configuration"), torch.device("meta"):
        model = kind.from_config(config, dtype=dtype, attn_implementation=attention)
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
    """Buffers follow from the configuration (rotary frequencies): build the module again, with memory, and take
    them.
    """
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


def why_not(config: Any, folder: Path, attention: str | None, dtype: torch.dtype) -> str | None:
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


def read_tensor(file: Path, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """One whole tensor of a safetensors file. Raises :class:`UserError` if its shape is another."""
    with vault.open_tensors(file) as shard:
        tensor = shard.get_tensor(name)
    same_shape(name, list(tensor.shape), shape, file)
    return tensor


def forget_pages(folder: Path) -> None:
    """Let the system drop what it kept in memory of the weight files in ``folder``, which have been read."""
    for file in sorted(set(tensors_in(folder).values())):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def same_shape(name: str, stored: list[int], wanted: tuple[int, ...], file: Path) -> None:
    if tuple(stored) != wanted:
        raise UserError(f"{name} is {stored} in the file and {list(wanted)} in the model", where=str(file))


Source = Mapping[str, torch.Tensor]


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of safetensors files, read one by one (encrypted files, too). ``places``: tensor name -> file."""

    def __init__(self, places: dict[str, Path]):
        self.places = places

    @classmethod
    def of(cls, folder: Path) -> TensorFiles:
        """The weights of a model folder."""
        return cls(tensors_in(folder))

    @classmethod
    def single(cls, file: Path) -> TensorFiles:
        with vault.open_tensors(file) as shard:
            return cls(dict.fromkeys(shard.keys(), file))

    def __getitem__(self, name: str) -> torch.Tensor:
        with vault.open_tensors(self.places[name]) as shard:
            return shard.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
