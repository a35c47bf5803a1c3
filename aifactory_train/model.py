"""The model: load it, check that this framework computes what the model computes, inject adapters, wrap it with its loss.

``apply_*`` functions change the model in a fixed order (attention, adapters, trainable set, precision, kernels); what each
did and why is collected in :class:`ModelReport`, printed once at start and stored in the run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aifactory_train import attention, compat, quantise
from aifactory_train.config import Recipe
from aifactory_train.errors import UserError
from aifactory_train.generation_config import loading
from aifactory_train.loss import linear_cross_entropy, token_nll
from aifactory_train.methods.preference_loss import token_logps
from aifactory_train.methods.vocabulary import first_new_row
from aifactory_train.runs import open_run

if TYPE_CHECKING:
    from aifactory_train.methods.neftune import Noise
    from aifactory_train.methods.preference_loss import Judged, TokenLogps

#: Arguments of the configuration that change the logits in ways the chunked loss must know.
_LOGIT_SOFTCAPS = ("final_logit_softcapping",)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class ModelReport:
    """What was chosen for the model and why; printed at start and stored in ``run.yaml``'s companion."""

    lines: list[tuple[str, str, str]] = field(default_factory=list)  # (what, choice, why)
    parameters: int = 0
    trainable: int = 0

    def add(self, what: str, choice: str, why: str = "") -> None:
        self.lines.append((what, choice, why))


