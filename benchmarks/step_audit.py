"""One training step counted on the meta device, ours and TRL's with Liger's kernels: bytes, launches, FLOPs, peak.

    python benchmarks/step_audit.py --json [--case llama-8b-lora|llama-8b-full|qwen3-30b-a3b-lora] [--layers N]

No GPU and no weights: models are built from published dimensions (``step_audit/*.json``) and one step of 4 x 4,096
packed tokens in bf16 runs on the meta device, for the chip of ``--sku``. Both sides go through one recorder
(``aifactory_train.audit``): operators of torch by their operands and results, Triton kernels by one table of reads and
writes, packed attention by one formula. Nothing here is a time.

The peer is what TRL's SFTTrainer runs with Liger on (transformers' model, peft's adapters, Liger's patch of the model
with its fused linear cross-entropy, padding-free packing, fused AdamW, clipping):

    peer            all weights bf16, adapters too, no autocast, the same checkpointing as ours: the least it can do
    peer_as_loaded  the same with what it does by itself when the base is loaded in bf16: fp32 adapters, autocast
    peer_defaults   its other defaults: fp32 weights, autocast, checkpointing

Routed experts are counted under an even load (which expert gets how many rows follows from data), and adapted on both
sides: by peft's ``target_parameters`` on transformers' own path for the peer.

The floor is computed from the dimensions by code that knows nothing of the recorder (``aifactory_train.audit.floor``).
Needs ``liger-kernel`` and ``peft``; a case whose model is not supported prints ``refused`` and why. A peer that cannot
run on the meta device is ``{"refused": why}``, and has no ratios. Without Liger the peers are null. ``--layers`` cuts
the models to their first layers, for a try.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import traceback
from pathlib import Path
from typing import Any

CASES = ("llama-8b-lora", "llama-8b-full", "qwen3-30b-a3b-lora")
DIMENSIONS = Path(__file__).with_name("step_audit")
PACKS, LENGTH, RANK = 4, 4096, 16
MODES = ("none", "full")
#: key of a side -> (words, unit)
SHOWN = {
    "bytes": ("GB moved", 1e9), "launches": ("launches", 1), "flops": ("TFLOP", 1e12), "syncs": ("host waits", 1),
    "peak_gib": ("peak GiB", 1), "weights_gib": ("weights GiB", 1),
}  # fmt: skip


def recipe(case: dict[str, Any], checkpointing: str) -> Any:
    """The recipe of our side."""
    from aifactory_train.config.schema import Recipe

    lora = case["adapter"] == "lora"
    return Recipe.model_validate(
        {
            "id": "benchmark/step-audit",
            "model": {"base": case["base"]},
            "adapter": {"kind": "lora" if lora else "none", "rank": RANK, "alpha": 2 * RANK},
            "data": {"train": "rows.jsonl", "eval": "eval.jsonl", "sequence_length": LENGTH},
            "train": {"max_steps": 1, "batch_rows": PACKS},
            "parallel": {"activation_checkpointing": checkpointing},
        }
    )


def read_case(name: str, layers: int | None) -> dict[str, Any]:
    """The case's dimensions, with no more than ``layers`` layers."""
    case = json.loads((DIMENSIONS / f"{name}.json").read_text())
    if layers is not None:
        case["config"]["num_hidden_layers"] = min(layers, case["config"]["num_hidden_layers"])
    return case


def configuration(case: dict[str, Any]) -> Any:
    """transformers' configuration from the published dimensions."""
    from transformers import AutoConfig

    values = dict(case["config"])
    return AutoConfig.for_model(values.pop("model_type"), **values)


def ours(case: dict[str, Any], checkpointing: str, sku: Any) -> Any:
    from aifactory_train.audit import step

    spec = step.StepSpec(configuration(case), recipe(case, checkpointing), sku.arch, sku.name, (LENGTH,) * PACKS)
    return step.run(spec)


def floor(case: dict[str, Any]) -> int:
    from aifactory_train.audit.floor import step_bytes
    from aifactory_train.model import shapes

    shape = shapes.from_config(case["config"], case["base"])
    tokens = PACKS * LENGTH
    return step_bytes(shape, tokens, tokens - PACKS, rank=RANK if case["adapter"] == "lora" else None)


