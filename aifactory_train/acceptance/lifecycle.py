"""A run from its first row to its export, and the export by itself: the same scores, the same answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from aifactory_train.acceptance import processes, small
from aifactory_train.acceptance.report import NotHere, Report

#: Largest difference of a held-out figure (relative) between the run and its export. On a GPU the run computes in bf16.
SAME_CPU, SAME_GPU = 1e-3, 3e-2


def check(report: Report) -> None:
    """Train, evaluate, answer, export through the gate; then ``eval`` on the run and transformers on the export."""
    report.work.mkdir(parents=True, exist_ok=True)
    threads = {} if report.gpu else {"parallel__threads": 1}
    recipe = small.run_files(report.work / "files", eval__generate_rows=2, eval__max_new_tokens=8, train__max_steps=4,
                             export__merge=True, **threads)  # fmt: skip
    run, log = report.work / "run", report.work / "train.log"
    report.begin("train, evaluate, generate, export")
    code, _ = processes.call("train", recipe, "--run-dir", run, "--quiet", log=log, fork=not report.gpu)
    if not report.expect(code == 0, f"the run ended with {code}: {processes.end_of(log)}"):
        return
    results = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    before, after = (results[when]["loss"] for when in ("before", "after"))
    exports = sorted(path.name for path in (run / "export").iterdir())
    report.figures |= {"loss_before": before, "loss_after": after, "exports": exports}
    report.expect(math.isfinite(after) and after < before, f"held-out loss went from {before:.4g} to {after:.4g}")
    with report.part("aifactory eval"):
        again(report, run, recipe.parent / "eval.jsonl", log, after)
    with report.part("the export in transformers"):
        reloaded(report, run / "export", recipe.parent / "eval.jsonl", after)
    with report.part("padded answers"):
        answers(report, run)


def again(report: Report, run: Path, rows: Path, log: Path, after: float) -> None:
    """``aifactory eval`` on the held-out rows gives what the run itself found."""
    code, out = processes.call("eval", run, "--data", rows, "--no-generate", "--json", log=log, fork=not report.gpu)
    if not report.expect(code == 0, f"eval ended with {code}: {processes.end_of(log)}"):
        return
    found = json.loads(out)["loss"]
    close(report, "aifactory eval", found, after)


def close(report: Report, what: str, found: float, wanted: float) -> None:
    allowed = SAME_GPU if report.gpu else SAME_CPU
    off = abs(found - wanted) / abs(wanted)
    report.figures[f"loss by {what}"] = found
    report.expect(off <= allowed, f"{what}: {found:.5g} per token, the run found {wanted:.5g}")


def reloaded(report: Report, export: Path, rows: Path, after: float) -> None:
    """The merged weights through transformers alone, on the device, row by row."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = next((p for p in export.iterdir() if (p / "model.safetensors").is_file()), None)
    if folder is None:
        raise NotHere("no merged weights were exported")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    model = model.to(report.device).eval()
    total, count = 0.0, 0
    for line in rows.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
        begin = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        ids = torch.tensor(tokenizer(whole, add_special_tokens=False)["input_ids"], device=report.device)
        with torch.no_grad():
            logits = model(ids[None]).logits[0, begin - 1 : -1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[begin:], reduction="sum"))
        count += len(ids) - begin
    close(report, "the export in transformers", total / count, after)


def answers(report: Report, run: Path) -> None:
    """Prompts of unequal length, answered together (padded) and each alone."""
    from aifactory_train.evaluation.generate import generate
    from aifactory_train.model.trained import load_trained
    from aifactory_train.run.folder import RunFolder

    model, tokenizer, _ = load_trained(RunFolder(run), report.device)
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"]
               for text in ("The door", "What colour is number 12? The", "The train number 7 is")]  # fmt: skip
    how: dict[str, Any] = {"max_new_tokens": 8, "stop_ids": [2], "pad_id": 3, "device": report.device}
    together = generate(model, prompts, **how)
    alone = [generate(model, [prompt], **how)[0] for prompt in prompts]
    same = sum(a == b for a, b in zip(together, alone, strict=True))
    report.figures["padded_answers_equal"] = f"{same} of {len(prompts)}"
    # In bf16 two tokens may be equally likely, and the order of a sum decides.
    other = len(prompts) - same
    report.expect(other <= bool(report.gpu), f"{other} of {len(prompts)} answers depend on the prompts beside them")
