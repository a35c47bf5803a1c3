"""Figures as people read them."""

from __future__ import annotations


def significant(value: float, digits: int = 2) -> str:
    """``value`` to so many significant figures, in plain or scientific notation."""
    if value == 0:
        return "0"
    text = f"{value:.{digits - 1}e}"
    return f"{float(text):g}" if 1e-4 <= abs(value) < 1e6 else text
