"""One rank of several on the meta device: a process group whose collectives go nowhere, and FSDP2 told that meta
tensors lie on a device with streams. What a collective would move is booked by the recorder as it is called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from aifactory_train.audit.pretend import replaced


@contextlib.contextmanager
def sharding(world: int) -> Iterator[None]:
    """Within it :class:`aifactory_train.parallel.fsdp.FSDPEngine` can be built and run for rank 0 of ``world``."""
    import torch
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group, _fsdp_state, _fully_shard

    from aifactory_train.parallel import fsdp
    from aifactory_train.planning.verify_sharding import fake_world

    def mesh_of_the_host(device: str, dims: Any, *, copies: bool) -> Any:
        return build_mesh("cpu", dims, copies=copies)

    build_mesh = fsdp.build_mesh
    patches: list[tuple[Any, str, Any]] = [
        (fsdp, "build_mesh", mesh_of_the_host),
        (_fully_shard, "_get_device_from_mesh", lambda mesh: torch.device("meta")),
        (_fsdp_param_group.FSDPParamGroup, "_validate_no_meta_params", lambda group: None),
        # the host's streams do nothing
        *((m, "_get_device_handle", lambda *_: torch.cpu) for m in (_fsdp_collectives, _fsdp_param_group, _fsdp_state)),
    ]
    with contextlib.ExitStack() as stack:
        for place, name, value in patches:
            if hasattr(place, name):
                stack.enter_context(replaced(place, name, value))
        stack.enter_context(fake_world(world))
        yield
