"""``aifactory kernels``: what the operators are, what they compile to for a chip that is not here, what they move, and how fast they run."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from aifactory_train.core.errors import EXIT_DONE, EXIT_FAILED, UserError, did_you_mean
from aifactory_train.core.output import note, print_json, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def command(name: str, text: str, where: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        sub.add_argument("--op", action="append", metavar="O", help="only this operator (may be repeated)")
        sub.add_argument("--json", action="store_true", help="one line of JSON on standard output")
        if where:
            sub.add_argument("--site", metavar="S", help="the chip of this system")
            sub.add_argument(
                "--target", action="append", metavar="T", help="an architecture, e.g. sm_90 or gfx942 (may be repeated)"
            )
            sub.add_argument("--sku", metavar="NAME", help="a device model of the target, e.g. MI300A")
        return sub

    command("list", "operators, implementations and where their launch parameters come from")
    check = command(
        "check",
        "compile for a chip without having it: registers, spills, shared memory, occupancy, load width, hazards",
    )
    check.add_argument("--dtype", action="append", choices=("bf16", "fp16", "fp32"), help="default: bf16 and fp32")
    check.add_argument(
        "--subset",
        "--quick",
        dest="quick",
        action="store_true",
        help="two shapes an operator; without --target the three targets of the PR tests",
    )
    check.add_argument(
        "--asm", metavar="DIR", help="write the machine code of every kernel (amdgcn; ptx and sass) into DIR"
    )
    tune = command(
        "tune", "choose launch parameters: legality, code quality, dominance, model; measured only where the GPU is"
    )
    tune.add_argument("--dtype", action="append", choices=("bf16", "fp16", "fp32"), help="default: bf16")
    tune.add_argument("--keep", type=int, default=8, metavar="K", help="candidates kept by the model (default 8)")
    tune.add_argument("--write", metavar="DIR", help="write the configuration file into this folder")
    bench = command("bench", "time the operators on the GPU of this machine against torch and Liger")
    bench.add_argument("--rows", type=int, default=8192)
    bench.add_argument("--hidden", type=int, default=4096)
    traffic = command(
        "traffic", "count the bytes that each operator loads and stores, in the interpreter, against the floor"
    )
    traffic.add_argument("--rows", type=int, default=4096)
    traffic.add_argument("--hidden", type=int, default=4096)
    traffic.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    plot = command("plot", "roofline and configurations as a PNG or HTML file")
    plot.add_argument("--out", required=True, metavar="FILE", help="FILE.png or FILE.html")
    new = commands.add_parser(
        "new", help="write the folder of a new operator: a small one that works", allow_abbrev=False
    )
    new.add_argument("name", metavar="NAME", help="its name, as in rms_norm")
    new.add_argument(
        "--into", metavar="DIR", help="the folder to write NAME into (default: the first of AIFACTORY_KERNELS)"
    )
    new.add_argument("--json", action="store_true", help="one line of JSON on standard output")


def run(args: argparse.Namespace) -> int:
    # Triton decides at import whether kernels are compiled or interpreted.
    os.environ["TRITON_INTERPRET"] = "1" if args.action == "traffic" else "0"
    if "triton" in sys.modules and args.action == "traffic":
        raise UserError(
            "Triton is already loaded in this process", fix="run `aifactory kernels traffic` as a command of its own"
        )
    actions = {
        "list": _list,
        "check": _check,
        "tune": _tune,
        "bench": _bench,
        "traffic": _traffic,
        "plot": _plot,
        "new": _new,
    }
    return actions[args.action](args)


# ---- what is asked for


def _operators(args: argparse.Namespace) -> list[str]:
    from aifactory_train.kernels import OPERATORS

    for name in args.op or ():
        if name not in OPERATORS:
            raise UserError(
                f"unknown operator '{name}'{did_you_mean(name, OPERATORS)}",
                where="--op",
                fix=f"one of {', '.join(OPERATORS)}",
            )
    return list(dict.fromkeys(args.op)) if args.op else list(OPERATORS)


def _targets(args: argparse.Namespace, default: list[str] | None = None) -> list[tuple[str, str | None]]:
    """(architecture, SKU) pairs of --site, --target and --sku; the default, or every target with each of its SKUs."""
    from aifactory_train.kernels import hardware, registry

    for name in args.target or ():
        if name not in hardware.TARGETS:
            known = ", ".join(hardware.TARGETS)
            raise UserError(
                f"unknown target '{name}'{did_you_mean(name, hardware.TARGETS)}",
                where="--target",
                fix=f"one of {known}",
            )
    if args.site:
        if args.target or args.sku:
            raise UserError(
                "--site already names a chip", where="--target/--sku", fix="give either --site or --target and --sku"
            )
        return [_chip(args.site)]
    if args.sku:
        found = registry.known_device(args.sku) or _of_catalogue(args.sku)
        if found is None:
            raise UserError(f"unknown SKU '{args.sku}'{did_you_mean(args.sku, hardware.SKUS)}", where="--sku",
                            fix=f"one of {', '.join(hardware.SKUS)}; for another device a profile with its figures: --site")  # fmt: skip
        if args.target and args.target != [found.arch]:
            raise UserError(
                f"{found.name} is a {found.arch}, not a {', '.join(args.target)}",
                where="--sku",
                fix=f"--target {found.arch}",
            )
        return [(found.arch, found.name)]
    if args.target:
        return [(t, None) for t in args.target]
    if default is not None:
        return [(t, None) for t in default]
    return [(t, None) for t in hardware.TARGETS]


def _chip(site: str) -> tuple[str, str | None]:
    """Architecture and SKU of a system's GPU."""
    from aifactory_train.kernels import hardware
    from aifactory_train.sites import load

    gpu = load(site).gpu
    if gpu.arch not in hardware.TARGETS:
        raise UserError(f"the GPU of {site} is {gpu.arch or 'unknown'}: the kernels are proven for {', '.join(hardware.TARGETS)}",
                        where="--site", fix="choose another site, or --target for a compile check of another chip")  # fmt: skip
    found = _device(gpu, site)
    if found is None:
        note(f"{site}: no known device fits its GPU, and its profile lacks compute_units, memory_bandwidth_gb_s or peak_tflops.bf16:"
             f" only the architecture {gpu.arch} is used")  # fmt: skip
    return gpu.arch, found.name if found else None


