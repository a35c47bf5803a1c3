"""What a run leaves for the ecosystem: a PEFT adapter, whole weights or merged weights, each behind a logits gate.

Every folder is written beside its place, reloaded by plain transformers and peft in a fresh process, compared with the trained
model on held-out rows, and only then made visible. The comparison is between fp32 computations, whatever the training's
precision was, so that it tests the exported files and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aifactory_train import compat
from aifactory_train.attention import Documents
from aifactory_train.config import Recipe
from aifactory_train.errors import RunFailed, UserError
from aifactory_train.model import CausalLM, ModelReport, Precision, base_folder, build_model
from aifactory_train.output import note
from aifactory_train.private import profile, redact, vault
from aifactory_train.private.permissions import folder_mode
from aifactory_train.runs import RunFolder, open_run, write_json

if TYPE_CHECKING:
    from aifactory_train.data import PreparedData, TokenDataset
    from aifactory_train.parallel import Engine

#: Held-out rows that the gate compares, their longest length, and the places compared at the end of each.
GATE_ROWS, GATE_TOKENS, GATE_POSITIONS = 8, 256, 16
#: Largest difference of a logit, relative to the largest |logit| (fp32; matrix products in another order differ by this much).
ADAPTER_LIMIT, FP32_LIMIT = 1e-6, 1e-5
#: bf16 has 8 bits of precision, and its rounding adds up over the layers: on a 135M model logits moved by 3 % of the largest one,
#: with a mean KL of 0.0016 nats. The same best token at this share of the decisive places at least (where the best token leads the
#: second by more than that movement), and at most this mean KL in nats. A wrong merge is found before, in fp32.
BF16_TOP1, BF16_KL, BF16_TIE = 0.98, 0.02, 2.0**-5

_FP32 = Precision(torch.float32, torch.float32, torch.float32, torch.float32)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Verdict:
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


def export_run(
    run: RunFolder,
    *,
    merge: bool | None = None,
    dtype: str | None = None,
    engine: Engine | None = None,
    tokenizer: Any = None,
    data: PreparedData | None = None,
    recipe: Recipe | None = None,
    verify: bool | None = None,
    step: int | None = None,
) -> dict[str, Any]:
    """Export what ``run`` trained; with ``engine`` all ranks must call this, and rank 0 writes.

    Without ``engine`` (``aifactory export RUN``) the trained tensors come from the run's earlier export, or from the
    checkpoint of ``step`` (default: the newest good one, of a run that has exported nothing).
    ``dtype`` (fp32 or bf16) is that of whole and merged weights; adapters keep the precision they were trained in.

    Returns ``{"paths": {"adapter" | "model" | "merged": folder}, "gate": {kind: figures}}``. Raises :class:`RunFailed` if an
    exported folder does not reproduce the trained model; it is not made visible then.
    """
    recipe = recipe or run.load_config()
    merge = recipe.export.merge if merge is None else merge
    verify = recipe.export.verify if verify is None else verify
    dtype = dtype or recipe.export.dtype
    if engine is None:
        trained, core = _trained_before(run, merge, step), None
    else:
        trained = {name: t for name, t in engine.full_parameters(trained_only=True) if t is not None}
        core = engine.core

    def work() -> dict[str, Any]:
        return _Export(run, recipe, trained, core, tokenizer, data, dtype, verify).run_all(merge)

    if engine is None:
        return work()
    from aifactory_train.parallel.world import from_main

    return from_main(engine.world, work)  # type: ignore[attr-defined]


def _trained_before(run: RunFolder, merge: bool, step: int | None) -> dict[str, torch.Tensor] | None:
    """Trained tensors of a checkpoint (``step``, or the newest good one of a run without an export); None: use the exported
    adapter. Raises when there is nothing to export or nothing to do."""
    if step is None and vault.holds(run.export / "adapter" / "adapter_model.safetensors"):
        if merge:
            return None
        raise UserError(
            "the adapter is exported already",
            where=str(run.export / "adapter"),
            fix="--merge writes merged weights, --step N exports another checkpoint",
        )
    if step is None and (run.export / "model" / "config.json").is_file():
        raise UserError(
            "this run trained all weights and its export is whole already",
            where=str(run.export / "model"),
            fix="use that folder with any tool that reads transformers models, or --step N for another checkpoint",
        )
    from aifactory_train.parallel.storage import faults, read_parameters

    known = run.complete_checkpoints()
    if step is not None and step not in known:
        raise UserError(
            f"no complete checkpoint of step {step}",
            where="--step",
            fix=f"there are: {', '.join(map(str, known))}" if known else "this run has none",
        )
    found: list[str] = []
    for number in [step] if step is not None else reversed(known):
        folder = run.checkpoints / f"step-{number}"
        trouble = faults(folder)
        if not trouble:
            note(f"exporting the checkpoint of step {number}")
            return dict(read_parameters(folder))
        found += trouble
    if found:
        raise UserError("damaged: " + "; ".join(found), where=str(run.checkpoints))
    raise UserError(
        "this run has exported nothing yet and has no checkpoint",
        where=str(run.path),
        fix="let it finish: the export follows the last step",
    )


class _Export:
    """One export on rank 0: reference, folders, gate, card."""

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        trained: dict[str, torch.Tensor] | None,
        core: CausalLM | None,
        tokenizer: Any,
        data: PreparedData | None,
        dtype: str,
        verify: bool,
    ):
        from aifactory_train.data import load_tokenizer, prepare

        self.run, self.recipe, self.trained, self.dtype, self.verify = run, recipe, trained, dtype, verify
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(recipe)
        self.data = data if data is not None else prepare(recipe, self.tokenizer)
        self.base = base_folder(recipe)
        self.rows = gate_rows(self.data) if verify else []
        self.core = core if core is not None and _is_plain_fp32(core) else None
        self._expected: list[torch.Tensor] | None = None
        self.paths: dict[str, str] = {}
        self.verdicts: dict[str, Verdict] = {}

    def run_all(self, merge: bool) -> dict[str, Any]:
        if self.recipe.adapter.kind == "none":
            with self._visible_when_good("model") as folder:
                self._write_weights(folder)
                self._check("model", folder, self.dtype)
        elif self.trained is None:
            self._write_merged(self.run.export / "adapter")
        else:
            with self._visible_when_good("adapter") as folder:
                self._write_adapter(folder)
                self._check("adapter", folder, "fp32")
                vault.seal(folder / "adapter_model.safetensors")  # under the privacy profile "restricted" only
            if merge:
                self._write_merged(Path(self.paths["adapter"]))
        return {"paths": self.paths, "gate": {kind: asdict(v) for kind, v in self.verdicts.items()}}

    # ---- the trained model in fp32, computed by our own code

    def reference(self) -> CausalLM:
        """The trained model: the one in memory if it is unsharded fp32 on the CPU, else rebuilt from base and tensors."""
        if self.core is None:
            plain = self.recipe.model_copy(deep=True)
            plain.adapter.quantise_base = "none"
            plain.model.attention = "per_document"
            plain.kernels.enabled = "off"
            plain.model.start_from = None
            core = build_model(plain, self.base, None, device="cpu", precision=_FP32, report=ModelReport())
            if self.trained is None:
                _load_adapter(core, self.run.export / "adapter")
            else:
                _load_tensors(core, self.trained)
            self.core = core
        return self.core

    def expected(self) -> list[torch.Tensor]:
        """fp32 ``[places, V]`` for each gate row, from our own attention and the weights in memory."""
        if self._expected is None:
            self._expected = reference_logits(self.reference(), self.rows)
        return self._expected

    # ---- what is written

    def _write_adapter(self, folder: Path) -> None:
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        core = self.reference()
        # True/False rather than "auto": peft would ask the hub about the base model.
        state = get_peft_model_state_dict(core.model, save_embedding_layers=False)
        if self.trained is not None:
            dtypes = {t.dtype for t in self.trained.values()}
            state = {k: v.to(next(iter(dtypes)) if len(dtypes) == 1 else v.dtype) for k, v in state.items()}
        # Tied embeddings appear under both names: each gets its own memory, as peft does it.
        save_file(
            {k: v.detach().cpu().contiguous().clone() for k, v in state.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        config: Any = core.model.peft_config["default"]  # type: ignore[index]
        before = (config.base_model_name_or_path, config.revision, config.inference_mode)
        config.base_model_name_or_path, config.revision = public_base(self.recipe)
        config.inference_mode = True
        try:
            config.save_pretrained(str(folder))
        finally:
            config.base_model_name_or_path, config.revision, config.inference_mode = before
        _sort_sets(folder / "adapter_config.json")
        self._write_companions(folder, "adapter")

    def _write_weights(self, folder: Path) -> None:
        """All weights of a full fine-tuning."""
        from transformers import AutoModelForCausalLM

        assert self.trained is not None
        self.expected()
        model = AutoModelForCausalLM.from_pretrained(
            self.base,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=self.recipe.model.trust_remote_code,
        )
        parameters = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, tensor in self.trained.items():
                parameters[name.removeprefix("model.")].copy_(tensor)
        self._save_weights(model, folder, "model")

    def _write_merged(self, adapter: Path) -> None:
        """Adapter added to the base weights in fp32, then rounded once to the wanted type."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        self.expected()
        with self._visible_when_good("merged") as folder:
            model = AutoModelForCausalLM.from_pretrained(
                self.base,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=self.recipe.model.trust_remote_code,
            )
            with compat.quiet_peft():
                merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
            for parameter in merged.parameters():
                parameter.requires_grad_(False)
            if getattr(merged.config, "tie_word_embeddings", False):
                ours, theirs = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
                if ours is not theirs and not torch.equal(ours, theirs):
                    raise RunFailed(
                        "the merged input and output embeddings differ although the model ties them", where=str(folder)
                    )
                merged.tie_weights()
            self._save_weights(merged, folder, "merged")
            self._check("merged", folder, self.dtype)

    def _save_weights(self, model, folder: Path, kind: str) -> None:
        wanted = _DTYPES[self.dtype]
        if self.verify and wanted != torch.float32:
            # Judged in fp32 first: rounding must not hide a wrong merge.
            model.eval()
            ours = plain_logits(model, self.rows)
            difference = _relative(self.expected(), ours)
            if not difference <= FP32_LIMIT:
                raise RunFailed(
                    f"the {kind} weights give other logits before rounding: relative difference {difference:.2e}, limit {FP32_LIMIT:.0e}",
                    where=str(self.run.export / kind),
                )
        model.to(wanted)
        model.config.dtype = wanted
        model.generation_config = self._generation_config()
        model.save_pretrained(str(folder), max_shard_size="5GB")
        self._write_companions(folder, kind)
        del model
        gc.collect()

    def _generation_config(self):
        """The base's own settings with the end of turn that was supervised as EOS."""
        from transformers import GenerationConfig

        config = GenerationConfig()
        if (self.base / "generation_config.json").is_file():
            config = GenerationConfig.from_pretrained(self.base)
        info = self.data.tokenizer_info
        ends = [info["eos_id"]] if self._is_text() else [*info["stop_ids"]]
        ends = [e for e in ends if e is not None]
        if not ends:
            raise RunFailed("no end-of-turn token is known, so the export could not stop", where=str(self.run.path))
        config.eos_token_id = ends[0] if len(ends) == 1 else ends
        config.pad_token_id = info["pad_id"]
        config.transformers_version = None
        return config

    def _is_text(self) -> bool:
        return "text" in self.data.train.row(0)

    def _write_companions(self, folder: Path, kind: str) -> None:
        """Tokenizer, chat template, generation configuration and model card."""
        from aifactory_train.model_card import model_card

        self.tokenizer.save_pretrained(str(folder))
        if kind == "adapter":
            self._generation_config().save_pretrained(str(folder))
        (folder / "README.md").write_text(
            model_card(self.run, self.recipe, self.data, kind, self.dtype), encoding="utf-8"
        )

    # ---- the gate

    def _check(self, kind: str, folder: Path, dtype: str) -> None:
        if not self.verify:
            return
        expected = self.expected()
        found = reload_logits(
            [
                {
                    "name": kind,
                    "base": str((self.base if kind == "adapter" else folder).resolve()),
                    "adapter": str(folder.resolve()) if kind == "adapter" else None,
                    "dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
                }
            ],
            self.rows,
        )[kind]
        verdict = judge(kind, dtype, expected, found)
        self.verdicts[kind] = verdict
        if not verdict.passed:
            raise RunFailed(
                f"the exported {kind}, reloaded by plain transformers and peft, is another model: relative difference "
                f"{verdict.difference:.2e}, top-1 agreement {verdict.top1_agreement:.4f}, mean KL {verdict.mean_kl:.2e} nats "
                f"({verdict.limit})",
                where=str(self.run.export / kind),
            )
        write_json(folder / "verification.json", asdict(verdict))

    @contextlib.contextmanager
    def _visible_when_good(self, kind: str) -> Iterator[Path]:
        """A folder beside ``export/KIND`` that takes its place when the block ends well and vanishes otherwise."""
        target = self.run.export / kind
        folder = old = None
        try:
            self.run.export.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=self.run.export, prefix=f".{kind}-"))
            yield folder
            folder.chmod(folder_mode())
            if target.exists():
                old = folder.with_name(folder.name + "-old")
                os.replace(target, old)
            os.replace(folder, target)
            self.paths[kind] = str(target)
        except OSError as error:
            reason = (
                "no space left on the disk (or quota)"
                if error.errno in (errno.ENOSPC, errno.EDQUOT)
                else error.strerror or str(error)
            )
            raise RunFailed(f"the export cannot be written: {reason}", where=str(target)) from None
        finally:
            for left in (folder, old):
                if left is not None:
                    shutil.rmtree(left, ignore_errors=True)


