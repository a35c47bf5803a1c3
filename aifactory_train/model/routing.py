"""What the routers of a mixture of experts decided in a step, and the losses on it.

**Load balancing** (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6, pooled over layers as transformers does):
``E sum_e f_e P_e`` with E experts, ``f_e`` the routed places of expert e and ``P_e`` the sum of its router's
probabilities, both over all layers L and all real tokens T *of the step*, divided by L T. ``f_e`` is not
differentiated, so the gradient of a router's logits z of one token is ``E / (L T) p_j (f_j - sum_e f_e p_e)``: a sum
over tokens once ``f`` is known. ``f`` must be the whole step's before the first backward pass begins. With one
micro-batch a rank it is: the counts are summed over ranks at the end of the forward pass. With several, all of them go
forward once without gradients before; so the curve does not depend on ranks or accumulation, at the price of a forward
pass. A mean of each micro-batch's own loss is another loss (the product of means is no mean of products).

**z loss** (Zoph et al. 2022, arXiv 2202.08906, equation 5): the mean over L T of ``log(sum_j exp z_j)^2``; its sum
needs no more than T, which every rank knows.

The gradients are added where the router's weights of its experts are used: nothing but numbers leaves a block, so
sharded and recomputed blocks are as they were. They take their scale from the gradient of the loss itself.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.model import experts
from aifactory_train.model.report import ModelReport


def routers_of(model: nn.Module) -> list[tuple[str, nn.Module, int]]:
    """(name, module, which of its results are the logits) of the routers that transformers says a model has."""
    wanted: list[tuple[type, int, str | None]] = []
    for module in model.modules():
        recorders = (getattr(type(module), "_can_record_outputs", None) or {}).get("router_logits", [])
        for recorder in recorders if isinstance(recorders, list) else [recorders]:
            target = getattr(recorder, "target_class", None)
            if isinstance(target, type):
                wanted.append((target, int(recorder.index), getattr(recorder, "layer_name", None)))
    found = []
    for name, module in model.named_modules():
        for target, index, layer in wanted:
            if isinstance(module, target) and (layer is None or layer in name):
                found.append((name, module, index))
                break
    return found


@dataclass
class Weights:
    """Of the two losses of routers; 0 is off."""

    balance: float = 0.0
    z: float = 0.0


class Routing:
    """Counts, probabilities and losses of the routers of one model; see the module.

    ``layers`` L and ``experts`` E; a router's logits are those of the call before its experts'.
    """

    def __init__(self, model: nn.Module, layers: list[tuple[str, Any]], weights: Weights, device: torch.device | str):
        self.weights, self.layers = weights, len(layers)
        self.experts = max(int(module.down_proj.shape[0]) for _, module in layers)
        self.numbers = {id(module): number for number, (_, module) in enumerate(layers)}
        self.device = device
        #: of the micro-batch that is computed: real tokens (bool [B * T]); None: all
        self.real: torch.Tensor | None = None
        #: the gradient of the loss that a backward pass began with
        self.scale: torch.Tensor | None = None
        self._logits: torch.Tensor | None = None
        self._open = self._counting = False
        self.begin(1, 1)
        found = routers_of(model)
        #: those whose logits are known: of every layer, or of none
        self.routers = found if len(found) == self.layers else []
        for _, router, index in self.routers:
            router.register_forward_hook(lambda _, __, out, index=index: self._note(out, index))
        for _, module in layers:
            module.routing = self

    @property
    def on(self) -> bool:
        return bool(self.weights.balance or self.weights.z)

    def begin(self, tokens: int, units: int) -> None:
        """A step of ``tokens`` real tokens over all ranks, whose loss is divided by ``units``."""
        self.tokens, self.units = max(1, tokens), units
        #: routed places by layer and expert, of this rank's tokens
        self.counts = torch.zeros(self.layers, self.experts, dtype=torch.int64, device=self.device)
        #: sums over this rank's tokens: of each expert's probability; of entropies and squared log-sums
        self.probabilities = torch.zeros(self.experts, dtype=torch.float64, device=self.device)
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        #: f: places of each expert over all layers and ranks, divided by layers and tokens; None: not known yet
        self.loads: torch.Tensor | None = None

    def count_before(self, forwards: list[Callable[[], Any]]) -> None:
        """Go forward through all micro-batches of a step for its loads, where a loss needs them and there are several;
        random numbers are drawn again afterwards as if nothing had been. Collective.
        """
        if not self.weights.balance or len(forwards) < 2:
            return
        cuda = [torch.device(self.device).index or 0] if torch.device(self.device).type == "cuda" else []
        self._counting = True
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=cuda):
                for run in forwards:
                    run()
        finally:
            self._counting = False
        self._share_loads()

    def _share_loads(self) -> None:
        if self.loads is not None:
            return
        loads = self.counts.sum(0)
        if dist.is_initialized():
            dist.all_reduce(loads)
        self.loads = loads.float() / (self.layers * self.tokens)

    @contextlib.contextmanager
    def watching(self, real: torch.Tensor | None) -> Iterator[None]:
        """Around a forward pass of the training: what routers decide is counted."""
        self.real = None if real is None else real.flatten()
        # not twice what was counted before, and not what is only scored
        self._open = self.loads is None and (self._counting or torch.is_grad_enabled())
        try:
            yield
        finally:
            self._open = False
        if self.weights.balance and torch.is_grad_enabled():
            self._share_loads()

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """``loss``, which notes the gradient that a backward pass begins with."""
        return _NoteScale.apply(loss, self) if self.on and torch.is_grad_enabled() else loss

    # ---- inside the blocks

    def _note(self, out: Any, index: int) -> None:
        self._logits = out[index] if isinstance(out, (tuple, list)) else out

    @torch.compiler.disable
    def seen(self, module: nn.Module, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The experts of ``module`` are called with ``index`` and ``weights`` [T, k]; the weights, which carry the
        losses' gradients back to the router.
        """
        logits, self._logits = self._logits, None
        if logits is not None:
            logits = logits.reshape(-1, logits.shape[-1]) if logits.shape[-1] == self.experts else None
        if self._open:
            self._count(self.numbers[id(module)], index, logits)
        if self.on and logits is not None and torch.is_grad_enabled() and weights.requires_grad:
            return _WithLosses.apply(weights, logits, self)
        return weights

    @torch.no_grad()
    def _count(self, layer: int, index: torch.Tensor, logits: torch.Tensor | None) -> None:
        real = torch.ones_like(index[:, 0], dtype=torch.bool) if self.real is None else self.real
        known = (index < self.experts) & real[:, None]
        places = index.clamp(max=self.experts - 1).flatten()
        self.counts[layer].scatter_add_(0, places, known.flatten().to(torch.int64))
        if logits is None:
            return
        logs = logits.float().log_softmax(-1)
        p = logs.exp() * real[:, None]
        self.sums[0] -= (p * logs).sum(dtype=torch.float64)
        self.sums[1] += (logits.float().logsumexp(-1).square() * real).sum(dtype=torch.float64)
        self.probabilities += p[:, : self.experts].sum(0, dtype=torch.float64)

    def gradient(self, logits: torch.Tensor) -> torch.Tensor:
        """Of both losses for a router's ``logits`` [T, E], times what the step's loss is multiplied with."""
        assert self.scale is not None
        z = logits.float()
        p = z.softmax(-1)
        share = self.scale * (self.units / (self.layers * self.tokens))
        out = torch.zeros_like(p)
        if self.weights.balance and self.loads is not None:
            apart = self.loads - (p * self.loads).sum(-1, keepdim=True)
            out += self.weights.balance * self.experts * p * apart
        if self.weights.z:
            out += 2 * self.weights.z * z.logsumexp(-1, keepdim=True) * p
        if self.real is not None:
            out *= self.real[:, None]
        return (out * share).to(logits.dtype)

    # ---- after a step

    def figures(self) -> dict[str, float]:
        """Of the step, over all ranks; collective.

        ``expert_load_max``: most tokens that an expert of any layer got, in shares of an even load;
        ``expert_load_entropy``: of the loads, mean over layers, 1 is even; ``experts_idle``: experts, counted in every
        layer, that got no token; ``router_entropy``: mean entropy of a token's probabilities in nats;
        ``router_balance_loss`` and ``router_z_loss`` without their weights (a model whose routers are known).
        """
        counts, sums = self.counts, torch.cat([self.sums, self.probabilities])
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        table, numbers = counts.cpu().double(), sums.tolist()
        share = table / table.sum(1, keepdim=True).clamp(min=1)
        entropy = torch.special.entr(share).sum(1) / math.log(max(2, self.experts))
        found = {
            "expert_load_max": round(share.max().item() * self.experts, 4),
            "expert_load_entropy": round(entropy.mean().item(), 6),
            "experts_idle": int((table == 0).sum()),
        }
        if self.routers and any(numbers[2:]):
            places = self.layers * self.tokens
            loads = (table.sum(0) / places).tolist()
            balance = self.experts * sum(f * p / places for f, p in zip(loads, numbers[2:], strict=True))
            found["router_entropy"] = round(numbers[0] / places, 6)
            found |= {"router_balance_loss": balance, "router_z_loss": numbers[1] / places}
        return found