def measure(name: str, checkpointing: str, sku: Any, layers: int | None = None) -> dict[str, Any]:
    """One row: a case under one checkpointing. All its ratios come from this configuration."""
    case = read_case(name, layers)
    row: dict[str, Any] = {"name": name, "checkpointing": checkpointing}
    from aifactory_train.core.errors import UserError

    try:
        lowest = floor(case)
        own = ours(case, checkpointing, sku).as_dict()
    except UserError as error:
        return row | {"status": "refused", "why": str(error)}
    row |= {"status": "done", "ours": own, "floor_bytes": lowest, "floor_ratio": own["bytes"] / lowest}
    if importlib.util.find_spec("liger_kernel") is None:
        return row | dict.fromkeys(("peer", "peer_as_loaded", "peer_defaults"))
    bf16 = _peer(case, sku, checkpointing, weights="bf16", autocast=False)
    loaded = _peer(case, sku, checkpointing, weights="bf16", autocast=True)
    defaults = _peer(case, sku, "full", weights="fp32", autocast=True)
    above = own["peak_gib"] - own["weights_gib"]
    row |= {"peer": bf16, "peer_as_loaded": loaded, "peer_defaults": defaults}
    for suffix, peer in (("", bf16), ("_as_loaded", loaded)):
        if "refused" not in peer:
            row |= {
                f"bytes_ratio{suffix}": own["bytes"] / peer["bytes"],
                f"launches_ratio{suffix}": own["launches"] / peer["launches"],
                f"peak_above_weights_ratio{suffix}": above / (peer["peak_gib"] - peer["weights_gib"]),
            }
    return row if "refused" in defaults else row | {"peak_defaults_ratio": own["peak_gib"] / defaults["peak_gib"]}


def _peer(case: dict[str, Any], sku: Any, checkpointing: str, *, weights: str, autocast: bool) -> dict[str, Any]:
    """A peer's account, or ``refused`` with the operator that has no form for its meta tensors."""
    import step_audit_peer as peers

    try:
        return peers.run(case, configuration(case), sku, checkpointing, weights=weights, autocast=autocast)
    except RuntimeError as error:  # torch's word for an operator without a meta form, or none for these types
        forms = [f.name for f in traceback.extract_tb(error.__traceback__) if f.name.startswith("meta_")]
        return {"refused": ": ".join([*forms[-1:], str(error).splitlines()[0]])}


def as_text(row: dict[str, Any]) -> str:
    """A row as a table for people, and where bytes and launches go on both sides."""
    head = f"{row['name']}, checkpointing {row['checkpointing']}: "
    if row["status"] == "refused":
        return head + f"refused: {row['why']}"
    everybody = [s for s in ("ours", "peer", "peer_as_loaded", "peer_defaults") if row.get(s)]
    sides = [s for s in everybody if "refused" not in row[s]]
    head += "; ".join(f"{s} refused: {row[s]['refused']}" for s in everybody if s not in sides)
    lines = [head, f"  {'':28}" + "".join(f"{side:>16}" for side in sides)]
    for key, (label, unit) in SHOWN.items():
        lines.append(f"  {label:28}" + "".join(f"{row[s][key] / unit:16,.1f}" for s in sides))
    ratios = {k: v for k, v in row.items() if k.endswith("ratio") or "_ratio_" in k}
    lines += [f"  {name:40} {value:.3f}" for name, value in ratios.items()]
    lines.append(f"  {'GB by operator':48}" + "".join(f"{s:>16}" for s in sides))
    names = dict.fromkeys(n for s in sides for n in row[s]["operators"])
    for name in sorted(names, key=lambda n: -max(_of(row, s, n, "bytes") for s in sides))[:24]:
        cells = "".join(f"{_of(row, s, name, 'bytes') / 1e9:10.1f}{_of(row, s, name, 'launches'):6d}" for s in sides)
        lines.append(f"  {name:48}{cells}")
    return "\n".join(lines)


def _of(row: dict[str, Any], side: str, operator: str, key: str) -> int:
    return row[side]["operators"].get(operator, {}).get(key, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one line of JSON on standard output")
    parser.add_argument("--case", action="append", choices=CASES, help="repeatable; default: all")
    parser.add_argument("--checkpointing", action="append", choices=MODES, help="repeatable; default: both")
    parser.add_argument("--sku", default="H100-80", help="the chip whose launch configurations are used")
    parser.add_argument("--layers", type=int, metavar="N", help="no more than the first N layers of each model")
    options = parser.parse_args()
    if options.layers is not None and options.layers < 1:
        parser.error(f"--layers {options.layers}: a model has at least one layer")
    from aifactory_train.kernels import hardware

    sku = hardware.sku(options.sku)
    if sku is None:
        parser.error(f"--sku: known are {', '.join(hardware.SKUS)}")
    rows = [
        measure(c, mode, sku, options.layers) for c in options.case or CASES for mode in options.checkpointing or MODES
    ]
    print(json.dumps({"cases": rows}) if options.json else "\n\n".join(map(as_text, rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
