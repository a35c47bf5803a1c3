"""Whose model is it? The one-third test of the Commission's Guidelines (C(2025) 7719, points 17-18 and 59-61), with its
reasoning.

Two tests are printed, because the first one is about modifying a general-purpose model only: (1) did the modifications
use more than a third of the base model's training compute; (2) if the base is below the indicator for a general-purpose
model, does base plus modifications cross it. Whether modifications by one party add up is not settled, so the sum over
the lineage is shown beside this run alone. Evidence, not legal advice.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent / "data"

GPAI_FLOP = 1e23  # indicator for a general-purpose model, Guidelines point 17
SYSTEMIC_FLOP = 1e25  # presumption of systemic risk, Art. 51(2)
SHARE = 1 / 3  # Guidelines point 60
WARN_AT = 0.1  # of the threshold


@dataclass(frozen=True)
class Base:
    """Training compute of a base model. ``flop`` None: unknown; ``source`` says where it comes from."""

    name: str
    flop: float | None
    source: str
    systemic: bool = False


@functools.cache
def table() -> list[dict[str, Any]]:
    return json.loads((DATA / "pretraining.json").read_text(encoding="utf-8"))["models"]


def base_of(model_id: str, override: float | None = None) -> Base:
    """Training compute of a base model by its id, from the shipped table or the user's own figure."""
    if override is not None:
        return Base(model_id, float(override), "given by the user (record.base_flop)", override > SYSTEMIC_FLOP)
    short = model_id.lower().replace("_", "-")
    for row in table():
        if model_id in row["ids"] or any(alias in short for alias in row.get("aliases", ())):
            flop = 6 * row["parameters"] * row["tokens"]
            source = (
                f"6 x {row['parameters']:.4g} parameters x {row['tokens']:.3g} tokens (tokens: {row['token_source']})"
            )
            if row.get("note"):
                source += f"; {row['note']}"
            return Base(row["name"], flop, source, flop > SYSTEMIC_FLOP)
    return Base(model_id, None, "not in the table of base models; give record.base_flop if its provider publishes it")


def threshold(base: Base) -> tuple[float, str]:
    """FLOP above which a modification counts as significant, and the point of the Guidelines that says so."""
    if base.flop is not None:
        return base.flop * SHARE, "pt60"
    return (SYSTEMIC_FLOP if base.systemic else GPAI_FLOP) * SHARE, "pt61"


def verdict(base: Base, this_run: float, earlier: float = 0.0) -> dict[str, Any]:
    """The record's ``aiact`` section. ``this_run`` and ``earlier``: model FLOP of this run and of the runs it started
    from.
    """
    limit, rule = threshold(base)
    lineage = this_run + earlier
    base_is_gpai = None if base.flop is None else base.flop > GPAI_FLOP
    over_third = lineage > limit
    crosses = base.flop is not None and not base_is_gpai and base.flop + lineage > GPAI_FLOP
    provider = crosses if base_is_gpai is False else over_third
    known = (
        f"The base model {base.name} took {base.flop:.2g} FLOP to train ({base.source})"
        if base.flop is not None
        else f"The training compute of the base model {base.name} is unknown ({base.source})"
    )
    lines = [known + "."]
    lines.append(
        f"This run used {this_run:.2g} FLOP"
        + (f", the runs it started from {earlier:.2g}, together {lineage:.2g}" if earlier else "")
        + f": {lineage / limit:.2g} of the threshold of {limit:.2g} FLOP "
        + (
            "(a third of the base model's, point 60)."
            if rule == "pt60"
            else f"(a third of {SYSTEMIC_FLOP if base.systemic else GPAI_FLOP:.0e}, point 61, because the base's is "
            f"unknown)."
        )
    )
    if base.flop is not None and not base_is_gpai:
        lines.append(
            f"The base is below {GPAI_FLOP:.0e} FLOP, the indicator for a general-purpose model (point 17), so the "
            f"one-third "
            f"rule does not apply to it; what counts is whether base and modifications together cross the indicator: "
            f"{base.flop + lineage:.2g} FLOP, which {'does' if crosses else 'does not'}."
        )
    elif base_is_gpai is None:
        lines.append("Whether the base is a general-purpose model is for its provider to say.")
    if provider:
        lines.append(
            "By this indicator the modifier may have become the provider of the modified model. Take legal advice."
        )
    else:
        lines.append(
            "By this indicator the modifier does not become a provider of a general-purpose model. Using the model in "
            "a "
            "product has duties of its own (Articles 25 and 50)."
        )
    if not provider and lineage > WARN_AT * limit:
        lines.append(f"The sum is above {WARN_AT:.0%} of the threshold: later modifications may cross it.")
    return {
        "base": base.name,
        "original_flop": base.flop,
        "original_flop_source": base.source,
        "modification_flop_this": this_run,
        "modification_flop_lineage": lineage,
        "ratio_this": None if base.flop is None else this_run / base.flop,
        "ratio_lineage": None if base.flop is None else lineage / base.flop,
        "threshold_flop": limit,
        "share_of_threshold": lineage / limit,
        "rule": rule,
        "base_is_gpai": base_is_gpai,
        "over_one_third": over_third,
        "base_and_modifications_cross_gpai": crosses,
        "provider_flag": provider,
        "gpai_flag": bool(base_is_gpai) or crosses,
        "reasoning": " ".join(lines),
        "not_legal_advice": True,
    }


def bin_parameters(count: float) -> str:
    """The size bin that downstream providers are told (Model Documentation Form, 2.7)."""
    edges = [
        (5e8, "1-500M"),
        (5e9, "500M-5B"),
        (1.5e10, "5-15B"),
        (5e10, "15-50B"),
        (1e11, "50-100B"),
        (5e11, "100-500B"),
    ]
    for edge, name in [*edges, (1e12, "500B-1T")]:
        if count <= edge:
            return name
    return ">1T"


def bin_tokens(tokens: float) -> str:
    """Size bin of text in the public summary (1.3)."""
    if tokens < 1e9:
        return "Less than 1 billion tokens"
    return "1 billion to 10 trillion tokens" if tokens <= 1e13 else "More than 10 trillion tokens"


def bin_months(days: float) -> str:
    """Training time for national authorities (form, 7.1)."""
    months = days / 30.4375
    return "<1 month" if months < 1 else "1-3 months" if months <= 3 else "3-6 months" if months <= 6 else ">6 months"
