"""The step audit against what the interpreter sees: the table of reads and writes, and the launches of a whole step."""

from collections import Counter

import pytest
import test_models as models
import torch

from aifactory_train.audit import pretend
from aifactory_train.audit.recorder import HostAnswers, StepRecorder
from aifactory_train.kernels import registry, runtime
from aifactory_train.kernels.workbench import interpreter, traffic
from aifactory_train.model.gpu_operators import apply_kernels

ROWS, HIDDEN = 32, 256


def booked(recorder):
    found = Counter()
    for (_, name), row in recorder.rows.items():
        found[name] += row.launches
    return found


@pytest.mark.parametrize("op", registry.OPERATORS)
def test_the_table_says_what_each_kernel_reads_and_writes(op):
    """Distinct addresses, counted by the interpreter in a dry run, equal the table's words, argument by argument."""
    interpreter.quick()
    with runtime.interpret("sm_90", "H100-80"), interpreter.counting(dry=registry.operator(op).dry) as launches:
        recorder = StepRecorder(HostAnswers(ROWS))
        with recorder:
            forward, backward = traffic.programs(op, traffic.shape_of(op, ROWS, HIDDEN), torch.bfloat16)
            made = forward()
            if backward:
                backward(made)
    seen = Counter()
    for launch in launches:
        seen[launch.kernel, "read"] += launch.loaded
        seen[launch.kernel, "written"] += launch.stored
    told = Counter()
    kernels = {launch.kernel for launch in launches}
    for (_, name), row in recorder.rows.items():
        if name in kernels:
            told[name, "read"] += row.read
            told[name, "written"] += row.written
    assert kernels and told == seen


def test_a_step_on_meta_launches_what_the_same_step_launches_on_a_cpu():
    """Forward and backward of an adapted model: the same Triton kernels as often, and the same matrix products."""
    real, meta = models.adapted_everywhere(), models.adapted_everywhere().to("meta")
    for model in (real, meta):
        apply_kernels(model, arch="sm_90", sku="H100-80", dtype="fp32")
    ids = torch.randint(3, 160, (2, 7))
    with (
        runtime.interpret("sm_90", "H100-80"),
        interpreter.counting() as launches,
        StepRecorder(HostAnswers(12)) as on_cpu,
    ):
        real(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    with pretend.chip("sm_90", "H100-80"), StepRecorder(HostAnswers(12)) as on_meta:
        meta(input_ids=ids.to("meta"), labels=ids.to("meta"), use_cache=False).loss.backward()
    ran = Counter(launch.kernel for launch in launches)
    assert ran["lora_epilogue"] == 2 * 7 + 2 * 4 - 1  # one a layer; backward one for each input, none before the first
    counted = booked(on_meta)
    assert {name: counted[name] for name in ran} == ran
    for name in ("aten::mm", "aten::mm.out", "aten::addmm", "aten::addmm_", "aten::addmm.out"):
        assert counted[name] == booked(on_cpu)[name], name
