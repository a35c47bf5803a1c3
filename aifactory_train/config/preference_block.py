"""The recipe's ``methods.preference``: learning from answers that were judged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from aifactory_train.config.strict import Strict

if TYPE_CHECKING:
    from typing_extensions import Self

#: Kinds whose rows are pairs, and kinds that look at the model before its first step.
OF_PAIRS, WITH_REFERENCE = ("dpo", "orpo", "simpo", "cpo"), ("dpo", "kto")
NAMES = {"dpo": "DPO", "orpo": "ORPO", "kto": "KTO", "simpo": "SimPO", "cpo": "CPO"}
#: What a key is where a recipe does not say it, by kind: the papers' own values.
_BY_KIND = {"simpo": {"beta": 2.0}, "cpo": {"nll_weight": 1.0}}


class PreferenceConfig(Strict):
    """Learning from preferences in place of imitation (docs/methods.md)."""

    kind: Literal["dpo", "orpo", "kto", "simpo", "cpo"] = Field(
        description="dpo, orpo, simpo, cpo: rows with prompt, chosen, rejected; kto: rows with prompt, completion, "
        "label (true or false). Only dpo and kto have a reference."
    )
    beta: float = Field(
        0.1,
        gt=0,
        description="dpo, kto: how strongly the reference holds; orpo: weight of the odds ratio; simpo (2 where it is "
        "not given), cpo: scale of the margin.",
    )
    loss: Literal["sigmoid", "sigmoid_norm", "ipo"] = Field(
        "sigmoid",
        description="dpo only. sigmoid_norm: log-ratios are means over each answer's tokens, so that long answers "
        "weigh no more than short ones; beta is then larger (2 or more). ipo: squared distance of the margin to 1 / "
        "(2 beta), for few or certain pairs (Azar et al. 2023, arXiv 2310.12036).",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="dpo (but for ipo), simpo, cpo: share of pairs that are thought to be the wrong way round.",
    )
    gamma: float = Field(
        1.0, ge=0, description="simpo only: margin that a pair is to have (Meng et al. 2024, arXiv 2405.14734)."
    )
    nll_weight: float = Field(
        0.0,
        ge=0,
        description="simpo, cpo (1 where it is not given): weight of the chosen answer's mean NLL per target.",
    )
    desirable_weight: float = Field(
        1.0,
        gt=0,
        description="kto only: lambda_D; desirable answers x their weight over undesirable ones x theirs should be 1 "
        "to 4/3.",
    )
    undesirable_weight: float = Field(1.0, gt=0, description="kto only: lambda_U.")
    replay_weight: float = Field(
        1.0,
        gt=0,
        description="With a replayed source (data.train[].share): a step's loss is the preference loss + "
        "replay_weight x mean NLL per target of its replayed rows (the pretraining term of Ouyang et al. 2022, arXiv "
        "2203.02155, equation 2).",
    )

    @model_validator(mode="after")
    def _defaults_of_the_kind(self) -> Self:
        for key, value in _BY_KIND.get(self.kind, {}).items():
            if key not in self.model_fields_set:
                self.__dict__[key] = value  # object-level write: each assignment would validate again
        return self

    @property
    def by_token(self) -> bool:
        """Whether an answer's log-probability counts as a mean over its tokens."""
        return self.kind in ("orpo", "simpo")


def check_preference(how: PreferenceConfig) -> None:
    """Keys that belong to other kinds. Raises :class:`ValueError`."""
    if how.kind != "dpo" and how.loss != "sigmoid":
        raise ValueError("methods.preference.loss: belongs to kind dpo")
    if how.kind in ("orpo", "kto") and how.label_smoothing:
        raise ValueError("methods.preference.label_smoothing: belongs to kind dpo, simpo or cpo")
    if how.loss == "ipo" and how.label_smoothing:
        raise ValueError("methods.preference.label_smoothing: belongs to loss sigmoid")
    if how.kind != "simpo" and how.gamma != 1.0:
        raise ValueError("methods.preference.gamma: belongs to kind simpo")
    if how.kind not in ("simpo", "cpo") and how.nll_weight:
        raise ValueError("methods.preference.nll_weight: belongs to kind simpo or cpo")
    if how.kind != "kto" and (how.desirable_weight, how.undesirable_weight) != (1.0, 1.0):
        raise ValueError("methods.preference.desirable_weight: belongs to kind kto")
