"""Our kernels and Liger's, cross-compiled the same way at the same shapes: registers, spills, load width, bytes, side
by side.

No GPU is needed and nothing is timed. Both go through ``kernels/workbench/compile.py`` with the hints that Triton's JIT
would derive from the same launch; Liger's launch parameters are its own (``calculate_settings``, with 16 instead of 32
warps on AMD for its widest blocks). Liger's backward kernels write over their inputs, so its bytes are derived from
what its kernels load and store (formulas below); ours are counted by ``aifactory kernels traffic``. Usage:

    python benchmarks/kernels_vs_liger.py [--target sm_90 --target gfx942] [--json FILE] [--strict]

``--strict`` ends with 1 when ours spills anywhere or theirs has fewer spills. Needs liger-kernel (pip install --no-deps
liger-kernel==0.8.5).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib import metadata

os.environ["TRITON_INTERPRET"] = "0"

import triton
import triton.language as tl

from aifactory_train.kernels import hardware, registry
from aifactory_train.kernels.workbench import check
from aifactory_train.kernels.workbench import compile as compiler

TYPES = {"bf16": tl.bfloat16, "fp32": tl.float32}
HIDDEN = (2048, 4096, 5120, 8192, 16384)
WIDTHS = (4096, 14336, 28672)
VOCABULARIES = (32000, 128256, 151936, 262144)
UNITS = 132


def settings(n: int, amd: bool) -> tuple[int, int]:
    """Block and warps that Liger's ``calculate_settings`` gives on a device of that vendor."""
    block = triton.next_power_of_2(n)
    warps = (16 if amd else 32) if block >= 32768 else 16 if block >= 8192 else 8 if block >= 2048 else 4
    return block, warps