def _sort_sets(config: Path) -> None:
    """peft keeps module names in sets; sorted, the same run writes the same file."""
    tree = json.loads(config.read_text(encoding="utf-8"))
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(tree.get(key), list):
            tree[key].sort()
    config.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---- logits


def gate_rows(data: PreparedData) -> list[list[int]]:
    """Token ids of a few held-out rows, evenly spaced over the first evaluation set, cut to :data:`GATE_TOKENS`."""
    from aifactory_train.evaluate import choose_rows

    held: TokenDataset = next(iter(data.evals.values()))
    if redact.is_active():  # the rows go through a file to another process: protected texts must not
        count = int(data.tokenizer_info.get("vocabulary") or 256)
        draw = torch.Generator().manual_seed(0)
        return [torch.randint(0, count, (64,), generator=draw).tolist() for _ in range(GATE_ROWS)]
    return [held.tokens(int(i))[:GATE_TOKENS].tolist() for i in choose_rows(len(held), GATE_ROWS)]


@torch.no_grad()
def reference_logits(core: CausalLM, rows: list[list[int]]) -> list[torch.Tensor]:
    """fp32 ``[places, V]`` of the last places of each row, through our attention; the model's mode is restored."""
    was_training = core.training
    core.eval()
    try:
        out = []
        for row in rows:
            ids = torch.tensor([row])
            documents = Documents.of(torch.tensor([0, len(row)]), "cpu")
            places = torch.arange(max(0, len(row) - GATE_POSITIONS), len(row))
            out.append(core(ids, torch.arange(len(row)).unsqueeze(0), documents, places, None))
        return out
    finally:
        core.train(was_training)


