"""Where adapters go in a mixture of experts, as peft's configuration says it.

The experts of a layer are one parameter, no layer, so they are named by ``target_parameters``. For some model types
peft takes the names of other layers (``gate_proj`` of a shared expert) for those that the experts had before they were
fused, and would move their adapters to the experts; such a layer is named by its parameter as well: the tensors of the
export have the same names either way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from aifactory_train.config.schema import Recipe
from aifactory_train.core import compat
from aifactory_train.core.errors import UserError
from aifactory_train.model import experts
from aifactory_train.model.causal_lm import _tuple_linears
from aifactory_train.model.report import ModelReport
from aifactory_train.model.routing import routers_of

#: Names that the experts' matrices had before transformers fused them -> the name now; some need both of a pair.
OLD_NAMES = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj", "gate_proj": "gate_up_proj"}
PAIRS = (("w1", "w3"), ("gate_proj", "up_proj"))


@dataclass
class Targets:
    """peft's ``target_modules`` and ``target_parameters``, and what the report says."""

    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)


def choose(model: Any, recipe: Recipe, report: ModelReport) -> Targets | None:
    """Where the adapters of ``recipe`` go, or None for a model without fused experts. Raises :class:`UserError`."""
    found = experts.find(model)
    if not found:
        return None
    settings, routers = recipe.adapter, routers_of(model)
    apart = {name for name, _, _ in routers} | set(_tuple_linears(model))
    apart |= {f"{name}.{inner}" for name, router, _ in routers for inner, _ in router.named_modules() if inner}
    every = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linears = _linears(model, apart) if settings.targets == "all-linear" else every  # what is named is judged later
    names = _weights(found)
    say_unknown(settings.targets, [*linears, *names, *_old(found)], [*linears, *names], report)
    chosen = linears if settings.targets == "all-linear" else [n for n in linears if _matches(settings.targets, n)]
    adapted = _experts_wanted(recipe, names, found)
    why_not = _why_not(recipe)
    if adapted and why_not and recipe.experts.adapt is None and settings.targets == "all-linear":
        adapted, left = [], f"none of them adapted: {why_not}"
    elif adapted and why_not:
        raise UserError(
            f"adapters cannot be put on experts: {why_not}", where="adapter", fix="--set experts.adapt=none"
        )
    else:
        left = "none of them adapted: experts.adapt none" if recipe.experts.adapt == "none" else "not among the targets"
    taken = compat.peft_takes_for_experts(getattr(model.config, "model_type", ""))
    clashes = [n for n in chosen if n.rpartition(".")[2] in taken]
    if clashes and why_not:
        report.add("adapters", f"none on {len(clashes)} layers ({', '.join(_short(clashes)[:3])})", why_not)
        chosen, clashes = [n for n in chosen if n not in clashes], []
    trained = [f"{name}.weight" for name, router, _ in routers if _has_weight(router)] if _router(recipe) else []
    _check_router(recipe, routers, trained, why_not)
    if not (chosen or adapted or trained):
        raise UserError(
            f"nothing is left to adapt: {left}", where="adapter.targets", fix="--set adapter.targets=all-linear"
        )
    _say(report, recipe, found, adapted, left, len(trained))
    modules = [n for n, _ in model.named_modules()]
    parameters = [n for n, _ in model.named_parameters()]
    return Targets(
        _names([n for n in chosen if n not in clashes], modules),
        _names([*adapted, *(f"{n}.weight" for n in clashes), *trained], parameters),
    )


def _linears(model: Any, apart: set[str]) -> list[str]:
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name not in apart
    ]


def _weights(found: list[tuple[str, Any]]) -> list[str]:
    """Names of all matrices of experts."""
    return [f"{name}.{inner}" for name, module in found for inner, p in module.named_parameters() if p.dim() == 3]


def _old(found: list[tuple[str, Any]]) -> list[str]:
    return [f"{name}.{old}" for name, _ in found for old in (*OLD_NAMES, "up_proj")]


