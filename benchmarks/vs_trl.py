"""This engine and TRL's SFTTrainer (or transformers' Trainer) on the same work: tokens/s, peak memory, loss curves,
GEMM ceiling.

    python benchmarks/vs_trl.py --json [--case packed-lora] [--pairs 5] [--data FILE.jsonl] [--peer trl|transformers]

Both sides train the same rows in the same order with the same tokens and masks, model, optimizer (fused AdamW),
learning rate, clipping and type (fp32), and start from the same adapter. In the packed cases TRL's own packing (best
fit decreasing, 4 packs of 512 tokens a step, padding-free) decides which rows a step holds. In the padded cases a step
is 4 rows, which the peer pads to the longest; ours lays them end to end, as it does by default (``--ours-pads``: it
pads them, too). Each side runs in a fresh process, alternating, so that the peak is the process's own (``ru_maxrss``).
The first step of a run warms up and is not timed; after it, the time between the ends of two steps counts, with
everything that happens in between. Tokens are real ones.

TRL runs in fp32 and without gradient checkpointing, as ours does. ``--peer-recomputes`` switches its checkpointing on,
which is its default; its other default, bf16, is another arithmetic and is not measured. Ours runs with the recipe's
defaults (which on a CPU means micro-batches of at most 1,100 tokens); ``--whole-steps`` measures it with one
micro-batch.

The ceiling: every matrix product of one of our steps is recorded with its shapes and layout, timed alone on warm memory
in the same process afterwards (median of repetitions), and added up. The share is that time over the step's. It is
taken twice: with ``torch.matmul``, a yardstick that is the same for every engine (``ceiling_share``), and with the
calls that the step makes itself, which on some processors are faster (aifactory_train/products.py;
``ceiling_share_own_calls``). The products inside attention's fused kernel (two forward, five backward for each
document) are timed as batched products of whole squares, and half of that counts: attention is causal.

Exit code 1 if the loss of any step differs by more than 1e-3 (relative) in a padded case: speed is never bought with
other work.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import measuring

CASES = ("packed-lora", "padded-lora", "packed-full", "padded-full")
PACK, PACKS, ROWS = 512, 4, 4  # tokens of a pack, packs of a packed step, rows of a padded step
SEED, RATE, BETAS, EPS, CLIP = 17, {"lora": 2e-4, "full": 2e-5}, (0.9, 0.95), 1e-8, 1.0
TOLERANCE = 1e-3
PEERS = {"trl": "TRL SFTTrainer", "transformers": "transformers Trainer"}


# ---- the work: which documents each step holds


def plan(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokenise the rows with our pipeline, choose the documents of every step, and write them for the peer."""
    from aifactory_train.data import load_tokenizer, prepare

    recipe = _recipe(spec)
    train = prepare(recipe, load_tokenizer(recipe)).train
    documents = [(train.tokens(i).tolist(), train.mask(i).tolist()) for i in range(len(train))]
    labels = [[t if m else -100 for t, m in zip(*d, strict=True)] for d in documents]
    if spec["packed"]:
        packs = _packs(documents, labels)
        steps = [packs[i : i + PACKS] for i in range(0, len(packs) - PACKS + 1, PACKS)]
    else:
        steps = [[[j] for j in range(i, i + ROWS)] for i in range(0, len(documents) - ROWS + 1, ROWS)]
    if len(steps) < spec["steps"]:
        raise SystemExit(f"the data gives {len(steps)} steps, {spec['steps']} are wanted: fewer --steps or more rows")
    steps = steps[: spec["steps"]]
    rows = [
        {
            "input_ids": [t for j in pack for t in documents[j][0]],
            "labels": [t for j in pack for t in labels[j]],
            **({"seq_lengths": [len(documents[j][0]) for j in pack]} if spec["packed"] else {}),
        }
        for step in steps
        for pack in step
    ]
    with open(spec["rows"], "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return {
        "documents": [[j for pack in step for j in pack] for step in steps],
        "tokens": [sum(len(documents[j][0]) for pack in step for j in pack) for step in steps],
        # the first label of a sequence has no position that predicts it
        "supervised": [sum(v != -100 for pack in step for j in pack for v in labels[j][1:]) for step in steps],
    }