class CausalLM(nn.Module):
    """A transformers causal language model (with or without peft) whose forward returns the summed loss.

    The loss is part of the module so that sharding engines gather the output weight inside its forward, and so that one
    call covers everything that needs gradients.
    """

    model: Any  # transformers' and peft's classes: their attributes are known at run time only

    def __init__(self, model: nn.Module, loss_rows: int | None = None):
        super().__init__()
        self.model = model
        self.loss_rows = loss_rows
        #: folder whose weights an engine has yet to read shard by shard; None where they are in the parameters
        self.unread: Path | None = None
        #: rows of the embeddings below this one do not move (``model.vocabulary.train: new``)
        self.first_moving_row = 0
        self.logit_scale = _logit_scale(self.language_model.config)
        _check_output_layer(self.language_model.get_output_embeddings())

    @property
    def language_model(self) -> Any:
        """The transformers ``...ForCausalLM`` below peft's wrapper."""
        base = getattr(self.model, "base_model", None)
        return base.model if _is_peft(self.model) and base is not None else self.model

    @property
    def backbone(self) -> Any:
        """The model below the output layer: it returns hidden states."""
        inner = self.language_model.base_model
        # Llama 4's text model names an attribute that it does not have, and is then its own base
        return inner if inner is not self.language_model else self.language_model.model

    @property
    def output_weight(self) -> torch.Tensor:
        """``[V, D]``; the embedding itself where the weights are tied."""
        head = self.language_model.get_output_embeddings()
        return head.weight

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        documents: attention.Documents,
        noise: Noise | None = None,
    ) -> torch.Tensor:
        """Last hidden states ``[B * T, D]`` after the final norm; ``noise`` goes onto the embeddings (NEFTune)."""
        start: dict[str, torch.Tensor] = {"input_ids": input_ids}
        if noise is not None or self.first_moving_row:
            embedded = self.language_model.get_input_embeddings()(input_ids)
            if self.first_moving_row:
                moves = (input_ids >= self.first_moving_row).unsqueeze(-1)
                embedded = torch.where(moves, embedded, embedded.detach())
            start = {"inputs_embeds": embedded if noise is None else noise.add_to(embedded)}
        out = self.backbone(
            **start, position_ids=position_ids, attention_mask=None, use_cache=False, documents=documents
        )
        return out.last_hidden_state.flatten(0, 1)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        documents: attention.Documents | None = None,
        positions: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        reduce: bool = True,
        *,
        attention_mask: torch.Tensor | None = None,
        cache=None,
        noise: Noise | None = None,
        judged: Judged | TokenLogps | None = None,
    ) -> torch.Tensor:
        """Loss over the supervised ``positions`` (int64 ``[N]`` into the flattened batch) with ``targets`` ``[N]``.

        Returns the fp32 sum, or with ``reduce=False`` the NLL of each target, or with ``targets=None`` the logits
        ``[N, V]`` at ``positions``, both without gradients. With a transformers ``cache`` it is one step of decoding
        instead: input_ids ``[B, T]`` follow what the cache holds, attention_mask int64 ``[B, cached + T]`` is 0 on padding,
        and the result is the logits ``[B, V]`` of the last position. All of it goes through forward, because sharding
        engines gather parameters there.
        """
        if cache is not None:
            return self._decode(input_ids, position_ids, attention_mask, cache)
        assert documents is not None and positions is not None
        hidden = self.hidden_states(input_ids, position_ids, documents, noise).index_select(0, positions)
        if targets is None:
            return self._logits(hidden.detach())
        weight = self.output_weight
        if self.first_moving_row:
            weight = _StillRows.apply(weight, self.first_moving_row)
        if weight.dtype != hidden.dtype:
            weight = weight.to(hidden.dtype)
        if judged is not None:  # a preference method: the loss is one of whole answers
            options: dict[str, Any] = {"scale": self.logit_scale, "rows": self.loss_rows, "kernels": judged.kernels}
            return judged.loss(token_logps(hidden, weight, targets, **options))
        function = linear_cross_entropy if reduce else token_nll
        return function(hidden, weight, targets, scale=self.logit_scale, rows=self.loss_rows)

    @torch.no_grad()
    def _decode(self, input_ids, position_ids, attention_mask, cache) -> torch.Tensor:
        out = self.backbone(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
        )
        return self._logits(out.last_hidden_state[:, -1])

    @torch.no_grad()
    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 ``[N, V]`` of a few hidden states ``[N, D]``."""
        return (hidden @ self.output_weight.to(hidden.dtype).t()).float() * self.logit_scale


class _StillRows(torch.autograd.Function):
    """A matrix whose first rows get no gradient: what the optimizer is given for them is zero, so they stay to the bit."""

    @staticmethod
    def forward(ctx, weight, first: int):
        ctx.first = first
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        return torch.cat([torch.zeros_like(grad[: ctx.first]), grad[ctx.first :]]), None


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "base_model")


def _logit_scale(config) -> float:
    """The factor between ``hidden @ weight.T`` and the logits; models with other arithmetic are refused."""
    for name in _LOGIT_SOFTCAPS:
        if getattr(config, name, None):
            raise UserError(f"models with {name} are not supported by the chunked loss", where="model.base")
    if getattr(config, "logits_scaling", None) not in (None, 1.0):  # Granite divides
        return 1.0 / float(config.logits_scaling)
    if getattr(config, "logit_scale", None) not in (None, 1.0):  # Cohere multiplies
        return float(config.logit_scale)
    return 1.0


def _check_output_layer(head: nn.Module) -> None:
    """The loss computes ``hidden @ weight.T``: an output layer that computes more is refused."""
    if getattr(head, "bias", None) is not None:
        raise UserError(
            "models whose output layer has a bias are not supported by the chunked loss", where="model.base"
        )
    if hasattr(head, "base_layer"):
        raise UserError(
            "an adapter on the output layer is not supported by the chunked loss",
            where="adapter.targets",
            fix="leave the output layer out, or train it in full with adapter.train_embeddings",
        )


# ---- loading


def load_config(path: Path, recipe: Recipe):
    """The transformers configuration in ``path``, checked against what the recipe asks for."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=recipe.model.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"no usable model configuration: {str(error).splitlines()[0]}", where=f"model.base: {recipe.model.base}"
        ) from None
    limit = getattr(config, "max_position_embeddings", None)
    if limit and recipe.data.sequence_length > limit:
        raise UserError(
            f"sequences of {recipe.data.sequence_length} tokens, but the model was built for {limit} positions",
            where="data.sequence_length",
            fix=f"--set data.sequence_length={limit}",
        )
    return config


def choose_attention(recipe: Recipe, device: str, report: ModelReport) -> str:
    """The name of ``model.attention`` in transformers' registry, where our functions are from now on."""
    attention.register()
    name, why = attention.choose(recipe.model.attention, device, choose_precision(recipe, device)[0].compute)
    report.add("attention", name.removeprefix("aifactory_"), why)
    return name


def load_language_model(
    path: Path,
    recipe: Recipe,
    *,
    device: str,
    dtype: torch.dtype,
    report: ModelReport,
    more: dict[str, Any] | None = None,
) -> nn.Module:
    """The transformers model with our attention, weights in ``dtype``, on ``device``; ``more`` goes to ``from_pretrained``."""
    if device == "cpu":
        # transformers imports DeepSpeed where it is installed, and that prints to standard output unless told the device.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # our own report says what was loaded

    name = choose_attention(recipe, device, report)
    config = load_config(path, recipe)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=name,
            local_files_only=True,
            trust_remote_code=recipe.model.trust_remote_code,
            use_safetensors=True,  # never unpickle weights
            **loading(path),
            **(more or {}),
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"the model cannot be loaded: {str(error).splitlines()[0]}", where=f"model.base: {recipe.model.base}"
        ) from None
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model if more else model.to(device)  # quantised weights are where they were made


