"""Learning from preferences: DPO, ORPO and KTO, on the loop and the batches of supervised fine-tuning.

One forward pass gives the log-probability of every supervised token of a micro-batch, packed or padded; sums over documents give
those of answers, and the loss is a function of answers. It is summed over documents and divided by their number over all ranks.

The reference of DPO and KTO is the model as it is before the first step: for a fresh adapter that is the base model (the adapter
adds nothing yet), for a full fine-tuning the weights it started from. Its log-probabilities are computed once, before the first step,
stored in the run folder and read again on resumption; no second model is held in memory.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from aifactory_train.errors import UserError
from aifactory_train.loss import chunk_rows

if TYPE_CHECKING:
    from aifactory_train.config import PreferenceConfig, Recipe
    from aifactory_train.parallel import DeviceBatch
    from aifactory_train.train import Trainer

REFERENCE_FILE = "reference_logps.json"


# ---- losses of answers (each term is fp32, summed over documents or pairs)


def dpo_loss(policy: torch.Tensor, reference: torch.Tensor, beta: float, smoothing: float = 0.0) -> torch.Tensor:
    """Sum over P pairs; policy and reference ``[P, 2]`` are log-probabilities of chosen and rejected answers.

    Rafailov et al. 2023, arXiv 2305.18290, equation 7; ``smoothing`` is the conservative form of its authors' note (labels that are
    wrong with that probability).
    """
    rewards = beta * (policy - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    return -((1 - smoothing) * F.logsigmoid(margin) + smoothing * F.logsigmoid(-margin)).sum()


def orpo_loss(policy: torch.Tensor, lengths: torch.Tensor, weight: float) -> torch.Tensor:
    """Sum over P pairs of the chosen answer's mean NLL and ``weight`` times the odds-ratio term; policy, lengths ``[P, 2]``.

    Hong et al. 2024, arXiv 2403.07691, equations 3 to 7: probabilities of answers are geometric means over their tokens, and
    odds(y) = P(y) / (1 - P(y)).
    """
    mean = policy / lengths
    # log(1 - exp(x)) without cancellation: log(-expm1(x)); x < 0 up to rounding
    mean = mean.clamp(max=-1e-7)
    log_odds = mean - torch.log(-torch.expm1(mean))
    return -(mean[:, 0] + weight * F.logsigmoid(log_odds[:, 0] - log_odds[:, 1])).sum()


def kto_loss(
    policy: torch.Tensor,
    reference: torch.Tensor,
    desirable: torch.Tensor,
    baseline: torch.Tensor | float,
    beta: float,
    weights: tuple[float, float] = (1.0, 1.0),
) -> torch.Tensor:
    """Sum over N answers; policy, reference ``[N]``, desirable bool ``[N]``, ``baseline`` the KL estimate z0 (no gradient).

    Ethayarajh et al. 2024, arXiv 2402.01306, equations 8 and 9: ``weight * (1 - sigmoid(beta (r - z0)))`` of a desirable answer, with
    the sign inside turned for an undesirable one. ``weights`` are lambda_D and lambda_U.
    """
    gain = beta * (policy - reference - baseline)
    value = torch.sigmoid(torch.where(desirable, gain, -gain))
    weight = torch.where(desirable, weights[0], weights[1])
    return (weight * (1 - value)).sum()


# ---- log-probabilities of tokens


def token_logps(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, scale: float, rows: int | None, kernels: bool
) -> torch.Tensor:
    """Log-probability of each label, fp32 ``[N]``, with gradients; the logits exist in chunks only (backward makes them again).

    hidden ``[N, D]``, weight ``[V, D]``, labels int64 ``[N]``. ``kernels``: by the registered operator ``linear_logps``, which runs
    Triton where the registry selects it; else plain torch.
    """
    if hidden.shape[0] == 0:
        return hidden.sum(1).float() + 0.0 * weight[:1].sum().float()
    if kernels:
        from aifactory_train.kernels.linear_dpo.op import linear_logps

        return linear_logps(hidden, weight, labels, scale=scale, chunk_size=rows)
    step = chunk_rows(weight.shape[0], rows)
    parts = [
        checkpoint(_logps_of_chunk, hidden[a : a + step], weight, labels[a : a + step], scale, use_reentrant=False)
        for a in range(0, hidden.shape[0], step)
    ]
    return torch.cat(parts)


def _logps_of_chunk(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
    logits = (hidden @ weight.t()).float() * scale
    return logits.gather(1, labels.unsqueeze(1)).squeeze(1) - torch.logsumexp(logits, dim=1)


# ---- one micro-batch


@dataclasses.dataclass
class Judged:
    """What a forward pass needs to turn log-probabilities of tokens into the loss of a micro-batch.

    owner: int64 ``[N]``, document of each supervised position; lengths: fp32 ``[D]``, supervised tokens of each document; reference:
    fp32 ``[D]``; desirable: bool ``[D]``. Pairs are neighbours, chosen first. ``sums`` (fp64 ``[4]``) collects figures of the step.
    """

    settings: PreferenceConfig
    owner: torch.Tensor
    lengths: torch.Tensor
    reference: torch.Tensor
    desirable: torch.Tensor
    baseline: float
    sums: torch.Tensor
    kernels: bool

    def loss(self, logps: torch.Tensor) -> torch.Tensor:
        """The summed loss (fp32 scalar) of token log-probabilities ``[N]``."""
        if not len(self.lengths):
            return logps.sum()
        answers = torch.zeros(len(self.lengths), dtype=logps.dtype, device=logps.device)
        answers = answers.index_add(0, self.owner, logps)
        how = self.settings
        if how.kind == "kto":
            weights = (how.desirable_weight, how.undesirable_weight)
            self._count(answers.detach() - self.reference, self.desirable)
            return kto_loss(answers, self.reference, self.desirable, self.baseline, how.beta, weights)
        pairs = answers.view(-1, 2)
        if how.kind == "orpo":
            lengths = self.lengths.view(-1, 2)
            self._count((answers / self.lengths).detach(), self.desirable)
            return orpo_loss(pairs, lengths, how.beta)
        self._count(answers.detach() - self.reference, self.desirable)
        return dpo_loss(pairs, self.reference.view(-1, 2), how.beta, how.label_smoothing)

    def _count(self, rewards: torch.Tensor, desirable: torch.Tensor) -> None:
        """Sums for the step's figures: rewards and numbers of good and of bad answers; for pairs also how many are in order."""
        good, bad = rewards[desirable].double(), rewards[~desirable].double()
        right = (good > bad).sum() if self.settings.kind != "kto" else torch.zeros((), device=good.device)
        self.sums += torch.stack([good.sum(), bad.sum(), desirable.sum(), right]).to(self.sums)


