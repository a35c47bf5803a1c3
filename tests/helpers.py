"""What several rooms' tests share: tiny models built in code, a small byte-level tokenizer, rows to learn from, and the
command line as a user calls it. Nothing here is downloaded; heavy imports happen inside the functions."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]

#: The families whose attention and output layer the engine must reproduce.
FAMILIES = ("llama", "qwen3", "mistral", "gemma3", "olmo2")

_COLOURS = ["red", "green", "blue", "white", "black", "yellow", "brown", "purple", "orange", "grey"]
_THINGS = ["door", "boat", "lamp", "stone", "bridge", "cup", "wheel", "roof", "scarf", "train", "map", "tower"]


def write_tokenizer(folder: Path, *, template: str | None = CHATML, eos: str = "<|im_end|>") -> Path:
    """A byte-level BPE tokenizer with about 400 tokens, ChatML and ``<|im_end|>`` as end of turn, saved like any
    other.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    corpus = [row_text(i) for i in range(200)] + ["Štítná žláza, naïve, 東京, Ελλάδα, größer"] * 3
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=None, eos_token=eos, pad_token="<|pad|>", model_max_length=512
    )
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def tiny_config(family: str = "llama", *, vocabulary: int = 400, layers: int = 2, tied: bool = True, **more: Any):
    """The transformers configuration of a model with about 100,000 parameters."""
    import transformers as tf

    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    if family == "llama":
        return tf.LlamaConfig(**{**shape, **more})
    if family == "qwen2":
        return tf.Qwen2Config(**{**shape, **more})
    if family == "qwen3":
        return tf.Qwen3Config(**{**shape, "head_dim": 16, **more})
    if family == "mistral":
        return tf.MistralConfig(**{**shape, "sliding_window": None, **more})
    if family == "gemma3":
        return tf.Gemma3TextConfig(
            **{**shape, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 256, **more}
        )
    if family == "olmo2":
        return tf.Olmo2Config(**{**shape, **more})
    raise ValueError(family)


def tiny_model(family: str = "llama", *, seed: int = 0, **more: Any):
    """A randomly initialised ``...ForCausalLM`` in fp32 on the CPU (norm weights perturbed so that they matter)."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **more), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(2.0)  # attention scores spread enough for mistakes to show
    return model.eval()


def write_model(
    folder: Path, family: str = "llama", *, template: str | None = CHATML, eos: str = "<|im_end|>", **more: Any
) -> Path:
    """A model folder (config, safetensors, tokenizer) as a user would have it on disk."""
    tiny_model(family, **more).save_pretrained(folder)
    return write_tokenizer(folder, template=template, eos=eos)


def row_text(i: int) -> str:
    colour, thing = _COLOURS[(i * 7 + i // 11) % len(_COLOURS)], _THINGS[i % len(_THINGS)]
    return f"The {thing} number {i} is {colour}."


def chat_rows(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Rows with ids, of unequal lengths (answers of 1 to 4 sentences), all different."""
    rows = []
    for i in range(start, start + count):
        thing = _THINGS[i % len(_THINGS)]
        answer = " ".join(row_text(i + 1000 * k) for k in range(1 + i % 4))
        messages = [
            {"role": "user", "content": f"What colour is the {thing} number {i}?"},
            {"role": "assistant", "content": answer},
        ]
        rows.append({"id": f"row-{i}", "messages": messages})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(
    folder: Path, model: Path, *, rows: int = 48, eval_rows: int = 12, settings: dict[str, Any] | None = None
) -> Path:
    """``recipe.yaml`` with ``train.jsonl`` and ``eval.jsonl`` beside it. ``settings`` are dotted keys:
    ``{"train.epochs": 2}``.
    """
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "train.jsonl", chat_rows(rows))
    write_jsonl(folder / "eval.jsonl", chat_rows(eval_rows, start=500))
    tree: dict[str, Any] = {
        "id": "test/tiny",
        "model": {"base": str(model), "licence": "Apache-2.0"},
        "adapter": {"kind": "lora", "rank": 4, "alpha": 8},
        "data": {
            "train": [{"source": "./train.jsonl", "licence": "CC0-1.0"}],
            "eval": [{"source": "./eval.jsonl", "licence": "CC0-1.0"}],
            "sequence_length": 256,
            "workers": 1,
        },
        "train": {"max_steps": 4, "batch_rows": 8, "micro_batch_tokens": 512, "learning_rate": 1.0e-2, "seed": 3},
        "eval": {"generate_rows": 0},
        "logging": {"tensorboard": False},
    }
    for key, value in (settings or {}).items():
        node = tree
        *blocks, last = key.split(".")
        for block in blocks:
            node = node.setdefault(block, {})
        node[last] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


# ---- ranks


def reserved_port() -> socket.socket:
    """A socket that keeps a free port of 127.0.0.1 (``.getsockname()[1]``) for ranks that will listen there seconds
    later.

    Nobody else is given the port while it is open; torch's store, which sets SO_REUSEADDR too, may listen at it. Close
    it when the ranks are gone.
    """
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    return kept


# ---- the command line, as a user calls it


def environment(**more: str) -> dict[str, str]:
    """The environment of a child: one thread, no network, a terminal of known width."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env.update({"COLUMNS": "110", "PYTHONDONTWRITEBYTECODE": "1"})
    env.pop("AIFACTORY_DEBUG", None)
    return {**env, **more}


def cli(*args: Any, cwd: Path, timeout: float = 300, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """``aifactory ARGS`` in a fresh process (text mode, both streams captured)."""
    command = [sys.executable, "-m", "aifactory_train", *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env=env or environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def torchrun(
    ranks: int, *args: Any, cwd: Path, timeout: float = 300, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """``torchrun --nproc-per-node RANKS -m aifactory_train ARGS`` on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "aifactory_train", *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env=env or environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def refused(result: subprocess.CompletedProcess, *words: str) -> str:
    """Assert exit 2, one message without a traceback that holds all ``words``; returns the message."""
    assert result.returncode == 2, (result.returncode, result.stdout[-2000:], result.stderr[-3000:])
    assert "Traceback" not in result.stderr, result.stderr[-3000:]
    for word in words:
        assert word in result.stderr, (word, result.stderr)
    return result.stderr


def costs_little(start: Callable[[], subprocess.CompletedProcess[str]], *, seconds: float, times: float) -> None:
    """Assert that a command takes at most ``seconds`` of processor time, or on a slower machine at most ``times`` what
    importing its libraries costs there.

    Each try is compared with an import just before it, because what else runs on this machine slows both; the best of
    six counts.
    """
    libraries = [sys.executable, "-c", "import pydantic, yaml, jinja2; from pydantic import BaseModel"]
    tried = []
    for _ in range(6):
        alone = _processor_time(lambda: subprocess.run(libraries, capture_output=True, text=True, check=False))
        tried.append((_processor_time(start), alone))
        if tried[-1][0] < max(seconds, times * alone):
            return
    raise AssertionError(f"(seconds of the command, of its libraries alone): {tried}")


def _processor_time(start: Callable[[], subprocess.CompletedProcess[str]]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = start()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
