"""Triton operators for fine-tuning, selected by device and proven without one.

Importing this package loads neither torch nor triton: ``select``, ``OPERATORS`` and the hardware tables are plain data,
usable on a login node. The operators themselves are in :mod:`aifactory_train.kernels.ops`.

An operator is a folder; :mod:`registry` finds those of this package and those in the folders that ``AIFACTORY_KERNELS``
names (separated as in ``PATH``), which are importable below this package as if they lay in it. Python in such a folder
is run, as with ``PYTHONPATH``.
"""

import os

__path__ += [os.path.abspath(p) for p in os.environ.get("AIFACTORY_KERNELS", "").split(os.pathsep) if p]

from aifactory_train.kernels.registry import OPERATORS, Selection, select  # noqa: E402

__all__ = ["OPERATORS", "Selection", "select"]
