"""Launch parameters, configuration space, chunk size and traffic of the chunked linear cross-entropy."""

from aifactory_train.kernels import hardware
from aifactory_train.kernels.cross_entropy.space import MODULE, VOCABULARIES, constexprs, fused_arguments, row_space
from aifactory_train.kernels.spec import ITEMSIZE, Kernel, Operator, Shape, cdiv

#: logits that a CPU keeps in its last-level cache between the softmax and the gradient GEMMs
CPU_LOGITS = 1 << 23


def chunk_rows(arch: str, sku: str | None, rows: int, vocab: int) -> int:
    """Rows of one chunk: the machine's balance on a GPU (:func:`hardware.chunk_rows`), cache size on a CPU; chunks of
    equal size.
    """
    most = max(64, min(4096, CPU_LOGITS // vocab)) if arch == "cpu" else hardware.chunk_rows(hardware.sku(sku, arch))
    return max(1, cdiv(rows, cdiv(max(1, rows), most)))


def floor(direction: str, dtype: str, shape: Shape) -> int:
    """Softmax part of one chunk: logits read once and overwritten with their gradient; bytes. The GEMMs are the
    vendor's.
    """
    return 2 * ITEMSIZE[dtype] * shape["rows"] * shape["vocab"]


def inputs(make, shape: Shape) -> tuple:
    n, h, v = shape["rows"], shape["hidden"], shape["vocab"]
    return make.normal(n, h), make.normal(v, h, scale=h**-0.5), make.labels(n, classes=v)


#: hidden size for which bytes are counted: the GEMMs over it are the vendor's and not part of the count
SHRINK = {"hidden": 8}
KERNELS = (
    Kernel(
        "linear_cross_entropy_fwd", "forward", f"{MODULE}:ce_fwd_bwd", fused_arguments, constexprs, row_space, "vocab"
    ),
)
CHECKS = tuple({"rows": 4095, "hidden": 4096, "vocab": v} for v in VOCABULARIES)
OPERATOR = Operator(
    "linear_cross_entropy", ("rows", "hidden", "vocab"), KERNELS, floor, CHECKS, inputs, pointwise=False,
    counted=("forward",), shrink=SHRINK, eager=False,
    note="loss and gradient of a chunk in one kernel; forward only, backward scales what forward computed",
)  # fmt: skip
