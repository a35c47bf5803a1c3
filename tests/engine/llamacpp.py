"""What real llama.cpp makes of a GGUF file: token ids of texts and greedy continuations of token ids.

python llamacpp.py JOB.json     JOB: {"file", "texts": [...], "prompts": [[ids], ...], "count": n, "banned": [ids]};
prints JSON. Tokens that are no whole characters must be banned: the server gives no probabilities of those.

Needs the package xllamacpp, whose wheels hold llama.cpp itself. Its server is asked on this machine's loopback only.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any


def main(job_file: str) -> None:
    import xllamacpp

    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    settings = xllamacpp.CommonParams()
    settings.model.path = job["file"]
    settings.n_ctx, settings.n_parallel, settings.port, settings.hostnames = 512, 1, 0, ["127.0.0.1"]
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.verbosity, settings.warmup, settings.cache_prompt = 0, False, False
    server = xllamacpp.Server(settings)

    def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{server.listening_address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    tokens = [
        ask("/tokenize", {"content": t, "add_special": True, "parse_special": True})["tokens"] for t in job["texts"]
    ]
    greedy, logprobs = [], []
    for prompt in job["prompts"]:
        found = ask(
            "/completion",
            {"prompt": prompt, "n_predict": job["count"], "temperature": 0, "n_probs": 5, "ignore_eos": True}
            | {"return_tokens": True, "cache_prompt": False, "logit_bias": [[t, False] for t in job["banned"]]},
        )
        greedy.append(found["tokens"])
        logprobs.append(
            [{t["id"]: t["logprob"] for t in place["top_logprobs"]} for place in found["completion_probabilities"]]
        )
    print(json.dumps({"tokens": tokens, "greedy": greedy, "logprobs": logprobs}))


if __name__ == "__main__":
    main(sys.argv[1])
