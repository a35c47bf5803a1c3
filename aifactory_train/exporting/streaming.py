"""Weights that pass through one tensor at a time: files that are written as tensors come, and models that read their
weights when they need them. With these an export needs the memory of one block, whatever the size of the model.

Sources of weights are mappings from name to tensor that read when they are asked (:class:`TensorFiles`,
:class:`Scratch`,
:class:`Merged`, :class:`aifactory_train.parallel.storage.StoredParameters`); a plain dict is one, too.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aifactory_train.core import compat
from aifactory_train.core.errors import RunFailed
from aifactory_train.model import experts
from aifactory_train.model.weight_files import Source, file_name_of
from aifactory_train.parallel.apply import block_modules
from aifactory_train.parallel.materialise import slots
from aifactory_train.parallel.storage import DTYPE_NAMES, bytes_of

# ---- reading


class Scratch(Mapping[str, torch.Tensor]):
    """A file that tensors are appended to and read from again: what the ranks send must lie somewhere."""

    def __init__(self, path: Path):
        self.path = path
        self.index: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        self._file = open(path, "w+b")  # noqa: SIM115 - closed in close()

    def put(self, name: str, tensor: torch.Tensor) -> None:
        self.index[name] = (self._file.seek(0, os.SEEK_END), tuple(tensor.shape), tensor.dtype)
        for chunk in bytes_of(tensor):
            self._file.write(chunk)

    def __getitem__(self, name: str) -> torch.Tensor:
        start, shape, dtype = self.index[name]
        tensor = torch.empty(shape, dtype=dtype)
        self._file.seek(start)
        if tensor.numel():
            into: Any = tensor.view(-1).view(torch.uint8).numpy()
            self._file.readinto(into)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def close(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


# ---- writing


class ShardFiles:
    """safetensors files of at most ``max_bytes`` each (a larger tensor has one of its own), filled in any order.

    What will be written is known before (``plan``: name -> shape and type), so headers come first and every tensor goes
    to its place as it arrives; nothing is held. More than one file get an index, as transformers reads and writes it.
    """

    def __init__(
        self,
        folder: Path,
        plan: dict[str, tuple[tuple[int, ...], torch.dtype]],
        *,
        max_bytes: int,
        stem: str = "model",
    ):
        self.folder, self.plan = folder, plan
        self.missing = set(plan)
        groups: list[dict[str, int]] = []
        total, filled = 0, max_bytes
        for name, (shape, dtype) in plan.items():
            size = prod(shape) * dtype.itemsize
            if filled + size > max_bytes:
                groups.append({})
                filled = 0
            groups[-1][name] = size
            filled, total = filled + size, total + size
        self.places: dict[str, tuple[Path, int]] = {}
        for number, group in enumerate(groups, 1):
            tail = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
            self._begin(folder / f"{stem}{tail}.safetensors", group)
        if len(groups) > 1:
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: path.name for name, (path, _) in sorted(self.places.items())},
            }
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _begin(self, path: Path, group: dict[str, int]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, size in group.items():
            shape, dtype = self.plan[name]
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + at)
        for name in group:
            self.places[name] = (path, 8 + len(text) + header[name]["data_offsets"][0])

    def put(self, name: str, tensor: torch.Tensor) -> None:
        shape, dtype = self.plan[name]
        if tuple(tensor.shape) != shape:
            raise RunFailed(f"{name}: expected the shape {list(shape)}, got {list(tensor.shape)}")
        path, at = self.places[name]
        with open(path, "r+b") as file:
            file.seek(at)
            for chunk in bytes_of(tensor.detach().to(dtype)):
                file.write(chunk)
        self.missing.discard(name)

    def finish(self) -> None:
        """All tensors were given, and are on the disk."""
        if self.missing:
            raise RunFailed(f"{len(self.missing)} tensors were not written, {min(self.missing)} among them")
        for path in sorted({path for path, _ in self.places.values()}):
            with open(path, "r+b") as file:
                os.fsync(file.fileno())


# ---- a model that reads its weights when it needs them


class Streamed:
    """Runs a model of meta tensors: the blocks and the input embedding get their weights when they are called and lose
    them afterwards, the output layer is read behind the last block, what else there is stays. Weights are read as fp32.

    ``read(parameter name)`` gives a weight. Models of at most ``budget`` bytes are read once and kept.
    """

    def __init__(self, model: nn.Module, language_model: Any, read: Callable[[str], torch.Tensor], budget: int):
        self.read = read
        self.names = {id(p): n for n, p in model.named_parameters()}
        self.slots = {self.names[key]: places for key, places in slots(model).items()}
        self.meta = dict(model.named_parameters())
        if sum(p.numel() * 4 for p in self.meta.values()) <= budget:
            self._fill(list(self.meta))
            return
        blocks = block_modules(model)
        # a classifier has no output embeddings
        first, last = language_model.get_input_embeddings(), language_model.get_output_embeddings()
        own = [self._names_in(unit) for unit in blocks]
        late = [n for n in self._names_in(last) if n not in {m for names in own for m in names}]
        early = [n for n in self._names_in(first) if n not in late]  # a tied weight is the output's
        tied = [n for n in self._names_in(first) if n in late]
        inside = {n for names in [*own, late, early] for n in names}
        self._fill([n for n in self.meta if n not in inside])
        self._around(first, early + tied)
        for block, names in zip(blocks, own, strict=True):
            self._around(block, names)
        blocks[-1].register_forward_hook(lambda *_: self._fill(late))
        model.register_forward_hook(lambda *_: self._empty(late))

    def _names_in(self, module: nn.Module | None) -> list[str]:
        return [] if module is None else [self.names[id(p)] for p in module.parameters()]

    def _around(self, module: nn.Module, names: list[str]) -> None:
        module.register_forward_pre_hook(lambda *_: self._fill(names))
        module.register_forward_hook(lambda *_: self._empty(names))

    def _fill(self, names: list[str]) -> None:
        for name in names:
            self._set(name, nn.Parameter(self.read(name).float(), requires_grad=False))

    def _empty(self, names: list[str]) -> None:
        for name in names:
            self._set(name, self.meta[name])

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        for owner, slot in self.slots[name]:
            owner._parameters[slot] = parameter


def all_to_meta(model: nn.Module) -> None:
    """Every parameter a meta tensor in its place; tied ones stay one."""
    for places in slots(model).values():
        owner, slot = places[0]
        parameter = owner._parameters[slot]
        assert parameter is not None
        empty = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), requires_grad=False)
        for owner, slot in places:
            owner._parameters[slot] = empty


# ---- an adapter


def adapter_names(model: Any) -> dict[str, str]:
    """Key in ``adapter_model.safetensors`` -> name of the parameter of the peft ``model`` that it holds."""
    from peft import get_peft_model_state_dict

    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    # peft renames; numbers in the place of tensors tell which became which. False rather than "auto": peft would ask
    # the hub.
    tags = {name: torch.tensor(number) for number, name in enumerate(names)}
    found = get_peft_model_state_dict(model, state_dict=tags, save_embedding_layers=False)
    return {key: names[int(tag)] for key, tag in found.items()}


class Merged(Mapping[str, torch.Tensor]):
    """The plain model's weights with an adapter added, in fp32, computed tensor by tensor by peft's own layers.

    ``model`` is the plain transformers model as meta tensors (it is wrapped here), ``base`` its weights, ``adapter``
    the tensors of ``adapter_model.safetensors`` in ``folder``.
    """

    def __init__(self, model: nn.Module, base: Source, folder: Path, adapter: Source):
        from peft import PeftConfig, get_peft_model
        from peft.tuners.lora import LoraLayer
        from peft.utils import ModulesToSaveWrapper

        self.base = base
        self.named = [name for name, _ in model.named_parameters()]
        with compat.quiet_peft(), torch.device("meta"):
            config = PeftConfig.from_pretrained(str(folder))
            self.model: Any = get_peft_model(model, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
        all_to_meta(self.model)
        names = {parameter: key for key, parameter in adapter_names(self.model).items()}
        absent = sorted(set(names.values()) - set(adapter))
        if absent:
            raise RunFailed(f"the adapter has no {absent[0]}", where=str(folder))
        self.adapter, self.keys_of = adapter, names
        self.layers: dict[str, tuple[str, Any]] = {}
        self.whole: dict[str, str] = {}
        for name, module in self.model.named_modules():
            if hasattr(module, "parameter_name"):  # of experts: wrappers of several parameters of one module are nested
                self.layers[self._plain(f"{name}.base_layer.{module.parameter_name}")] = (name, module)
            elif isinstance(module, LoraLayer):
                for inner, _ in module.get_base_layer().named_parameters():
                    self.layers[self._plain(f"{name}.base_layer.{inner}")] = (name, module)
            elif isinstance(module, ModulesToSaveWrapper):
                for inner, _ in module.modules_to_save["default"].named_parameters():
                    parameter = f"{name}.modules_to_save.default.{inner}"
                    if parameter in names:
                        self.whole[self._plain(parameter)] = names[parameter]

    @staticmethod
    def _plain(name: str) -> str:
        plain = file_name_of(name)
        assert plain is not None
        return plain

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.whole:
            return self.adapter[self.whole[name]].float()
        if name not in self.layers:
            return self.base[name].float()
        place, layer = self.layers[name]
        of_parameter, before = hasattr(layer, "parameter_name"), []
        for inner, parameter in list(layer.named_parameters()):
            if of_parameter and not inner.startswith(("lora_A.", "lora_B.")):
                continue
            owner = layer.get_submodule(inner.rpartition(".")[0])
            slot, full = inner.rpartition(".")[2], f"{place}.{inner}"
            source = self.adapter[self.keys_of[full]] if full in self.keys_of else self.base[self._plain(full)]
            before.append((owner, slot, parameter))
            self._set(owner, slot, nn.Parameter(source.float(), requires_grad=False))
        try:
            with torch.no_grad():
                if of_parameter:
                    return self.base[name].float() + experts.delta(layer)
                layer.merge(safe_merge=True)
            inner_name = next(
                n
                for n, _ in layer.get_base_layer().named_parameters()
                if self._plain(f"{place}.base_layer.{n}") == name
            )
            return layer.get_base_layer().get_parameter(inner_name).detach()
        finally:
            layer.merged_adapters.clear()
            for owner, slot, parameter in before:
                self._set(owner, slot, parameter)

    @staticmethod
    def _set(owner: nn.Module, slot: str, parameter: nn.Parameter) -> None:
        if isinstance(owner, nn.ParameterDict):
            owner[slot] = parameter
        else:
            owner._parameters[slot] = parameter

    def __iter__(self) -> Iterator[str]:
        return iter(self.named)

    def __len__(self) -> int:
        return len(self.named)