def _device(gpu: Any, site: str) -> Any:
    """The device that a profile's GPU is: a known one where name or figures say so, else one of the profile's own figures; None: neither.

    A known SKU is taken by its name, or by memory size where the profile names a GPU of the catalogue. A GPU of the profile's own
    must have the units and the bandwidth of a known device to be taken for it.
    """
    from aifactory_train.kernels import hardware

    arch, name, units = str(gpu.arch), str(gpu.sku or ""), gpu.compute_units or 0
    bandwidth = (gpu.memory_bandwidth_gb_s or 0) * 1e9

    def fits(device: Any) -> bool:
        same_units = not units or units == device.units or "units" in device.recalled
        return same_units and (
            bool(name) or (bool(units) and abs(bandwidth - device.bandwidth) <= 0.05 * device.bandwidth)
        )

    by_memory = hardware.identify(arch, units, round(float(gpu.memory_gib or 0) * 1.0737e9), name)
    for found in (hardware.sku(name, arch), by_memory):
        if found is not None and fits(found):
            return found
    peak = gpu.peak_tflops.get("bf16", 0) * 1e12
    if not (units and bandwidth and peak):
        return None
    own = "".join(c if c.isalnum() or c in "._-" else "-" for c in (gpu.model or name or site)).strip("-.")
    if hardware.sku(own) is not None or own in hardware.TARGETS:
        own = f"{own}-{site}"
    memory = round(float(gpu.memory_gib) * 1.0737, 1) if gpu.memory_gib else None
    device = hardware.Sku(own, arch, units, bandwidth, peak, memory_gb=memory)
    hardware.add(device)
    note(f"{site}: its GPU is no known device; the figures of the profile are used, under the name {own}")
    return device


def _of_catalogue(name: str) -> Any:
    """The device of a GPU in ``sites/gpus.yaml``, or None where it has none of that name."""
    from aifactory_train.sites.catalogue import gpu_catalogue
    from aifactory_train.sites.schema import Gpu

    entry = next((e for sku, e in gpu_catalogue().items() if sku.lower() == name.lower()), None)
    return _device(Gpu(**entry, sku=name.lower()), name) if entry and entry.get("arch") else None


# ---- the actions