def _packs(documents: list, labels: list) -> list[list[int]]:
    """Documents of each pack as TRL packs them, the packs in an order drawn once (TRL's own is by falling length)."""
    import random

    from datasets import Dataset
    from trl import pack_dataset

    # TRL packs batches of 1,000 rows; what is packed carries no row numbers, so they travel as a second sequence.
    numbered = {
        "input_ids": [d[0] for d in documents],
        "number": [[i] * len(d[0]) for i, d in enumerate(documents)],
    }
    packed = pack_dataset(Dataset.from_dict(numbered), PACK, "bfd")
    packs = [list(dict.fromkeys(numbers)) for numbers in packed["number"]]
    full = [
        p for p in packs if sum(len(documents[j][0]) for j in p) > 0.9 * PACK
    ]  # the last pack of a batch is a remainder
    random.Random(SEED).shuffle(full)
    return full


def _recipe(spec: dict[str, Any]):
    from aifactory_train.config.schema import Recipe

    lora = spec["kind"] == "lora"
    return Recipe.model_validate(
        {
            "id": "benchmark/vs-trl",
            "model": {"base": spec["model"]},
            "adapter": {"kind": "lora" if lora else "none", "rank": 16, "alpha": 32},
            "data": {
                "train": spec["data"],
                "eval": spec["eval"],
                "overlap": "allow",
                "sequence_length": PACK,
                "batching": "padded" if spec["ours_pads"] and not spec["packed"] else "packed",
                "workers": 1,
            },
            "train": {
                "seed": SEED,
                "max_steps": spec["steps"],
                "batch_rows": ROWS,
                "learning_rate": RATE[spec["kind"]],
                "schedule": "constant",
                "warmup_steps": 0,
                "betas": list(BETAS),
                "eps": EPS,
                "max_grad_norm": CLIP,
                "weight_decay": 0.0,
                **({"grad_accum": 1} if spec["whole_steps"] else {}),
            },
            "eval": {"before": False, "after": False},
            "checkpoint": {"at_end": False},
            "export": {"automatic": False},
            "record": {"pack": False, "energy": False},
            "logging": {"tensorboard": False},
        }
    )


# ---- one side, in a process of its own


def ours(spec: dict[str, Any]) -> dict[str, Any]:
    """Train with :func:`aifactory_train.training.start.train`, documents given; then time the matrix products of a
    step.
    """
    import resource

    import aifactory_train.training.trainer as loop
    from aifactory_train.data import Cursor
    from aifactory_train.training.start import train

    class Given(loop.Sampler):
        """The documents of every step as planned."""

        def steps(self, epochs: float, at_most: int | None = None) -> int:
            return len(spec["documents"])

        def step(self, cursor):
            import numpy as np

            return np.asarray(spec["documents"][cursor.position]), Cursor(0, cursor.position + 1)

    products = Products()
    ends: list[float] = []
    plain = loop.Trainer.train_step

    def timed(self):
        if not ends:
            with products.recording():  # in the step that is not timed
                record = plain(self)
        else:
            record = plain(self)
        ends.append(time.perf_counter())
        return record

    loop.Sampler = Given
    loop.Trainer.train_step = timed
    folder = Path(spec["scratch"]) / f"run-{time.time_ns()}"
    train(_recipe(spec), folder, quiet=True)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    seconds, own_seconds, flop = products.time() if spec["ceiling"] else (0.0, 0.0, 0.0)
    return {
        "ends": ends,
        "loss": [r["loss"] for r in records],
        "tokens": [r["tokens"] for r in records],
        "supervised": [r["supervised_tokens"] for r in records],
        "peak_gb": peak,
        "ceiling_s": seconds,
        "ceiling_own_calls_s": own_seconds,
        "ceiling_tokens": records[0]["tokens"],
        "gemm_gflops": flop / seconds / 1e9 if seconds else 0.0,
    }


