"""Options that several commands share."""

from __future__ import annotations

import argparse


def add_overrides(parser: argparse._ActionsContainer, what: str = "change one value of the recipe; repeatable") -> None:
    """``--set A.B=C``, as the list ``overrides``."""
    parser.add_argument("--set", metavar="A.B=C", dest="overrides", action="append", default=[], help=what)


def add_size(parser: argparse._ActionsContainer) -> None:
    """What a plan cannot read by itself: ``--tokens``, ``--model-config``."""
    parser.add_argument(
        "--tokens", metavar="N", type=float, help="tokens of one epoch; default: from the prepared data"
    )
    parser.add_argument("--model-config", metavar="FILE", help="config.json of a base whose dimensions are not shipped")
