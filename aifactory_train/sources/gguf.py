"""Models in GGUF files, converted once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aifactory_train.core.errors import RunFailed
from aifactory_train.core.files import foreign


def convert_gguf(file: Path, target: Path) -> dict[str, Any]:
    """Write the model in a GGUF file as a transformers folder: fp32 safetensors, config, tokenizer, chat template.

    transformers reads GGUF but refuses to save the model it read, so the weights are copied into a fresh model of the
    same configuration. Returns ``{"architecture", "licence", "parameters", "quantisation"}`` read from the file. Raises
    :class:`UserError` for a file that is damaged or that transformers does not read.
    """
    with foreign(
        file, "the GGUF file cannot be converted", "copy or fetch it again, or use the model's safetensors form"
    ):
        return _convert(file, target)


def _convert(file: Path, target: Path) -> dict[str, Any]:
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    def text(reader: Any, key: str) -> str | None:
        field = reader.fields.get(key)
        return None if field is None else str(field.contents())

    reader = GGUFReader(str(file))
    template = text(reader, "tokenizer.chat_template")
    facts: dict[str, Any] = {
        "architecture": text(reader, "general.architecture"),
        "licence": text(reader, "general.license"),
        "quantisation": sorted({str(t.tensor_type.name) for t in reader.tensors}),
    }
    del reader
    hf_logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32, local_files_only=True
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    fresh = type(loaded)(config)
    missing, unexpected = fresh.load_state_dict(loaded.state_dict(), strict=False)
    fresh.tie_weights()
    lost = [name for name in missing if name != "lm_head.weight" or not config.tie_word_embeddings]
    if lost or unexpected:
        raise RunFailed(f"the GGUF conversion lost tensors: {lost[:3]} {unexpected[:3]}", where=str(file))
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
    if template and not tokenizer.chat_template:
        tokenizer.chat_template = template
    fresh.save_pretrained(target)
    tokenizer.save_pretrained(target)
    facts["parameters"] = sum(p.numel() for p in fresh.parameters())
    return facts