class Products:
    """The matrix products that ran while recording, by operator, shapes and strides."""

    def __init__(self) -> None:
        self.seen: Counter = Counter()

    def recording(self):
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        aten, seen = torch.ops.aten, self.seen
        #: position of the two factors among the arguments
        factors = {aten.mm.default: 0, aten.mm.out: 0, aten.addmm.default: 1, aten.addmm_.default: 1, aten.addmm.out: 1}
        factors |= {aten.bmm.default: 0, aten.bmm.out: 0, aten.baddbmm.default: 1}
        onednn = torch.ops.mkldnn._linear_pointwise.default  # left @ right.T (aifactory_train/products.py)
        attention = {
            aten._scaled_dot_product_flash_attention_for_cpu.default: 0,
            aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 1,
        }

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                at = 0 if function is onednn else factors.get(function)
                if at is not None:
                    a, b = args[at], args[at + 1]
                    kind = "onednn" if function is onednn else "adds" if at == 1 else "plain"
                    seen[(kind, tuple(a.shape), a.stride(), tuple(b.shape), b.stride())] += 1
                if function in attention:
                    self._attention(args[attention[function]].shape, backward=attention[function] == 1)
                return function(*args, **(kwargs or {}))

            @staticmethod
            def _attention(query, backward):
                batch, heads, tokens, width = query
                wide = ((batch * heads, tokens, width), (batch * heads, width, tokens))  # as Q K^T
                tall = ((batch * heads, tokens, tokens), (batch * heads, tokens, width))  # as P V
                # backward: Q K^T again and dO V^T; P^T dO, dS K, dS^T Q
                for (left, right), count in ((wide, 2 if backward else 1), (tall, 3 if backward else 1)):
                    strides = [(s[1] * s[2], s[2], 1) for s in (left, right)]
                    seen[("causal", left, strides[0], right, strides[1])] += count

        return Recorder()

    def time(self) -> tuple[float, float, float]:
        """(seconds with torch.matmul, seconds with the calls that the step made, FLOP) of all recorded products."""
        import torch

        plain = own = flop = 0.0
        for (kind, left, left_strides, right, right_strides), count in self.seen.items():
            a, b = _laid_out(left, left_strides), _laid_out(right, right_strides)
            factor = b.t() if kind == "onednn" else b
            product = torch.empty(*left[:-1], factor.shape[-1])
            work = 2.0 * math.prod(left) * factor.shape[-1]
            if kind == "adds" and a.dim() == 2:
                seconds = _median_time(partial(torch.addmm, product, a, factor, out=product), work)
            else:
                seconds = _median_time(partial(torch.matmul, a, factor, out=product), work)
            if kind == "causal":
                seconds, work = seconds / 2, work / 2
            plain += count * seconds
            if kind == "onednn":
                seconds = _median_time(partial(torch.ops.mkldnn._linear_pointwise, a, b, None, "none", [], ""), work)
            own += count * seconds
            flop += count * work
        return plain, own, flop


def _median_time(run: Any, work: float) -> float:
    """Seconds of one call with ``work`` FLOP, on memory that was touched before."""
    run()
    times = []
    for _ in range(max(3, min(15, int(2e10 / work)))):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _laid_out(shape: tuple[int, ...], strides: tuple[int, ...]):
    """A tensor with this shape and these strides."""
    import torch

    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return torch.randn(size).mul_(0.01).as_strided(shape, strides)


