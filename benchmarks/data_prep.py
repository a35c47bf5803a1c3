"""Preparing rows: from a file to tokens that carry loss, beside TRL's own preparation and beside the bare tokenizer.

    python benchmarks/data_prep.py --json [--rows 10000] [--pairs 3] [--data FILE.jsonl]
    python benchmarks/data_prep.py --json --million          # 1,000,000 rows, ours alone: is memory flat?

Synthetic chat rows of real lengths (``measuring.LENGTHS``; the short ones with ``--million``) and one chat template for
both sides.

* **TRL**: what ``SFTTrainer`` does with a data set when it is constructed (chat template with assistant masks, labels,
  best-fit-decreasing packing to 512 tokens). Reading the JSON is not timed (``load_dataset`` has done it), and it
  splits, compares and reports nothing.
* **Ours**: the whole of ``prepare``, what a user of ``aifactory prepare`` waits for: reading, validation and digests of
  every row, rendering, masks and tokens, the cache on disk; then duplicates, overlap of train and eval,
  near-duplicates, languages, personal data, and the report. Rows are packed when a step needs them. "Reading alone" is
  the part up to the last row tokenised and masked in the cache.
* **The bare tokenizer**: ``tokenizers.encode_batch`` on the same rows, rendered before, one thread, 1,000 at a time,
  ids not even read.

Imports, loading the tokenizer and (TRL) building the model are not timed. Each side runs in fresh processes,
alternating; caches are empty each time. Both sides must come to the same number of tokens and of supervised tokens,
else the script fails.

Memory is that of the process and its children together: anonymous memory, sampled ten times a second (mapped files are
the page cache's). With ``--million`` it is flat if its highest reading over the rows after the first tenth is at most
10 % above that of the first tenth.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measuring

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endif %}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PACK = 512


# ---- one side


def ours(spec: dict[str, Any]) -> dict[str, Any]:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.data import load_tokenizer, pipeline, prepare

    recipe = Recipe.model_validate(
        {
            "id": "benchmark/data",
            "model": {"base": spec["model"], "chat_template": spec["template"]},
            "data": {
                "train": spec["data"],
                "eval": spec["eval"],
                "overlap": "allow",
                "deduplicate": False,
                "sequence_length": PACK,
                "workers": spec["processes"],
            },
        }
    )
    tokenizer = load_tokenizer(recipe)
    marks: list[tuple[float, int]] = []
    inside: list[float] = []
    plain = pipeline.read_source

    def timed(*args: Any) -> Any:
        began = time.perf_counter()
        try:
            return plain(*args)
        finally:
            inside.append(time.perf_counter() - began)

    setattr(pipeline, "read_source", timed)  # noqa: B010 - measured where it is called
    started = time.perf_counter()
    prepared = prepare(
        recipe, tokenizer, cache_dir=spec["cache"], progress=lambda rows, tokens: marks.append((time.time(), rows))
    )
    seconds = time.perf_counter() - started
    report = prepared.report["sets"]["train"]
    return {
        "seconds": seconds,
        "seconds_reading": sum(inside),
        "tokens": report["tokens"],
        "supervised": report["supervised"],
        "rows": report["rows"],
        "marks": marks[:: max(1, len(marks) // 200)] + marks[-1:],
    }


def bare(spec: dict[str, Any]) -> dict[str, Any]:
    """``encode_batch`` on the rendered rows, 1,000 at a time, one thread."""
    from tokenizers import Tokenizer

    from aifactory_train.config.schema import Recipe
    from aifactory_train.data import load_tokenizer
    from aifactory_train.data.template import ChatTemplate

    recipe = Recipe.model_validate({"model": {"base": spec["model"]}, "data": {"train": spec["data"]}})
    tokenizer = Tokenizer.from_str(load_tokenizer(recipe).backend_tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    template = ChatTemplate(Path(spec["template"]).read_text(), {})
    texts = [template.render(json.loads(line)["messages"]) for line in Path(spec["data"]).read_text().splitlines()]
    tokens = 0
    started = time.perf_counter()
    for at in range(0, len(texts), 1000):
        tokens += sum(len(e) for e in tokenizer.encode_batch(texts[at : at + 1000], add_special_tokens=False))
    return {"seconds": time.perf_counter() - started, "tokens": tokens, "rows": len(texts)}


def trl(spec: dict[str, Any]) -> dict[str, Any]:
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(spec["model"], local_files_only=True)
    tokenizer.chat_template = Path(spec["template"]).read_text()
    small = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    rows = load_dataset("json", data_files=spec["data"], split="train", cache_dir=spec["cache"])
    taken: list[float] = []
    plain = SFTTrainer._prepare_dataset

    def timed(self, *args, **kwargs):
        started = time.perf_counter()
        prepared = plain(self, *args, **kwargs)
        taken.append(time.perf_counter() - started)
        return prepared

    SFTTrainer._prepare_dataset = timed
    trainer = SFTTrainer(
        model=LlamaForCausalLM(small),
        args=SFTConfig(
            output_dir=str(Path(spec["cache"]) / "trl"),
            packing=True,
            max_length=PACK,
            assistant_only_loss=True,
            dataset_num_proc=spec["processes"] if spec["processes"] > 1 else None,
            shuffle_dataset=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    packed = trainer.train_dataset.with_format("numpy")
    tokens = supervised = 0
    for row in packed:
        labels, at = row["labels"], 0
        for length in row["seq_lengths"]:
            tokens += int(length)
            supervised += int((labels[at + 1 : at + length] != -100).sum())
            at += int(length)
    return {"seconds": sum(taken), "tokens": tokens, "supervised": supervised, "rows": len(rows)}


# ---- memory of a process and its children


def _anonymous(root: int) -> float:
    """GB of anonymous memory of ``root`` and everything below it."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue  # it has ended
            parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    total = 0
    for pid in parents:
        at = pid
        while at not in (root, 0, 1) and at in parents:
            at = parents[at]
        if at != root:
            continue
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
    return total * 1024 / 1e9


