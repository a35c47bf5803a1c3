"""Greedy tokens of a model served by vLLM, offline, in a process of its own.

This file is copied and run as a script by an interpreter that has vLLM (often another environment: vLLM pins its own
versions of torch and transformers). It imports nothing of this project.
"""

import json
import os
import sys


def main(job_file: str) -> None:
    """Do the job in ``job_file``.

    It is JSON: ``{"model": DIR, "adapter": DIR or null, "rank": n, "dtype": "float32" | "bfloat16" | "auto", "prompts":
    [[token ids]], "tokens": n, "out": FILE}``. ``out`` gets ``{"version", "device", "dtype", "answers": [{"tokens":
    [ids], "logprobs": [nats]}]}``.
    """
    with open(job_file, encoding="utf-8") as file:
        job = json.load(file)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, without a GPU
    import vllm
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform

    longest = max(len(p) for p in job["prompts"]) + job["tokens"]
    lora = {"enable_lora": True, "max_lora_rank": job["rank"]} if job["adapter"] else {}
    if current_platform.is_cpu():
        lora["gpu_memory_utilization"] = 0.2  # of host memory, there
    engine = vllm.LLM(
        model=job["model"],
        dtype=job["dtype"],
        max_model_len=longest,
        max_num_seqs=4,
        enforce_eager=True,
        seed=0,
        **lora,
    )
    found = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in job["prompts"]],
        vllm.SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, logprobs=1),
        lora_request=LoRARequest("adapter", 1, job["adapter"]) if job["adapter"] else None,
        use_tqdm=False,
    )
    answers = []
    for one in found:
        tokens = list(one.outputs[0].token_ids)
        places = one.outputs[0].logprobs
        answers.append({"tokens": tokens, "logprobs": [p[t].logprob for p, t in zip(places, tokens, strict=True)]})
    out = {
        "version": vllm.__version__,
        "device": current_platform.device_name or current_platform.device_type,
        "dtype": str(engine.llm_engine.model_config.dtype).removeprefix("torch."),
        "answers": answers,
    }
    with open(job["out"], "w", encoding="utf-8") as file:
        json.dump(out, file)


if __name__ == "__main__":
    main(sys.argv[1])