def peer(spec: dict[str, Any]) -> dict[str, Any]:
    """Train the planned rows with TRL's or transformers' trainer."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    rows = [json.loads(line) for line in Path(spec["rows"]).read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32, local_files_only=True)
    model.config.use_cache = False
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], local_files_only=True)
    if spec["kind"] == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(SEED)  # the same adapter as ours
        config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    settings = {
        "output_dir": str(Path(spec["scratch"]) / f"peer-{time.time_ns()}"),
        "per_device_train_batch_size": PACKS if spec["packed"] else ROWS,
        "max_steps": spec["steps"],
        "learning_rate": RATE[spec["kind"]],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "weight_decay": 0.0,
        "max_grad_norm": CLIP,
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": spec["peer_recomputes"],
        "dataloader_pin_memory": False,
        "remove_unused_columns": spec["peer"] == "trl",
        "seed": SEED,
    }
    ends: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    if spec["peer"] == "trl":
        from trl import SFTConfig, SFTTrainer

        config = SFTConfig(**settings, max_length=None, padding_free=spec["packed"], shuffle_dataset=False)
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
    else:
        from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments

        if spec["packed"]:
            # its collator knows rows, not packs: one row per document, and as many as the step has
            collate = _flattening_of_packs(DataCollatorWithFlattening(return_flash_attn_kwargs=False))
        else:
            collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**settings),
            train_dataset=Dataset.from_list(rows),
            data_collator=collate,
            callbacks=[Clock()],
        )
    trainer.train()
    return {"ends": ends, "loss": losses[: spec["steps"]]}


def _flattening_of_packs(collator):
    def collate(features):
        parts = []
        for pack in features:
            at = 0
            for n in pack["seq_lengths"]:
                parts.append({"input_ids": pack["input_ids"][at : at + n], "labels": pack["labels"][at : at + n]})
                at += n
        return collator(parts)

    return collate


# ---- pairs


def measure(case: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Alternating pairs of one case."""
    batching, kind = case.split("-")
    spec: dict[str, Any] = {
        "packed": batching == "packed",
        "kind": kind,
        "peer": options.peer,
        "model": str(measuring.model_folder(options.model)),
        "data": str(options.data or scratch / "rows.jsonl"),
        "eval": str(scratch / "eval.jsonl"),
        "rows": str(scratch / f"{case}.jsonl"),
        "scratch": str(scratch),
        "steps": 1 + options.steps,
        "whole_steps": options.whole_steps,
        "peer_recomputes": options.peer_recomputes,
        "ours_pads": options.ours_pads,
        "ceiling": True,
    }
    env = measuring.quiet_env(scratch)
    work, _, _ = measuring.child([__file__, "--child", "plan", json.dumps(spec)], env=env)
    spec["documents"] = work["documents"]
    pairs = []
    for number in range(options.pairs):
        theirs, their_peak, _ = measuring.child([__file__, "--child", "peer", json.dumps(spec)], env=env)
        own, _, _ = measuring.child([__file__, "--child", "ours", json.dumps(spec)], env=env)
        if own["tokens"] != work["tokens"] or own["supervised"] != work["supervised"]:
            raise SystemExit(f"{case}: our run trained other tokens than planned")
        timed = sum(work["tokens"][1:])
        speed = [timed / (side["ends"][-1] - side["ends"][0]) for side in (own, theirs)]
        step = (own["ends"][-1] - own["ends"][0]) / options.steps
        tokens = timed / options.steps
        pair = {
            "ours_tokens_per_s": round(speed[0], 2),
            "peer_tokens_per_s": round(speed[1], 2),
            "speed_ratio": round(speed[0] / speed[1], 3),
            "ours_peak_gb": round(own["peak_gb"], 3),
            "peer_peak_gb": round(their_peak, 3),
            "memory_ratio": round(own["peak_gb"] / their_peak, 3),
            "loss_ours": own["loss"],
            "loss_peer": theirs["loss"],
            "loss_max_rel_diff": max(abs(a - b) / abs(b) for a, b in zip(own["loss"], theirs["loss"], strict=True)),
            "gemm_gflops": round(own["gemm_gflops"], 1),
            # the products of the first step, at the tokens of an average timed one
            "ceiling_share": round(own["ceiling_s"] * tokens / own["ceiling_tokens"] / step, 3),
            "ceiling_share_own_calls": round(own["ceiling_own_calls_s"] * tokens / own["ceiling_tokens"] / step, 3),
        }
        pairs.append(pair)
        note(f"{case} {number + 1}/{options.pairs}: " + ", ".join(f"{k} {pair[k]}" for k in _SHOWN))
    middle = statistics.median
    return {
        "name": case,
        "peer": options.peer,
        "pairs": pairs,
        "tokens_per_step": round(sum(work["tokens"][1:]) / options.steps, 1),
        "ours_tokens_per_s": middle(p["ours_tokens_per_s"] for p in pairs),
        "peer_tokens_per_s": middle(p["peer_tokens_per_s"] for p in pairs),
        "speed_ratio": min(p["speed_ratio"] for p in pairs),  # the worst pair
        "ours_peak_gb": max(p["ours_peak_gb"] for p in pairs),
        "peer_peak_gb": middle(p["peer_peak_gb"] for p in pairs),
        "memory_ratio": max(p["memory_ratio"] for p in pairs),  # the worst pair
        "loss_max_rel_diff": max(p["loss_max_rel_diff"] for p in pairs),
        "gemm_gflops": middle(p["gemm_gflops"] for p in pairs),
        "ceiling_share": middle(p["ceiling_share"] for p in pairs),
        "ceiling_share_own_calls": middle(p["ceiling_share_own_calls"] for p in pairs),
    }