def watched(side: str, spec: dict[str, Any], env: dict[str, str]) -> tuple[dict[str, Any], list[tuple[float, float]]]:
    """One side in a process of its own: (its figures, [(time, GB)])."""
    readings: list[tuple[float, float]] = []
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        command = [sys.executable, __file__, "--child", side, json.dumps(spec)]
        process = subprocess.Popen(command, stdout=out, stderr=err, env={**measuring.alone(), **env})
        while process.poll() is None:
            readings.append((time.time(), _anonymous(process.pid)))
            time.sleep(0.1)
        out.seek(0), err.seek(0)
        lines = [line for line in out.read().splitlines() if line.startswith("{")]
        if process.returncode != 0 or not lines:
            raise SystemExit(f"{side} ended with {process.returncode}\n{err.read()[-3000:]}")
    return json.loads(lines[-1]), readings


# ---- the measurements


def compare(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Alternating pairs at 1 and 2 processes, and the bare tokenizer."""
    spec = _spec(options, scratch)
    env = measuring.quiet_env(scratch)
    cases = []
    for processes in options.processes:
        pairs = []
        for number in range(options.pairs):
            figures = {}
            for side in ("trl", "ours", "bare") if processes == 1 else ("trl", "ours"):
                own = {**spec, "processes": processes, "cache": str(scratch / f"{side}-{processes}-{number}")}
                result, readings = watched(side, own, {**env, "HF_DATASETS_CACHE": own["cache"]})
                figures[side] = {**result, "peak_gb": max(gb for _, gb in readings)}
            if any(figures["ours"][k] != figures["trl"][k] for k in ("tokens", "supervised", "rows")):
                raise SystemExit(f"the sides prepared different work: {figures}")
            speed = {side: f["rows"] / f["seconds"] for side, f in figures.items()}
            pair = {
                "ours_rows_per_s": round(speed["ours"], 1),
                "trl_rows_per_s": round(speed["trl"], 1),
                "speed_ratio": round(speed["ours"] / speed["trl"], 2),
                "ours_reading_rows_per_s": round(figures["ours"]["rows"] / figures["ours"]["seconds_reading"], 1),
                "ours_peak_gb": round(figures["ours"]["peak_gb"], 3),
                "trl_peak_gb": round(figures["trl"]["peak_gb"], 3),
            }
            if "bare" in speed:
                pair["bare_rows_per_s"] = round(speed["bare"], 1)
                pair["share_of_bare"] = round(speed["ours"] / speed["bare"], 3)
            pairs.append(pair)
            print(f"{processes} process(es), pair {number + 1}: {pair}", file=sys.stderr, flush=True)
        middle = {k: statistics.median(p[k] for p in pairs) for k in pairs[0]}
        middle["speed_ratio"] = min(p["speed_ratio"] for p in pairs)
        if "share_of_bare" in middle:
            middle["share_of_bare"] = min(p["share_of_bare"] for p in pairs)
        cases.append({"processes": processes, "rows": figures["ours"]["rows"], **middle, "pairs": pairs})
    return {"cases": cases}


def million(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Ours alone on very many rows: rows/s, and whether memory is flat."""
    spec = {**_spec(options, scratch), "processes": options.processes[-1], "cache": str(scratch / "prepared")}
    result, readings = watched("ours", spec, measuring.quiet_env(scratch))
    marks = result.pop("marks")
    tenth = next(at for at, rows in marks if rows >= result["rows"] / 10)
    last = marks[-1][0]
    early = max(gb for at, gb in readings if at <= tenth)
    later = max((gb for at, gb in readings if tenth < at <= last), default=early)  # over in an instant
    after = max((gb for at, gb in readings if at > last), default=later)
    return {
        "processes": spec["processes"],
        "rows": result["rows"],
        "tokens": result["tokens"],
        "seconds": round(result["seconds"], 1),
        "seconds_reading": round(result["seconds_reading"], 1),
        "rows_per_s": round(result["rows"] / result["seconds"], 1),
        "peak_gb_first_tenth": round(early, 3),
        "peak_gb_rest": round(later, 3),
        "growth": round(later / early - 1, 3),
        "peak_gb_selection": round(after, 3),
    }


def _spec(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    template = scratch / "chatml.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    kind, longest = ("short", None) if options.million else ("chat", PACK - 60)
    data = options.data or measuring.write_rows(scratch / "rows.jsonl", options.rows, longest=longest, kind=kind)
    return {
        "model": str(measuring.model_folder(options.model)),
        "template": str(template),
        "data": str(data),
        "eval": str(measuring.write_rows(scratch / "eval.jsonl", 2, seed=99)),
    }


def as_markdown(result: dict[str, Any]) -> str:
    if "cases" in result:
        header = [
            "processes",
            "ours, whole, rows/s",
            "TRL, rows/s",
            "worst pair",
            "bare encode_batch, rows/s",
            "ours of it (worst)",
            "ours, reading alone, rows/s",
            "ours, peak GB",
            "TRL, peak GB",
        ]
        rows = [
            [
                f"{c['processes']} ({c['rows']} rows, {len(c['pairs'])} pairs)",
                f"{c['ours_rows_per_s']:.0f}",
                f"{c['trl_rows_per_s']:.0f}",
                f"{c['speed_ratio']:.2f} x",
                f"{c['bare_rows_per_s']:.0f}" if "bare_rows_per_s" in c else "–",
                f"{100 * c['share_of_bare']:.0f} %" if "share_of_bare" in c else "–",
                f"{c['ours_reading_rows_per_s']:.0f}",
                f"{c['ours_peak_gb']:.2f}",
                f"{c['trl_peak_gb']:.2f}",
            ]
            for c in result["cases"]
        ]
    else:
        header = [
            "rows",
            "tokens",
            "processes",
            "seconds, whole",
            "seconds, reading",
            "rows/s, whole",
            "peak GB, first tenth",
            "peak GB, the rest",
            "growth",
            "peak GB, selection and report",
        ]
        keys = (
            "rows",
            "tokens",
            "processes",
            "seconds",
            "seconds_reading",
            "rows_per_s",
            "peak_gb_first_tenth",
            "peak_gb_rest",
            "growth",
            "peak_gb_selection",
        )
        rows = [[str(result[key]) for key in keys]]
    return measuring.table(header, rows) + "\n" + measuring.facts_text(result["facts"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one line of JSON on standard output")
    parser.add_argument("--rows", type=int, help="default: 10,000 (with --million: 1,000,000)")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--processes", type=int, action="append", help="repeatable; default: 1 and 2")
    parser.add_argument("--million", action="store_true", help="ours alone on 1,000,000 rows: memory over time")
    parser.add_argument("--data", type=Path, help="JSONL of chat rows instead of synthetic ones")
    parser.add_argument("--model", default=measuring.MODEL)
    parser.add_argument("--update-readme", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        side, spec = options.child
        print(json.dumps({"ours": ours, "bare": bare, "trl": trl}[side](json.loads(spec))))
        return 0
    options.rows = options.rows or (1_000_000 if options.million else 10_000)
    options.processes = options.processes or [1, 2]
    found = measuring.facts("trl", "datasets")
    with tempfile.TemporaryDirectory(prefix="aifactory-bench-") as name:
        result = (million if options.million else compare)(options, Path(name))
    result["facts"] = found
    if options.update_readme:
        measuring.update_readme("data-prep-million" if options.million else "data-prep", as_markdown(result))
    print(json.dumps(result) if options.json else as_markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
