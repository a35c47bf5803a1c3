"""Which operators replace those of transformers, and why."""

from __future__ import annotations

import torch

from aifactory_train.config.schema import Recipe
from aifactory_train.model import experts
from aifactory_train.model.causal_lm import CausalLM
from aifactory_train.model.report import ModelReport


def apply_operators(
    core: CausalLM, recipe: Recipe, *, device: str, engine: str, weights: str, report: ModelReport
) -> None:
    """Our operators in place of the model's own, with a report of what was replaced and what was not.

    ``weights``: when ``engine`` shows a whole weight, 'always', while its 'block' or only while its own 'module' runs.
    On a GPU the Triton kernels that the registry selects for this chip; on a CPU the torch path that keeps less for the
    backward pass (:mod:`aifactory_train.model.cpu_operators`).
    """
    if recipe.kernels.enabled == "off":
        report.add("operators", "the model's own", "kernels.enabled off")
        experts.without_kernels(core.model)
    elif device != "cpu":
        core.kernels = True
        _apply_triton(core, weights=weights, compiled=recipe.parallel.compile, report=report)
    elif weights == "module":
        why = f"{engine} gathers weights when a layer is called, and these operators read them directly"
        report.add("operators", "the model's own", why)
    elif recipe.parallel.compile:
        report.add("operators", "the model's own", "parallel.compile fuses by itself")
    else:
        from aifactory_train.model.cpu_matmul import library
        from aifactory_train.model.cpu_operators import apply_cpu_operators, keep_freed_memory

        keep_freed_memory()
        replaced, left = apply_cpu_operators(
            core.model, in_place=recipe.parallel.activation_checkpointing != "selective"
        )
        shown = ", ".join(f"{count} {name}" for name, count in sorted(replaced.items())) or "none replaced"
        why = "CPU: the torch path that keeps less for the backward pass"
        if left:
            why += "; left as they are: " + ", ".join(f"{count} {name}" for name, count in sorted(left.items()))
        report.add("operators", shown, why)
        name, why = library()
        report.add("matrix products", "oneDNN, called directly" if name == "onednn" else "torch's own choice", why)


def skipped(weights: str, compiled: bool) -> tuple[str, ...]:
    """Operators that an engine which shows weights so (:func:`apply_operators`) cannot have: they read their children's
    weights directly. Compiled blocks are traced through each layer's own call."""
    if weights == "module":
        return ("rms_norm_residual", "lora_linear")
    return ("lora_linears",) if compiled else ()


def _apply_triton(core: CausalLM, *, weights: str, compiled: bool, report: ModelReport) -> None:
    from aifactory_train.kernels import hardware, runtime
    from aifactory_train.model.gpu_operators import apply_kernels
    from aifactory_train.model.loss import chunk_rows

    index = torch.cuda.current_device()
    arch, sku, _ = runtime.device_of(index)
    trouble = runtime.trouble(torch.device("cuda", index)) if runtime.HAS_TRITON else "it is not installed"
    if arch in hardware.TARGETS and trouble:
        core.kernels = False
        report.add("kernels", "the model's own", f"Triton cannot run here: {trouble}")
        return
    dtype = next((p.dtype for p in core.parameters() if not p.requires_grad), torch.bfloat16)
    outcome = apply_kernels(core.model, arch=arch, sku=sku, dtype=dtype, skip=skipped(weights, compiled))
    shown = ", ".join(f"{count} {op} in {name}" for (op, name), count in sorted(outcome.replaced.items()))
    kept = "; ".join(f"{count} {name} kept: {why}" for (name, why), count in sorted(outcome.kept.items()))
    report.add(
        "kernels", shown or "the model's own", "; ".join(filter(None, (outcome.note, kept))) or f"{arch} {sku or ''}"
    )
    for line in outcome.selections:
        report.add("", line, "")
    rows = chunk_rows(core.language_model.config.get_text_config().vocab_size, core.loss_rows, device="cuda")
    what = "fused with the vocabulary projection" if arch in hardware.TARGETS else f"torch (no kernels for {arch})"
    report.add("loss", what, f"{rows} rows of logits at a time")
