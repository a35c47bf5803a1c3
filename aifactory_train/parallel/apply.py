"""What is done to the model before an engine takes it, block by block: compute type, activation checkpointing,
compilation (:func:`prepare_blocks`). Each replaces the ``forward`` of a block (an instance attribute), so that
parameter names and the hooks that engines add stay as they are."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from aifactory_train.core.output import note

if TYPE_CHECKING:
    from aifactory_train.model.causal_lm import CausalLM


def block_modules(core: nn.Module) -> list[nn.Module]:
    """The transformer blocks of the model, in order: the unit of sharding, checkpointing and compilation.

    They are the modules that transformers names in ``_no_split_modules``; without such names, the children of the
    longest ``ModuleList``.
    """
    named: set[str] = set()
    for module in core.modules():
        named.update(getattr(module, "_no_split_modules", None) or ())
    blocks = [m for m in core.modules() if type(m).__name__ in named and isinstance_of_list(core, m)]
    if blocks:
        return blocks
    lists = [list(m) for m in core.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def isinstance_of_list(core: nn.Module, module: nn.Module) -> bool:
    """Whether ``module`` is an element of a ``ModuleList`` (vision towers and embeddings named no-split are not)."""
    return any(isinstance(m, nn.ModuleList) and any(child is module for child in m) for m in core.modules())


# ---- compute type


class _CastTogether(torch.autograd.Function):
    """Copies of several parameters in another type, one behind the other in one piece of memory; their gradients come
    back in the parameters' types. Few kernels serve all of them, in both directions."""

    @staticmethod
    def forward(ctx, compute: torch.dtype, *parameters: torch.Tensor):
        ctx.set_materialize_grads(False)
        ctx.types = [p.dtype for p in parameters]
        sizes = [p.numel() for p in parameters]
        parts = parameters[0].new_empty(sum(sizes), dtype=compute).split(sizes)
        copies = [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]
        torch._foreach_copy_(copies, list(parameters))
        return tuple(copies)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor | None):
        given = [(i, g) for i, g in enumerate(gradients) if g is not None]
        back = [torch.empty_like(g, dtype=ctx.types[i]) for i, g in given]
        if back:
            torch._foreach_copy_(back, [g for _, g in given])
        found = dict(zip((i for i, _ in given), back, strict=True))
        return None, *(found.get(i) for i in range(len(gradients)))


#: Elements of the largest parameter that is cast with others, and tensors that torch's kernels take at once.
MOST_TOGETHER, TENSORS_TOGETHER = 2**22, 64


def _made_ahead(core: nn.Module, found: list[ComputeCopies]) -> None:
    """Copies of small parameters (adapters) are made when the model's forward begins, for some blocks together and by
    shape, so that operators which take several find them side by side. They stay until the next forward: recomputation
    uses them again. Whole weights are copied block by block, and live as long as their block needs them."""
    if any(p.numel() > MOST_TOGETHER for copies in found for p in copies.parameters.values()):
        return
    groups: list[list[ComputeCopies]] = []
    for copies in found:
        full = not groups or sum(len(c.slots) for c in [*groups[-1], copies]) > TENSORS_TOGETHER
        groups.append([copies]) if full else groups[-1].append(copies)
    inner = core.forward

    @functools.wraps(inner)
    def with_copies_made(*args: Any, **kwargs: Any) -> Any:
        for group in groups:
            parameters = sorted(
                (item for copies in group for item in copies.parameters.items()), key=lambda item: tuple(item[1].shape)
            )
            made = _CastTogether.apply(group[0].compute, *(p for _, p in parameters))
            by_id = {key: (copy, p._version) for (key, p), copy in zip(parameters, made, strict=True)}
            for copies in group:
                copies.made = by_id
        return inner(*args, **kwargs)

    core.forward = with_copies_made  # type: ignore[method-assign]


