"""What was chosen for the model and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass
class ModelReport:
    """What was chosen for the model and why; printed at start and stored in ``run.yaml``'s companion."""

    lines: list[tuple[str, str, str]] = field(default_factory=list)  # (what, choice, why)
    parameters: int = 0
    trainable: int = 0

    def add(self, what: str, choice: str, why: str = "") -> None:
        self.lines.append((what, choice, why))
