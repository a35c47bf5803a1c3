"""The model: load it, check that this framework computes what the model computes, inject adapters, wrap it with its
loss.

``apply_*`` functions change the model in a fixed order (attention, adapters, trainable set, precision, kernels); what
each did and why is collected in :class:`ModelReport`, printed once at start and stored in the run.
"""

from __future__ import annotations

import contextlib
import enum
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aifactory_train.core.errors import UserError
from aifactory_train.model import attention, recurrent
from aifactory_train.model.head import Head, HeadObjective
from aifactory_train.model.loss import linear_cross_entropy, shaped
from aifactory_train.model.objective import SUMMED_NLL, Objective

if TYPE_CHECKING:
    from aifactory_train.model.embedding_noise import Noise
    from aifactory_train.model.routing import Routing

#: Names under which configurations give the soft cap of the logits (Gemma, RecurrentGemma).
_LOGIT_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")


class Forward(enum.Enum):
    """What a call of the module computes: the method of :class:`CausalLM` that gets its arguments."""

    LOSS = "loss"
    LOGITS = "logits"
    HIDDEN = "hidden"
    DECODE = "decode"


class CausalLM(nn.Module):
    """A transformers causal language model (with or without peft) whose forward returns the loss, unless asked for
    more.

    The loss is part of the module so that sharding engines gather the output weight inside its forward, and so that one
    call covers everything that needs gradients. Everything that computes is reached by calling the module (its
    wrapper), never by its methods: engines gather parameters around the call.
    """

    model: Any  # transformers' and peft's classes: their attributes are known at run time only

    def __init__(self, model: nn.Module, loss_rows: int | None = None, *, own: bool = False):
        """``own``: the model computes as transformers has it (``model.attention: own``), with its own attention and all
        that stands between its backbone and its output layer; a row is a document then.
        """
        super().__init__()
        self.model = model
        self.loss_rows = loss_rows
        self.own = own
        #: the vocabulary projection runs by the registered operators
        #: (:func:`aifactory_train.model.operators.apply_operators`)
        self.kernels = False
        #: folder whose weights an engine has yet to read shard by shard; None where they are in the parameters
        self.unread: Path | None = None
        #: rows of the embeddings below this one do not move (``model.vocabulary.train: new``)
        self.first_moving_row = 0
        #: what classifies in place of the vocabulary (:func:`aifactory_train.model.head.attach_head`)
        self.head: Head | None = None
        #: what the routers of a mixture of experts decide while it is trained; None: there are none, or nobody asks
        self.routing: Routing | None = None
        self.logit_scale = _logit_scale(self.language_model.config)
        self.logit_softcap = _logit_softcap(self.language_model.config)
        _check_output_layer(self.language_model.get_output_embeddings())
        #: layers that carry a state are run on documents, whose boundaries they learn here
        self.states, self.stateful = (recurrent.States(), []) if own else recurrent.keep_apart(self.backbone)

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

    @property
    def output_bias(self) -> torch.Tensor | None:
        """``[V]`` of the models whose output layer has one (Phi)."""
        return getattr(self.language_model.get_output_embeddings(), "bias", None)

    def forward(self, *inputs: Any, task: Forward = Forward.LOSS, **more: Any) -> torch.Tensor:
        """Dispatch to :meth:`loss`, :meth:`logits`, :meth:`hidden` or :meth:`decode`, which say what the arguments
        are.
        """
        return getattr(self, task.value)(*inputs, **more)

    def loss(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        documents: attention.Documents,
        positions: torch.Tensor,
        targets: torch.Tensor,
        *,
        noise: Noise | None = None,
        objective: Objective | HeadObjective = SUMMED_NLL,
        real: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``objective`` of the supervised ``positions`` (int64 ``[N]`` into the flattened batch) with ``targets``
        ``[N]``.

        The fp32 sum of their negative log-likelihoods by default. With a head ``positions`` are those that it reads,
        one of each document, and ``targets`` are not looked at. ``real`` (bool ``[B, T]``) are the tokens that are no
        padding: those that routers of experts are judged by.
        """
        with contextlib.nullcontext() if self.routing is None else self.routing.watching(real):
            hidden = self.hidden(input_ids, position_ids, documents, noise).index_select(0, positions)
        if isinstance(objective, HeadObjective):
            return objective.loss(hidden if self.head is None else self.head(hidden))  # embeddings need no layer
        weight = self.output_weight
        if self.first_moving_row:
            weight = _StillRows.apply(weight, self.first_moving_row)
        if weight.dtype != hidden.dtype:
            weight = weight.to(hidden.dtype)
        how: dict[str, Any] = {
            "scale": self.logit_scale,
            "softcap": self.logit_softcap,
            "bias": self.output_bias,
            "rows": self.loss_rows,
            "kernels": self.kernels,
        }
        found = objective.loss(functools.partial(linear_cross_entropy, hidden, weight, targets, **how))
        return found if self.routing is None else self.routing.scaled(found)

    @torch.no_grad()
    def logits(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        documents: attention.Documents,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """fp32 ``[N, V]`` at ``positions``, without gradients."""
        return self._logits(self.hidden(input_ids, position_ids, documents).index_select(0, positions))

    def hidden(
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
        if self.own:
            return self._before_output_layer(start, documents)
        self.states.now = recurrent.Rows(documents, input_ids.device) if self.stateful else None
        try:
            out = self.backbone(
                **start, position_ids=position_ids, attention_mask=None, use_cache=False, documents=documents
            )
        finally:
            self.states.now = None
        return out.last_hidden_state.flatten(0, 1)

    def _before_output_layer(self, start: dict[str, torch.Tensor], documents: attention.Documents) -> torch.Tensor:
        """``[B * T, D]``: what the output layer is given where the model is called as transformers would call it. The
        padding behind a document is seen by nothing before it, so no mask says where it begins.
        """
        batch, length = next(iter(start.values())).shape[:2]
        if any(n != length for n in documents.lengths):
            raise UserError(
                "a model with its own attention sees the neighbours of a packed document",
                where="model.attention",
                fix="--set data.batching=padded",
            )
        mask = torch.ones(batch, length, dtype=torch.int64, device=documents.cu_seqlens.device)
        head = self.language_model.get_output_embeddings()

        def stop(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            raise _ReachedError(args[0])

        handle = head.register_forward_pre_hook(stop)
        try:
            self.language_model(**start, attention_mask=mask, use_cache=False)
        except _ReachedError as reached:
            return reached.hidden.reshape(batch * length, -1)
        finally:
            handle.remove()
        raise ValueError("the model does not call its output layer")

    @torch.no_grad()
    def decode(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, *, attention_mask: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """One step of decoding with a transformers ``cache``: fp32 logits ``[B, V]`` of the last position.

        input_ids ``[B, T]`` follow what the cache holds; attention_mask int64 ``[B, cached + T]`` is 0 on padding.
        """
        with attention.decoding(self.backbone):
            out = self.backbone(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=True,
            )
        return self._logits(out.last_hidden_state[:, -1])

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 ``[N, V]`` of a few hidden states ``[N, D]``."""
        logits = (hidden @ self.output_weight.to(hidden.dtype).t()).float()
        return shaped(logits, self.logit_scale, self.logit_softcap, self.output_bias)


class _ReachedError(Exception):
    """The output layer was reached with ``hidden``; nothing behind it is computed."""

    def __init__(self, hidden: torch.Tensor):
        super().__init__()
        self.hidden = hidden


class _StillRows(torch.autograd.Function):
    """A matrix whose first rows get no gradient: what the optimizer is given for them is zero, so they stay to the
    bit.
    """

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
    """The factor between what the output layer gives and the logits."""
    if getattr(config, "logits_scaling", None) not in (None, 1.0):  # Granite divides
        return 1.0 / float(config.logits_scaling)
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere and Falcon-H1 multiply
        if getattr(config, name, None) not in (None, 1.0):
            return float(getattr(config, name))
    return 1.0


def _logit_softcap(config) -> float:
    """c of ``c * tanh(logits / c)``; 0 where the logits are not capped."""
    return next((float(cap) for name in _LOGIT_SOFTCAPS if (cap := getattr(config, name, None))), 0.0)


def _check_output_layer(head: nn.Module) -> None:
    """The loss computes the output layer by its weight and bias: an adapter on it is refused."""
    if hasattr(head, "base_layer"):
        raise UserError(
            "an adapter on the output layer is not supported by the chunked loss",
            where="adapter.targets",
            fix="leave the output layer out, or train it in full with adapter.train_embeddings",
        )


def _tuple_linears(model: Any) -> list[str]:
    """Names of linear layers that give something else than one product with their weights: more than one tensor (the
    routers of Llama 4 and Phi-MoE), or a product of groups (DeepSeek V4's output): adapters cannot wrap them.
    """
    found = []
    for name, module in model.named_modules():
        own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
        if own and type(module).__module__.startswith("transformers"):
            row = module.weight.new_zeros(1, module.in_features)
            try:
                with torch.no_grad():
                    out = module(row)
            except (RuntimeError, ValueError, IndexError):  # it does not take a row, as a linear layer would
                out = None
            if not isinstance(out, torch.Tensor) or out.shape != (1, module.out_features):
                found.append(name)
    return found
