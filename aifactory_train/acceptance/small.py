"""A tiny model, its batches and its runs, made in code: what the checks compute on. Heavy imports inside."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.parallel.engine import DeviceBatch, Engine
    from aifactory_train.parallel.world import World

VOCABULARY = 512
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
#: Compute and frozen weights in bf16 from fp32 masters: what GPUs that have bf16 do by default.
HALF = {"compute": "bf16", "frozen": "bf16"}
DOCUMENTS, STEPS = 8, 20


def config(**more: Any) -> Any:
    """A Llama of 0.4 million parameters, or with ``more`` of any size."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 2,
            "pad_token_id": 3,
            **SHAPE,
            **more,
        }
    )


def recipe(**case: Any) -> Recipe:
    """``engine``, ``adapter``, ``checkpointing``, ``compile``, ``kernels``, ``precision``, ``shard_size``, ``tokens``,
    ``length``; the rest keeps its default."""
    from aifactory_train.config.schema import Recipe as Schema

    return Schema.model_validate(
        {
            "model": {"base": "none", "attention": case.get("attention", "auto")},
            "data": {"train": ["none.jsonl"], "sequence_length": case.get("length", 512)},
            "adapter": {"kind": case.get("adapter", "none"), "rank": 8, "alpha": 16},
            "train": {
                "learning_rate": 3e-3,
                "max_grad_norm": 1.0,
                "weight_decay": 0.1,
                "micro_batch_tokens": case.get("tokens", 4096),
            },
            "parallel": {
                "engine": case.get("engine", "ddp"),
                "shard_size": case.get("shard_size"),
                "activation_checkpointing": case.get("checkpointing", "none"),
                "compile": case.get("compile", False),
            },
            "precision": case.get("precision", {}),
            "kernels": {"enabled": case.get("kernels", "auto")},
        }
    )


def engine(world: World, **case: Any) -> Engine:
    """An engine around a tiny model, put together as the trainer does. ``shape``: changes of its dimensions."""
    return engine_of(recipe(**case), world, case.get("shape"))


def engine_of(settings: Recipe, world: World, shape: dict[str, Any] | None = None) -> Engine:
    """As :func:`engine`, for a recipe."""
    import torch
    from transformers import AutoModelForCausalLM

    from aifactory_train.model import attention, attention_choice
    from aifactory_train.model.adapters import apply_adapter
    from aifactory_train.model.causal_lm import CausalLM
    from aifactory_train.model.operators import apply_operators
    from aifactory_train.model.precision import apply_precision, choose_precision
    from aifactory_train.model.report import ModelReport
    from aifactory_train.parallel.build import build_engine
    from aifactory_train.parallel.traits import traits_of

    name, report = settings.parallel.engine, ModelReport()
    precision, _ = choose_precision(settings, world.device)
    attention.register()
    torch.manual_seed(0)
    dimensions = config(**(shape or {}))
    with torch.device(world.device if shape else "cpu"):  # a large one is made where it is used
        model = AutoModelForCausalLM.from_config(dimensions, dtype=torch.float32)
    chosen, _ = attention_choice.choose(
        settings.model.attention,
        world.device,
        precision.compute,
        heads=attention_choice.heads_of(dimensions),
        compiled=settings.parallel.compile,
    )
    model.set_attn_implementation(chosen)
    model.config.use_cache = False
    torch.manual_seed(5)
    adapted: Any = apply_adapter(model, settings, report)
    if settings.adapter.kind != "none":
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:  # it starts at zero, where half of the gradients are zero too
                torch.nn.init.normal_(parameter, std=0.02)
    apply_precision(adapted, precision)
    core = CausalLM(adapted.to(world.device), loss_rows=settings.train.loss_chunk_tokens)
    weights = traits_of(name).weights
    apply_operators(core, settings, device=world.device, engine=name, weights=weights, report=report)
    return build_engine(name, core, settings, precision, world)


def documents(step: int, count: int = DOCUMENTS) -> list[tuple[list[int], int]]:
    """``(tokens, how many of the last are supervised)`` of a step; four steps, repeated."""
    dice = random.Random(step % 4)
    found = []
    for _ in range(count):
        length = dice.randint(4, 40)
        start, stride = dice.randrange(VOCABULARY), dice.choice([1, 3, 7])
        found.append(([(start + stride * i) % VOCABULARY for i in range(length)], dice.randint(1, length - 1)))
    return found