class ComputeCopies:
    """While active, the parameters of some modules read as copies in the compute type.

    This is what FSDP2's mixed precision does with the gathered parameters: fp32 master, bf16 arithmetic, gradients that
    flow back through the cast. It is not autocast, which would keep the residual stream in fp32 and so train another
    curve than the sharded engines.
    """

    def __init__(self, modules: list[nn.Module], compute: torch.dtype):
        self.compute = compute
        self.slots = [
            (module, name)
            for module in modules
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.is_floating_point() and parameter.dtype != compute
        ]
        #: by the parameter's id, with its version then: where they were made before (:func:`_made_ahead`)
        self.made: dict[int, tuple[torch.Tensor, int]] = {}

    @property
    def parameters(self) -> dict[int, nn.Parameter]:
        """What is copied, by id: a tied weight is there once."""
        return {id(p): p for module, name in self.slots if (p := module._parameters[name]) is not None}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        copies: dict[int, torch.Tensor] = {}
        for key, parameter in self.parameters.items():
            made, version = self.made.get(key, (None, None))
            current = made is not None and version == parameter._version  # not of before the last update
            copies[key] = made if made is not None and current else parameter.to(self.compute)
        for module, name in self.slots:
            module.__dict__[name] = copies[id(module._parameters[name])]  # found before _parameters
        try:
            yield
        finally:
            for module, name in self.slots:
                module.__dict__.pop(name, None)

    def wrap(self, forward: Callable) -> Callable:
        @functools.wraps(forward)
        def with_copies(*args: Any, **kwargs: Any) -> Any:
            with self.active():
                return forward(*args, **kwargs)

        return with_copies

    def wrap_eager(self, forward: Callable) -> Callable:
        """For inside a compiled region, whose own copies are around it: where it is not compiled after all,
        checkpointing computes ``forward`` again after those are gone."""
        with_copies = self.wrap(forward)

        @functools.wraps(forward)
        def compiled_or_with_copies(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return forward(*args, **kwargs)
            return with_copies(*args, **kwargs)

        return compiled_or_with_copies


def apply_compute_type(core: CausalLM, compute: torch.dtype, between: Callable[[], None] | None = None) -> None:
    """Compute in ``compute`` while parameters keep their type; used by engines that do not cast by themselves.

    ``between``: checkpointing and compilation, where blocks are compiled. The copies are then made around the compiled
    region, which takes them as arguments: inside, tracing would meet a module that is written to, and one set of
    parameters for each block, and leave most blocks as they are. They live from a block's forward to its backward, also
    with checkpointing.
    """
    blocks = block_modules(core)
    inside = {id(m) for block in blocks for m in block.modules()}
    found = [(block, copies) for block in blocks if (copies := ComputeCopies(list(block.modules()), compute)).slots]
    for block, copies in found:
        how = copies.wrap if between is None else copies.wrap_eager
        block.forward = how(block.forward)  # type: ignore[method-assign]
    if between is None and found:
        _made_ahead(core, [copies for _, copies in found])
    if between is not None:
        between()
        for block, copies in found:
            block.forward = copies.wrap(block.forward)  # type: ignore[method-assign]
    outside = ComputeCopies([m for m in core.modules() if id(m) not in inside], compute)
    if outside.slots:
        core.forward = outside.wrap(core.forward)  # type: ignore[method-assign]


# ---- activation checkpointing

#: Operators whose results selective checkpointing keeps: matrix products and attention, which cost the most to compute
#: again. By name: most of them exist on some devices or with some packages only.
KEPT = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "torch_attn::_varlen_attn",  # torch.nn.attention.varlen
    "flash_attn::_flash_attn_varlen_forward",  # the flash-attn package
    "aifactory::attention_fwd",
    "aifactory::grouped_linear_fwd",
    "mkldnn::_linear_pointwise",  # model/cpu_matmul.py
    "aifactory::lora_linear_fwd",  # the product of base and adapter in one operator
    "aifactory::lora_linears_fwd",
    "aifactory::lora_gated_down_fwd",
}


def keeps(operator: Any, args: tuple) -> bool:
    """Whether selective checkpointing keeps the result of ``operator(*args)``."""
    if operator.name() == "aten::addmm" and args[0].dim() == 2:
        return False  # an adapter's branch onto a product that is kept: its rank is small
    return operator.name() in KEPT


def _keep_matmuls() -> Any:
    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if keeps(operator, args) else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def apply_activation_checkpointing(core: nn.Module, mode: str) -> None:
    """``full``: a block keeps its input alone; ``selective``: also its matrix products; ``none``."""
    if mode == "none":
        return
    extra: dict[str, Any] = {"context_fn": _keep_matmuls} if mode == "selective" else {}
    for block in block_modules(core):
        inner = block.forward

        @functools.wraps(inner)
        def recomputed(*args: Any, _inner: Callable = inner, _block: nn.Module = block, **kwargs: Any) -> Any:
            if not (torch.is_grad_enabled() and _block.training):
                return _inner(*args, **kwargs)
            return checkpoint(_inner, *args, use_reentrant=False, preserve_rng_state=True, **extra, **kwargs)

        block.forward = recomputed  # type: ignore[method-assign]


# ---- compilation


def apply_compile(core: nn.Module) -> None:
    """``torch.compile`` of each block: the blocks are alike, so one compilation serves them all."""
    # One block differs from the next by its weights alone; without this each block would be compiled again.
    torch._dynamo.config.inline_inbuilt_nn_modules = True
    for block in block_modules(core):
        block.forward = torch.compile(block.forward, dynamic=True)  # type: ignore[method-assign]
    _tell_what_was_not_compiled(core)


def _tell_what_was_not_compiled(core: nn.Module) -> None:
    """After the first forward of ``core``: torch.compile runs what it cannot trace as it is, and says so in a debug log
    alone.
    """
    from torch._dynamo.utils import counters

    before = sum(counters["graph_break"].values())

    def look(module: nn.Module, inputs: Any, outputs: Any) -> None:
        handle.remove()
        broken = sum(counters["graph_break"].values()) - before
        if broken and not (dist.is_initialized() and dist.get_rank()):
            reason = next(iter(counters["graph_break"])).splitlines()[0]
            note(f"parallel.compile: {broken} places could not be compiled and run as they are ({reason})")

    handle = core.register_forward_hook(look)


def prepare_blocks(core: CausalLM, *, compute: torch.dtype | None, checkpointing: str, compiled: bool) -> None:
    """All of it. ``compute``: the type to compute in, None where the engine casts by itself."""

    def rest() -> None:
        apply_activation_checkpointing(core, checkpointing)
        if compiled:
            apply_compile(core)

    if compute is None:
        rest()
    elif compiled:
        apply_compute_type(core, compute, between=rest)
    else:
        apply_compute_type(core, compute)
        rest()