_SHOWN = (
    "ours_tokens_per_s",
    "peer_tokens_per_s",
    "speed_ratio",
    "ours_peak_gb",
    "peer_peak_gb",
    "memory_ratio",
    "loss_max_rel_diff",
    "ceiling_share",
    "ceiling_share_own_calls",
)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def as_markdown(result: dict[str, Any]) -> str:
    header = [
        "case",
        "ours, tokens/s",
        "peer, tokens/s",
        "worst pair",
        "ours, peak GB",
        "peer, peak GB",
        "worst pair",
        "loss differs by",
        "share of the GEMM ceiling",
        "with its own calls",
    ]
    rows = [
        [
            f"{c['name']} ({len(c['pairs'])} pairs, {c['tokens_per_step']:.0f} tokens a step)",
            f"{c['ours_tokens_per_s']:.0f}",
            f"{c['peer_tokens_per_s']:.0f}",
            f"{c['speed_ratio']:.2f} x",
            f"{c['ours_peak_gb']:.2f}",
            f"{c['peer_peak_gb']:.2f}",
            f"{c['memory_ratio']:.2f} x",
            f"{c['loss_max_rel_diff']:.1e}",
            f"{100 * c['ceiling_share']:.0f} %",
            f"{100 * c['ceiling_share_own_calls']:.0f} %",
        ]
        for c in result["cases"]
    ]
    name = PEERS[result["peer"]]
    return f"Peer: {name}.\n\n" + measuring.table(header, rows) + "\n" + measuring.facts_text(result["facts"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one line of JSON on standard output")
    parser.add_argument("--case", action="append", choices=CASES, help="repeatable; default: all")
    parser.add_argument("--pairs", type=int, help="default: 5 for packed-lora, 3 for the others")
    parser.add_argument(
        "--steps", type=int, help="timed steps per run, after one that warms up (default: 1 packed, 2 padded)"
    )
    parser.add_argument("--data", type=Path, help="JSONL of chat rows (default: synthetic rows of real lengths)")
    parser.add_argument("--peer", choices=sorted(PEERS), default="trl")
    parser.add_argument("--model", default=measuring.MODEL)
    parser.add_argument("--whole-steps", action="store_true", help="ours with one micro-batch a step, as the peer")
    parser.add_argument(
        "--peer-recomputes", action="store_true", help="the peer with gradient checkpointing, TRL's default"
    )
    parser.add_argument("--ours-pads", action="store_true", help="ours pads the rows of the padded cases, as the peer")
    parser.add_argument("--update-readme", action="store_true", help="write the table into benchmarks/README.md")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "SPEC"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        side, spec = options.child
        print(json.dumps({"plan": plan, "ours": ours, "peer": peer}[side](json.loads(spec))))
        return 0
    if options.data is not None and not options.data.is_file():
        parser.error(f"--data: no such file: {options.data}")
    found = measuring.facts("trl", "accelerate", "datasets")
    note(measuring.facts_text(found))
    with tempfile.TemporaryDirectory(prefix="aifactory-bench-") as name:
        scratch = Path(name)
        measuring.write_rows(scratch / "rows.jsonl", 200 * (1 + (options.steps or 2)), longest=PACK)
        measuring.write_rows(scratch / "eval.jsonl", 2, seed=SEED + 1000)
        cases = []
        for case in options.case or CASES:
            pairs = options.pairs or (5 if case == "packed-lora" else 3)
            steps = options.steps or (2 if case.startswith("padded") else 1)
            given = argparse.Namespace(**{**vars(options), "pairs": pairs, "steps": steps})
            cases.append(measure(case, given, scratch))
    lead = next((c for c in cases if c["name"] == "packed-lora"), cases[0])
    result = {
        "peer": options.peer,
        "cases": cases,
        "gemm_gflops": lead["gemm_gflops"],
        "ceiling_share": lead["ceiling_share"],
        "facts": found,
    }
    if options.update_readme:
        section = "vs-" + options.peer + ("-whole-steps" if options.whole_steps else "")
        section += "-recomputing" if options.peer_recomputes else ""
        section += "-padding" if options.ours_pads else ""
        measuring.update_readme(section, as_markdown(result))
    print(json.dumps(result) if options.json else as_markdown(result))
    apart = [c["name"] for c in cases if c["name"].startswith("padded") and c["loss_max_rel_diff"] > TOLERANCE]
    if apart:
        note(f"the loss curves differ by more than {TOLERANCE:g}: {', '.join(apart)}")
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