class _NoteScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, routing: Routing) -> torch.Tensor:
        ctx.routing = routing
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.routing.scale = grad.detach().float()
        return grad, None


class _WithLosses(torch.autograd.Function):
    """The weights as they are; their backward pass adds the losses' gradient to that of the router's logits."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, logits: torch.Tensor, routing: Routing) -> torch.Tensor:
        ctx.routing = routing
        ctx.save_for_backward(logits)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return grad, ctx.routing.gradient(ctx.saved_tensors[0]), None


# ---- which losses


def weights_of(recipe: Recipe, config: Any) -> tuple[Weights, str]:
    """(the losses' weights, why): the recipe's, else those that the model's configuration asks for."""
    settings, config = recipe.experts, config.get_text_config()
    asks = bool(getattr(config, "output_router_logits", False))
    asked = {key: float(getattr(config, key, 0.0) or 0.0) if asks else 0.0 for key in _COEFFICIENTS}
    balance = settings.balance_loss if settings.balance_loss is not None else asked["router_aux_loss_coef"]
    z = settings.z_loss if settings.z_loss is not None else asked["router_z_loss_coef"]
    own = settings.balance_loss is not None or settings.z_loss is not None
    why = "the recipe" if own else "the model's configuration" if asks else "not asked for"
    return Weights(balance, z), why


_COEFFICIENTS = ("router_aux_loss_coef", "router_z_loss_coef")


def watch(model: Any, plain: Any, recipe: Recipe, report: ModelReport, device: torch.device | str) -> Routing | None:
    """The routing of ``model`` (``plain``: the transformers model in it), or None where it has no experts of ours.

    Raises :class:`UserError` for a loss that cannot be computed for this model.
    """
    layers = experts.find(model)
    weights, why = weights_of(recipe, plain.config)
    wanted = [key for key, on in (("balance_loss", weights.balance), ("z_loss", weights.z)) if on]
    if not layers:
        if wanted and (recipe.experts.balance_loss or recipe.experts.z_loss):
            raise UserError(
                "this model has no routed experts that this loss could be of",
                where=f"experts.{wanted[0]}",
                fix=f"--set experts.{wanted[0]}=0",
            )
        return None
    routing = Routing(model, layers, weights, device)
    if wanted:
        _check(routing, plain, recipe, wanted)
        shown = ", ".join(f"{name} {value:g}" for name, value in (("balance", weights.balance), ("z", weights.z)))
        report.add("routers' losses", shown, why)
    return routing


def _check(routing: Routing, plain: Any, recipe: Recipe, wanted: list[str]) -> None:
    defined = hasattr(sys.modules[type(plain).__module__], "load_balancing_loss_func")
    name, where = type(plain).__name__, f"experts.{wanted[0]}"
    off = f"--set experts.{wanted[0]}=0"
    if not routing.routers:
        raise UserError(
            f"transformers does not say where the router of each layer of {name} gives its logits", where=where, fix=off
        )
    if routing.weights.balance and not defined:
        raise UserError(f"no load-balancing loss is defined for {name}", where="experts.balance_loss", fix=off)
    if recipe.parallel.compile:
        raise UserError(
            "the routers' losses cannot be computed in compiled blocks",
            where="parallel.compile",
            fix=f"--set parallel.compile=false, or {off}",
        )
