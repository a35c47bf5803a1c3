"""A trained model as one GGUF file, for llama.cpp and the programs built on it (Ollama, LM Studio).

Tensors are read from base and adapter, merged, put into llama.cpp's order and type and written one at a time. Before
the file becomes visible it is read again: its fields and tensors are what they should be, and transformers' own GGUF
reader, in a fresh process, computes from it the logits of a model whose weights went through the same rounding. How far
the rounding moves the logits of the trained model is stated beside the file.

Names, order and fields follow llama.cpp's ``convert_hf_to_gguf.py``; the ``gguf`` package holds the name tables, the
number formats and the file format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aifactory_train.core.errors import RunFailed, UserError, did_you_mean
from aifactory_train.core.files import write_json
from aifactory_train.exporting import writer as ex
from aifactory_train.exporting.gate import FP32_LIMIT, GateVerdict, judge, plain_logits, relative, reload_logits
from aifactory_train.exporting.gguf_fields import (
    add_general,
    add_model,
    add_tokenizer,
    extra_tensors,
    model_fields,
    rope_fields,
    unread_settings,
)
from aifactory_train.exporting.gguf_tokenizer import WAY_OUT, read_tokenizer
from aifactory_train.exporting.place import refuse_plain
from aifactory_train.exporting.streaming import Streamed, all_to_meta
from aifactory_train.model.base import base_folder
from aifactory_train.model.loading import load_config
from aifactory_train.model.weight_files import TensorFiles, skeleton
from aifactory_train.private import profile
from aifactory_train.run.folder import RunFolder

#: transformers' model_type -> llama.cpp's architecture. Mistral is a Llama there.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
#: What --type may say. Below 8 bits the embeddings stay at 8: they are read directly, not multiplied.
TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
#: Mean KL in nats that a type may cost, as for safetensors in bf16; below 8 bits it is stated, not judged.
JUDGED = ("f32", "f16", "bf16", "q8_0")

Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class GgufVerdict(GateVerdict):
    """What :class:`aifactory_train.exporting.gate.GateVerdict` says of the file against the trained model, and of the
    file itself.
    """

    file: str
    tensors: int
    file_difference: float  # largest |logit difference| / largest |logit| against weights rounded in the same way
    greedy_agreement: float  # share of all places where file and trained model choose the same token


def export_gguf(run: RunFolder, kind: str, *, step: int | None = None, verify: bool | None = None) -> dict[str, Any]:
    """Write ``export/gguf-KIND/RUN-KIND.gguf`` from what ``run`` exported (``step``: of that checkpoint, exported
    first).

    Returns what :func:`aifactory_train.exporting.writer.export_run` returns. Raises :class:`UserError` for a type,
    model or tokenizer that cannot be written, :class:`RunFailed` if the file read back is not the model; nothing
    becomes visible then.
    """
    if kind not in TYPES:
        raise UserError(
            f"there is no type '{kind}'{did_you_mean(kind, TYPES)}", where="--type", fix=f"one of: {', '.join(TYPES)}"
        )
    recipe = run.load_config()
    if recipe.methods.head is not None:
        raise UserError(
            "llama.cpp has no place for a trained head", where=str(run.path), fix="--merge writes safetensors"
        )
    profile.enforce(recipe, run.path)
    refuse_plain(run, "gguf")
    verify = recipe.export.verify if verify is None else verify
    check_model(load_config(base_folder(recipe), recipe))
    whole = recipe.adapter.kind == "none"
    folder = run.export / ("model" if whole else "adapter")
    done: dict[str, Any] = {"paths": {}, "gate": {}}
    if step is not None or not (folder / "README.md").is_file():
        done = ex.export_run(run, merge=False, step=step, verify=verify, recipe=recipe)
    export = ex.Export(run, recipe, None, None, None, None, "fp32", verify)
    if export.whole is not None:
        raise UserError(f"a GGUF file is written tensor by tensor: {export.whole}", where="model.base", fix=WAY_OUT)
    config = load_config(folder if whole else export.base, recipe)
    source: ex.Source = TensorFiles.of(folder) if whole else export.merged(folder)
    content = GgufFile(config, source, folder, kind)
    export.paths.update(done["paths"])
    verdict = None
    with export.visible_when_good(f"gguf-{kind}") as target:
        from aifactory_train.exporting.model_card import model_card

        name = re.sub(r"[^A-Za-z0-9._-]+", "-", run.path.resolve().name) or "model"
        file = target / f"{name}-{kind}.gguf"
        card = model_card(run, recipe, export.data, "gguf", kind)
        (target / "README.md").write_text(card, encoding="utf-8")
        content.write(file)
        content.check(file)
        if verify:
            trained = content.logits(content.read, export.rows) if whole else export.reference.expected()
            export.reference.core = None  # what it holds can go
            verdict = judge_file(content, file, trained, export.rows)
            write_json(target / "verification.json", asdict(verdict))
    gate = {**done["gate"], **({f"gguf-{kind}": asdict(verdict)} if verdict else {})}
    return {"paths": export.paths, "gate": gate}


def check_model(config: Any) -> None:
    """Refuse a model whose computation llama.cpp would not reproduce from the fields written here."""
    known = "Llama, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3"
    if config.model_type not in ARCHITECTURES:
        raise UserError(f"GGUF export knows {known}; this is '{config.model_type}'", where="model.base", fix=WAY_OUT)
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise UserError(f"GGUF export does not write models with {name}", where="config.json", fix=WAY_OUT)
    if config.hidden_act != "silu":
        raise UserError(f"llama.cpp computes silu, this model {config.hidden_act}", where="config.json", fix=WAY_OUT)
    rope_fields(config)


# ---- what is written


class GgufFile:
    """What a GGUF file of type ``kind`` holds of a model: ``source`` has its fp32 (or narrower) weights by
    transformers' names, ``folder`` its tokenizer and generation configuration."""

    def __init__(self, config: Any, source: ex.Source, folder: Path, kind: str):
        check_model(config)
        self.config, self.source, self.kind = config, source, kind
        self.arch = ARCHITECTURES[config.model_type]
        self.tokenizer = read_tokenizer(folder, int(config.vocab_size), end_ids(folder))
        self.names = self._names()
        self.plan = {to: (shape, self.type_of(to, shape)) for to, shape in self.names.values()}
        self.parameters = sum(math.prod(shape) for shape, _ in self.plan.values())

    def model(self) -> Any:
        """The plain transformers model as meta tensors."""
        model = skeleton(self.config, None, torch.float32)
        all_to_meta(model)
        return model

    def _names(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Parameter of transformers -> (llama.cpp's name, shape)."""
        from gguf import MODEL_ARCH, get_tensor_name_map

        known = get_tensor_name_map(MODEL_ARCH[self.arch.upper()], int(self.config.num_hidden_layers))
        out = {}
        for name, parameter in self.model().named_parameters():
            found = known.get_name(name, try_suffixes=(".weight", ".bias"))
            if found is None:
                raise UserError(f"llama.cpp's {self.arch} has no place for {name}", where="model.base", fix=WAY_OUT)
            out[name] = (found, tuple(parameter.shape))
        return out

    def read(self, name: str) -> torch.Tensor:
        """fp32 weight of the trained model."""
        return self.source[name].float()

    def type_of(self, name: str, shape: tuple[int, ...]) -> Any:
        """Number format of a tensor: vectors stay fp32, rows that do not fill blocks go to f16, as llama.cpp's
        converter has it.
        """
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if len(shape) < 2:
            return GGMLQuantizationType.F32
        kind = self.kind
        if kind[0] == "q" and kind != "q8_0" and name in ("token_embd.weight", "output.weight"):
            kind = "q8_0"
        wanted = GGMLQuantizationType[kind.upper()]
        return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.F16

    def encode(self, name: str) -> np.ndarray[Any, Any]:
        """The bytes of a weight, in llama.cpp's order and the tensor's number format."""
        from gguf import quants

        to, shape = self.names[name]
        weight = interleaved(to, self.read(name), self.config) if self.arch == "llama" else self.read(name)
        kind = self.type_of(to, shape)
        data = np.ascontiguousarray(weight.numpy(), dtype=np.float32)
        with np.errstate(over="ignore"):
            found = quants.quantize(data, kind)
        if kind.name == "F16" and not np.isfinite(found).all():
            raise RunFailed(f"{name} has values above 65504, which f16 cannot hold", where="--type", fix="--type bf16")
        return found

    def rounded(self, name: str) -> torch.Tensor:
        """fp32 weight after the rounding of its number format, in transformers' order."""
        from gguf import quants

        to, shape = self.names[name]
        kind = self.type_of(to, shape)
        data = quants.quantize(np.ascontiguousarray(self.read(name).numpy(), dtype=np.float32), kind)
        return torch.from_numpy(np.array(quants.dequantize(data, kind), dtype=np.float32)).reshape(shape)

    def write(self, file: Path) -> None:
        """Write ``file``, described as the model card (README.md) beside it says; tensors pass one at a time."""
        import gguf

        writer = gguf.GGUFWriter(None, self.arch)
        extra = extra_tensors(self.config)
        add_general(writer, file, self.parameters, self.kind)
        add_model(writer, self.arch, self.config, len(self.tokenizer.tokens))
        add_tokenizer(writer, self.tokenizer)
        for name, values in extra.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        for name, (shape, kind) in self.plan.items():
            stored = gguf.quant_shape_to_byte_shape(shape, kind) if kind.name not in ("F32", "F16") else shape
            dtype = {"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8)
            size = math.prod(stored) * np.dtype(dtype).itemsize
            writer.add_tensor_info(name, stored, np.dtype(dtype), size, raw_dtype=kind)
        try:
            writer.write_header_to_file(path=file)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            assert writer.fout is not None
            out = writer.fout[0]
            writer.write_padding(out, out.tell())
            for data in self._data(extra):
                # not writer.write_tensor_data: numpy's tofile hides why a write failed
                out.write(data.data.cast("B"))
                writer.write_padding(out, data.nbytes)
            out.flush()
            os.fsync(out.fileno())
        finally:
            writer.close()

    def _data(self, extra: dict[str, np.ndarray[Any, Any]]) -> Iterator[np.ndarray[Any, Any]]:
        yield from extra.values()
        for name in self.names:
            yield self.encode(name)

    # ---- what is read again

    def check(self, file: Path) -> None:
        """Every tensor with its shape and type, and the fields that the computation depends on, are as they were
        meant.
        """
        from gguf import GGMLQuantizationType, GGUFReader

        reader = GGUFReader(str(file))
        found = {t.name: (tuple(int(n) for n in reversed(t.shape)), t.tensor_type) for t in reader.tensors}
        plan = dict(self.plan)
        plan.update({n: (v.shape, GGMLQuantizationType.F32) for n, v in extra_tensors(self.config).items()})
        fields = {name: field.contents() for name, field in reader.fields.items()}
        meant = model_fields(self.arch, self.config, len(self.tokenizer.tokens))
        wrong = [n for n in plan if found.get(n) != plan[n]] + [n for n in found if n not in plan]
        wrong += [name for name, value in meant.items() if not _same(fields.get(name), value)]
        if fields.get("tokenizer.ggml.tokens") != self.tokenizer.tokens:
            wrong.append("tokenizer.ggml.tokens")
        if wrong:
            raise RunFailed(f"the written file does not hold what was meant: {wrong[0]}", where=file.name)

    def logits(self, read: Read, rows: list[list[int]]) -> list[torch.Tensor]:
        """Logits of the plain transformers model whose weights ``read`` gives, as
        :func:`aifactory_train.exporting.gate.plain_logits`.
        """
        model = self.model()
        Streamed(model, model, read, ex.MAX_SHARD_BYTES)
        return plain_logits(model, rows)


def judge_file(content: GgufFile, file: Path, trained: list[torch.Tensor], rows: list[list[int]]) -> GgufVerdict:
    """Compare the file, read by transformers in a fresh process, with the logits ``trained`` of the model that was
    trained.
    """
    check = {
        "name": "gguf",
        "base": str(file.parent.resolve()),
        "adapter": None,
        "dtype": "float32",
        "gguf": file.name,
        "settings": unread_settings(content.config),
    }
    return compare(content, file, trained, rows, reload_logits([check], rows)["gguf"])


def compare(
    content: GgufFile, file: Path, trained: list[torch.Tensor], rows: list[list[int]], found: list[torch.Tensor]
) -> GgufVerdict:
    """The verdict on ``found``, the logits of the file. Raises :class:`RunFailed` for another model or too coarse a
    type.
    """
    kind = content.kind
    own = relative(content.logits(content.rounded, rows), found)
    if not own <= FP32_LIMIT:
        raise RunFailed(
            f"the GGUF file, read by transformers, is another model: relative difference {own:.2e} to weights rounded "
            f"in the same "
            f"way, limit {FP32_LIMIT:.0e}",
            where=file.name,
        )
    facts = asdict(judge("gguf", "fp32" if kind == "f32" else "bf16", trained, found))
    if kind not in JUDGED:
        facts.update(limit="stated only: fewer than 8 bits", passed=math.isfinite(facts["difference"]))
    facts.update(kind=f"gguf-{kind}", dtype=kind)
    same = torch.cat(trained).argmax(1) == torch.cat(found).argmax(1)
    out = GgufVerdict(
        **facts,
        file=file.name,
        tensors=len(content.plan),
        file_difference=own,
        greedy_agreement=same.float().mean().item(),
    )
    if not out.passed:
        raise RunFailed(
            f"--type {kind} costs this model too much: top-1 agreement {out.top1_agreement:.4f}, mean KL "
            f"{out.mean_kl:.2e} nats "
            f"({out.limit})",
            where="--type",
            fix="--type f32, bf16 or f16",
        )
    return out


def _same(found: Any, meant: Any) -> bool:
    """Numbers of a file are fp32."""
    if isinstance(meant, float):
        return isinstance(found, (int, float)) and math.isclose(found, meant, rel_tol=1e-6)
    return bool(found == meant)


def interleaved(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Rows of Q and K in llama.cpp's order for ``llama``: it rotates neighbouring pairs of a head, transformers the
    first half against the second. ``[heads * d, ...]`` in and out."""
    if ".attn_q." in name:
        heads = int(config.num_attention_heads)
    elif ".attn_k." in name:
        heads = int(config.num_key_value_heads)
    else:
        return weight
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape).contiguous()


def end_ids(folder: Path) -> list[int]:
    """Token ids that end an answer, from ``generation_config.json``: the one that was trained first."""
    try:
        ends = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except FileNotFoundError:
        return []
    return [ends] if isinstance(ends, int) else list(ends or [])


# ---- fields
