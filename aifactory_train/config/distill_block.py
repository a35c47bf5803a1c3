"""The recipe's ``methods.distill``: a small model that learns from what a larger one thinks of each token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from aifactory_train.config.source_spec import parse
from aifactory_train.config.strict import Strict

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe


class DistillConfig(Strict):
    """Learning from a teacher's stored log-probabilities beside the rows (docs/methods.md)."""

    teacher: str = Field(
        description="Model whose log-probabilities 'aifactory teach' stores; the forms of model.base. Its tokenizer "
        "has the same vocabulary."
    )
    revision: str | None = Field(None, description="Commit, tag or branch of a Hugging Face id.")
    licence: str = Field("unknown", description="SPDX id of the teacher, or 'unknown'.")
    stored: str | None = Field(
        None, description="Folder of the stored log-probabilities; null: in the cache, by teacher, top_k, temperature."
    )
    top_k: int = Field(
        64, ge=1, le=1024, description="Tokens kept at each place; 6 bytes each (4 of a vocabulary up to 65,536) and 4."
    )
    loss: Literal["forward_kl", "reverse_kl", "js"] = Field(
        "forward_kl",
        description="forward_kl: KL(teacher, student); reverse_kl: KL(student, teacher); js: beta x KL(teacher, mix) + "
        "(1 - beta) x KL(student, mix), mix = beta x teacher + (1 - beta) x student (Agarwal et al. 2024, arXiv "
        "2306.13649).",
    )
    beta: float = Field(0.5, gt=0, lt=1, description="js only: the teacher's part of the mixture.")
    temperature: float = Field(
        1.0,
        gt=0,
        le=100,
        description="Divides the logits of both; the divergence is multiplied by its square (Hinton et al. 2015, arXiv "
        "1503.02531). Stored with the log-probabilities: another one needs another pass of the teacher.",
    )
    weight: float = Field(
        0.5, gt=0, le=1, description="loss = weight x divergence + (1 - weight) x supervised loss, per target."
    )


def stored_folder(recipe: Recipe) -> Path:
    """Where the teacher's log-probabilities lie, or are to be written."""
    from aifactory_train.config.loading import cache_dir

    how = recipe.methods.distill
    assert how is not None
    if how.stored is not None:
        return Path(how.stored)
    revision = f"-{how.revision.replace('/', '-')}" if how.revision else ""
    return cache_dir() / "teachers" / f"{parse(how.teacher).key}{revision}-k{how.top_k}-t{how.temperature:g}"


def teacher_recipe(recipe: Recipe) -> Recipe:
    """The recipe with the teacher in place of its model, as it is: nothing adapted, nothing trained."""
    how, found = recipe.methods.distill, recipe.model_copy(deep=True)
    assert how is not None
    from aifactory_train.config.schema import AdapterConfig, MethodsConfig, ModelConfig

    # Object-level writes: each validated assignment would run the rules on a tree that is half changed.
    found.__dict__["model"] = ModelConfig(
        base=how.teacher,
        revision=how.revision,
        licence=how.licence,
        attention=recipe.model.attention,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    found.__dict__["adapter"], found.__dict__["methods"] = AdapterConfig(kind="none"), MethodsConfig()
    return found


def check_distill(recipe: Recipe) -> None:
    """Rules of ``methods.distill`` with other keys. Raises :class:`ValueError`."""
    how = recipe.methods.distill
    assert how is not None
    if how.loss != "js" and how.beta != 0.5:
        raise ValueError("methods.distill.beta: belongs to loss js")
    if recipe.methods.goldfish is not None:
        raise ValueError("methods.goldfish: withholds tokens that a teacher's probabilities would give away")
    if recipe.model.vocabulary is not None:
        raise ValueError("model.vocabulary: a teacher has no probabilities of new tokens")
    if recipe.privacy.profile == "restricted":
        raise ValueError(
            "methods.distill: a teacher's likeliest tokens tell the texts and are stored unencrypted, which "
            "privacy.profile restricted forbids"
        )