def _list(args: argparse.Namespace) -> int:
    from aifactory_train.kernels import registry

    rows: list[dict[str, Any]] = []
    for target, sku in _targets(args, default=["sm_90", "gfx942", "gfx90a"]):
        for name in _operators(args):
            operator = registry.operator(name)
            chosen = registry.select(name, target, sku, "bf16", operator.checks[0])
            rows.append({
                "op": name, "target": target, "sku": sku, "implementation": chosen.implementation,
                "kernels": [
                    {"kernel": k, "config": chosen.config[k], "status": p.status, "level": p.level, "file": p.file, "notes": p.notes}
                    for k, p in chosen.provenance.items()
                ],
                "shape": operator.checks[0], "note": operator.note,
            })  # fmt: skip
    if args.json:
        print_json(rows)
        return EXIT_DONE
    for target in dict.fromkeys(r["target"] for r in rows):
        body = [
            [r["op"] if i == 0 else "", k["kernel"], k["status"], k["level"], " ".join(f"{a}={b}" for a, b in k["config"].items())]
            for r in rows if r["target"] == target for i, k in enumerate(r["kernels"])
        ]  # fmt: skip
        table(f"{target}, bf16", ["operator", "kernel", "status", "from", "configuration"], body)
    notes = sorted({n for r in rows for k in r["kernels"] for n in k["notes"]})
    for text in notes:
        note(f"note: {text}")
    return EXIT_DONE


def _check(args: argparse.Namespace) -> int:
    _need_triton()
    from pathlib import Path

    from aifactory_train.kernels.workbench import check

    default = list(check.SUBSET_TARGETS) if args.quick else None
    rows = []
    for row in check.rows(_operators(args), _targets(args, default), args.dtype or check.DTYPES, args.quick):
        rows.append(row)
        if not args.json and row["status"] != "ok":
            note(f"{row['target']} {row['kernel']} {row['dtype']} {_sizes(row['shape'])}: {row['status']}")
    bad = [r for r in rows if r["status"] != "ok" and not r["status"].startswith("unsupported")]
    if args.asm:
        compiled = [r for r in rows if r["registers"] is not None]
        files = [f for row in compiled for f in check.write_assembly(row, Path(args.asm))]
        note(f"wrote {len(files)} files of machine code to {args.asm}")
    if args.json:
        print_json(rows)
    else:
        _check_table(rows)
        lacking = sorted({r["status"] for r in rows if r["status"].startswith("unsupported")})
        for text in lacking:
            note(text)
        note(f"{len(rows)} kernels compiled, {len(bad)} with findings")
    return EXIT_FAILED if bad else EXIT_DONE


def _check_table(rows: list[dict[str, Any]]) -> None:
    body = [
        [r["target"], r["kernel"], r["dtype"], _sizes(r["shape"]), r["registers"], r["spills"], r["shared_bytes"], r["occupancy"], r["limiter"],
         r["load_bytes"], r["matrix"], r["atomics"], r["int32_hazards"], r["config_status"], r["status"]]
        for r in rows
    ]  # fmt: skip
    table(None, ["target", "kernel", "dtype", "shape", "regs", "spill", "shared", "blocks", "limited by", "load B", "matrix", "atomics",
                 "int32", "config", "status"], body, right=(4, 5, 6, 7, 9, 10, 11, 12))  # fmt: skip


def _sizes(shape: dict[str, int]) -> str:
    return " ".join(f"{k}={v}" for k, v in shape.items())


def _tune(args: argparse.Namespace) -> int:
    _need_triton()
    from pathlib import Path

    from aifactory_train.kernels import hardware
    from aifactory_train.kernels.workbench import bench, tune

    targets = _targets(args, default=[])
    if len(targets) != 1:
        raise UserError(
            "tuning is for one chip", where="--site/--target", fix="--site S, or --target T with --sku NAME"
        )
    if args.keep < 1:
        raise UserError(f"--keep {args.keep} keeps nothing", where="--keep", fix="a number from 1 on")
    (arch, name), = targets  # fmt: skip
    target, sku = hardware.TARGETS[arch], hardware.sku(name, arch)
    measure, where = bench.measurement(arch, name)
    note(f"{arch} {name or '(no SKU: units unknown, nothing is ranked)'}: "
         + ("timed on this machine's GPU" if measure else f"nothing is timed: {where}"))  # fmt: skip
    results = tune.tune(_operators(args), target, sku, args.dtype or ("bf16",), args.keep, measure, note)
    entries = tune.entries(results, bench.conditions() if measure else None)
    correlations = [r.correlation for r in results if r.correlation is not None]
    summary = {
        "target": arch, "sku": name, "measured": bool(measure), "why_not_measured": None if measure else where,
        "rank_correlation": sum(correlations) / len(correlations) if correlations else None, "entries": entries,
        "kept": {f"{r.kernel.name} {r.dtype} {r.size}": [c.config for c in r.kept] for r in results},
    }  # fmt: skip
    if args.write:
        path = Path(args.write) / f"{name or arch}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            tune.write(path, tune.describe(target, sku), entries)
        except ValueError as error:
            raise UserError(
                str(error), where="--write", fix="move the file away, or write into another folder"
            ) from error
        note(f"wrote {path}")
    if args.json:
        print_json(summary)
    elif correlations:
        note(
            f"rank correlation of model and measurement: {summary['rank_correlation']:.2f} (mean of {len(correlations)} kernels)"
        )
    return EXIT_DONE


