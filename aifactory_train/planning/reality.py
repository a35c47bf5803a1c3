"""Prediction against measurement of one run: what ``train`` stores beside the plan, and one more row for the calibration."""

from __future__ import annotations

from typing import Any


def compare(plan: dict[str, Any], tokens_per_s_per_gpu: float | None, peak_gib: float | None) -> dict[str, Any]:
    """Measured over predicted, as plain values.

    ``tokens_per_s_per_gpu``: token positions per second and GPU after warm-up; ``peak_gib``: the largest reserved memory of a rank as
    torch reports it (``max_memory_reserved``), which leaves out the context that the plan counts as ``framework``.
    """
    speed, stored = plan["tokens_per_s_per_gpu"], plan["memory_gib"]
    expected = stored["total"] - stored.get("framework", 0.0)
    found: dict[str, Any] = {
        "tokens_per_s_per_gpu": {"predicted": speed["mid"], "measured": tokens_per_s_per_gpu},
        "peak_gib": {"predicted": round(expected, 3), "measured": peak_gib},
    }
    if tokens_per_s_per_gpu:
        found["tokens_per_s_per_gpu"]["ratio"] = round(tokens_per_s_per_gpu / speed["mid"], 4)
        found["tokens_per_s_per_gpu"]["inside_interval"] = speed["low"] <= tokens_per_s_per_gpu <= speed["high"]
    if peak_gib and expected:
        found["peak_gib"]["ratio"] = round(peak_gib / expected, 4)
    return found


def advice_when_out_of_memory(plan: dict[str, Any]) -> str:
    """Which setting to change by how much, when a planned run still ran out of memory."""
    micro, mode = plan["micro_batch"], plan["activation_checkpointing"]
    if micro > 1:
        return f"--set train.micro_batch_tokens={max(1, micro // 2) * plan['sequence_length']} (half of {plan['micro_batch_tokens']})"
    if mode != "full":
        return f"--set parallel.activation_checkpointing={'full' if mode == 'selective' else 'selective'}"
    shard = plan["mesh"]["shard"]
    if plan["engine"] in ("ddp", "hsdp") and shard < plan["gpus"]:
        return "--set parallel.engine=fsdp2 (one copy of the model over all GPUs)"
    return f"--nodes {2 * plan['nodes']}, a shorter data.sequence_length, or parallel.offload_optimizer=true"