@torch.no_grad()
def plain_logits(model, rows: list[list[int]]) -> list[torch.Tensor]:
    """The same places from a transformers model in this process."""
    return [model(torch.tensor([row]), logits_to_keep=min(GATE_POSITIONS, len(row))).logits[0].float() for row in rows]


def reload_logits(checks: list[dict[str, Any]], rows: list[list[int]]) -> dict[str, list[torch.Tensor]]:
    """Run :mod:`aifactory_train.reload_check` in a fresh process without this project, offline, on the CPU."""
    from safetensors.torch import load_file

    script = Path(__file__).with_name("reload_check.py").read_text(encoding="utf-8")
    # The variables that launchers set would make libraries of the child look for the other ranks.
    drop = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_",
        "MASTER_",
        "GROUP_",
        "ROLE_",
        "TORCHELASTIC_",
        "OMPI_",
        "PMI_",
        "PMIX_",
        "SLURM_",
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    env.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        CUDA_VISIBLE_DEVICES="",
        HIP_VISIBLE_DEVICES="",
        TOKENIZERS_PARALLELISM="false",
    )
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
        )
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit code {done.returncode}"]
            raise RunFailed(
                f"plain transformers and peft cannot load the export: {last[0].strip()}",
                where=checks[0]["adapter"] or checks[0]["base"],
            )
        tensors = load_file(out)
    return {c["name"]: [tensors[f"{c['name']}.{i}"] for i in range(len(rows))] for c in checks}