def _matches(targets: str | list[str], name: str) -> bool:
    """As peft matches a module's name: a pattern for all of it, or a list of ends."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == t or name.endswith(f".{t}") for t in targets)


def say_unknown(targets: str | list[str], known: list[str], shown: list[str], report: ModelReport) -> None:
    """Names of ``adapter.targets`` that no layer of ``known`` has are reported, which peft does not do; refused where
    there is no other, with the last parts of the names ``shown``. Raises :class:`UserError`.
    """
    if targets == "all-linear":
        return
    wanted = [targets] if isinstance(targets, str) else targets
    absent = [t for t in wanted if not any(_matches(targets if isinstance(targets, str) else [t], n) for n in known)]
    names = ", ".join(f"'{name}'" for name in absent)
    if absent and len(absent) == len(wanted):
        there = ", ".join(sorted({name.rpartition(".")[2] for name in shown}))
        raise UserError(
            f"not found: no layer of this model is called {names}", where="adapter.targets", fix=f"there are: {there}"
        )
    if absent:
        report.add("targets left out", f"{len(absent)}: {names}", "no layer of this model is called so")


def _experts_wanted(recipe: Recipe, names: list[str], found: list[tuple[str, Any]]) -> list[str]:
    """Matrices of experts that get an adapter. Raises :class:`UserError` for half of a fused pair."""
    targets, adapt = recipe.adapter.targets, recipe.experts.adapt
    if adapt == "none":
        return []
    if adapt == "all" or targets == "all-linear":
        return names
    wanted = [n for n in names if _matches(targets, n)]
    for name, module in found:
        hit = {old for old in (*OLD_NAMES, "up_proj") if _matches(targets, f"{name}.{old}")}
        for pair in PAIRS:
            if len(hit & set(pair)) == 1 and module.has_gate:
                one = next(iter(hit & set(pair)))
                raise UserError(
                    f"'{one}' of the experts is one matrix with '{next(p for p in pair if p != one)}'",
                    where="adapter.targets",
                    fix=f"name both ({', '.join(pair)}), or --set experts.adapt=none",
                )
        fused = {OLD_NAMES[old] for old in hit if old in OLD_NAMES}
        wanted += [f"{name}.{new}" for new in sorted(fused) if f"{name}.{new}" in names]
    return list(dict.fromkeys(wanted))


def _why_not(recipe: Recipe) -> str | None:
    """Why peft cannot put an adapter on a parameter."""
    if recipe.adapter.kind == "dora":
        return "peft has no DoRA of a parameter"
    if recipe.adapter.dropout:
        return "peft has no dropout of an adapter on a parameter (adapter.dropout)"
    return None


def _router(recipe: Recipe) -> bool:
    return recipe.experts.router == "trained"


def _has_weight(router: nn.Module) -> bool:
    return isinstance(router._parameters.get("weight"), nn.Parameter)


def _check_router(recipe: Recipe, routers: list[Any], trained: list[str], why_not: str | None) -> None:
    if not _router(recipe):
        return
    if not trained or len(trained) < len(routers):
        raise UserError(
            "the routers of this model have no weight that an adapter could be put on",
            where="experts.router",
            fix="--set experts.router=frozen, or adapter.kind=none",
        )
    if why_not:
        raise UserError(
            f"adapters cannot be put on routers: {why_not}", where="experts.router", fix="--set experts.router=frozen"
        )


def _say(
    report: ModelReport, recipe: Recipe, found: list[tuple[str, Any]], adapted: list[str], left: str, routers: int
) -> None:
    each = found[0][1].down_proj.shape[0]
    total = sum(module.down_proj.shape[0] for _, module in found)
    where = f"{total} experts in {len(found)} layers"
    if adapted:
        kinds = ", ".join(sorted({n.rpartition(".")[2] for n in adapted}))
        how = f"{kinds}: two matrices of rank {recipe.adapter.rank} for each of {each} experts a layer"
        report.add("experts", f"{where}, all adapted", f"{how}, kept as factors")
    else:
        report.add("experts", where, left)
    shown = f"adapted in {routers} layers" if routers else "frozen"
    report.add("routers", shown, f"experts.router {recipe.experts.router or 'not given'}")


def _short(names: list[str]) -> list[str]:
    return sorted({re.sub(r".*\.\d+\.", "", name) for name in names})


def _names(chosen: list[str], every: list[str]) -> list[str]:
    """As few names as say it: without the number of the layer where that means the same modules or parameters."""
    found = set()
    for short in _short(chosen):
        mine = {n for n in chosen if n == short or n.endswith(f".{short}")}
        same = {n for n in every if n == short or n.endswith(f".{short}")}
        found |= {short} if mine == same else {n for n in mine if re.sub(r".*\.\d+\.", "", n) == short}
    return sorted(found)
