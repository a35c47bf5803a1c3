"""Logits of exported models, computed by plain transformers and peft.

This file is run as a script of its own (``python - JOB`` with its text on standard input) in a fresh process: it
imports nothing of this project, so what it computes is what anybody else would get from the exported folders.
"""

import gc
import inspect
import json
import sys
from typing import Any


def main(job_file: str) -> None:
    """Do the job in ``job_file``.

    It is JSON: ``{"checks": [{"name", "base", "adapter" or null, "dtype"}], "rows": [[token ids], ...], "positions": n,
    "threads": n, "out": FILE}``. A check with ``gguf`` (a file name in ``base``) reads that file instead of
    safetensors, with ``settings`` for what transformers leaves out of its configuration; one with ``plain_generation``
    leaves the base's generation settings out, which transformers would not load; one with ``head`` is of a classifier,
    whose configuration lies in that folder, and whose outputs are ``[1, outputs]``; one with ``pooling`` is of an
    embedding model, whose vectors are ``[1, D]``. For each check the logits of the
    last ``positions`` places of every row go to ``out`` (safetensors, fp32 ``[places, V]``, keys ``NAME.ROW``), each
    row alone in its batch, without padding.
    """
    import torch
    from safetensors.torch import save_file

    with open(job_file, encoding="utf-8") as file:
        job = json.load(file)
    torch.set_num_threads(job["threads"])
    found: dict[str, Any] = {}
    for check in job["checks"]:
        model = _loaded(check, getattr(torch, check["dtype"]))
        plain = model if check["adapter"] is None else model.get_base_model()
        keeps = "logits_to_keep" in inspect.signature(plain.forward).parameters  # older families give all
        with torch.no_grad():
            for i, row in enumerate(job["rows"]):
                ids = torch.tensor([row])
                if check.get("pooling"):
                    inner = model if check["adapter"] is None else plain.base_model
                    hidden = inner(ids).last_hidden_state[0].float()
                    vector = hidden[-1:] if check["pooling"] == "last_token" else hidden.mean(dim=0, keepdim=True)
                    found[f"{check['name']}.{i}"] = vector.contiguous()
                    continue
                if check.get("head"):
                    found[f"{check['name']}.{i}"] = model(ids).logits.float().contiguous()
                    continue
                last = min(job["positions"], len(row))
                logits = model(ids, **({"logits_to_keep": last} if keeps else {})).logits
                found[f"{check['name']}.{i}"] = logits[0, -last:].float().contiguous()
        del model
        gc.collect()
    save_file(found, job["out"])


def _loaded(check: dict[str, Any], dtype: Any) -> Any:
    """The model of a check, as plain transformers and peft read it."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

    how: dict[str, Any] = {"use_safetensors": True}
    if check.get("plain_generation"):
        how["generation_config"] = GenerationConfig()
    if check.get("gguf"):
        how = {"gguf_file": check["gguf"]}
        config = AutoConfig.from_pretrained(check["base"], local_files_only=True, **how)
        for key, value in check["settings"].items():
            setattr(config, key, value)
        how["config"] = config
    kind: Any = AutoModelForCausalLM
    if check.get("pooling") and check["adapter"] is None:
        kind = transformers.AutoModel
    if check.get("head"):
        kind = AutoModelForSequenceClassification
        how["config"] = AutoConfig.from_pretrained(check["head"], local_files_only=True)
    how |= {"dtype": dtype, "attn_implementation": check.get("attention"), "local_files_only": True}
    model: Any = kind.from_pretrained(check["base"], **how)
    if check["adapter"] is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, check["adapter"])
    return model.eval()


if __name__ == "__main__":
    main(sys.argv[1])
