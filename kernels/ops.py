"""The operators as callables. Importing this module registers them with torch (``torch.ops.aifactory``) and their
sharding rules.

Each folder's ``op.py`` says in ``__all__`` what it offers; all of that is here.
"""

from typing import Any

from aifactory_train.kernels import dtensor
from aifactory_train.kernels.registry import OPERATORS, part

__all__: list[str] = []


def _gather() -> None:
    for name in OPERATORS:
        module = part(name, "op")
        if module is None or name not in getattr(module, "__all__", ()):
            raise ImportError(f"operator {name}: {name}/op.py must define {name} and name it in __all__")
        for public in module.__all__:
            if public in globals():
                raise ImportError(f"{public} is offered by {name} and by another operator")
            globals()[public] = getattr(module, public)
            __all__.append(public)


def __getattr__(name: str) -> Any:
    raise AttributeError(f"no operator offers {name!r}: known are {', '.join(sorted(__all__))}")


_gather()
dtensor.register()
