"""A linear layer on one hidden state of each document, in place of the vocabulary: what classifies.

It is what transformers' ``...ForSequenceClassification`` calls ``score``: no bias, on the last token. Its weight is a
trained parameter like any other (``head.weight``), so engines shard it and checkpoints keep it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from aifactory_train.config.head_block import embeds, names, outputs
from aifactory_train.core.errors import UserError

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.model.causal_lm import CausalLM
    from aifactory_train.model.report import ModelReport

#: The head's name among trained parameters, in a transformers classifier, and in a PEFT adapter's file.
PARAMETER, PLAIN, IN_ADAPTER = "head.weight", "score.weight", "base_model.model.score.weight"
#: transformers' ``problem_type`` of each kind of head; a reward is none of its problems.
PROBLEMS = {"classification": "single_label_classification", "multi_label": "multi_label_classification"}


class Head(nn.Module):
    """``weight`` ``[outputs, D]``. Computes in fp32 whatever the model computes in: it is small, and its outputs are
    compared with each other.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 ``[documents, outputs]`` of hidden states ``[documents, D]``."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float())


class HeadObjective:
    """What a forward pass of a model with a head computes from the head's outputs."""

    def loss(self, outputs: torch.Tensor) -> torch.Tensor:
        """Of fp32 ``[documents, outputs]``."""
        raise NotImplementedError


class Outputs(HeadObjective):
    """The outputs themselves, for evaluation and export."""

    def loss(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs


@dataclass
class LabelLoss(HeadObjective):
    """The summed loss of a micro-batch's documents (fp32 scalar).

    targets: int64 ``[documents]``, or fp32 ``[documents, labels]`` of 0 and 1 where a document has any number of
    labels; weights: fp32 ``[labels]`` or None, what a document counts by its label, or a label that applies against
    one that does not.
    """

    targets: torch.Tensor
    weights: torch.Tensor | None

    def loss(self, outputs: torch.Tensor) -> torch.Tensor:
        return label_losses(outputs, self.targets, self.weights).sum()


class PairLoss(HeadObjective):
    """The summed loss of pairs of answers, which are neighbours, the chosen one first (fp32 scalar)."""

    def loss(self, outputs: torch.Tensor) -> torch.Tensor:
        return pair_losses(outputs).sum()


def pair_losses(outputs: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry: ``-log sigmoid(chosen - rejected)`` of rewards ``[2 * pairs, 1]``, ``[pairs]``."""
    return -F.logsigmoid(outputs[0::2, 0] - outputs[1::2, 0])


def label_losses(outputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The loss of each document, ``[documents]``: cross-entropy, or the mean over labels of binary cross-entropy.

    Its mean over documents is the loss of transformers' ``AutoModelForSequenceClassification`` (without weights).
    """
    if targets.dim() == 1:
        each = F.cross_entropy(outputs, targets, reduction="none")
        return each if weights is None else each * weights[targets]
    return F.binary_cross_entropy_with_logits(outputs, targets, pos_weight=weights, reduction="none").mean(dim=1)


# ---- on the model


def attach_head(core: CausalLM, recipe: Recipe, *, dtype: torch.dtype, report: ModelReport) -> None:
    """Give ``core`` the head that the recipe asks for; nothing without one. Raises :class:`UserError` for a model that
    transformers has no classifier of.

    Its first weights are drawn from ``train.seed`` alone, so that they are the same on all ranks. An output layer of
    its own (not tied to the embeddings) is not trained any more.
    """
    count = outputs(recipe)
    if embeds(recipe):
        check_plain_model(core.language_model.config)
        report.trainable -= _hold_vocabulary(core)
        return
    if count is None:
        return
    model, vocabulary = core.language_model, core.output_weight
    plain_class(model.config, recipe)
    width, device = int(vocabulary.shape[1]), vocabulary.device
    spread = float(getattr(model.config.get_text_config(), "initializer_range", 0.02) or 0.02)
    drawn = torch.empty(count, width).normal_(0.0, spread, generator=torch.Generator().manual_seed(recipe.train.seed))
    core.head = Head(drawn.to(device=device, dtype=dtype))
    report.trainable += drawn.numel() - _hold_vocabulary(core)
    report.parameters += drawn.numel()
    report.add("head", f"{count} outputs from the last token's {width} hidden values", "methods.head")


def _hold_vocabulary(core: CausalLM) -> int:
    """Do not train an output layer of its own, which nothing computes; returns how many numbers that are."""
    freed = 0
    if core.output_weight is not core.language_model.get_input_embeddings().weight:
        for parameter in (core.output_weight, core.output_bias):
            if isinstance(parameter, nn.Parameter) and parameter.requires_grad:
                parameter.requires_grad_(False)
                freed += parameter.numel()
    return freed


def check_plain_model(config: Any) -> None:
    """Raises :class:`UserError` where transformers has no model without an output layer, which embeddings are read
    from.
    """
    from transformers import MODEL_MAPPING

    if MODEL_MAPPING.get(type(config), None) is None:
        raise UserError(
            f"transformers' AutoModel has no models of type '{config.model_type}', so its embeddings could not be used",
            where="methods.head",
            fix="another model.base (Llama, Mistral, Qwen, Gemma and their relatives)",
        )


def plain_class(config: Any, recipe: Recipe) -> Any:
    """transformers' class for classification of this model. Raises :class:`UserError` where it has none whose head is
    this one.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSES

    found: Any = CLASSES.get(type(config), None)
    if found is None or recipe.model.trust_remote_code:
        raise UserError(
            f"transformers has no classifier of models of type '{config.model_type}', so a head on it could not be "
            "exported",
            where="methods.head",
            fix="another model.base (Llama, Mistral, Qwen, Gemma and their relatives have one)",
        )
    with torch.device("meta"):
        model = found(configured(config, recipe))
    inside = f"{model.base_model_prefix}."
    own = [name for name, _ in model.named_parameters() if not name.startswith(inside)]
    if own != [PLAIN]:
        raise UserError(
            f"transformers' {found.__name__} has another head ({', '.join(own) or 'none'}) than one linear layer on "
            "the last token",
            where="methods.head",
            fix="another model.base (Llama, Mistral, Qwen, Gemma and their relatives have this one)",
        )
    return found


def configured(config: Any, recipe: Recipe) -> Any:
    """A copy of a model's configuration that says what the head's outputs are."""
    import copy

    head, labels = recipe.methods.head, names(recipe)
    assert head is not None
    config = copy.deepcopy(config)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.problem_type = PROBLEMS.get(head.kind)
    return config
