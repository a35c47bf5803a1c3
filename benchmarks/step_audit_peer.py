"""The peer's side of ``step_audit.py``: one step as TRL's SFTTrainer runs it with Liger's kernels on, counted.

transformers' model, peft's adapters, Liger's patch of the instance, TRL's padding-free collation (boundaries made on
the host), gradient checkpointing that does not re-enter, the loss over the items of the batch, clipping and fused AdamW
by torch. What a meta tensor cannot say is said for it, always in the peer's favour: where Liger asks whether a tensor
is on a GPU of compute capability 8 or newer it is told yes; autocast, which meta tensors do not have, is applied by its
own rule (products in bf16; the copy of a trained fp32 leaf is made once a forward).

Routed experts run by transformers' own path (``grouped_mm``, the default), adapted by peft's ``target_parameters``.
Liger's own experts stay off: they replace the forward of peft's wrapper, which has no such weights, and the adapters
with it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch

PACKS, LENGTH, RANK = 4, 4096, 16
PEER = "audit_packed"  # the peer's attention in transformers' registry


def run(
    case: dict[str, Any], config: Any, sku: Any, checkpointing: str, *, weights: str, autocast: bool
) -> dict[str, Any]:
    """The account of one step, as plain values. ``weights``: bf16 or fp32, of the base; adapters are fp32 under
    autocast, as peft makes them, else of the base's type."""
    from aifactory_train.audit import pretend, step
    from aifactory_train.audit.recorder import HostAnswers

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[weights]
    tokens = PACKS * LENGTH
    answers = HostAnswers(tokens - PACKS, [LENGTH] * PACKS)
    with contextlib.ExitStack() as stack:
        stack.enter_context(pretend.chip(sku.arch, sku.name))
        stack.enter_context(_liger_on_the_chip(sku, autocast))
        with torch.device("meta"):
            model = _model(case, config, dtype, checkpointing, fp32_adapters=autocast)
            batch = _batch(tokens)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), fused=True)
        for p in trained:
            p.grad = torch.empty_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        inputs = [t for t in batch.values() if isinstance(t, torch.Tensor)]
        with step.audited(model, answers, inputs, lambda: list(optimizer.state.values())) as recorder:
            low = stack.enter_context(Autocast()) if autocast else None
            loss = model(**batch, use_cache=False).loss
            if low is not None:
                low.end_of_forward()
            recorder.phase = "backward"
            loss.backward()
            recorder.phase = "update"
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return step.account(recorder, model).as_dict()


def _model(case: dict[str, Any], config: Any, dtype: torch.dtype, checkpointing: str, *, fp32_adapters: bool) -> Any:
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance
    from transformers import AutoModelForCausalLM

    _register_attention()
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=PEER)
    if case["adapter"] == "lora":
        from peft import LoraConfig, get_peft_model

        experts = [f"{n}.{p}" for n, m in model.named_modules() for p in EXPERTS if hasattr(m, p) and _stacked(m)]
        settings = LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            lora_dropout=0.0,
            target_modules="all-linear",
            target_parameters=experts or None,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, settings, autocast_adapter_dtype=fp32_adapters)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32 if fp32_adapters else dtype)
    routed = any(map(_stacked, model.modules()))
    plain = model.get_base_model() if case["adapter"] == "lora" else model
    _apply_liger_kernel_to_instance(model=plain, **({"swiglu": False} if routed else {}))
    if checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if case["adapter"] == "lora":
            model.enable_input_require_grads()
    return model.train()


#: parameters that hold the matrices of all experts of a layer
EXPERTS = ("gate_up_proj", "down_proj")


def _stacked(module: torch.nn.Module) -> bool:
    """Whether ``module`` holds the matrices of many experts."""
    return all(isinstance(module._parameters.get(name), torch.nn.Parameter) for name in EXPERTS)