def check_vocabulary(model: Any, tokenizer) -> None:
    """Every token id that the tokenizer can produce has an embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        raise UserError(
            f"the tokenizer has ids up to {highest}, the model's embedding has {rows} rows",
            where="model.base",
            fix="use the tokenizer that belongs to this model",
        )


# ---- adapters and the trainable set


def apply_adapter(model: Any, recipe: Recipe, report: ModelReport) -> nn.Module:
    """Inject the adapter through peft, or train all weights; returns the (wrapped) model."""
    settings = recipe.adapter
    if settings.kind == "none":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        report.add("trained", "all weights", "adapter.kind none")
    else:
        from peft import LoraConfig, get_peft_model

        targets = settings.targets
        routers = _tuple_linears(model)
        spared = routers if targets == "all-linear" else []
        saved = _embedding_modules(model) if settings.train_embeddings else None
        try:
            with compat.quiet_peft():
                model = get_peft_model(
                    model,
                    LoraConfig(
                        task_type="CAUSAL_LM",
                        r=settings.rank,
                        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft takes fractions too
                        lora_dropout=settings.dropout,
                        target_modules=targets,
                        exclude_modules=spared or None,
                        use_rslora=settings.kind == "rslora",
                        use_dora=settings.kind == "dora",
                        modules_to_save=saved,
                        ensure_weight_tying=bool(saved) and bool(getattr(model.config, "tie_word_embeddings", False)),
                    ),
                    autocast_adapter_dtype=False,
                )
        except ValueError as error:
            raise UserError(str(error).splitlines()[0], where="adapter.targets") from None
        adapted = [n for n in routers if hasattr(model.get_base_model().get_submodule(n), "base_layer")]
        if adapted:
            raise UserError(
                f"'{adapted[0]}' returns more than the product with its weights, an adapter cannot be put on it",
                where="adapter.targets",
                fix="leave it out, or --set adapter.targets=all-linear, which does",
            )
        shown = targets if isinstance(targets, str) else ", ".join(targets)
        if spared:
            shown += f" but {len(spared)} routers"
        extra = " and the embeddings in full" if saved else ""
        report.add(
            "trained", f"{settings.kind} r={settings.rank} alpha={settings.alpha:g} on {shown}{extra}", "adapter"
        )
    report.parameters = sum(p.numel() for p in model.parameters())
    report.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model


def _tuple_linears(model: Any) -> list[str]:
    """Names of linear layers that return more than one tensor (the routers of Llama 4 and Phi-MoE): adapters cannot wrap them."""
    found = []
    for name, module in model.named_modules():
        own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
        if own and type(module).__module__.startswith("transformers"):
            weight = module.weight
            with torch.no_grad():
                out = module(torch.zeros(1, module.in_features, dtype=weight.dtype, device=weight.device))
            if not isinstance(out, torch.Tensor):
                found.append(name)
    return found


def _embedding_modules(model: Any) -> list[str]:
    """Names (last part) of the input and output embeddings, for peft's ``modules_to_save``."""
    wanted = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if id(module) in wanted})
    if getattr(model.config, "tie_word_embeddings", False):
        names = [n for n in names if n != "lm_head"]
    return names


def base_folder(recipe: Recipe) -> Path:
    """Folder of the weights below the adapter: the recipe's base, or what ``model.start_from`` put in its place.

    A run that trained all weights leaves a new base; a run that trained an adapter keeps the base it had.
    """
    return _base_below(recipe, [])


def _base_below(recipe: Recipe, seen: list[Path]) -> Path:
    from aifactory_train.sources import resolve_model, same_source
    from aifactory_train.sources.cache import check_weight_index

    if not recipe.model.start_from:
        return resolve_model(recipe.model)
    run = open_run(recipe.model.start_from)
    if run.path.resolve() in seen:
        raise UserError("the chain of earlier runs leads back to itself", where=f"model.start_from: {run.path}")
    if (run.export / "model" / "config.json").is_file():
        check_weight_index(run.export / "model")
        return run.export / "model"
    earlier = run.load_config()
    if not same_source(earlier.model.base, recipe.model.base):
        raise UserError(
            f"the earlier run's adapter belongs to {earlier.model.base}, this recipe trains {recipe.model.base}",
            where="model.start_from",
            fix=f"--set model.base={earlier.model.base}",
        )
    return _base_below(earlier, [*seen, run.path.resolve()])


