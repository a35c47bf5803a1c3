"""The engine's own settings as the plan shows them: FSDP2's mesh and policy, or DeepSpeed's JSON. Torch-free.

They mirror what ``parallel/fsdp.py`` and ``parallel/deepspeed.py`` build from the recipe's keys; ``tests/planning``
compares the two.
"""

from __future__ import annotations

from typing import Any

from aifactory_train.planning.job import TrainingJob

_NAMES = {4: "fp32", 2: "bf16"}


def of(job: TrainingJob) -> dict[str, Any]:
    """Settings of the job's engine."""
    layout, b = job.layout, job.bytes
    if layout.traits.cuts == "rows":
        copies = layout.traits.shard_group == "chosen"
        mesh: list[int] = [layout.replicas, layout.shard] if copies else [layout.shard]
        return {
            "fsdp2": {
                "mesh": mesh,
                "mesh_dim_names": ["shard"] if len(mesh) == 1 else ["replicate", "shard"],
                "units": f"each of the {job.shape.layers} blocks, then the root",
                "reshard_after_forward": {"blocks": True, "root": False},
                "param_dtype": _NAMES[int(b.compute)],
                "reduce_dtype": _NAMES[int(b.reduce)],
                "offload": "CPUOffloadPolicy" if layout.offload_optimizer else None,
            }
        }
    if layout.deepspeed:
        return {"deepspeed": deepspeed_json(job)}
    return {}


def deepspeed_json(job: TrainingJob) -> dict[str, Any]:
    """DeepSpeed's configuration for this job, as ``parallel/deepspeed.py`` generates it."""
    layout, bucket = job.layout, int(job.zero_bucket)
    stage = layout.traits.zero_stage
    assert stage is not None, f"{layout.engine} is no stage of ZeRO"
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if stage == 3:
        zero.pop("allgather_bucket_size")
        zero["stage3_param_persistence_threshold"] = 10 * job.shape.hidden
        zero["stage3_prefetch_bucket_size"] = bucket
    if layout.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_batch_size": layout.world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "gradient_allreduce_op": "sum" if stage < 3 else "mean",
        "communication_data_type": _NAMES[int(job.bytes.reduce)],
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": job.bytes.compute == 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "zero_optimization": zero,
    }