class Preference:
    """The preference method of a run: its reference, batches and figures."""

    def __init__(self, recipe: Recipe):
        assert recipe.methods.preference is not None
        self.recipe, self.settings = recipe, recipe.methods.preference
        self.paired = self.settings.kind != "kto"
        self.reference: np.ndarray | None = None  # float64 [documents], NaN where the run does not come by
        self.exchanged: np.ndarray | None = None  # the same of answers under wrong questions (KTO)
        self.baseline = 0.0
        self.sums = torch.zeros(4, dtype=torch.float64)

    # ---- the reference

    def begin(self, trainer: Trainer, *, resumed: bool) -> None:
        """Compute the reference's log-probabilities of the run's documents, or read them when the run goes on."""
        self.sums = self.sums.to(trainer.world.device)
        if self.settings.kind == "orpo":
            return
        wanted = self._documents_of_run(trainer)
        if resumed:
            self._read(trainer, wanted)
            return
        self.reference = self._score(trainer, self._base(trainer), wanted)
        if self.settings.kind == "kto":
            self.exchanged = self._score(trainer, self._mismatched(trainer), wanted)
        if trainer.world.is_main:
            self._write(trainer)

    def _base(self, trainer: Trainer) -> Any:
        return trainer.data.train.both if self.paired else trainer.data.train  # type: ignore[attr-defined]

    def _mismatched(self, trainer: Trainer) -> Any:
        from aifactory_train.methods.pairs import Mismatched

        return Mismatched(trainer.data.train, self.recipe.data.sequence_length)

    def _documents_of_run(self, trainer: Trainer) -> np.ndarray:
        """Documents (of :meth:`_base`) that the run's steps will use, sorted."""
        from aifactory_train.data import Cursor

        seen = np.zeros(len(trainer.data.train), dtype=bool)
        cursor = Cursor(0, 0)
        for _ in range(trainer.total_steps):
            rows, cursor = trainer.sampler.step(cursor)
            seen[rows] = True
            if seen.all():
                break
        rows = np.flatnonzero(seen)
        return np.sort(np.concatenate([2 * rows, 2 * rows + 1])) if self.paired else rows

    def _score(self, trainer: Trainer, dataset: Any, wanted: np.ndarray) -> np.ndarray:
        """Log-probabilities of the wanted documents' answers under the model as it is, float64 ``[documents]``, else NaN."""
        from aifactory_train.evaluate import held_out

        trainer.attempt.beat(trainer.step, "reference")
        scored = held_out(
            trainer.engine.module,
            Chosen(dataset, wanted),  # type: ignore[arg-type]
            max_rows=len(wanted),
            batching=self.recipe.data.batching,
            pad_id=trainer.pad_id,
            device=trainer.world.device,
            micro_batch_tokens=self.recipe.train.micro_batch_tokens,
            rank=trainer.world.rank,
            world_size=trainer.world.size,
            autocast=_autocast(trainer),
        )
        out = np.full(len(dataset), np.nan)
        out[wanted] = -scored.nll
        return out

    def _write(self, trainer: Trainer) -> None:
        from aifactory_train.metrics.bootstrap import packed
        from aifactory_train.resume import data_digest
        from aifactory_train.runs import write_json

        found = {"reference": self.reference, "exchanged": self.exchanged}
        arrays = {name: packed(values) for name, values in found.items() if values is not None}
        content = {"what": "log-probabilities, float64, base64", "data": data_digest(trainer.data.train), **arrays}
        write_json(trainer.run.path / REFERENCE_FILE, content)

    def _read(self, trainer: Trainer, wanted: np.ndarray) -> None:
        from aifactory_train.metrics.bootstrap import unpacked
        from aifactory_train.resume import data_digest
        from aifactory_train.runs import read_json

        path = trainer.run.path / REFERENCE_FILE
        fix = "start a new run (--run-dir NEW): the reference is the model before its first step"
        found = read_json(path)
        if found["data"] != data_digest(trainer.data.train):
            raise UserError("the reference was computed on other rows", where=str(path), fix=fix)
        self.reference = unpacked(found["reference"])
        self.exchanged = unpacked(found["exchanged"]) if "exchanged" in found else None
        missing = int(np.isnan(self.reference[wanted]).sum())
        if missing:
            raise UserError(
                f"the reference was not computed for {missing} of this run's documents", where=str(path), fix=fix
            )

    # ---- a step

    def before_step(self, trainer: Trainer, documents: np.ndarray, shares: list[np.ndarray]) -> None:
        """KTO: z0, the mean log-ratio of exchanged answers over all documents of the step and all ranks, at least 0."""
        self.sums.zero_()
        if self.settings.kind != "kto":
            return
        from aifactory_train.data import collate
        from aifactory_train.parallel.batches import device_batch, empty_batch

        assert self.exchanged is not None
        module, device, mismatched = trainer.engine.module, trainer.world.device, self._mismatched(trainer)
        total = torch.zeros((), dtype=torch.float64, device=device)
        autocast = _autocast(trainer)
        context = torch.autocast(device.split(":")[0], dtype=autocast, enabled=autocast is not None)
        module.eval()
        try:
            with torch.no_grad(), context:
                for share in shares:
                    if len(share):
                        collated = collate(mismatched, share, self.recipe.data.batching, trainer.pad_id)  # type: ignore[arg-type]
                        batch = device_batch(collated, device)
                    else:
                        batch = empty_batch(trainer.pad_id, device)
                    nll = module(**batch.kwargs(), reduce=False)
                    if len(share):
                        total -= nll.double().sum() + float(self.exchanged[share].sum())
        finally:
            module.train()
        dist.all_reduce(total)
        self.baseline = max(0.0, total.item() / len(documents))

    def micro_batch(self, trainer: Trainer, share: np.ndarray) -> tuple[DeviceBatch, np.ndarray, np.ndarray]:
        """(batch, its documents in :meth:`_base`, their lengths) of the rows ``share``."""
        from aifactory_train.data import collate
        from aifactory_train.parallel.batches import device_batch, empty_batch

        base, device = self._base(trainer), trainer.world.device
        rows = np.asarray(share, dtype=np.int64)
        documents = np.stack([2 * rows, 2 * rows + 1], axis=1).reshape(-1) if self.paired else rows
        owner = np.zeros(0, dtype=np.int64)
        if len(documents):
            collated = collate(base, documents, self.recipe.data.batching, trainer.pad_id)
            batch = device_batch(collated, device)
            places = np.flatnonzero(collated.labels.flatten().numpy() != -100)
            owner = np.searchsorted(collated.cu_seqlens.numpy(), places, side="right") - 1
        else:
            batch = empty_batch(trainer.pad_id, device)
        lengths = np.bincount(owner, minlength=len(documents)).astype(np.float32)
        desirable = (
            np.arange(len(documents)) % 2 == 0
            if self.paired
            else np.asarray([bool(base.row(int(i))["desirable"]) for i in documents], dtype=bool)
        )
        reference = np.zeros(len(documents)) if self.reference is None else self.reference[documents]
        batch.extra["judged"] = Judged(
            settings=self.settings,
            owner=torch.from_numpy(owner).to(device),
            lengths=torch.from_numpy(lengths).to(device),
            reference=torch.from_numpy(reference.astype(np.float32)).to(device),
            desirable=torch.from_numpy(desirable).to(device),
            baseline=self.baseline,
            sums=self.sums,
            kernels=self.recipe.kernels.enabled != "off" and device != "cpu",
        )
        return batch, documents, base.lengths[documents]

    def figures(self, trainer: Trainer, documents: int) -> dict[str, float]:
        """``reward_margin`` (mean over good minus mean over bad answers), and for pairs ``reward_accuracy``; KTO also ``kl``.

        The reward is the log-ratio to the reference times beta; for ORPO, which has none, the mean log-probability of a token.
        """
        sums = self.sums.clone()
        dist.all_reduce(sums)
        good, bad, number, right = (float(x) for x in sums.tolist())
        others = documents - number if not self.paired else number
        factor = 1.0 if self.settings.kind == "orpo" else self.settings.beta
        out: dict[str, float] = {}
        if number and others:
            out["reward_margin"] = factor * (good / number - bad / others)
        if self.paired:
            out["reward_accuracy"] = right / number
        else:
            out["kl"] = self.baseline
        return out


