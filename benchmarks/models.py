"""Does every model that transformers has train here? A tiny model of each family, through the command that users call.

    python benchmarks/models.py [--json] [--only FAMILY ...] [--tenth N] [--quick] [--write] [--jobs N]

For each class of transformers' causal language models (aliases of one class count once) a small copy of its default
configuration (every kind of layer, few and narrow) is written as a model folder and trained for two steps by
``aifactory train`` with LoRA on ``all-linear``: start-up check, packs, evaluation, generated answers, export, and the
export read again by plain transformers and peft, whose logits must be those of the trained model. The reading runs in
the same process as the rest, to save the start of one. A family whose default configuration cannot be built gets the
values in ``SETTINGS``; one that does not come out small is listed with the reason, and so is one that is no causal
decoder: alone, computed by transformers, its earlier logits change with a later token.

``--write`` writes ``aifactory_train/model/data/families.json``, which ``aifactory models`` answers from, and
``docs/models.md``. ``--quick`` makes no run: start-up check, adapter, the loss and the gradients of one step against
transformers' loss; ``exported`` stays unknown. ``--tenth N`` takes every tenth family, beginning with the N-th.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "aifactory_train" / "model" / "data" / "families.json"
PAGE = ROOT / "docs" / "models.md"
#: Values without which transformers' default configuration cannot be built or run.
SETTINGS: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
    "rwkv": {"hidden_size": 64, "attention_hidden_size": 64, "num_hidden_layers": 2},
    "xmod": {"default_language": "en_XX"},
}
#: Encoders that transformers builds as decoders on request.
DECODER = {"is_decoder": True}
#: Tokens of the small vocabulary, and how long one family may take (s).
VOCABULARY, PATIENCE = 512, 900
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
EXCLUDED, UNBUILT, REFUSED, FAILED = "excluded", "cannot be built tiny", "refused", "failed"


def families() -> dict[str, str]:
    """Model type -> class, one class once: under the type whose configuration bears its name, else the first."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES as CONFIGS
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    chosen: dict[str, str] = {}
    for kind, name in NAMES.items():
        if name not in chosen or CONFIGS.get(kind, "").removesuffix("Config") == name.partition("For")[0]:
            chosen[name] = kind
    return {kind: name for name, kind in chosen.items()}


