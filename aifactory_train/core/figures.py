"""Figures as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def significant(value: float, digits: int = 2) -> str:
    """``value`` to so many significant figures, in plain or scientific notation."""
    if value == 0:
        return "0"
    text = f"{value:.{digits - 1}e}"
    return f"{float(text):g}" if 1e-4 <= abs(value) < 1e6 else text


def measured(value: Any) -> str:
    """A figure to four significant digits; what is no number was not measured."""
    return f"{value:.4g}" if isinstance(value, (int, float)) else "not measured"


#: Held-out figures in the order in which they are shown: what people call them, and which way is better.
FIGURES = {
    "bits_per_byte": ("bits per byte", "less is better"),
    "perplexity": ("perplexity", "less is better"),
    "exact_match": ("exact match", "more is better"),
    "token_f1": ("token F1", "more is better"),
    "accuracy": ("accuracy", "more is better"),
    "micro_f1": ("micro-F1", "more is better"),
    "macro_f1": ("macro-F1", "more is better"),
    "macro_f1_chosen": ("macro-F1 at chosen thresholds", "more is better"),
    "auroc": ("AUROC", "more is better"),
    "calibration_error": ("expected calibration error", "less is better"),
    "calibrated_error": ("the same with the chosen temperature", "less is better"),
    "ndcg_at_10": ("nDCG@10", "more is better"),
    "recall_at_1": ("recall@1", "more is better"),
    "recall_at_10": ("recall@10", "more is better"),
    "chrf": ("chrF", "more is better"),
    "chrf_pp": ("chrF++", "more is better"),
    "rouge_l": ("ROUGE-L", "more is better"),
    "numeric_match": ("numeric match", "more is better"),
    "valid_json": ("valid JSON", "more is better"),
    "valid_xml": ("valid XML", "more is better"),
    "memorisation": ("training rows continued word for word", "less is better"),
    "preference_loss": ("preference loss", "less is better"),
    "reward_accuracy": ("chosen answer has the higher reward", "more is better"),
    "reward_margin": ("reward margin", "more is better"),
    "preference_accuracy": ("chosen answer preferred", "more is better"),
    "preference_margin": ("preference margin in nats", "more is better"),
    "chosen_logp": ("log-probability of good answers in nats", "more is better"),
    "rejected_logp": ("log-probability of bad answers in nats", "less is better"),
}


def duration(seconds: float) -> str:
    """``0m45s``, ``12m00s``, ``3h30m``"""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def certainty(change: Mapping[str, Any]) -> str:
    """What the interval of a change says of it: ``better``, ``worse``, or ``undecided`` where it holds zero."""
    better = change.get("better")
    return "undecided" if better is None else "better" if better else "worse"
