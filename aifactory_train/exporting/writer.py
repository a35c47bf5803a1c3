"""What a run leaves for the ecosystem: a PEFT adapter, whole weights or merged weights, each behind a logits gate.

Every folder is written beside its place, reloaded by plain transformers and peft in a fresh process, compared with the
trained model on held-out rows, and only then made visible. The comparison is between fp32 computations, whatever the
training's precision was, so that it tests the exported files and nothing else.

Weights pass through one tensor at a time (:mod:`aifactory_train.exporting.streaming`): from the ranks or a checkpoint
into the files, from base and adapter into merged weights, and block by block through the reference model. Whole is only
what the gate's fresh process loads, as any user of the export would.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aifactory_train.config.head_block import embeds, pooling_of
from aifactory_train.config.schema import Recipe
from aifactory_train.core import compat
from aifactory_train.core.errors import RunFailed
from aifactory_train.core.files import read_json, write_json
from aifactory_train.core.output import note
from aifactory_train.exporting.embedding_files import judge_vectors, write_embedding_files
from aifactory_train.exporting.gate import (
    DTYPES,
    FP32_LIMIT,
    GateVerdict,
    gate_rows,
    judge,
    plain_logits,
    relative,
    reload_logits,
    unpadded,
)
from aifactory_train.exporting.head_files import chosen_for, classifier_config, write_head_file
from aifactory_train.exporting.place import named, refuse_plain, remove_left
from aifactory_train.exporting.streaming import Merged, ShardFiles, Streamed, adapter_names, all_to_meta
from aifactory_train.exporting.trained_model import TrainedModel
from aifactory_train.exporting.trained_tensors import trained_before, trained_by
from aifactory_train.exporting.vllm_check import say_who_ignores
from aifactory_train.model.base import base_folder, public_base
from aifactory_train.model.causal_lm import CausalLM
from aifactory_train.model.generation_config import loading, read_base
from aifactory_train.model.head import IN_ADAPTER, PARAMETER, PLAIN
from aifactory_train.model.trained import adapter_tensors, with_adapter
from aifactory_train.model.weight_files import Source, TensorFiles
from aifactory_train.private import profile, vault
from aifactory_train.private.permissions import folder_mode
from aifactory_train.run.folder import RunFolder

if TYPE_CHECKING:
    from aifactory_train.data import PreparedData
    from aifactory_train.parallel.engine import Engine


#: Largest safetensors file of an export; models above it are never whole in the exporting process.
MAX_SHARD_BYTES = 5_000_000_000

_TIED_DIFFER = "the merged input and output embeddings differ although the model ties them"


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

    Returns ``{"paths": {"adapter" | "model" | "merged": folder}, "gate": {kind: figures}}``. Raises :class:`RunFailed`
    if an exported folder does not reproduce the trained model; it is not made visible then.
    """
    recipe = recipe or run.load_config()
    merge = (recipe.export.merge if merge is None else merge) or (embeds(recipe) and not vault.seals())
    verify = recipe.export.verify if verify is None else verify
    dtype = dtype or recipe.export.dtype
    if engine is None:
        profile.enforce(recipe, run.path)
        trained = trained_before(run, merge, step)
        return Export(run, recipe, trained, None, tokenizer, data, dtype, verify).run_all(merge)
    from aifactory_train.parallel.world import from_main

    with trained_by(engine, run) as (source, core):
        return from_main(
            engine.world,  # type: ignore[attr-defined]
            lambda: Export(run, recipe, source, core, tokenizer, data, dtype, verify, live=True).run_all(merge),
        )