def aliases() -> dict[str, str]:
    """Model type -> the family that stands for its class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    first = {name: kind for kind, name in families().items()}
    return {kind: first[name] for kind, name in NAMES.items() if first[name] != kind}


def configuration(family: str) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, **SETTINGS.get(family, {}))
    if getattr(config, "is_decoder", None) is False and not getattr(config, "is_encoder_decoder", False):
        config = AutoConfig.for_model(family, **{**SETTINGS.get(family, {}), **DECODER})
    return config


def write_tokenizer(folder: Path) -> None:
    """Bytes and a few special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|pad|>", "<|end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def write_recipe(folder: Path, base: Path) -> Path:
    """Twelve rows to learn and four held out, two steps, with everything that a run does."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, first, count in (("train", 0, 12), ("eval", 100, 4)):
        rows = [
            {
                "id": str(i),
                "messages": [
                    {"role": "user", "content": f"{i}?"},
                    {"role": "assistant", "content": f"It is {'very ' * (i % 4)}{i}."},
                ],
            }
            for i in range(first, first + count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tree = {
        "id": "benchmark/models",
        "model": {"base": str(base), "licence": "unknown"},
        "adapter": {"kind": "lora", "rank": 4, "alpha": 8},
        "data": {
            "train": [{"source": "./train.jsonl", "licence": "CC0-1.0"}],
            "eval": [{"source": "./eval.jsonl", "licence": "CC0-1.0"}],
            "sequence_length": 48, "workers": 1,
        },
        "train": {"max_steps": 2, "batch_rows": 6, "micro_batch_tokens": 128, "learning_rate": 1.0e-3, "seed": 3},
        "eval": {"generate_rows": 2, "max_new_tokens": 3},
        "logging": {"tensorboard": False},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return path


# ---- one family


def row_of(family: str, name: str, folder: Path, quick: bool) -> dict[str, Any]:
    """One row of the table; writes below ``folder``. ``quick``: without a run."""
    import torch

    from aifactory_train.model import position_check, small_copy

    small_copy.VOCABULARY = VOCABULARY
    row: dict[str, Any] = {
        "family": family, "class": name, "trains": UNBUILT, "packed_equals_alone": None, "lora": None, "kernels": None,
        "planned": None, "exported": None, "gguf": None, "why": "",
    }  # fmt: skip
    position_check.register()
    try:
        config = configuration(family)
        with small_copy.quietly(), torch.no_grad():
            torch.manual_seed(0)
            small, plain, tokens, expected = small_copy.small_plain(config, False)
            if sees_the_future(plain, tokens[1], expected[1]):
                why = "no causal decoder: in transformers itself its logits change with later tokens"
                return {**row, "trains": EXCLUDED, "why": why}
        base = folder / "base"
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(plain.config, key, None) is not None:
                setattr(plain.config, key, 1)
        if not quick:
            plain.generation_config = type(plain.generation_config)()
            plain.save_pretrained(base)
    except Exception as error:  # whatever a default configuration lacks
        return {**row, "why": small_copy.one_line(error)[:200]}
    row |= {"planned": planned(config), "gguf": gguf(config), "kernels": kernels(plain)}
    if quick:
        try:
            return row | stepped(config, small, plain, tokens, expected)
        except Exception as error:
            return {**row, "trains": FAILED, "why": small_copy.one_line(error)}
    write_tokenizer(base)
    return row | trained(folder, base)


def sees_the_future(plain: Any, tokens: Any, expected: Any) -> bool:
    changed = tokens.clone()
    cut = len(changed) // 2
    changed[cut:] = (changed[cut:] + 11) % (VOCABULARY - 8) + 8
    logits = plain(input_ids=changed[None], use_cache=False).logits[0].float()
    return float((logits[:cut] - expected[:cut]).abs().max()) > 1e-5 * float(expected.abs().max())


def stepped(config: Any, small: Any, plain: Any, tokens: list[Any], expected: list[Any]) -> dict[str, Any]:
    """The start-up check, and one step with adapters in memory: its loss must be that of the logits ``expected``."""
    import torch

    from aifactory_train.config.schema import Recipe
    from aifactory_train.core.errors import UserError
    from aifactory_train.model import position_check, small_copy
    from aifactory_train.model.adapters import apply_adapter
    from aifactory_train.model.attention import PER_DOCUMENT, Documents
    from aifactory_train.model.causal_lm import CausalLM
    from aifactory_train.model.report import ModelReport

    verdict = position_check.examine(config)
    packed, own = verdict.batching == "packed", verdict.attention == "own"
    row: dict[str, Any] = {"packed_equals_alone": packed, "why": "" if packed else verdict.why}
    if verdict.error is not None:
        return row | {"trains": REFUSED}
    recipe = Recipe.model_validate({"model": {"base": "x"}, "data": {"train": "x.jsonl"}})
    try:
        with torch.no_grad():
            model = small_copy.build(small, "eager" if own else PER_DOCUMENT, False)
        model.load_state_dict(plain.state_dict())
        core = CausalLM(apply_adapter(model, recipe, ModelReport()), own=own).train()
    except UserError as error:
        return row | {"trains": REFUSED, "why": error.what}
    lengths = [len(t) for t in tokens] if packed else [max(map(len, tokens))] * len(tokens)
    ids = torch.cat([torch.cat([t, t.new_zeros(n - len(t))]) for t, n in zip(tokens, lengths, strict=True)])
    starts = torch.tensor([0, *lengths]).cumsum(0)
    at = torch.cat([torch.arange(len(t) - 1) + s for t, s in zip(tokens, starts.tolist(), strict=False)])
    shape = (1, -1) if packed else (len(tokens), -1)
    places = torch.cat([torch.arange(n) for n in lengths]).view(shape)
    core.eval()  # no dropout: the loss is compared
    loss = core(ids.view(shape), places, Documents.of(starts, "cpu"), at, ids[at + 1])
    loss.backward()
    pairs = zip(expected, tokens, strict=True)
    nll = sum(torch.nn.functional.cross_entropy(e[:-1], t[1:], reduction="sum") for e, t in pairs)
    moved = [p.grad for n, p in core.named_parameters() if "lora_B" in n and p.grad is not None]
    if abs(loss.item() - float(nll)) > 1e-5 * float(nll) or not moved or not all(g.isfinite().all() for g in moved):
        return row | {"trains": FAILED, "why": f"loss {loss.item():.6g} for {float(nll):.6g}, {len(moved)} gradients"}
    config_of_adapter = next(iter(core.model.peft_config.values()))
    targets = sorted({str(t).rpartition(".")[2] for t in config_of_adapter.target_modules})
    words = ("packed" if packed else "one document a row") + (", its own attention" if own else "")
    return row | {"trains": words, "lora": ", ".join(targets)}


def trained(folder: Path, base: Path) -> dict[str, Any]:
    """What ``aifactory train`` made of the model folder ``base``."""
    from aifactory_train import cli

    recipe = write_recipe(folder / "recipe", base)
    os.environ["AIFACTORY_CACHE"] = str(folder / "cache")
    out, run = folder / "out.txt", folder / "run"
    with out.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            with reloaded_here():
                code = cli.main(["train", str(recipe), "--run-dir", str(run)])
        except BaseException:
            traceback.print_exc(file=file)
            code = 70
    text = out.read_text(encoding="utf-8")
    verdict = next((json.loads(p.read_text()) for p in (folder / "cache").glob("position-checks/*.json")), {})
    found: dict[str, Any] = {"packed_equals_alone": verdict.get("batching") == "packed"}
    if code == 2:
        message = text[text.rfind("aifactory train:") :].splitlines()
        return found | {"trains": REFUSED, "why": " ".join(line.strip() for line in message)[:300]}
    if code:
        last = [line for line in text.splitlines() if line.strip()]
        return found | {"trains": FAILED, "why": (last or ["no message"])[-1][:300]}
    words = {"packed": "packed", "padded": "one document a row"}[verdict["batching"]]
    own = ", its own attention" if verdict["attention"] == "own" else ""
    adapter = json.loads((run / "export" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    targets = sorted({str(t).rpartition(".")[2] for t in adapter["target_modules"]})
    return found | {
        "trains": words + own,
        "lora": ", ".join(targets),
        "exported": (run / "export" / "adapter" / "adapter_model.safetensors").is_file(),
        "why": "" if found["packed_equals_alone"] else str(verdict.get("why", "")).replace(str(base), "the model"),
    }


@contextlib.contextmanager
def reloaded_here() -> Iterator[None]:
    """The export is read again by the gate's script in this process."""
    from unittest import mock

    from aifactory_train.exporting import gate, reload_check

    def here(command: list[str], **_: Any) -> Any:
        try:
            reload_check.main(command[-1])
        except Exception as error:
            return mock.Mock(returncode=1, stderr=f"{type(error).__name__}: {error}")
        return mock.Mock(returncode=0, stderr="")

    with mock.patch.object(gate.subprocess, "run", here):
        yield


