"""Adapters: injected, or taken from an earlier run."""

from __future__ import annotations

import fnmatch
import re
from typing import Any

from torch import nn

from aifactory_train.config.schema import Recipe
from aifactory_train.core import compat
from aifactory_train.core.errors import UserError
from aifactory_train.model import expert_targets, experts
from aifactory_train.model.causal_lm import _is_peft, _tuple_linears
from aifactory_train.model.report import ModelReport
from aifactory_train.model.routing import routers_of
from aifactory_train.run.folder import open_run

#: Names of parameters in the message about a pattern that matches none; the numbers of blocks count as one.
NAMES_SHOWN = 24


def apply_adapter(model: Any, recipe: Recipe, report: ModelReport) -> nn.Module:
    """Inject the adapter through peft, or train all weights; returns the (wrapped) model."""
    settings = recipe.adapter
    if settings.kind == "none":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        report.add("trained", "all weights", "adapter.kind none")
        _all_experts(model, recipe, report)
    else:
        placed = expert_targets.choose(model, recipe, report)
        if placed is None:
            modules = dict(model.named_modules())
            linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
            expert_targets.say_unknown(settings.targets, list(modules), linears, report)
        targets = settings.targets if placed is None else placed.modules
        routers = _tuple_linears(model)
        barred = _barred(model)
        left_out = (routers, barred) if settings.targets == "all-linear" else ([], [])
        model = _with_adapter(model, recipe, targets, placed, [*left_out[0], *left_out[1]])
        adapted = [n for n in routers if hasattr(model.get_base_model().get_submodule(n), "base_layer")]
        if adapted:
            raise UserError(
                f"'{adapted[0]}' returns more than the product with its weights, or another one; an adapter cannot be "
                "put on it",
                where="adapter.targets",
                fix="leave it out, or --set adapter.targets=all-linear, which does",
            )
        experts.use_factors(model)
        shown = _described(targets, placed.parameters if placed else [], *left_out)
        extra = " and the embeddings in full" if settings.train_embeddings else ""
        report.add(
            "trained", f"{settings.kind} r={settings.rank} alpha={settings.alpha:g} on {shown}{extra}", "adapter"
        )
    if recipe.train.freeze:
        freeze(model, recipe.train.freeze, report)
        if recipe.model.vocabulary is not None and not _embeddings_move(model):
            raise UserError(
                "the embeddings are frozen, so that the new tokens would never be learnt",
                where="train.freeze",
                fix="leave the embeddings out of train.freeze, or model.vocabulary out",
            )
    report.parameters = sum(p.numel() for p in model.parameters())
    report.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model


def _with_adapter(
    model: Any,
    recipe: Recipe,
    targets: str | list[str],
    placed: expert_targets.Targets | None,
    spared: list[str],
) -> Any:
    """peft's model with fresh adapters on ``targets``. Raises :class:`UserError` with peft's words where it cannot."""
    from peft import LoraConfig, get_peft_model

    settings = recipe.adapter
    saved = _embedding_modules(model) if settings.train_embeddings else None
    try:
        with compat.quiet_peft():
            return get_peft_model(
                model,
                LoraConfig(
                    task_type="CAUSAL_LM",
                    r=settings.rank,
                    lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft takes fractions too
                    lora_dropout=settings.dropout,
                    target_modules=targets,
                    target_parameters=placed.parameters or None if placed is not None else None,
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


def _described(targets: str | list[str], parameters: list[str], routers: list[str], barred: list[str]) -> str:
    """What an adapter is on, and what it is not on, in the words of the start-up table."""
    shown = targets if isinstance(targets, str) else ", ".join([*targets, *parameters])
    spared = [f"{len(routers)} routers"] if routers else []
    spared += [f"{len(barred)} output projections of Mamba, which peft takes no adapter on"] if barred else []
    return f"{shown} but {' and '.join(spared)}" if spared else shown


def _barred(model: Any) -> list[str]:
    """Linear layers that peft refuses: kernels of Mamba take their weights and would leave an adapter out."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    refused = {last: compat.peft_refuses(model, last) for last in {name.rpartition(".")[2] for name in linears}}
    return [name for name in linears if refused[name.rpartition(".")[2]]]


def _all_experts(model: Any, recipe: Recipe, report: ModelReport) -> None:
    """Say what of a mixture of experts is trained with all weights; freeze its routers where the recipe says so."""
    found = experts.find(model)
    routers = routers_of(model)
    if found:
        total = sum(module.down_proj.shape[0] for _, module in found)
        report.add("experts", f"{total} experts in {len(found)} layers, all trained", "adapter.kind none")
    if recipe.experts.router == "frozen" and routers:
        for _, router, _ in routers:
            router.requires_grad_(False)
    if routers:
        shown = "frozen" if recipe.experts.router == "frozen" else "trained"
        report.add(
            "routers", f"{shown} in {len(routers)} layers", f"experts.router {recipe.experts.router or 'not given'}"
        )


def freeze(model: nn.Module, patterns: list[str], report: ModelReport) -> None:
    """Parameters whose names match one of ``patterns`` are not trained.

    Raises :class:`UserError` for a pattern that matches no parameter that would be trained, and where none is left.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    frozen: set[str] = set()
    for pattern in patterns:
        hit = fnmatch.filter(trained, pattern)
        if not hit:
            kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in trained))
            more = f" and {len(kinds) - NAMES_SHOWN} more" if len(kinds) > NAMES_SHOWN else ""
            raise UserError(
                f"'{pattern}' is the name of no parameter that would be trained",
                where="train.freeze",
                fix=f"there are: {', '.join(kinds[:NAMES_SHOWN])}{more}; patterns match whole names, '*' is any part",
            )
        frozen.update(hit)
    if len(frozen) == len(trained):
        raise UserError("all parameters are frozen, nothing would be trained", where="train.freeze")
    count = 0
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
            count += parameter.numel()
    report.add("frozen", f"{len(frozen)} of {len(trained)} tensors, {count:,} parameters", "train.freeze")


def _embeddings_move(model: Any) -> bool:
    """Whether input and output embeddings are trained."""
    modules = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    return all(any(p.requires_grad for p in m.parameters()) for m in modules)


def _embedding_modules(model: Any) -> list[str]:
    """Names (last part) of the input and output embeddings, for peft's ``modules_to_save``."""
    wanted = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if id(module) in wanted})
    if getattr(model.config, "tie_word_embeddings", False):
        names = [n for n in names if n != "lm_head"]
    return names


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