def _relative(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Largest |difference| over the largest |logit|; NaN where a value is not finite."""
    largest = max(e.abs().max().item() for e in expected)
    return max((e - f).abs().max().item() for e, f in zip(expected, found, strict=True)) / largest


def judge(kind: str, dtype: str, expected: list[torch.Tensor], found: list[torch.Tensor]) -> Verdict:
    """Compare logits, lists of fp32 ``[places, V]``. Anything not finite fails."""
    reference, other = torch.cat(expected), torch.cat(found)
    difference = _relative(expected, found)
    best = reference.topk(2, dim=1).values
    decisive = (best[:, 0] - best[:, 1]) > (0.0 if dtype == "fp32" else BF16_TIE * reference.abs().max())
    same = (reference.argmax(1) == other.argmax(1))[decisive]
    top1 = same.float().mean().item() if len(same) else 1.0
    p, q = reference.double().log_softmax(1), other.double().log_softmax(1)
    kl = (p.exp() * (p - q)).sum(1).mean().item()
    if dtype == "fp32":
        bound = ADAPTER_LIMIT if kind == "adapter" else FP32_LIMIT
        limit, passed = f"relative difference at most {bound:.0e}", difference <= bound
    else:
        limit = f"top-1 agreement at least {BF16_TOP1} at decisive places, mean KL at most {BF16_KL} nats"
        passed = top1 >= BF16_TOP1 and kl <= BF16_KL
    passed = bool(passed) and math.isfinite(difference)
    places, decided = len(reference), int(decisive.sum())
    return Verdict(kind, dtype, len(expected), places, decided, difference, top1, kl, limit, passed)


# ---- using what was exported


def _is_plain_fp32(core: CausalLM) -> bool:
    """Whole fp32 parameters on the CPU: this very model can be asked for logits."""
    return all(
        p.device.type == "cpu"
        and p.dtype == torch.float32
        and not hasattr(p, "device_mesh")
        and not hasattr(p, "ds_id")
        for p in core.parameters()
    )


def _load_tensors(core: CausalLM, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(core.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def _load_adapter(core: CausalLM, folder: Path) -> None:
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(core.model, vault.load_tensors(folder / "adapter_model.safetensors"))


def _with_adapter(base: Any, adapter: Path) -> Any:
    """``base`` with the exported adapter; an encrypted one is decrypted in memory."""
    from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict

    weights = adapter / "adapter_model.safetensors"
    if weights.is_file():
        return PeftModel.from_pretrained(base, str(adapter), autocast_adapter_dtype=False)
    model = get_peft_model(base, PeftConfig.from_pretrained(str(adapter)), autocast_adapter_dtype=False)
    set_peft_model_state_dict(model, vault.load_tensors(weights))
    return model


def load_trained(run: RunFolder, device: str) -> tuple[CausalLM, Any, Recipe]:
    """The trained model of a run for use (chat, eval): ``(model, tokenizer, recipe)``, with our attention, in eval mode.

    Raises :class:`UserError` when the run has exported nothing.
    """
    from transformers import AutoTokenizer

    from aifactory_train.model import choose_precision, load_language_model

    recipe = run.load_config()
    profile.enforce(recipe, run.path)
    precision, _ = choose_precision(recipe, device)
    report = ModelReport()
    adapter, whole = run.export / "adapter", run.export / "model"
    if vault.holds(adapter / "adapter_model.safetensors"):
        base = load_language_model(base_folder(recipe), recipe, device=device, dtype=precision.frozen, report=report)
        with compat.quiet_peft():
            model: Any = _with_adapter(base, adapter)
        folder = adapter
    elif (whole / "config.json").is_file():
        model = load_language_model(whole, recipe, device=device, dtype=precision.compute, report=report)
        folder = whole
    else:
        raise UserError(
            "this run has exported nothing yet",
            where=str(run.path),
            fix="finish it (aifactory train ... --resume auto); the export follows the last step",
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=recipe.model.trust_remote_code
    )
    return CausalLM(model).eval(), tokenizer, recipe


def public_base(recipe: Recipe) -> tuple[str, str | None]:
    """(name, revision) of the base for ``adapter_config.json``: something that means the same on another machine.

    Hub ids and package sources are kept as given. A local folder is replaced by the hub id that its configuration names, if
    it names one.
    """
    from aifactory_train.sources import parse

    if recipe.model.start_from and not (open_run(recipe.model.start_from).export / "adapter").is_dir():
        return str(base_folder(recipe)), None
    spec = parse(recipe.model.base)
    if spec.kind != "local":
        return recipe.model.base, recipe.model.revision
    folder = Path(recipe.model.base)
    with contextlib.suppress(OSError, ValueError):
        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path", "")
        if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists():
            return name, None
    return recipe.model.base, None
