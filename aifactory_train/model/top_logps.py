"""Two more walks through the vocabulary projection, for distillation: the teacher's likeliest tokens, and what the
student thinks of the same tokens.

Both describe a distribution by ``k + 1`` numbers: the log-probabilities of ``k`` tokens, and the logarithm of the mass
of all others together (the *rest*), which is summed and never taken as one minus something. Logits exist in chunks only
(:mod:`aifactory_train.model.loss`).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from aifactory_train.model.loss import Shaping, _Gradients, _logits

if TYPE_CHECKING:
    from aifactory_train.model.objective import Likelihood

#: The smallest logarithm of a rest: below it fp32 holds no probability that could be divided by.
LEAST = -80.0


@dataclass
class TeacherTop:
    """An objective (:class:`aifactory_train.model.objective.Objective`) of a teacher: gives the NLL of each target,
    fp32 ``[N]``, and keeps the ``k`` likeliest of the token ids below ``vocabulary`` at ``temperature``.

    After a forward pass ``ids`` int64 ``[N, k]`` (likeliest first), ``logps`` fp32 ``[N, k]``, ``rest`` fp32 ``[N]``.
    """

    k: int
    temperature: float
    vocabulary: int
    ids: torch.Tensor = field(init=False)
    logps: torch.Tensor = field(init=False)
    rest: torch.Tensor = field(init=False)

    def loss(self, nll: Likelihood) -> torch.Tensor:
        return nll(walk=self.walk)

    @torch.no_grad()
    def walk(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        how: Shaping,
        rows: int,
    ) -> torch.Tensor:
        """See the class; the arguments are :class:`aifactory_train.model.objective.Walk`'s."""
        count, device = len(targets), hidden.device
        self.ids = torch.empty(count, self.k, dtype=torch.int64, device=device)
        self.logps = torch.empty(count, self.k, dtype=torch.float32, device=device)
        self.rest = torch.empty(count, dtype=torch.float32, device=device)
        nll = torch.empty(count, dtype=torch.float32, device=device)
        for start in range(0, count, rows):
            here = slice(start, start + rows)
            logits = _logits(hidden[here], weight, bias, how)
            nll[here] = torch.logsumexp(logits, 1) - logits.gather(1, targets[here].unsqueeze(1)).squeeze(1)
            logits.div_(self.temperature)
            whole = torch.logsumexp(logits, 1, keepdim=True)
            found = logits[:, : self.vocabulary].topk(self.k, dim=1)
            self.ids[here], self.logps[here] = found.indices, (found.values - whole).clamp_(min=LEAST)
            logits.scatter_(1, found.indices, -torch.inf)
            self.rest[here] = (torch.logsumexp(logits, 1) - whole.squeeze(1)).clamp_(LEAST, -1e-7)
            del logits
        return nll