def _batch(tokens: int) -> dict[str, Any]:
    """What TRL's collator hands over without padding: the host knows the boundaries and the longest document."""

    def integers(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    bounds = integers(PACKS + 1, dtype=torch.int32)
    return {
        "input_ids": integers(1, tokens),
        "position_ids": integers(1, tokens),
        "labels": integers(1, tokens),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": LENGTH,
        "max_length_k": LENGTH,
        "num_items_in_batch": integers(),
    }


def _register_attention() -> None:
    """FlashAttention 2's way through transformers (its mask rules too), up to the kernel, which is the same for both
    sides."""
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    def attention(module, query, key, value, attention_mask, *, cu_seq_lens_q, max_length_q, **kwargs):
        batch, heads, length, dim = query.shape
        q, k, v = (t.transpose(1, 2).reshape(-1, t.shape[1], dim) for t in (query, key, value))
        low = torch.bfloat16 if q.dtype == torch.float32 else q.dtype  # what its peft check does under autocast
        q, k, v = (t.to(low) for t in (q, k, v))
        out = varlen_attn(
            q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, window_size=(-1, 0), enable_gqa=True
        )
        return out.view(batch, length, heads, dim), None

    AttentionInterface.register(PEER, attention)
    AttentionMaskInterface.register(PEER, flash_attention_mask)


class Autocast:
    """Autocast to bf16 where meta tensors have none: products take their factors in bf16, in recomputation too."""

    PRODUCTS = (
        (torch.nn.functional, "linear"), (torch, "matmul"), (torch, "mm"), (torch, "bmm"), (torch, "addmm"),
        (torch.Tensor, "__matmul__"), (torch.Tensor, "matmul"), (torch.Tensor, "mm"),
    )  # fmt: skip

    def __init__(self) -> None:
        self.copies: dict[int, torch.Tensor] | None = {}
        self.before: list[Any] = []

    def __enter__(self) -> Autocast:
        for place, name in self.PRODUCTS:
            plain = getattr(place, name)
            self.before.append((place, name, plain))
            setattr(place, name, self._lowered(plain))
        return self

    def __exit__(self, *error: Any) -> None:
        for place, name, plain in self.before:
            setattr(place, name, plain)

    def end_of_forward(self) -> None:
        """The context ends: copies are forgotten. Recomputation is under one of its own, block by block."""
        self.copies = None

    def _lowered(self, plain: Any) -> Any:
        def product(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("out") is None:
                args = tuple(map(self._low, args))
                kwargs = {k: self._low(v) for k, v in kwargs.items()}
            return plain(*args, **kwargs)

        return product

    def _low(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        if self.copies is None or not (value.requires_grad and value.is_leaf):
            return value.to(torch.bfloat16)
        if id(value) not in self.copies:
            self.copies[id(value)] = value.to(torch.bfloat16)
        return self.copies[id(value)]


# ---- Liger, which asks a tensor where it lies


@contextlib.contextmanager
def _liger_on_the_chip(sku: Any, autocast: bool) -> Iterator[None]:
    from liger_kernel.ops import fused_linear_cross_entropy as loss
    from liger_kernel.ops import rms_norm
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    capability = "8" if not sku.arch.startswith("sm_") else sku.arch.removeprefix("sm_")[:-1]
    patched = {
        modeling_llama: ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"),
        modeling_qwen3_moe: ("apply_rotary_pos_emb", "Qwen3MoeRMSNorm"),
    }
    before = [
        # Liger's patch replaces them
        *((module, name, getattr(module, name)) for module, names in patched.items() for name in names),
        (loss, "_can_use_mm_out", loss._can_use_mm_out),
    ]

    def can_use_mm_out(left: torch.Tensor, right: torch.Tensor) -> bool:
        return (
            not torch.is_grad_enabled() and left.dtype == right.dtype and (not autocast or left.dtype == torch.bfloat16)
        )

    loss._can_use_mm_out = can_use_mm_out
    before.append(
        _reworded(
            loss,
            "fused_linear_cross_entropy_forward",
            {
                'grad_weight.device.type == "cuda"': "True",
                "torch.cuda.get_device_capability(grad_weight.device)[0]": capability,
            },
        )
    )
    before += _autocast_off()
    before.append(
        _reworded(
            rms_norm,
            "rms_norm_backward",
            {
                'X.device.type == "cuda"': "True",
                "torch.cuda.get_device_properties(X.device).multi_processor_count": str(sku.units),
            },
        )
    )
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _autocast_off() -> list[tuple[Any, str, Any]]:
    """peft switches autocast off around the sum of a parameter and its adapter by the parameter's device; of meta
    tensors, which have none, that is nothing to do. Returns what it was, to be put back."""
    from peft.tuners.lora import layer

    class Torch:
        """torch, but for ``autocast``."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
            nothing = device_type == "meta" and not kwargs.get("enabled", True)
            return contextlib.nullcontext() if nothing else torch.autocast(device_type, *args, **kwargs)

    before = layer.torch
    layer.torch = Torch()
    return [(layer, "torch", before)]


def _reworded(module: Any, name: str, words: dict[str, str]) -> tuple[Any, str, Any]:
    """A function of ``module`` with some of its words replaced; returns what it was, to be put back."""
    function = getattr(module, name)
    source = inspect.getsource(function)
    for old, new in words.items():
        if old not in source:
            raise SystemExit(f"{module.__name__}.{name} is another than that of liger-kernel 0.8.5: it lacks {old!r}")
        source = source.replace(old, new)
    scope: dict[str, Any] = {}
    exec(compile(source, inspect.getfile(module), "exec"), module.__dict__, scope)
    setattr(module, name, scope[name])
    return module, name, function