def batch(given: list[tuple[list[int], int]], device: str) -> DeviceBatch:
    """The documents packed into one row. Without any: one token that carries no loss."""
    import torch

    from aifactory_train.model.attention import Documents
    from aifactory_train.parallel.engine import DeviceBatch as Batch

    tokens: list[int] = []
    places: list[int] = []
    positions, targets, edges = [], [], [0]
    for ids, supervised in given:
        begin = len(tokens)
        positions += [begin + i for i in range(len(ids) - 1 - supervised, len(ids) - 1)]
        targets += ids[len(ids) - supervised :]
        tokens += ids
        places += range(len(ids))
        edges.append(len(tokens))
    if not given:
        tokens, places, edges = [0], [0], [0, 1]

    def row(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    bounds = Documents.of(torch.tensor(edges, dtype=torch.int32), device)
    return Batch(row(tokens)[None], row(places)[None], bounds, row(positions), row(targets))


def full_batch(tokens: int, length: int, device: str, vocabulary: int = VOCABULARY) -> DeviceBatch:
    """``tokens`` tokens in documents of ``length``, all supervised."""
    dice = random.Random(tokens)
    ids = [dice.choices(range(vocabulary), k=min(length, tokens - at)) for at in range(0, tokens, length)]
    return batch([(one, max(1, len(one) - 1)) for one in ids if len(one) > 1], device)


def preference_batch(given: list[tuple[list[int], int]], device: str) -> DeviceBatch:
    """The documents as pairs, the first of each chosen, with the objective of DPO against a reference that is fixed."""
    import torch

    from aifactory_train.config.schema import PreferenceConfig
    from aifactory_train.methods.preference_loss import SUMS, PairObjective

    found = batch(given, device)
    counts = [supervised for _, supervised in given]
    floats: dict[str, Any] = {"dtype": torch.float32, "device": device}
    lengths = torch.tensor(counts, **floats)
    found.objective = PairObjective(
        settings=PreferenceConfig(kind="dpo"),
        counts=counts,
        answers=torch.arange(len(counts), device=device),
        lengths=lengths,
        reference=-6.0 * lengths,
        desirable=torch.tensor([i % 2 == 0 for i in range(len(counts))], device=device),
        replayed=torch.empty(0, dtype=torch.int64, device=device),
        replay_tokens=0,
        replay_scale=0.0,
        baseline=0.0,
        sums=torch.zeros(len(SUMS), dtype=torch.float64, device=device),
    )
    return found


def step(running: Engine, world: World, number: int, *, preference: bool = False, rate: float = 3e-3) -> float:
    """One optimizer step with the arithmetic of the trainer's; the mean loss over all ranks."""
    import torch
    import torch.distributed as dist

    from aifactory_train.parallel.torch_engine import split_scale

    all_of_it = documents(number)
    mine = all_of_it[world.rank :: world.size]
    units = len(all_of_it) // 2 if preference else sum(count for _, count in all_of_it)
    power, rest = split_scale(1.0 / units)
    made = (preference_batch if preference else batch)(mine, world.device)
    loss = running.forward_backward(made, power, last=True).double()
    norm = running.clip(1.0, rest)
    dist.all_reduce(loss)
    mean, _ = torch.stack([loss, norm.to(loss)]).tolist()
    running.step(rate)
    return mean / units


def curve(world: World, steps: int = STEPS, **case: Any) -> list[float]:
    """The losses of ``steps`` steps."""
    import gc

    running = engine(world, **case)
    losses = [step(running, world, number, preference=case.get("preference", False)) for number in range(steps)]
    del running
    gc.collect()  # DeepSpeed's engines are cycles
    return losses


def deviation(found: list[float], exact: list[float]) -> float:
    """The largest relative difference of two curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, exact, strict=True))


def on_cpu(world: World) -> World:
    """The same rank, computing on the CPU."""
    return dataclasses.replace(world, device="cpu")


# ---- whole runs


CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def model_folder(folder: Path, **shape: Any) -> Path:
    """A model with its tokenizer as a user would have it on disk."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config(**shape), dtype=torch.float32).save_pretrained(folder)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([text(i) for i in range(100)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    return folder


def text(number: int) -> str:
    things = ("door", "boat", "lamp", "stone", "bridge", "cup", "wheel", "roof", "scarf", "train", "map", "tower")
    colours = ("red", "green", "blue", "white", "black", "yellow", "brown", "purple", "orange")
    return f"The {things[number % 12]} number {number} is {colours[(number * 7) % 9]}."


def run_files(folder: Path, **settings: Any) -> Path:
    """A recipe with its model and rows, as files; ``settings`` are dotted keys (dots as ``__``)."""
    folder.mkdir(parents=True, exist_ok=True)
    base = model_folder(folder / "model")
    rows = [
        {"id": f"row-{i}", "messages": [
            {"role": "user", "content": f"What colour is number {i}?"},
            {"role": "assistant", "content": " ".join(text(i + 100 * k) for k in range(1 + i % 3))},
        ]}
        for i in range(60)
    ]  # fmt: skip
    for name, some in (("train", rows[:48]), ("eval", rows[48:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    tree: dict[str, Any] = {
        "id": "acceptance/tiny",
        "model": {"base": str(base), "licence": "Apache-2.0"},
        "adapter": {"kind": "lora", "rank": 8, "alpha": 16},
        "data": {
            "train": [{"source": "./train.jsonl", "licence": "CC0-1.0"}],
            "eval": [{"source": "./eval.jsonl", "licence": "CC0-1.0"}],
            "sequence_length": 256,
            "workers": 1,
        },
        "train": {"max_steps": 6, "batch_rows": 8, "micro_batch_tokens": 512, "learning_rate": 1e-2, "seed": 3},
        "eval": {"generate_rows": 0},
        "logging": {"tensorboard": False},
    }
    for key, value in settings.items():
        *blocks, last = key.split("__")
        node = tree
        for block in blocks:
            node = node.setdefault(block, {})
        node[last] = value
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return path