def start_from_adapter(model: nn.Module, recipe: Recipe, report: ModelReport) -> None:
    """Load the adapter that an earlier run exported into ``model``: every tensor must have its place and its shape."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    from aifactory_train.private import vault

    export = open_run(str(recipe.model.start_from)).export
    file = export / "adapter" / "adapter_model.safetensors"
    if not vault.holds(file):
        if (export / "model" / "config.json").is_file():
            return  # whole weights: base_folder() has taken them already
        raise UserError("this run has no export to start from", where=f"model.start_from: {recipe.model.start_from}")
    if not _is_peft(model):
        raise UserError(
            "the earlier run left an adapter, this recipe trains all weights",
            where="model.start_from",
            fix="--set adapter.kind=lora, or use the earlier run's merged weights as model.base",
        )
    earlier = vault.load_tensors(file)
    here = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in sorted({*earlier, *here}):
        old, new = (tuple(t.shape) if (t := side.get(name)) is not None else None for side in (earlier, here))
        if old != new:
            raise UserError(
                f"the earlier run's adapter does not fit: {name} is {old or 'absent'} there and {new or 'absent'} here",
                where="model.start_from",
                fix="use the earlier run's adapter block (kind, rank, targets, train_embeddings)",
            )
    set_peft_model_state_dict(model, earlier)
    report.add("starting point", str(file), "model.start_from")


# ---- precision


@dataclass(frozen=True)
class Precision:
    """The one precision policy: what engines, checkpoints and the planner read."""

    parameters: torch.dtype
    frozen: torch.dtype
    compute: torch.dtype
    reduce: torch.dtype

    def describe(self) -> str:
        names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
        return (
            f"trained parameters and optimizer state {names[self.parameters]}, frozen {names[self.frozen]}, "
            f"compute {names[self.compute]}, gradient reduction {names[self.reduce]}"
        )


def choose_precision(recipe: Recipe, device: str) -> tuple[Precision, str]:
    """Resolve ``auto``: fp32 everywhere on CPU; on a GPU with bf16, compute and frozen weights in bf16, master in fp32."""
    has_bf16 = compat.supports_bf16(device)
    fast = device != "cpu" and has_bf16
    settings = recipe.precision
    for key in ("parameters", "frozen", "compute", "reduce"):
        if getattr(settings, key) == "bf16" and not has_bf16:
            raise UserError("this GPU has no bf16 arithmetic", where=f"precision.{key}", fix="use fp32")

    def pick(value: str, automatic: str) -> torch.dtype:
        return _DTYPES[automatic if value == "auto" else value]

    compute = pick(settings.compute, "bf16" if fast else "fp32")
    low = "bf16" if compute == torch.bfloat16 else "fp32"
    policy = Precision(
        parameters=pick(settings.parameters, "fp32"),
        frozen=pick(settings.frozen, low),
        compute=compute,
        reduce=pick(settings.reduce, "fp32"),
    )
    why = "GPU with bf16" if fast else ("CPU" if device == "cpu" else "this GPU has no bf16")
    return policy, why


def apply_precision(model: nn.Module, precision: Precision) -> None:
    """Cast trained parameters and frozen parameters (not buffers) to the policy's types."""
    for parameter in model.parameters():
        wanted = precision.parameters if parameter.requires_grad else precision.frozen
        if parameter.dtype != wanted and parameter.is_floating_point():
            parameter.data = parameter.data.to(wanted)


# ---- operators


def apply_operators(core: CausalLM, recipe: Recipe, *, device: str, engine: str, report: ModelReport) -> None:
    """Our operators in place of the model's own, with a report of what was replaced and what was not.

    On a GPU the Triton kernels that the registry selects for this chip; on a CPU the torch path that keeps less for the
    backward pass (:mod:`aifactory_train.lean`).
    """
    if recipe.kernels.enabled == "off":
        report.add("operators", "the model's own", "kernels.enabled off")
    elif device != "cpu":
        _apply_triton(core, engine=engine, report=report)
    elif engine == "zero3":
        why = "zero3 gathers weights when a layer is called, and these operators read them directly"
        report.add("operators", "the model's own", why)
    elif recipe.parallel.compile:
        report.add("operators", "the model's own", "parallel.compile fuses by itself")
    else:
        from aifactory_train.lean import apply_lean, keep_freed_memory
        from aifactory_train.products import library

        keep_freed_memory()
        replaced, left = apply_lean(core.model, in_place=recipe.parallel.activation_checkpointing != "selective")
        shown = ", ".join(f"{count} {name}" for name, count in sorted(replaced.items())) or "none replaced"
        why = "CPU: the torch path that keeps less for the backward pass"
        if left:
            why += "; left as they are: " + ", ".join(f"{count} {name}" for name, count in sorted(left.items()))
        report.add("operators", shown, why)
        name, why = library()
        report.add("matrix products", "oneDNN, called directly" if name == "onednn" else "torch's own choice", why)


