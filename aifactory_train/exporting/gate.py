"""The gate: an export is loaded by a fresh process and must compute what the trained model computes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aifactory_train.core.errors import RunFailed
from aifactory_train.core.fresh_process import environment
from aifactory_train.model.attention import Documents
from aifactory_train.model.causal_lm import CausalLM, Forward
from aifactory_train.model.cpu_matmul import as_torch
from aifactory_train.model.head import Outputs
from aifactory_train.private import redact, vault

if TYPE_CHECKING:
    from aifactory_train.data import PreparedData, TokenDataset


#: Held-out rows that the gate compares, their longest length, and the places compared at the end of each.
GATE_ROWS, GATE_TOKENS, GATE_POSITIONS = 8, 256, 16


#: Largest difference of a logit, relative to the largest |logit| (fp32; matrix products in another order differ by this
#: much).
ADAPTER_LIMIT, FP32_LIMIT = 1e-6, 1e-5


#: bf16 has 8 bits of precision, and its rounding adds up over the layers: on a 135M model logits moved by 3 % of the
#: largest one, with a mean KL of 0.0016 nats. The same best token at this share of the decisive places at least (where
#: the best token leads the second by more than that movement), and at most this mean KL in nats. A wrong merge is found
#: before, in fp32.
BF16_TOP1, BF16_KL, BF16_TIE = 0.98, 0.02, 2.0**-5


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class GateVerdict:
    """Outcome of the gate for one exported folder; stored in its ``verification.json``."""

    kind: str  # adapter | model | merged
    dtype: str
    rows: int
    places: int
    decisive_places: int  # where the best token leads clearly
    difference: float  # largest |logit difference| / largest |logit|
    top1_agreement: float
    mean_kl: float  # nats
    limit: str
    passed: bool


def gate_rows(data: PreparedData) -> list[list[int]]:
    """Token ids of a few held-out rows, evenly spaced over the first evaluation set, cut to :data:`GATE_TOKENS`."""
    from aifactory_train.evaluation.likelihood import choose_rows

    held: TokenDataset = next(iter(data.evals.values()))
    if redact.is_active():  # the rows go through a file to another process: protected texts must not
        count = int(data.tokenizer_info.get("vocabulary") or 256)
        draw = torch.Generator().manual_seed(0)
        return [torch.randint(0, count, (64,), generator=draw).tolist() for _ in range(GATE_ROWS)]
    return [held.tokens(int(i))[:GATE_TOKENS].tolist() for i in choose_rows(len(held), GATE_ROWS)]


def unpadded(row: list[int], pad_id: int) -> list[int]:
    """A row for a classifier, which reads the last token that is no padding: it must end with another one."""
    end = max((i for i, token in enumerate(row) if token != pad_id), default=0)
    return row[: end + 1]


@torch.no_grad()
def reference_logits(core: CausalLM, rows: list[list[int]], pooling: str | None = None) -> list[torch.Tensor]:
    """fp32 ``[places, V]`` of the last places of each row, through our attention; the model's mode is restored.

    Of a model with a head its outputs, ``[1, outputs]``; with ``pooling`` the vector of each row, ``[1, D]``.

    Products are torch's own here, as they are in the process that reloads the files: summed in another order, the
    logits of a 135M model move by 2e-6, which is more than the gate lets pass.
    """
    was_training = core.training
    core.eval()
    try:
        out = []
        for row in rows:
            ids = torch.tensor([row])
            documents = Documents.of(torch.tensor([0, len(row)]), "cpu")
            places = torch.arange(max(0, len(row) - GATE_POSITIONS), len(row))
            with as_torch():
                positions = torch.arange(len(row)).unsqueeze(0)
                if pooling is not None:
                    hidden = core(ids, positions, documents, task=Forward.HIDDEN)
                    out.append(pooled(hidden, pooling))
                    continue
                if core.head is not None:
                    out.append(core(ids, positions, documents, places[-1:], places[-1:], objective=Outputs()))
                    continue
                out.append(core(ids, positions, documents, places, task=Forward.LOGITS))
        return out
    finally:
        core.train(was_training)


@torch.no_grad()
def plain_logits(model, rows: list[list[int]], pooling: str | None = None) -> list[torch.Tensor]:
    """The same places from a transformers model in this process, or the outputs of a classifier, or vectors."""
    if pooling is not None:
        return [pooled(model.base_model(torch.tensor([row])).last_hidden_state[0], pooling) for row in rows]
    if getattr(model, "score", None) is not None:
        return [model(torch.tensor([row])).logits.float() for row in rows]
    return [model(torch.tensor([row]), logits_to_keep=min(GATE_POSITIONS, len(row))).logits[0].float() for row in rows]


def pooled(hidden: torch.Tensor, pooling: str) -> torch.Tensor:
    """The vector ``[1, D]`` of a text's hidden states ``[T, D]``."""
    return hidden[-1:].float() if pooling == "last_token" else hidden.float().mean(dim=0, keepdim=True)


