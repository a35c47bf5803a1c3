"""Faults in profiles, found by machine: schema, provenance, arithmetic, limits, links, dates. Each has a name.

``check_room`` looks at a whole folder (``factories.yaml``, ``gpus.yaml``, ``systems/``), ``check_file`` at one profile.
"""

from aifactory_train.sites.check.faults import FAULTS, CheckReport, Fault
from aifactory_train.sites.check.profile import check_file
from aifactory_train.sites.check.room import (
    check_catalogue,
    check_members,
    check_readiness,
    check_room,
    check_sources,
    guarded,
    index_fresh,
)

__all__ = [
    "FAULTS",
    "Fault",
    "CheckReport",
    "check_catalogue",
    "check_file",
    "check_members",
    "check_readiness",
    "check_room",
    "check_sources",
    "guarded",
    "index_fresh",
]