def _apply_triton(core: CausalLM, *, engine: str, report: ModelReport) -> None:
    from aifactory_train.kernels.runtime import device_of
    from aifactory_train.kernels_apply import apply_kernels

    arch, sku, _ = device_of(torch.cuda.current_device())
    # ZeRO-3 gathers a weight when its own module is called; these two read their children's weights directly.
    skip = ("rms_norm_residual", "lora_linear") if engine == "zero3" else ()
    dtype = next((p.dtype for p in core.parameters() if not p.requires_grad), torch.bfloat16)
    outcome = apply_kernels(core.model, arch=arch, sku=sku, dtype=dtype, skip=skip)
    shown = ", ".join(f"{count} {op} in {name}" for (op, name), count in sorted(outcome.replaced.items()))
    kept = "; ".join(f"{count} {name} kept: {why}" for (name, why), count in sorted(outcome.kept.items()))
    report.add(
        "kernels", shown or "the model's own", "; ".join(filter(None, (outcome.note, kept))) or f"{arch} {sku or ''}"
    )
    for line in outcome.selections:
        report.add("", line, "")


# ---- all of it


def build_model(
    recipe: Recipe,
    path: Path,
    tokenizer,
    *,
    device: str,
    precision: Precision,
    report: ModelReport,
    sharded: bool = False,
) -> CausalLM:
    """Load, check, adapt, cast and wrap, in this order.

    ``sharded``: build without weights where the files allow it; the engine reads each rank's rows (``CausalLM.unread``).

    ``path`` is the recipe's base (:func:`aifactory_train.sources.resolve_model`); with ``model.start_from`` the weights come
    from :func:`base_folder` instead.
    """
    whole = recipe.adapter.kind == "none"
    if recipe.model.start_from:
        path = base_folder(recipe)
        report.add("base weights", str(path), "model.start_from")
    # Weights that will be trained are read in their own type: going through bf16 would round an fp32 base for good.
    dtype = precision.parameters if whole else precision.frozen
    unread = path if sharded and _loads_by_shard(path, recipe, device=device, dtype=dtype, report=report) else None
    if unread is not None:
        model = empty_language_model(path, recipe, device=device, dtype=dtype, report=report)
    else:
        more = quantise.loading(recipe, device, precision.compute)
        if more:
            report.add("base weights", "NF4, 4 bits, through bitsandbytes", "adapter.quantise_base")
        model = load_language_model(path, recipe, device=device, dtype=dtype, report=report, more=more)
    if tokenizer is not None:
        check_vocabulary(model, tokenizer)
    model = apply_adapter(model, recipe, report)
    if recipe.model.start_from:
        start_from_adapter(model, recipe, report)
    apply_precision(model, precision)
    core = CausalLM(model, recipe.train.loss_chunk_tokens)
    core.unread = unread
    if recipe.model.vocabulary is not None and recipe.model.vocabulary.train == "new":
        core.first_moving_row = first_new_row(path)
        report.add("embeddings", f"rows from {core.first_moving_row} on are trained", "model.vocabulary.train new")
    return core


def _loads_by_shard(path: Path, recipe: Recipe, *, device: str, dtype: torch.dtype, report: ModelReport) -> bool:
    """Whether every rank may read its own rows of the weights alone; the reason if not goes into the report."""
    from aifactory_train.parallel.materialise import why_not

    if recipe.adapter.kind == "dora":
        reason: str | None = "DoRA starts from the norms of the base weights"
    elif recipe.model.start_from and recipe.adapter.train_embeddings:
        reason = "the embeddings come from an earlier run"
    elif recipe.model.trust_remote_code:
        reason = "the model's own code decides how it is loaded"
    else:
        reason = why_not(load_config(path, recipe), path, choose_attention(recipe, device, ModelReport()), dtype)
    report.add(
        "loading",
        "each rank its shard" if reason is None else "the whole model on each rank",
        reason or "sharded engine",
    )
    return reason is None


def empty_language_model(
    path: Path, recipe: Recipe, *, device: str, dtype: torch.dtype, report: ModelReport
) -> nn.Module:
    """The same model as :func:`load_language_model` without memory for its weights (stride-0 zeros on the host)."""
    from aifactory_train.parallel.materialise import skeleton

    name = choose_attention(recipe, device, report)
    model = skeleton(load_config(path, recipe), name, dtype)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model