def planned(config: Any) -> bool:
    """Whether the planner covers the family."""
    from aifactory_train.core.errors import UserError
    from aifactory_train.model import shapes

    try:
        shapes.from_config(json.loads(config.to_json_string(use_diff=False)), config.model_type)
    except UserError as error:
        return "do not cover" not in error.what and "mixture of experts" not in error.what
    return True


def gguf(config: Any) -> bool:
    from aifactory_train.exporting.gguf import ARCHITECTURES

    return config.model_type in ARCHITECTURES


def kernels(model: Any) -> bool:
    """Whether the operators of this project take the place of the family's norms, MLPs and rotary embeddings."""
    from aifactory_train.model.gpu_operators import family_of

    return family_of(model) is not None


# ---- all of them


def examined(names: dict[str, str], jobs: int, note: Any, quick: bool = False) -> list[dict[str, Any]]:
    """A row for each family, each in a process of its own (forked: libraries are imported once)."""
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    waiting, running, rows = list(names.items()), {}, []
    with tempfile.TemporaryDirectory(prefix="aifactory-models-") as scratch:
        while waiting or running:
            while waiting and len(running) < jobs:
                family, name = waiting.pop(0)
                folder = Path(scratch) / family
                folder.mkdir()
                running[_started(family, name, folder, quick)] = (family, name, folder, time.monotonic())
            time.sleep(0.05)
            for pid in list(running):
                family, name, folder, began = running[pid]
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    if time.monotonic() - began < PATIENCE:
                        continue
                    os.kill(pid, 9)
                    os.waitpid(pid, 0)
                del running[pid]
                file = folder / "row.json"
                ended = {"family": family, "class": name, "trains": FAILED, "why": "its process ended or took too long"}
                rows.append(json.loads(file.read_text()) if file.is_file() else ended)
                note(f"{len(rows)}/{len(names)} {family}: {rows[-1]['trains']} {rows[-1]['why'][:160]}")
    return sorted(rows, key=lambda row: row["family"])


