"""Launch parameters, configuration space and traffic of 8-bit AdamW."""

from aifactory_train.kernels.spec import ITEMSIZE, Config, Kernel, Operator, Shape


def arguments(dtype: str, shape: Shape) -> dict:
    p = "*" + dtype
    return {
        "P": p, "G": p, "M": "*i8", "V": "*u8", "SM": "*fp32", "SV": "*fp32", "n": shape["numel"],
        **dict.fromkeys(("lr", "beta1", "beta2", "eps", "decay", "bias1", "bias2"), "fp32"), "seed": 12345,
    }  # fmt: skip


def constexprs(config: Config, dtype: str, shape: Shape) -> dict:
    return {"STOCHASTIC": False, "GROUPS": config["groups"]}


def space(target, dtype: str, shape: Shape):
    """16 elements a lane, so that even the one-byte codes are loaded 16 bytes wide."""
    for groups in (4, 8, 16, 32):
        for warps in (1, 2, 4, 8):
            if groups * 256 // (warps * target.wave) in (8, 16):
                yield {"groups": groups, "num_warps": warps, "num_stages": 1}


def floor(direction: str, dtype: str, shape: Shape) -> int:
    """Parameter and both codes read and written, gradient read, two fp32 scales a block of 256 read and written;
    bytes.
    """
    n = shape["numel"]
    return 3 * ITEMSIZE[dtype] * n + 4 * n + 16 * n // 256


def inputs(make, shape: Shape) -> tuple:
    """Parameter, gradient and the zero state of a first step."""
    from aifactory_train.kernels.adamw8bit.reference import new_state

    param = make.fixed(shape["numel"])
    return param, make.fixed(shape["numel"]), new_state(param)


KERNELS = (
    Kernel(
        "adamw8bit_step",
        "forward",
        "adamw8bit.triton_kernels:adamw8bit_step",
        arguments,
        constexprs,
        space,
        "numel",
        inputs=4,
        tile=lambda constants: 256 * constants["GROUPS"],
    ),
)
CHECKS = ({"numel": 4096 * 4096}, {"numel": 8192 * 28672})
OPERATOR = Operator(
    "adamw8bit", ("numel",), KERNELS, floor, CHECKS, inputs, note="an update in place; it has no backward",
    options={"step": 1, "lr": 1e-3}, counted=("forward",), flops=20, eager=False,
)  # fmt: skip
