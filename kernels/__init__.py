"""Triton operators for fine-tuning, selected by device and proven without one.

Importing this package loads neither torch nor triton: ``select``, ``OPERATORS`` and the hardware tables are plain data, usable on a
login node. The operators themselves are in :mod:`aifactory_train.kernels.ops`.
"""

from aifactory_train.kernels.registry import OPERATORS, Selection, select

__all__ = ["OPERATORS", "Selection", "select"]