class Chosen:
    """Some documents of a data set, behind the part of it that scoring reads."""

    def __init__(self, base: Any, documents: np.ndarray):
        self.base, self.documents, self.name = base, documents, base.name
        self.lengths = np.asarray(base.lengths)[documents]

    def __len__(self) -> int:
        return len(self.documents)

    def tokens(self, i: int) -> np.ndarray:
        return self.base.tokens(int(self.documents[i]))

    def mask(self, i: int) -> np.ndarray:
        return self.base.mask(int(self.documents[i]))

    def text_mask(self, i: int) -> np.ndarray:
        return self.base.text_mask(int(self.documents[i]))

    def text_bytes(self, i: int) -> int:
        return self.base.text_bytes(int(self.documents[i]))


def _autocast(trainer: Trainer) -> torch.dtype | None:
    policy = trainer.precision
    mixed = policy.compute != policy.parameters or policy.compute != policy.frozen
    return policy.compute if mixed else None


# ---- held-out figures


def preference_statistics(good: np.ndarray, bad: np.ndarray) -> dict[str, np.ndarray]:
    """``{metric: [rows, 2]}`` of pairs: ``preference_accuracy`` and ``preference_margin``. good, bad: log-probabilities ``[rows]``
    (ORPO: means over tokens)."""
    ones = np.ones(len(good))
    return {
        "preference_accuracy": np.stack([(good > bad).astype(float), ones], axis=1),
        "preference_margin": np.stack([good - bad, ones], axis=1),
    }


def margin_of_labels(logps: np.ndarray, desirable: np.ndarray) -> np.ndarray:
    """Statistics ``[rows, 4]`` of answers with a label each; :func:`difference_of_means` of their sums is the margin."""
    good = desirable.astype(float)
    return np.stack([logps * good, good, logps * (1 - good), 1 - good], axis=1)


def difference_of_means(sums: np.ndarray) -> np.ndarray:
    """Mean of the good minus mean of the bad, NaN where a resample holds one kind only; sums ``[..., 4]``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]
