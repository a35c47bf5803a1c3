"""What each Triton kernel reads and writes: one table, an entry a kernel, a word an argument.

``r`` the tensor is read once, ``w`` written once, ``rw`` both; what a launch touches of a tensor is all that it was
given of it (a view counts as the view). Distinct addresses count, loads and stores apart, as in ``kernels traffic``:
what a second pass reads again comes from the cache. A word may carry a share (``r/2``: half of it) and a condition
(``r?HAS_RES``: only where that argument is true). An argument that has no word is no tensor, or not touched.

A kernel without an entry is refused by name: a launch that nobody counts would make every sum wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

#: Kernels of this project, by the name of their function.
OURS: dict[str, dict[str, str]] = {
    "adamw8bit_step": {"P": "rw", "G": "r", "M": "rw", "V": "rw", "SM": "rw", "SV": "rw"},
    "attention_fwd": {
        "Q": "r", "K": "r", "V": "r", "SINKS": "r?SINK", "SLOPE": "r?SLOPES", "CU": "r", "OUT": "w", "LSE": "w",
    },
    "attention_delta": {"OUT": "r", "DO": "r", "DELTA": "w"},
    "attention_bwd_q": {
        "Q": "r", "K": "r", "V": "r", "SLOPE": "r?SLOPES", "CU": "r", "DO": "r", "LSE": "r", "DELTA": "r", "DQ": "w",
    },
    "attention_bwd_kv": {
        "Q": "r", "K": "r", "V": "r", "SLOPE": "r?SLOPES", "CU": "r", "DO": "r", "LSE": "r", "DELTA": "r", "DK": "w",
        "DV": "w",
    },
    "ce_fwd": {"X": "r", "L": "r", "LOSS": "w", "LSE": "w"},
    "ce_bwd": {"G": "r", "X": "r", "L": "r", "LSE": "r", "DX": "w"},
    "ce_fwd_bwd": {"X": "rw", "L": "r", "LOSS": "w"},
    "glu_fwd": {"A": "r", "B": "r", "C": "w"},
    "glu_bwd": {"DC": "r", "A": "r", "B": "r", "DA": "w", "DB": "w"},
    "grouped_mm": {
        "X": "r", "W": "r", "OFF": "r", "BIAS": "r?HAS_BIAS", "T": "r?LORA", "B": "r?LORA", "Y": "w",
    },
    "grouped_outer": {"A": "r", "C": "r", "OFF": "r", "OUT": "w"},
    "layer_norm_fwd": {"X": "r", "W": "r?HAS_W", "B": "r?HAS_B", "Y": "w", "M": "w", "R": "w"},
    "layer_norm_bwd": {
        "DY": "r", "X": "r", "W": "r?HAS_W", "M": "r", "R": "r", "DX": "w", "P": "w?SUMS",
    },
    "lora_epilogue": {"Y": "rw", "T": "r", "B": "r"},
    "rms_norm_fwd": {"X": "r", "RES": "r?HAS_RES", "W": "r?HAS_W", "Y": "w", "S": "w?HAS_RES", "R": "w"},
    "rms_norm_bwd": {"DY": "r", "DS": "r?HAS_DS", "X": "r", "W": "r?HAS_W", "R": "r", "DX": "w", "P": "w?HAS_W"},
    # both halves of a rotary table are equal: the first is read
    "rope_fwd": {
        "Q": "r", "K": "r", "COS": "r/2", "SIN": "r/2", "QW": "r?HAS_NORM", "KW": "r?HAS_NORM", "QO": "w", "KO": "w",
    },
    "rope_norm_bwd": {
        "DQO": "r", "DKO": "r", "Q": "r", "K": "r", "COS": "r/2", "SIN": "r/2", "QW": "r", "KW": "r", "DQ": "w",
        "DK": "w", "P": "w",
    },
    "column_sum": {"P": "r", "OUT": "w"},
}  # fmt: skip

#: Kernels of liger-kernel 0.8, which ``benchmarks/step_audit.py`` counts beside ours.
THEIRS: dict[str, dict[str, str]] = {
    "_rms_norm_forward_kernel": {"Y_ptr": "w", "X_ptr": "r", "W_ptr": "r?elementwise_affine", "RSTD_ptr": "w"},
    "_block_rms_norm_forward_kernel": {"Y_ptr": "w", "X_ptr": "r", "W_ptr": "r?elementwise_affine", "RSTD_ptr": "w"},
    "_rms_norm_backward_kernel": {
        "dY_ptr": "r", "dX_ptr": "w", "X_ptr": "r", "W_ptr": "r?elementwise_affine", "RSTD_ptr": "r",
        "dW_ptr": "w?COMPUTE_DW",
    },
    "_block_rms_norm_backward_kernel": {
        "dY_ptr": "r", "dX_ptr": "w", "X_ptr": "r", "W_ptr": "r?elementwise_affine", "RSTD_ptr": "r",
        "dW_ptr": "w?COMPUTE_DW",
    },
    "_triton_rope": {"q_ptr": "rw", "k_ptr": "rw", "cos": "r/2", "sin": "r/2"},
    "_swiglu_forward_kernel": {"a_ptr": "r", "b_ptr": "r", "c_ptr": "w"},
    "_swiglu_forward_kernel_tiled": {"a_ptr": "r", "b_ptr": "r", "c_ptr": "w"},
    "_swiglu_backward_kernel": {"dc_ptr": "r", "a_ptr": "rw", "b_ptr": "rw"},
    "_swiglu_backward_kernel_tiled": {"dc_ptr": "r", "a_ptr": "rw", "b_ptr": "rw"},
    "liger_cross_entropy_kernel": {
        "X_ptr": "rw", "Y_ptr": "r", "weight_ptr": "r?HAS_WEIGHT", "loss_ptr": "w", "z_loss_ptr": "w?RETURN_Z_LOSS",
        "token_accuracy_ptr": "w?RETURN_TOKEN_ACCURACY", "predicted_tokens_ptr": "w?RETURN_PREDICTED_TOKENS",
    },
    "element_mul_kernel": {"X_ptr": "rw", "grad_output_ptr": "r"},
}  # fmt: skip

TABLE = OURS | THEIRS


def _pairs(a: Mapping[str, Any]) -> int:
    """Queries times keys that they see, over all heads; a launch knows how many documents there are, not how long each
    is: equal ones are counted."""
    rows, documents = int(a["rows"]), a["CU"].numel() - 1
    longest = max(1, rows // max(1, documents))
    reach = min([longest, *(int(a[size]) for size, used in (("window", "WINDOW"), ("chunk", "CHUNK")) if a[used])])
    return int(a["Q"].shape[1]) * rows * reach // (2 if reach == longest else 1)


#: Floating-point operations of the kernels that multiply matrices; of the others they are not counted, nor are those
#: of torch's pointwise operators.
PRODUCTS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "attention_fwd": lambda a: 2 * _pairs(a) * (int(a["dim"]) + int(a["vdim"])),
    "attention_bwd_q": lambda a: 2 * _pairs(a) * (2 * int(a["dim"]) + int(a["vdim"])),
    "attention_bwd_kv": lambda a: 4 * _pairs(a) * (int(a["dim"]) + int(a["vdim"])),
    "grouped_mm": lambda a: 2 * len(a["X"]) * int(a["N"]) * (int(a["K"]) + (int(a["R"]) if a["LORA"] else 0)),
    "grouped_outer": lambda a: 2 * len(a["A"]) * int(a["M"]) * int(a["N"]),
    "lora_epilogue": lambda a: 2 * int(a["M"]) * int(a["N"]) * int(a["R"]),
}


def entry(kernel: str) -> dict[str, str]:
    """The words of a kernel's arguments. Raises ``KeyError`` that names a kernel which has no entry."""
    try:
        return TABLE[kernel]
    except KeyError:
        raise KeyError(
            f"the Triton kernel '{kernel}' has no entry in aifactory_train/audit/traffic.py: what it reads and writes "
            f"must be said there, or no sum of a step that launches it is right"
        ) from None


def moved(kernel: str, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """``(bytes read, bytes written)`` by one launch; ``arguments`` by name, tensors and constants."""
    read = written = 0
    for name, word in entry(kernel).items():
        how, _, condition = word.partition("?")
        if condition and not arguments[condition]:
            continue
        how, _, part = how.partition("/")
        tensor = arguments[name]
        shape = zip(tensor.shape, tensor.stride(), strict=True)
        distinct = math.prod(n for n, stride in shape if stride or n == 0)
        size = distinct * tensor.element_size() // int(part or 1)
        read += size * ("r" in how)
        written += size * ("w" in how)
    return read, written


def products(kernel: str, arguments: Mapping[str, Any]) -> int:
    """Floating-point operations of one launch's matrix products."""
    count = PRODUCTS.get(kernel)
    return count(arguments) if count else 0
