"""The command line with a fault in one rank: ``python -m aifactory_train.acceptance.faulty --fault oom|sleep --rank N
--marker FILE -- train ...``. The fault comes in the second step, once; FILE says when."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

AT_STEP = 1


def main(argv: list[str]) -> int:
    """The command's exit code."""
    split = argv.index("--")
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", choices=("oom", "sleep"), required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--marker", type=Path, required=True)
    args = parser.parse_args(argv[:split])
    if int(os.environ["RANK"]) == args.rank:
        {"oom": runs_out, "sleep": stands_still}[args.fault](args.marker)
    from aifactory_train.cli import main as program

    return program(argv[split + 1 :])


def runs_out(marker: Path) -> None:
    """Memory runs out in the forward pass, as torch says it."""
    import torch

    from aifactory_train.training.trainer import Trainer

    whole = Trainer.train_step

    def step(trainer: Any) -> Any:
        if trainer.step == AT_STEP:

            def fail(*given: Any, **more: Any) -> Any:
                marker.write_text("")
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 EiB (on purpose)")

            trainer.engine.forward_backward = fail
        return whole(trainer)

    Trainer.train_step = step  # type: ignore[method-assign, assignment]


def stands_still(marker: Path) -> None:
    """The rank waits for the data of a step, which do not come."""
    from aifactory_train.training.ahead import StepsAhead

    whole = StepsAhead.take

    def take(ahead: Any, number: int, cursor: Any) -> Any:
        if number == AT_STEP:
            ahead.close()
            marker.write_text("")
            ahead._thread = threading.Thread(target=time.sleep, args=(600,), daemon=True)
            ahead._thread.start()
        return whole(ahead, number, cursor)

    StepsAhead.take = take  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