def _new(args: argparse.Namespace) -> int:
    from pathlib import Path

    from aifactory_train.kernels.spec import folders
    from aifactory_train.kernels.workbench import new

    found = folders()
    into = Path(args.into) if args.into else (found[1] if len(found) > 1 else None)
    if into is None:
        raise UserError("where shall it lie?", where="--into", fix=f"--into {found[0]} for an operator of this package, or a folder of"
                        " your own, which AIFACTORY_KERNELS must then name")  # fmt: skip
    try:
        written = new.write(args.name, into)
    except ValueError as error:
        raise UserError(
            str(error), where="NAME" if into.is_dir() else "--into", fix="another name or folder"
        ) from error
    prefix = "" if into.resolve() in [f.resolve() for f in found] else f"AIFACTORY_KERNELS={into} "
    if args.json:
        print_json({"op": args.name, "files": [str(p) for p in written]})
    else:
        for path in written:
            note(f"wrote {path}")
        note(
            f"next: {prefix}aifactory kernels check --op {args.name} --subset; {prefix}aifactory kernels traffic --op {args.name}; "
            "neither looks at values: docs/kernels.md, 'Adding an operator', has the test that does"
        )
    return EXIT_DONE


def _bench(args: argparse.Namespace) -> int:
    _need_triton()
    from aifactory_train.kernels.workbench import bench

    measure, where = bench.measurement(None, None)
    if measure is None:
        raise UserError(f"nothing can be timed here: {where}",
                        fix="run it in a job on the GPU; `aifactory kernels check` and `traffic` work without one")  # fmt: skip
    rows = list(bench.rows(_operators(args), args.rows, args.hidden))
    if args.json:
        print_json(rows)
    else:
        table(None, ["operator", "direction", "ours us", "% of floor", "eager us", "compile us", "other us"],
              [[r["op"], r["direction"], r["us"]["ours"], r["percent_of_floor"], r["us"].get("eager"), r["us"].get("compile"),
                r["us"].get("liger") or r["us"].get("torch_linear_cross_entropy")] for r in rows], right=(2, 3, 4, 5, 6))  # fmt: skip
    return EXIT_DONE


def _traffic(args: argparse.Namespace) -> int:
    _need_triton()
    if args.rows < 1 or args.hidden < 128 or args.hidden % 128:
        raise UserError(f"--rows {args.rows} --hidden {args.hidden}", where="--rows/--hidden",
                        fix="at least one row, and a hidden size that is a multiple of 128")  # fmt: skip
    from aifactory_train.kernels.workbench import traffic

    ((arch, sku),) = _targets(args, default=["sm_90"])[:1]
    sku = sku or ("H100-80" if arch == "sm_90" else None)
    rows = []
    for row in traffic.rows(_operators(args), args.rows, args.hidden, args.dtype, arch, sku):
        rows.append(row)
        note(f"{row['op']} {row['direction']}: {row['ratio']:.3f} x the floor"
             + (f" (bound {row['bound']})" if row["bound"] else "") + f", requested {row['requested_bytes'] / row['floor_bytes']:.2f} x")  # fmt: skip
    over = [r for r in rows if r["bound"] and r["ratio"] > r["bound"]]
    if args.json:
        print_json(rows)
    return EXIT_FAILED if over else EXIT_DONE


def _plot(args: argparse.Namespace) -> int:
    from pathlib import Path

    path = Path(args.out)
    if path.suffix not in (".png", ".html"):
        raise UserError(f"{path}: unknown kind of plot", where="--out", fix="a name that ends in .png or .html")
    from aifactory_train.kernels.workbench import plot

    targets = _targets(args, default=["gfx942"])
    for arch, sku in targets[:1]:
        plot.write(path, arch, sku, _operators(args))
    note(f"wrote {path}")
    return EXIT_DONE


def _need_triton() -> None:
    import importlib.util

    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("torch") is None:
        raise UserError("compiling, counting and timing kernels need torch and Triton",
                        fix="pip install 'aifactory-train[train,triton]' (Triton has wheels for Linux on x86_64 and aarch64)")  # fmt: skip
