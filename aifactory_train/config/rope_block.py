"""The recipe's ``model.rope_scaling``: rotary positions beyond those that the base was trained on."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from aifactory_train.config.strict import Strict

#: Keys that only one kind has, with its name for them in a transformers configuration being the same.
OF_KIND = {
    "low_freq_factor": "llama3",
    "high_freq_factor": "llama3",
    "beta_fast": "yarn",
    "beta_slow": "yarn",
    "attention_factor": "yarn",
}


class RopeScalingConfig(Strict):
    """How rotary positions are stretched; the base's own length is ``max_position_embeddings`` of its configuration."""

    kind: Literal["linear", "dynamic", "yarn", "llama3"] = Field(
        description="dynamic (NTK): stretches only in generation, data.sequence_length stays within the base's length."
    )
    factor: float = Field(gt=1, description="The new length over the base's own.")
    low_freq_factor: float | None = Field(None, gt=0, description="llama3 only; null: 1.")
    high_freq_factor: float | None = Field(None, gt=0, description="llama3 only; null: 4.")
    beta_fast: float | None = Field(None, gt=0, description="yarn only; null: 32.")
    beta_slow: float | None = Field(None, gt=0, description="yarn only; null: 1.")
    attention_factor: float | None = Field(None, gt=0, description="yarn only; null: 0.1 ln(factor) + 1.")

    @model_validator(mode="after")
    def _of_its_kind(self) -> RopeScalingConfig:
        for key, kind in OF_KIND.items():
            if getattr(self, key) is not None and self.kind != kind:
                raise ValueError(f"{key} belongs to kind {kind}, not {self.kind}")
        low, high = self.low_freq_factor or 1.0, self.high_freq_factor or 4.0
        if self.kind == "llama3" and low >= high:
            raise ValueError(f"low_freq_factor {low:g} must be less than high_freq_factor {high:g}")
        slow, fast = self.beta_slow or 1.0, self.beta_fast or 32.0
        if self.kind == "yarn" and slow >= fast:
            raise ValueError(f"beta_slow {slow:g} must be less than beta_fast {fast:g}")
        return self

    def parameters(self, original: int) -> dict[str, Any]:
        """As transformers' ``rope_parameters`` say it, for a base of ``original`` positions."""
        found: dict[str, Any] = {"rope_type": self.kind, "factor": self.factor}
        if self.kind == "llama3":
            found |= {"low_freq_factor": self.low_freq_factor or 1.0, "high_freq_factor": self.high_freq_factor or 4.0}
        if self.kind == "yarn":
            keys = ("beta_fast", "beta_slow", "attention_factor")
            found |= {key: value for key in keys if (value := getattr(self, key)) is not None}
        if self.kind in ("llama3", "yarn"):
            found["original_max_position_embeddings"] = original
        return found

    def positions(self, original: int) -> int:
        """Positions that a model of ``original`` ones can be trained on with it."""
        return original if self.kind == "dynamic" else int(original * self.factor)