def _started(family: str, name: str, folder: Path, quick: bool) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        sink = os.open(folder / "process.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        row = row_of(family, name, folder, quick)
        (folder / "row.tmp").write_text(json.dumps(row), encoding="utf-8")
        (folder / "row.tmp").rename(folder / "row.json")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    kinds = [row["trains"] for row in rows]
    decoders = [k for k in kinds if k != EXCLUDED]
    built = [k for k in decoders if k != UNBUILT]
    train = [k for k in built if k not in (REFUSED, FAILED)]
    return {
        "families": len(rows), "excluded": kinds.count(EXCLUDED), "causal_decoders": len(decoders),
        "cannot_be_built_tiny": decoders.count(UNBUILT), "train": len(train), "refused": built.count(REFUSED),
        "failed": built.count(FAILED), "share": round(len(train) / max(1, len(built)), 3),
    }  # fmt: skip


def page(rows: list[dict[str, Any]], versions: dict[str, str], others: dict[str, str], classes: int) -> str:
    """``docs/models.md``; ``classes``: how many transformers has, tried here or not."""
    figures = summary(rows)
    tried = "all" if len(rows) == classes else f"{len(rows)} of the {classes}"
    whole = sum(row.get("exported") is not None for row in rows)

    def shown(value: Any) -> str:
        return {True: "yes", False: "no", None: ""}.get(value, str(value))

    lines = [
        "# Which models train",
        "",
        f"Written by `python benchmarks/models.py --write`: a tiny model of {tried} classes in the mapping of causal "
        f"language models of transformers {versions['transformers']} (peft {versions['peft']}, torch "
        f"{versions['torch']}), trained with LoRA. {whole} were trained for two steps by `aifactory train`, evaluated, "
        "exported and read again; where `exported` is empty, the row comes from `--quick`: the check of the start and "
        "one step in memory, no run. `aifactory models [ID|MODEL_TYPE|FOLDER]` answers from the same data. How a model "
        "is checked before its training: [data.md](data.md#which-models).",
        "",
        f"Of {figures['causal_decoders']} classes with a causal decoder {figures['cannot_be_built_tiny']} cannot be "
        f"built tiny; of the others {figures['train']} train ({figures['share']:.0%}), {figures['refused']} are "
        f"refused with the reason, {figures['failed']} fail.",
        "",
        "`packed = alone`: documents of a pack have the logits that they have alone (1e-5 of the largest). `kernels`: "
        "the family is known to this project's operators for norms, MLPs and rotary embeddings; attention, loss and "
        "adapters do not depend on it. `planned`: covered by the planner's formulae. `exported`: the adapter was read "
        "by plain transformers and peft and gave the same logits.",
        "",
        "| family | class | trains | packed = alone | LoRA on | kernels | planned | exported | GGUF | why |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = ("family", "class", "trains", "packed_equals_alone", "lora", "kernels", "planned", "exported", "gguf", "why")
    for row in rows:
        cells = [shown(row.get(key)).replace("|", "\\|").replace("\n", " ") for key in keys]
        lines.append(f"| `{cells[0]}` | {' | '.join(cells[1:])} |")
    named = ", ".join(f"`{kind}` ({first})" for kind, first in sorted(others.items()))
    return "\n".join([*lines, "", f"Other names of these classes: {named}.", ""])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line of JSON: rows and summary")
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="these families alone")
    parser.add_argument("--tenth", type=int, metavar="N", help="every tenth family, beginning with the N-th (0 to 9)")
    parser.add_argument("--quick", action="store_true", help="check and one step in memory; no run, no export")
    parser.add_argument("--write", action="store_true", help="write the table of the documentation")
    parser.add_argument("--jobs", type=int, default=1, help="families at the same time")
    args = parser.parse_args(argv)
    os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    names = families()
    if args.only:
        names = {k: v for k, v in names.items() if k in args.only}
    if args.tenth is not None:
        names = dict(sorted(names.items())[args.tenth :: 10])
    rows = examined(names, args.jobs, lambda text: print(text, file=sys.stderr, flush=True), args.quick)
    if args.write:
        write(rows, replaces=args.only is None and args.tenth is None)
    if args.json:
        print(json.dumps({"rows": rows, "summary": summary(rows)}))
    return int(any(row["trains"] == FAILED for row in rows))


def write(rows: list[dict[str, Any]], *, replaces: bool) -> None:
    """The data file and the page; rows of a part go into what is there."""
    import importlib.metadata

    if not replaces and DATA.is_file():
        kept = {row["family"]: row for row in json.loads(DATA.read_text(encoding="utf-8"))["rows"]}
        rows = [row for _, row in sorted({**kept, **{row["family"]: row for row in rows}}.items())]
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in ("transformers", "peft", "torch")}
    classes = len(families())
    tree = {"versions": versions, "classes": classes, "summary": summary(rows), "aliases": aliases(), "rows": rows}
    DATA.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(rows, versions, aliases(), classes), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