class Export:
    """One export on rank 0: reference, folders, gate, card."""

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        trained: Source | None,
        core: CausalLM | None,
        tokenizer: Any,
        data: PreparedData | None,
        dtype: str,
        verify: bool,
        *,
        live: bool = False,
    ):
        from aifactory_train.data import load_tokenizer, prepare

        self.run, self.recipe, self.trained, self.dtype, self.verify = run, recipe, trained, dtype, verify
        self.embeds, self.pooling = embeds(recipe), pooling_of(recipe)
        self.has_head = recipe.methods.head is not None and not self.embeds
        self.chosen = chosen_for(run, live=live, again=trained is None) if self.has_head else None
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(recipe)
        self.data = data if data is not None else prepare(recipe, self.tokenizer)
        self.base = base_folder(recipe)
        self.generation = read_base(self.base)
        if self.generation.repaired and core is None:  # a training has said it at its start
            note(f"{self.base / 'generation_config.json'}: {self.generation.describe()}")
        self.rows = gate_rows(self.data) if verify else []
        if self.has_head:
            pad_id = self.data.tokenizer_info["pad_id"]
            self.rows = [unpadded(row, pad_id) for row in self.rows]
        self.reference = TrainedModel(run, recipe, self.base, trained, core, self.rows)
        self.whole = self.reference.why_whole
        if self.whole is not None and core is None:
            note(f"the export holds the whole model in memory: {self.whole}")
        self.paths: dict[str, str] = {}
        self.verdicts: dict[str, GateVerdict] = {}

    def run_all(self, merge: bool) -> dict[str, Any]:
        if self.recipe.adapter.kind == "none":
            with self.visible_when_good("model") as folder:
                self._write_weights(folder)
                self._check("model", folder, self.dtype)
        elif self.trained is None:
            self._write_merged(self.run.export / "adapter")
        else:
            with self.visible_when_good("adapter") as folder:
                weights = folder / "adapter_model.safetensors"
                with vault.in_memory(weights):  # under the privacy profile "restricted" only
                    self._write_adapter(folder)
                    self._check("adapter", folder, "fp32")
                    vault.seal(weights)
            if merge:
                self._write_merged(Path(self.paths["adapter"]))
            elif not self.embeds:
                say_who_ignores(Path(self.paths["adapter"]))
        return {"paths": self.paths, "gate": {kind: asdict(v) for kind, v in self.verdicts.items()}}

    # ---- what is written

    def _write_adapter(self, folder: Path) -> None:
        core = self.reference.model()
        assert self.trained is not None
        trained = self.trained
        dtypes = {trained[name].dtype for name in trained}
        common = next(iter(dtypes)) if len(dtypes) == 1 else None
        # A tied embedding has two names in the model and one among the trained tensors.
        one_name = {id(p): n for n, p in core.named_parameters()}
        own = {n: one_name[id(p)] for n, p in core.named_parameters(remove_duplicate=False)}
        names = {key: own[f"model.{name}"] for key, name in adapter_names(core.model).items()}
        if self.has_head:
            names[IN_ADAPTER] = PARAMETER
        shapes = {n: tuple(p.shape) for n, p in core.named_parameters()}

        def tensor_of(name: str) -> torch.Tensor:
            return trained[name] if name in trained else core.get_parameter(name).detach()

        plan = {key: (shapes[name], common or tensor_of(name).dtype) for key, name in names.items()}
        total = sum(prod(shape) * dtype.itemsize for shape, dtype in plan.values())
        files = ShardFiles(folder, plan, max_bytes=total, stem="adapter_model")  # peft reads one file
        for key, name in names.items():
            files.put(key, tensor_of(name))
        files.finish()
        config: Any = core.model.peft_config["default"]  # type: ignore[index]
        config = copy.copy(config)
        config.base_model_name_or_path, config.revision = public_base(self.recipe)
        config.inference_mode = True
        if self.has_head:  # as peft writes it where it trained the classifier itself
            config.task_type, config.modules_to_save = "SEQ_CLS", ["classifier", "score"]
            self._bare().config.save_pretrained(str(folder))
        config.save_pretrained(str(folder))
        _sort_sets(folder / "adapter_config.json")
        self._write_companions(folder, "adapter")

    def _write_weights(self, folder: Path) -> None:
        """All weights of a full fine-tuning."""
        assert self.trained is not None
        trained = self.trained
        if self.whole is not None:
            self.reference.expected()
            model = self._load_plain()
            parameters = dict(model.named_parameters(remove_duplicate=False))
            with torch.no_grad():
                for name in trained:
                    parameters[_plain_name(name)].copy_(trained[name])
            self._save_whole(model, folder, "model")
            return
        weights = {_plain_name(name): name for name in trained}
        base = TensorFiles.of(self.base)
        self._save(lambda name: trained[weights[name]] if name in weights else base[name], folder, "model")

    def _write_merged(self, adapter: Path) -> None:
        """Adapter added to the base weights in fp32, then rounded once to the wanted type."""
        with self.visible_when_good("merged") as folder:
            if self.whole is not None:
                self._merge_whole(adapter, folder)
            else:
                self._save(self.merged(adapter).__getitem__, folder, "merged")
            self._check("merged", folder, self.dtype)

    def merged(self, adapter: Path) -> Merged:
        """The plain model's fp32 weights with the exported ``adapter`` added, computed when they are asked for."""
        source = Merged(self._bare(), TensorFiles.of(self.base), adapter, adapter_tensors(adapter))
        for alias, name in self._tied().items():
            if (alias in source.layers or alias in source.whole) and not torch.equal(source[alias], source[name]):
                raise RunFailed(_TIED_DIFFER, where=str(adapter))
        return source

    def _bare(self) -> Any:
        """The plain transformers model (with a head its classifier) as meta tensors."""
        from aifactory_train.model.loading import load_config
        from aifactory_train.model.weight_files import skeleton

        config = load_config(self.base, self.recipe)
        if self.has_head:
            config = classifier_config(config, self.recipe, self.data.tokenizer_info["pad_id"])
        model = skeleton(config, None, torch.float32, classifies=self.has_head)
        all_to_meta(model)
        return model

    def _tied(self) -> dict[str, str]:
        """Second name of a tied weight -> the name that files have."""
        model = self._bare()
        first = {id(p): n for n, p in model.named_parameters()}
        return {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if first[id(p)] != n}

    def _save(self, read: Callable[[str], torch.Tensor], folder: Path, kind: str) -> None:
        """Write the plain model whose weights ``read`` gives; judged in fp32 first: rounding must not hide a wrong
        merge.
        """
        expected, wanted = self.reference.expected(), DTYPES[self.dtype]
        self.reference.core = None  # no longer needed: what it holds can go
        model = self._bare()
        names = {n: tuple(p.shape) for n, p in model.named_parameters()}
        plan = {n: (shape, wanted) for n, shape in names.items()}
        aliases = {n for n, _ in model.named_parameters(remove_duplicate=False)}
        kept = {n: t for n, t in model.state_dict().items() if n not in aliases}  # buffers that files carry
        base = TensorFiles.of(self.base)
        kept = {n: base.get(n, t) for n, t in kept.items()}
        plan.update({n: (tuple(t.shape), wanted if t.is_floating_point() else t.dtype) for n, t in kept.items()})
        files = ShardFiles(folder, plan, max_bytes=MAX_SHARD_BYTES)
        for name in names:
            files.put(name, read(name))
        for name, tensor in kept.items():
            files.put(name, tensor)
        files.finish()
        config = model.config
        config.architectures, config.dtype = [type(model).__name__], wanted
        config.save_pretrained(str(folder))
        if not (self.has_head or self.embeds):
            self._generation_config().save_pretrained(str(folder))
        self._write_companions(folder, kind)
        if self.verify and wanted != torch.float32:
            Streamed(model, model, read, MAX_SHARD_BYTES)
            self._before_rounding(expected, plain_logits(model, self.rows, self.pooling), kind)

    def _before_rounding(self, expected: list[torch.Tensor], found: list[torch.Tensor], kind: str) -> None:
        difference = relative(expected, found)
        if not difference <= FP32_LIMIT:
            raise RunFailed(
                f"the {kind} weights give other logits before rounding: relative difference {difference:.2e}, limit "
                f"{FP32_LIMIT:.0e}",
                where=str(self.run.export / kind),
            )

    # ---- models that only transformers can load: whole in memory

    def _load_plain(self) -> Any:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        kind: Any = AutoModelForSequenceClassification if self.has_head else AutoModelForCausalLM
        return kind.from_pretrained(
            self.base,
            **({"config": self._bare().config} if self.has_head else {}),
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=self.recipe.model.trust_remote_code,
            **loading(self.base),
        )

    def _merge_whole(self, adapter: Path, folder: Path) -> None:
        self.reference.expected()
        with compat.quiet_peft():
            merged = with_adapter(self._load_plain(), adapter).merge_and_unload(safe_merge=True)
        for parameter in merged.parameters():
            parameter.requires_grad_(False)
        if getattr(merged.config, "tie_word_embeddings", False) and not self.has_head:
            ours, theirs = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
            if ours is not theirs and not torch.equal(ours, theirs):
                raise RunFailed(_TIED_DIFFER, where=str(folder))
            merged.tie_weights()
        self._save_whole(merged, folder, "merged")

    def _save_whole(self, model: Any, folder: Path, kind: str) -> None:
        wanted = DTYPES[self.dtype]
        if self.verify and wanted != torch.float32:
            model.eval()
            self._before_rounding(self.reference.expected(), plain_logits(model, self.rows, self.pooling), kind)
        model.to(wanted)
        model.config.dtype = wanted
        if not (self.has_head or self.embeds):
            model.generation_config = self._generation_config()
        model.save_pretrained(str(folder), max_shard_size=MAX_SHARD_BYTES)
        self._write_companions(folder, kind)
        del model
        gc.collect()

    def _generation_config(self):
        """The base's own settings, repaired where they contradict each other, with the end of turn that was supervised
        as EOS.
        """
        config = copy.deepcopy(self.generation.config)
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
        from aifactory_train.exporting.model_card import model_card

        self.tokenizer.save_pretrained(str(folder))
        if self.has_head:
            write_head_file(folder, self.recipe, self.chosen)
        elif self.embeds:
            write_embedding_files(folder, self.recipe, kind, self._bare().get_input_embeddings().weight.shape[1])
        elif kind == "adapter":
            self._generation_config().save_pretrained(str(folder))
        (folder / "README.md").write_text(
            model_card(self.run, self.recipe, self.data, kind, self.dtype), encoding="utf-8"
        )

    # ---- the gate

    def _check(self, kind: str, folder: Path, dtype: str) -> None:
        if not self.verify:
            return
        expected = self.reference.expected()
        found = reload_logits(
            [
                {
                    "name": kind,
                    "base": str((self.base if kind == "adapter" else folder).resolve()),
                    "adapter": str(folder.resolve()) if kind == "adapter" else None,
                    "dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
                    **({"head": str(folder.resolve())} if self.has_head else {}),
                    "pooling": self.pooling,
                    # a base that transformers only loads without its own generation settings (they do not touch the
                    # logits)
                    "plain_generation": kind == "adapter" and not self.generation.loadable,
                    "attention": "eager" if self.recipe.model.attention == "own" else None,
                }
            ],
            self.rows,
        )[kind]
        # peft adds the product of adapters on parameters (experts) to these first, as a merge does; we never do
        wrapped = kind == "adapter" and bool(read_json(folder / "adapter_config.json", dict).get("target_parameters"))
        bound = FP32_LIMIT if self.has_head or wrapped else None
        verdict = (judge_vectors if self.embeds else judge)(kind, dtype, expected, found, bound=bound)
        self.verdicts[kind] = verdict
        if not verdict.passed:
            raise RunFailed(
                f"the exported {kind}, reloaded by plain transformers and peft, is another model: relative difference "
                f"{verdict.difference:.2e}, top-1 agreement {verdict.top1_agreement:.4f}, mean KL "
                f"{verdict.mean_kl:.2e} nats "
                f"({verdict.limit})",
                where=str(self.run.export / kind),
            )
        write_json(folder / "verification.json", asdict(verdict))

    @contextlib.contextmanager
    def visible_when_good(self, kind: str) -> Iterator[Path]:
        """A folder beside ``export/KIND`` that takes its place when the block ends well and vanishes otherwise."""
        target = self.run.export / kind
        if kind != "adapter":
            refuse_plain(self.run, kind)
        folder = old = None
        try:
            with named(target, "the export cannot be written"):
                self.run.export.mkdir(parents=True, exist_ok=True)
                remove_left(self.run.export)
                mine = f".{kind}-{platform.node()}-{os.getpid()}-"
                folder = Path(tempfile.mkdtemp(dir=self.run.export, prefix=mine))
                yield folder
                folder.chmod(folder_mode())
                if target.exists():
                    old = folder.with_name(folder.name + "-old")
                    os.replace(target, old)
                os.replace(folder, target)
                self.paths[kind] = str(target)
        finally:
            for left in (folder, old):
                if left is not None:
                    shutil.rmtree(left, ignore_errors=True)


def _plain_name(name: str) -> str:
    """Name in the plain transformers model of a trained weight."""
    return PLAIN if name == PARAMETER else name.removeprefix("model.")


def _sort_sets(config: Path) -> None:
    """peft keeps module names in sets; sorted, the same run writes the same file."""
    tree = json.loads(config.read_text(encoding="utf-8"))
    for key in ("target_modules", "target_parameters", "modules_to_save", "exclude_modules"):
        if isinstance(tree.get(key), list):
            tree[key].sort()
    config.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")
