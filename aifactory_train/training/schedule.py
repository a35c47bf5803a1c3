"""The learning rate of each step."""

from __future__ import annotations

import math

from aifactory_train.config.schema import TrainConfig


def learning_rate(step: int, total: int, settings: TrainConfig) -> float:
    """The rate of optimizer step ``step`` (from 0) of ``total``: linear warm-up, then the schedule.

    The first step of a warm-up of W steps runs at 1/W of the peak, never at zero; the last step of cosine and linear
    runs just above ``min_lr_ratio`` times the peak.
    """
    peak = settings.learning_rate
    warmup = settings.warmup_steps if settings.warmup_steps is not None else math.ceil(total * settings.warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.schedule == "constant":
        return peak
    floor = settings.min_lr_ratio
    done = (step - warmup) / max(1, total - warmup)
    if settings.schedule == "wsd":
        start = 1.0 - settings.decay_ratio
        if done < start:
            return peak
        return peak * (floor + (1 - floor) * (1 - (done - start) / settings.decay_ratio))
    if settings.schedule == "linear":
        return peak * (floor + (1 - floor) * (1 - done))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def remarks(total: int, settings: TrainConfig) -> list[tuple[str, str, str]]:
    """``(what, choice, why)`` of what a run of ``total`` steps never comes to."""
    lines = []
    if (settings.warmup_steps or 0) > total:
        why = f"train.warmup_steps {settings.warmup_steps} are more than the run's {total} steps"
        lines.append(("learning rate", f"stays below {settings.learning_rate:g}", why))
    if settings.average is not None and settings.average.start_step >= total:
        why = f"train.average.start_step {settings.average.start_step} is not before the last of {total} steps"
        lines.append(("mean of the weights", "the last step's weights", why))
    return lines