def reload_logits(checks: list[dict[str, Any]], rows: list[list[int]]) -> dict[str, list[torch.Tensor]]:
    """Run :mod:`aifactory_train.exporting.reload_check` in a fresh process without this project, offline, on the
    CPU.
    """
    from safetensors.torch import load_file

    script = Path(__file__).with_name("reload_check.py").read_text(encoding="utf-8")
    env = environment(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    with tempfile.TemporaryDirectory(prefix="aifactory-gate-") as scratch:
        job, out = Path(scratch) / "job.json", Path(scratch) / "logits.safetensors"
        job.write_text(
            json.dumps(
                {
                    "checks": checks,
                    "rows": rows,
                    "positions": GATE_POSITIONS,
                    "threads": torch.get_num_threads(),
                    "out": str(out),
                }
            ),
            encoding="utf-8",
        )
        done = subprocess.run(
            [sys.executable, "-", str(job)],
            input=script,
            cwd=scratch,
            env=env,
            capture_output=True,
            text=True,
            check=False,
            pass_fds=vault.held(),
        )
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit code {done.returncode}"]
            raise RunFailed(
                f"plain transformers and peft cannot load the export: {last[0].strip()}",
                where=checks[0]["adapter"] or checks[0]["base"],
            )
        tensors = load_file(out)
    return {c["name"]: [tensors[f"{c['name']}.{i}"] for i in range(len(rows))] for c in checks}


def relative(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Largest |difference| over the largest |logit|; NaN where a value is not finite, and where every logit is zero."""
    largest = max(e.abs().max().item() for e in expected)
    if largest == 0.0:
        return math.nan
    return max((e - f).abs().max().item() for e, f in zip(expected, found, strict=True)) / largest


def judge(
    kind: str, dtype: str, expected: list[torch.Tensor], found: list[torch.Tensor], *, bound: float | None = None
) -> GateVerdict:
    """Compare logits, lists of fp32 ``[places, V]``. Anything not finite fails. ``bound``: the limit in fp32, where it
    is not that of the kind.
    """
    reference, other = torch.cat(expected), torch.cat(found)
    difference = relative(expected, found)
    best = reference.topk(min(2, reference.shape[1]), dim=1).values
    decisive = (best[:, 0] - best[:, -1]) > (0.0 if dtype == "fp32" else BF16_TIE * reference.abs().max())
    same = (reference.argmax(1) == other.argmax(1))[decisive]
    top1 = same.float().mean().item() if len(same) else 1.0
    p, q = reference.double().log_softmax(1), other.double().log_softmax(1)
    kl = (p.exp() * (p - q)).sum(1).mean().item()
    if dtype == "fp32":
        if bound is None:
            bound = ADAPTER_LIMIT if kind == "adapter" else FP32_LIMIT
        limit, passed = f"relative difference at most {bound:.0e}", difference <= bound
    else:
        limit = f"top-1 agreement at least {BF16_TOP1} at decisive places, mean KL at most {BF16_KL} nats"
        passed = top1 >= BF16_TOP1 and kl <= BF16_KL
    passed = bool(passed) and math.isfinite(difference)
    places, decided = len(reference), int(decisive.sum())
    return GateVerdict(kind, dtype, len(expected), places, decided, difference, top1, kl, limit, passed)


def is_plain_fp32(core: CausalLM) -> bool:
    """Whole fp32 parameters on the CPU: this very model can be asked for logits."""
    return all(
        p.device.type == "cpu"
        and p.dtype == torch.float32
        and not hasattr(p, "device_mesh")
        and not hasattr(p, "ds_id")
        for p in core.parameters()
    )
