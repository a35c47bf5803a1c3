"""Held-out figures: likelihood, answers, memorisation, general text."""