class _AtIds(torch.autograd.Function):
    """fp32 ``[N, k + 2]``: log-probabilities of ``ids`` and of the rest at a temperature, and the NLL of the target at
    temperature 1. What they weigh in the loss is known after all of them, so backward makes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        ids: torch.Tensor,
        temperature: float,
        how: Shaping,
        rows: int,
    ) -> torch.Tensor:
        count, k = ids.shape
        out = torch.empty(count, k + 2, dtype=torch.float32, device=hidden.device)
        whole, plain = (torch.empty(count, dtype=torch.float32, device=hidden.device) for _ in range(2))
        for start in range(0, count, rows):
            here = slice(start, start + rows)
            logits = _logits(hidden[here], weight, bias, how)
            plain[here] = torch.logsumexp(logits, 1)
            out[here, k + 1] = plain[here] - logits.gather(1, targets[here].unsqueeze(1)).squeeze(1)
            if temperature != 1.0:
                logits.div_(temperature)
            picked, highest = logits.gather(1, ids[here]), logits.amax(1)
            likely = logits.sub_(highest.unsqueeze(1)).exp_()
            kept = likely.gather(1, ids[here]).sum(1)
            tail = likely.scatter_(1, ids[here], 0.0).sum(1)
            whole[here] = highest + (kept + tail).log()
            out[here, :k] = picked - whole[here].unsqueeze(1)
            out[here, k] = (tail.log() + highest - whole[here]).clamp_min(LEAST)
            del logits, likely
        ctx.save_for_backward(hidden, weight, bias, targets, ids, whole, plain, out[:, k].clone())
        ctx.temperature, ctx.how, ctx.rows = temperature, how, rows
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, ids, whole, plain, rest = ctx.saved_tensors
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        k = ids.shape[1]
        for start in range(0, len(ids), ctx.rows):
            here = slice(start, start + ctx.rows)
            chunk, of, target = hidden[here], ids[here], targets[here].unsqueeze(1)
            top, tail, nll = grad_output[here, :k], grad_output[here, k : k + 1], grad_output[here, k + 1 :]
            logits = _logits(chunk, weight, bias, ctx.how)
            slope = ctx.how.slope_(logits)
            # d log q_i / d z_j = [i = j] - q_j; of the rest q_j / q_rest - q_j for a token of it, else - q_j
            every = top.sum(1, keepdim=True) + tail
            here_whole = whole[here].unsqueeze(1)
            grad = (logits / ctx.temperature).sub_(here_whole).exp_()
            of_ids = top - grad.gather(1, of) * every
            grad.mul_(tail * torch.exp(-rest[here]).unsqueeze(1) - every)
            grad.scatter_(1, of, of_ids).div_(ctx.temperature)
            grad.addcmul_(logits.sub_(plain[here].unsqueeze(1)).exp_(), nll)
            grad.scatter_add_(1, target, -nll)
            grad.mul_(ctx.how.scale)
            gradients.add(here, chunk, weight, grad if slope is None else grad.mul_(slope))
            del grad, logits, slope
        grad_weight = gradients.weight.to(weight.dtype) if gradients.weight is not None else None
        grad_bias = gradients.bias.to(bias.dtype) if gradients.bias is not None else None
        return gradients.hidden, grad_weight, grad_bias, None, None, None, None, None


def student_at(
    ids: torch.Tensor,
    temperature: float,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    how: Shaping,
    rows: int,
) -> torch.Tensor:
    """fp32 ``[N, k + 2]`` with gradients: log-probabilities of ``ids`` (int64 ``[N, k]``, different ones in a row), of
    the rest, both at ``temperature``, and the NLL of ``targets``. Costs the 8 N V D FLOP of a loss of single targets.
    """
    if not len(ids):
        unused = hidden.sum() + weight[:1].sum() + (0.0 if bias is None else bias.sum())
        return unused.float() * hidden.new_zeros((0, ids.shape[1] + 2), dtype=torch.float32)
    found: torch.Tensor = _AtIds.apply(hidden, weight, bias, targets, ids, temperature, how, rows)
    return found


def divergences(
    kind: Literal["forward_kl", "reverse_kl", "js"], teacher: torch.Tensor, student: torch.Tensor, beta: float
) -> torch.Tensor:
    """fp32 ``[N]`` nats between distributions ``[N, K]`` of log-probabilities whose last entry is the rest.

    The generalised Jensen-Shannon divergence is equation 1 of Agarwal et al. 2024, arXiv 2306.13649.
    """
    if kind == "forward_kl":
        return _kl(teacher, student)
    if kind == "reverse_kl":
        return _kl(student, teacher)
    mix = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _kl(teacher, mix) + (1 - beta) * _kl(student, mix)


def _kl(of: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    return (of.exp() * (of - to)).sum(1)


@dataclass
class DistillObjective:
    """The summed loss of a micro-batch against a teacher's stored log-probabilities.

    ids int64 ``[N, k]``; teacher fp32 ``[N, k + 1]``, the rest last; ``sums`` fp64 ``[2]`` collects the divergence and
    the NLL of the step.
    """

    kind: Literal["forward_kl", "reverse_kl", "js"]
    beta: float
    temperature: float
    weight: float
    ids: torch.Tensor
    teacher: torch.Tensor
    sums: torch.Tensor

    def loss(self, nll: Likelihood) -> torch.Tensor:
        """fp32 scalar: ``weight x temperature^2 x divergence + (1 - weight) x NLL`` over all targets."""
        found = nll(walk=functools.partial(student_at, self.ids, self.temperature))
        k = self.ids.shape[1]
        apart = divergences(self.kind, self.teacher, found[:, : k + 1], self.beta).sum() * self.temperature**2
        supervised = found[:, k + 1].sum()
        self.sums += torch.stack([apart.detach(), supervised.detach()]).to(self.sums)
        return self.weight * apart + (1.0 - self.weight) * supervised
