"""The environment of a process that checks an export: by itself, and without network."""

from __future__ import annotations

import os

#: Beginnings of what launchers set: with them, libraries of a child would look for the other ranks.
_LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "MASTER_",
    "GROUP_",
    "ROLE_",
    "TORCHELASTIC_",
    "OMPI_",
    "PMI_",
    "PMIX_",
    "SLURM_",
)


def environment(*without: str, **more: str) -> dict[str, str]:
    """This process's variables without a launcher's and without those that begin with one of ``leave_out``; the hub
    switched off; then ``more``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith((*_LAUNCHERS, *without))}
    return {**kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **more}
