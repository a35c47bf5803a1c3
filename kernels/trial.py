"""The smallest kernel, to find out whether Triton works on this process's GPU: at its first launch it builds a helper
in C, for which an image may lack the compiler or Python's headers.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _one(x_ptr):
    tl.store(x_ptr, 1.0)


def run(device: torch.device) -> None:
    """Raises whatever keeps Triton from running on ``device``."""
    x = torch.zeros(1, device=device)
    _one[(1,)](x)
    if x.item() != 1.0:
        raise RuntimeError("a kernel ran and wrote nothing")
