"""The command line with one rank that breaks; started by torchrun.

torchrun struck.py KIND MARKER train RECIPE …      rank 1 strikes when it begins the fourth step, and makes the file
MARKER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from scenarios import FAULTS, at_step


def main() -> int:
    kind, marker = sys.argv[1], Path(sys.argv[2])

    def strike() -> None:
        marker.touch()
        FAULTS[kind]()

    at_step(3, 1, strike)(int(os.environ["RANK"]), None)
    from aifactory_train.cli import main as command_line

    return command_line(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
