"""Every test here runs Triton kernels on CPU tensors, with conversions made exact."""

import pytest
import torch

from aifactory_train.kernels import runtime
from aifactory_train.kernels.workbench import interpreter


@pytest.fixture(autouse=True)
def interpreted():
    """Kernels run in the interpreter with the configurations of an H100; random numbers start from the same seed."""
    torch.manual_seed(0)
    interpreter.exact()
    interpreter.quick()
    with runtime.interpret("sm_90", "H100-80"):
        yield
