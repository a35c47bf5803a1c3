"""What would have the host wait for the device, counted on a CPU."""

from __future__ import annotations

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

#: Operators whose result the host must have before it goes on.
ASKING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_consecutive"}


class ReadBacks(TorchDispatchMode):
    """Counts, by name, what would have the host wait for the device: within it, tensors are taken for a device's, but
    for numbers of the type ``host``."""

    def __init__(self, host: torch.dtype | None = None) -> None:
        super().__init__()
        self.host = host
        self.found: Counter[str] = Counter()
        self._copies = _Copies(self.found)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name in ASKING and args[0].dtype != self.host:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *exc):
        super().__exit__(*exc)
        self._copies.__exit__(*exc)


class _Copies(TorchFunctionMode):
    def __init__(self, found: Counter[str]):
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("tolist", "cpu", "numpy"):
            self.found[function.__name__] += 1
        return function(*args, **(kwargs or {}))
