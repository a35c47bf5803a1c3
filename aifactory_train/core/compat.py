"""Every difference between the library versions that this project supports (torch 2.8 to 2.13) lives here."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

if not torch.cuda.is_available():
    # peft imports DeepSpeed where it is installed, and DeepSpeed warns on every CPU process unless it is told.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


@functools.cache
def torch_version() -> tuple[int, int]:
    """(major, minor) of torch, local suffixes such as ``+rocm6.4`` dropped."""
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def varlen_attention() -> Any | None:
    """``torch.nn.attention.varlen.varlen_attn`` (torch >= 2.10), or None where this torch lacks it."""
    if torch_version() < (2, 10):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def varlen_supports_gqa() -> bool:
    """Whether ``varlen_attn`` takes fewer key/value heads than query heads by itself (torch >= 2.12)."""
    return torch_version() >= (2, 12)


def device_type() -> str:
    """``cuda`` (NVIDIA, and AMD through ROCm) or ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def supports_bf16(device: str) -> bool:
    """Whether the hardware computes in bf16; emulation (V100) does not count."""
    if device == "cpu":
        return True
    if torch.version.hip:
        return True
    return torch.cuda.get_device_capability() >= (8, 0)


def shares_memory(device: str) -> bool:
    """Whether the GPU computes in the host's own memory (MI300A and other integrated ones)."""
    if device == "cpu":
        return False
    properties = torch.cuda.get_device_properties(device)
    return bool(getattr(properties, "is_integrated", False)) or "MI300A" in properties.name


def sum_gradients(module: Any) -> None:
    """Make FSDP2 add the ranks' gradients and divide by nothing.

    A factor of 1 alone would ask the backend for ``AVG`` (one rank) or ``PREMUL_SUM`` (which gloo lacks), so plain sums
    are forced as well where this torch can (all supported versions; the factor is a method of the root in some of
    them).
    """
    from torch.distributed.fsdp import FSDPModule

    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.set_gradient_divide_factor(1.0)
            child.set_force_sum_reduction_for_comms(True)


def ddp_without_buffer_sync() -> dict[str, bool]:
    """Arguments of ``DistributedDataParallel`` that leave buffers alone (they are constants of the model).

    torch 2.13 renamed the switch.
    """
    import inspect

    from torch.nn.parallel import DistributedDataParallel

    names = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers": False} if "forward_sync_buffers" in names else {"broadcast_buffers": False}


class _Heard(torch.autograd.Function):
    """Calls a function with gradients on: what C++ warns of meanwhile goes through Python's filters, not straight to
    the terminal.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[[], Any], results: list[Any]) -> torch.Tensor:
        with torch.enable_grad():
            results.append(function())
        return torch.empty(0)


def quiet_unused_parameters(function: Callable[[], Any]) -> Any:
    """``function()`` without DDP's one warning that ``find_unused_parameters=True``, which we set on purpose, found
    none unused.

    DDP gives it once a process, in the first forward pass whose backward pass reduces gradients.
    """
    results: list[Any] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        _Heard.apply(function, results)
    return results[0]


def peft_refuses(model: Any, name: str) -> bool:
    """Whether peft refuses an adapter on layers of ``model`` called ``name`` (Mamba's output projections)."""
    from peft import LoraConfig
    from peft.tuners import tuners_utils

    check = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    if check is None:
        return False
    try:
        check(LoraConfig(), model, name)
    except ValueError:
        return True
    return False


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Hides the warning that peft 0.21 causes by reading a name that transformers 5 has renamed: no user could act on
    it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        yield


def peft_takes_for_experts(model_type: str) -> set[str]:
    """Names of layers that peft (from 0.19 on, with transformers 5) takes for experts that were fused since."""
    try:
        from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
    except ImportError:
        return set()
    return set(_MOE_TARGET_MODULE_MAPPING.get(_MODEL_TO_CONVERSION_PATTERN.get(model_type, ""), {}))