def liger_cases(dtype: str, amd: bool):
    """(operator, direction, size, function, run-time arguments, constants, warps) of every Liger kernel that has one of
    ours beside it.
    """
    from liger_kernel.ops import cross_entropy, fused_add_rms_norm, geglu, layer_norm, rms_norm, swiglu

    p, f = "*" + dtype, "*fp32"
    stat = p  # LayerNorm keeps mean and 1/std in the activations' type, RMSNorm (llama casting) in fp32
    for h in HIDDEN:
        block, warps = settings(h, amd)
        common = {"BLOCK_SIZE": block}
        rows_each = -(-8191 // UNITS)
        yield (
            "rms_norm",
            "forward",
            h,
            rms_norm._rms_norm_forward_kernel,
            {
                "Y_ptr": p,
                "Y_row_stride": h,
                "X_ptr": p,
                "X_row_stride": h,
                "W_ptr": p,
                "W_row_stride": 1,
                "RSTD_ptr": f,
                "RSTD_row_stride": 1,
                "n_cols": h,
                "eps": "fp32",
                "offset": "fp32",
            },
            common | {"casting_mode": 0, "elementwise_affine": True},
            warps,
        )
        yield (
            "rms_norm",
            "backward",
            h,
            rms_norm._rms_norm_backward_kernel,
            {
                "dY_ptr": p,
                "dY_row_stride": h,
                "dX_ptr": p,
                "dX_row_stride": h,
                "X_ptr": p,
                "X_row_stride": h,
                "W_ptr": p,
                "W_row_stride": 1,
                "RSTD_ptr": f,
                "RSTD_row_stride": 1,
                "dW_ptr": f,
                "dW_row_stride": h,
                "n_rows": 8191,
                "n_cols": h,
                "offset": "fp32",
                "rows_per_program": rows_each,
            },
            common | {"X_dtype": TYPES[dtype], "casting_mode": 0, "elementwise_affine": True, "COMPUTE_DW": True},
            warps,
        )
        yield (
            "rms_norm_residual",
            "forward",
            h,
            fused_add_rms_norm._fused_add_rms_norm_forward_kernel,
            {
                "Y_ptr": p,
                "Y_row_stride": h,
                "S_ptr": p,
                "S_row_stride": h,
                "X_ptr": p,
                "X_row_stride": h,
                "R_ptr": p,
                "R_row_stride": h,
                "W_ptr": p,
                "W_row_stride": 1,
                "RSTD_ptr": f,
                "RSTD_row_stride": 1,
                "n_cols": h,
                "eps": "fp32",
                "offset": "fp32",
            },
            common | {"casting_mode": 0},
            warps,
        )
        yield (
            "rms_norm_residual",
            "backward",
            h,
            fused_add_rms_norm._fused_add_rms_norm_backward_kernel,
            {
                "dY_ptr": p,
                "dY_row_stride": h,
                "dS_out_ptr": p,
                "dS_out_row_stride": h,
                "dX_ptr": p,
                "dX_row_stride": h,
                "X_ptr": p,
                "X_row_stride": h,
                "W_ptr": p,
                "W_row_stride": 1,
                "RSTD_ptr": f,
                "RSTD_row_stride": 1,
                "dW_ptr": f,
                "dW_row_stride": h,
                "n_rows": 8191,
                "n_cols": h,
                "offset": "fp32",
            },
            common
            | {
                "X_dtype": TYPES[dtype],
                "casting_mode": 0,
                "has_dS_out": True,
                "rows_per_program": rows_each,
                "COMPUTE_DW": True,
            },
            warps,
        )
        yield (
            "layer_norm",
            "forward",
            h,
            layer_norm._layer_norm_forward_kernel,
            {
                "Y_ptr": p,
                "Y_row_stride": h,
                "X_ptr": p,
                "X_row_stride": h,
                "W_ptr": p,
                "W_row_stride": 1,
                "B_ptr": p,
                "B_row_stride": 1,
                "Mean_ptr": stat,
                "Mean_row_stride": 1,
                "RSTD_ptr": stat,
                "RSTD_row_stride": 1,
                "n_cols": h,
                "eps": "fp32",
            },
            common,
            warps,
        )
        yield (
            "layer_norm",
            "backward",
            h,
            layer_norm._layer_norm_backward_kernel,
            {
                "X_ptr": p,
                "stride_x": h,
                "W_ptr": p,
                "Mean_ptr": stat,
                "stride_mean": 1,
                "RSTD_ptr": stat,
                "stride_rstd": 1,
                "DX_ptr": p,
                "stride_dx": h,
                "DW_ptr": f,
                "stride_dw": h,
                "DB_ptr": f,
                "stride_db": h,
                "DY_ptr": p,
                "stride_dy": h,
                "n_rows": 8191,
                "n_cols": h,
            },
            common | {"rows_per_program": rows_each, "COMPUTE_DW": True, "COMPUTE_DB": True},
            warps,
        )
    for w in WIDTHS:
        block, warps = settings(w, amd)
        constants = {"n_cols": w, "BLOCK_SIZE": block}
        yield (
            "swiglu",
            "forward",
            w,
            swiglu._swiglu_forward_kernel,
            {"a_ptr": p, "b_ptr": p, "c_ptr": p, "stride": w, "gate_multiplier": "fp32"},
            constants,
            warps,
        )
        yield (
            "swiglu",
            "backward",
            w,
            swiglu._swiglu_backward_kernel,
            {"dc_ptr": p, "a_ptr": p, "b_ptr": p, "stride": w, "gate_multiplier": "fp32"},
            constants,
            warps,
        )
        yield (
            "geglu",
            "forward",
            w,
            geglu._geglu_tanh_forward_kernel,
            {"a": p, "b": p, "c": p, "stride": w},
            constants,
            warps,
        )
        yield (
            "geglu",
            "backward",
            w,
            geglu._geglu_tanh_backward_kernel,
            {"dc": p, "a": p, "b": p, "stride": w},
            constants,
            warps,
        )
    for v in VOCABULARIES:
        # Gradient in forward, over the logits, as its fused linear cross-entropy calls it.
        yield (
            "linear_cross_entropy",
            "forward",
            v,
            cross_entropy.liger_cross_entropy_kernel,
            {
                "X_ptr": p,
                "X_stride": v,
                "Y_ptr": "*i64",
                "Y_stride": 1,
                "weight_ptr": "*i64",
                "loss_ptr": f,
                "z_loss_ptr": f,
                "loss_stride": 1,
                "token_accuracy_ptr": f,
                "token_accuracy_stride": 0,
                "predicted_tokens_ptr": "*i64",
                "predicted_tokens_stride": 0,
                "n_cols": v,
                "n_non_ignore": 4095,
                "sum_non_ignore_weight": "fp32",
                "weight_sum": "fp32",
                "ignore_index": -100,
                "softcap": "fp32",
            },
            {
                "lse_square_scale": 0.0,
                "label_smoothing": 0.0,
                "reduction": "sum",
                "RETURN_Z_LOSS": False,
                "RETURN_TOKEN_ACCURACY": False,
                "RETURN_PREDICTED_TOKENS": False,
                "HAS_WEIGHT": False,
                "HAS_SOFTCAPPING": False,
                "HAS_GRADIENTS": True,
                "BLOCK_SIZE": min(32768, triton.next_power_of_2(v)),
            },
            16 if amd else 32,
        )


def derived_bytes(op: str, direction: str, dtype: str, size: int) -> int:
    """Distinct bytes of Liger's launch at 8191 rows, from its loads and stores; its fp32 partial sums are reread by
    ``torch.sum``.

    dX of RMSNorm is allocated with ``zeros_like`` when it is not in place, which is another pass; the default is in
    place.
    """
    item, rows = (2 if dtype == "bf16" else 4), 4095 if op == "linear_cross_entropy" else 8191
    passes = {
        ("rms_norm", "forward"): 2, ("rms_norm", "backward"): 3, ("rms_norm_residual", "forward"): 4,
        ("rms_norm_residual", "backward"): 4, ("layer_norm", "forward"): 2, ("layer_norm", "backward"): 3,
        ("linear_cross_entropy", "forward"): 2,
    }.get((op, direction), 3 if direction == "forward" else 5)  # fmt: skip
    sums = {"rms_norm": 1, "rms_norm_residual": 1, "layer_norm": 2}.get(op, 0) if direction == "backward" else 0
    return passes * item * rows * size + 8 * UNITS * size * sums


def compiled(function, arguments: dict, constants: dict, warps: int, target: str) -> compiler.Compiled:
    """Compile a Liger kernel with the hints of a launch on aligned tensors."""
    chip = hardware.TARGETS[target]
    signature, fixed, hints = {}, dict(constants), {}
    for i, name in enumerate(function.arg_names):
        value = arguments.get(name)
        if name in fixed:
            signature[name] = "constexpr"
        elif value == 1:
            signature[name], fixed[name] = "constexpr", 1
        elif isinstance(value, str):
            signature[name] = value
            if value.startswith("*"):
                hints[(i,)] = [["tt.divisibility", 16]] + ([["tt.pointer_range", 32]] if chip.backend == "hip" else [])
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                hints[(i,)] = [["tt.divisibility", 16]]
    return compiler.compile_function(function, signature, fixed, hints, {"num_warps": warps}, target)


def ours(op: str, direction: str, size: int, dtype: str, target: str) -> dict:
    """The row of ``aifactory kernels check`` for our main kernel of that operator and direction."""
    operator = registry.operator(op)
    key = operator.kernels[0].key
    shape = next(s for s in operator.checks if s[key] == size)
    chosen = registry.select(op, target, None, dtype, shape)
    kernel = next(k for k in operator.kernels if k.direction == direction)
    return check.one(operator, kernel, chosen, target, dtype, shape)


def compare(targets: list[str], dtypes: list[str]):
    for target in targets:
        amd = hardware.TARGETS[target].backend == "hip"
        for dtype in dtypes:
            for op, direction, size, function, arguments, constants, warps in liger_cases(dtype, amd):
                try:
                    use = compiled(function, arguments, constants, warps, target)
                    theirs = {"registers": use.registers, "spills": use.spills, "shared_bytes": use.shared,
                              "occupancy": use.occupancy, "load_bytes": use.load_bytes, "warps": warps}  # fmt: skip
                except (RuntimeError, compiler.Unsupported) as error:
                    theirs = {"error": str(error).splitlines()[0]}
                mine = ours(op, direction, size, dtype, target)
                floor = registry.operator(op).floor(direction, dtype, mine["shape"])
                yield {
                    "op": op,
                    "direction": direction,
                    "size": size,
                    "dtype": dtype,
                    "target": target,
                    "ours": {
                        k: mine[k] for k in ("registers", "spills", "shared_bytes", "occupancy", "load_bytes", "status")
                    },
                    "liger": theirs,
                    "floor_bytes": floor,
                    "liger_bytes_derived": derived_bytes(op, direction, dtype, size),
                }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=sorted(hardware.TARGETS))
    parser.add_argument("--dtype", action="append", choices=sorted(TYPES))
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--strict", action="store_true")
    args = parser.parse_args()
    print(
        f"triton {triton.__version__}, liger-kernel {metadata.version('liger-kernel')}; compiled, not run; [ours | "
        f"liger]"
    )
    print(
        f"{'target':8} {'kernel':28} {'size':>7} {'dtype':5} {'registers':>11} {'spills':>9} {'load B':>8} "
        f"{'blocks':>8}"
    )
    rows, bad = [], 0
    for row in compare(args.target or ["sm_90", "gfx90a", "gfx942"], args.dtype or ["bf16"]):
        rows.append(row)
        a, b = row["ours"], row["liger"]
        name = f"{row['op']} {row['direction']}"
        pairs = [f"{a[k]} | {b.get(k, '-')}" for k in ("registers", "spills", "load_bytes", "occupancy")]
        worse = bool(a["spills"]) or ("spills" in b and (a["spills"] or 0) > b["spills"])
        bad += worse
        print(
            f"{row['target']:8} {name:28} {row['size']:7} {row['dtype']:5} {pairs[0]:>11} {pairs[1]:>9} "
            f"{pairs[2]:>8} {pairs[3]:>8}"
            + (f"  {b['error'][:60]}" if "error" in b else "")
            + ("  OURS SPILLS" if worse else ""),
            flush=True,
        )
    spilled = [r for r in rows if r["liger"].get("spills")]
    narrow = [r for r in rows if r["liger"].get("load_bytes", 16) < r["ours"]["load_bytes"]]
    print(f"{len(rows)} pairs; Liger spills in {len(spilled)}, ours in {sum(bool(r['ours']['spills']) for r in rows)}; "
          f"Liger's loads are narrower in {len(narrow)}")  # fmt: skip
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    return 1 if args.strict and bad else 0


if __name__ == "__main__":
    sys.exit(main())
