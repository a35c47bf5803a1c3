"""This machine as a system, for runs that start right here: what is known without asking torch or a driver."""

from __future__ import annotations

import platform
from datetime import date

from aifactory_train.sites.profiles import System


def this_machine() -> System:
    """A profile with no scheduler and no limits; the number of GPUs is counted when the job's shape is made."""
    isa = platform.machine().lower()
    return System.model_validate(
        {
            "schema": 1,
            "id": "local",
            "name": "this machine",
            "status": "usable",
            "operator": "you",
            "maintainer": "nobody",
            "expires": date(9999, 12, 31),
            "scheduler": {"kind": "none"},
            "node": {"isa": isa if isa in ("x86_64", "aarch64") else None},
            "internet": {"compute": "full"},
        }
    )
